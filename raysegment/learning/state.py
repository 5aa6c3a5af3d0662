"""Everything a learner is, as named tensors and a few numbers, so that a resumed run is the same run, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from raysegment.climate.checks import BadInput
from raysegment.learning.flat import Flat
from raysegment.learning.step import Learner


@dataclass(frozen=True)
class TrainState:
    """`weights`: the network as `segment` uses it, by `state_dict` name (the moving average where there is one).

    `tensors`: what training needs besides, as "kind.parameter" (exp_avg, exp_avg_sq, momentum_buffer, lagged, and value
    where `weights` holds the average). `facts`: step, cursor and counts, readable as JSON.
    """

    weights: dict[str, Tensor]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def capture(learner: Learner) -> TrainState:
    """A learner's state between two steps, copied to the CPU; it must be settled."""
    state = views(learner)
    weights, tensors = ({name: _plain(t) for name, t in kind.items()} for kind in (state.weights, state.tensors))
    return TrainState(weights, tensors, state.facts)


def views(learner: Learner) -> TrainState:
    """The same without copies: views of the learner's own tensors, which the next step changes."""
    assert learner.settled, "a step is under way: settle first"
    flat, optimizer = learner.flat, learner.optimizer
    kinds = sorted({name for state in optimizer.states for name in state} - {"step"})
    vectors = {kind: [state[kind] for state in optimizer.states] for kind in kinds}
    if learner.lagged is not None:
        vectors["lagged"] = [learner.lagged]
    weights = dict(learner.network.state_dict())
    if optimizer.ema is not None:
        vectors["value"] = [flat.values]
        weights |= _named(flat, [optimizer.ema])
    tensors = {f"{kind}.{name}": view for kind, parts in vectors.items() for name, view in _named(flat, parts).items()}
    facts = {
        "step": learner.step,
        "cursor": learner.step * learner.config.global_batch,
        "updates": optimizer.count,
        "loss_scale": learner.scale.value,
        "good_steps": learner.scale.good,
        "loss_scale_before": learner.scale.before,
    }
    return TrainState(weights, tensors, facts)


def _named(flat: Flat, parts: list[Tensor]) -> dict[str, Tensor]:
    """The tensors that lie in a vector (P,) given in consecutive parts, none of which cuts through a tensor, by name."""
    found, rest, start = {}, list(parts), 0
    for name, p in zip(flat.names, flat.parameters, strict=True):
        while start == rest[0].numel():
            rest, start = rest[1:], 0
        found[name] = rest[0].detach().as_strided(p.shape, p.stride(), rest[0].storage_offset() + start)
        start += p.numel()
    return found


def restore(learner: Learner, state: TrainState) -> None:
    """Make a freshly built learner of the same configuration continue from a state."""
    flat, kinds = learner.flat, _kinds(state)
    expected = {*learner.optimizer.vectors()} - {"ema"}
    found = {*kinds} - {"lagged", "value"}
    if found != expected or (learner.optimizer.ema is not None) != ("value" in kinds):
        got = ", ".join(sorted(kinds)) or "none"
        wanted = ", ".join(sorted(expected)) + (", value" if learner.optimizer.ema is not None else "")
        raise BadInput("training state", f"the tensors {wanted}", got, "Resume with the optimizer and average it was saved with.")
    _load_network(learner, state.weights)
    vectors = {kind: _vector(learner, tensors) for kind, tensors in kinds.items()}
    learner.lagged = vectors.pop("lagged", None)
    if "value" in vectors:
        own = vectors.pop("value")
        vectors["ema"] = flat.values.clone()  # `weights` held the average
        flat.values.copy_(own)
    learner.optimizer.load(vectors, int(state.facts["updates"]))
    learner.step = learner.committed = int(state.facts["step"])
    _set_scale(learner, state.facts)


def live(learner: Learner) -> dict[str, Tensor]:
    """The learner's own tensors as they lie, no copies, in an order that follows from `facts` and the configuration.

    For a member that joins or fell behind: after `adopt` it copies another member's into its own, one by one.
    """
    found = {"values": learner.flat.values}
    for number, state in enumerate(learner.optimizer.states):
        found |= {f"{name}.{number}": state[name] for name in sorted(state) if name != "step"}
    counts = {f"tracked.{i}": norm.num_batches_tracked for i, norm in enumerate(learner.statistics.norms)}
    optional = {"ema": learner.optimizer.ema, "lagged": learner.lagged, "previous": learner.previous}
    found |= {"statistics": learner.statistics.values}
    return found | {name: tensor for name, tensor in (*counts.items(), *optional.items()) if tensor is not None}


def facts(learner: Learner) -> dict[str, Any]:
    """What `adopt` must know, readable as JSON. The learner has no exchange under way: it is settled, or interrupted."""
    assert not learner.under_way, "a step is under way: settle or interrupt first"
    return {
        "step": learner.step,
        "committed": learner.committed,
        "updates": learner.optimizer.count,
        "loss_scale": learner.scale.value,
        "good_steps": learner.scale.good,
        "loss_scale_before": learner.scale.before,
        "redoing": learner.redoing,
        "lagged": learner.lagged is not None,
        "previous": learner.previous is not None,
    }


def adopt(learner: Learner, facts: dict[str, Any]) -> None:
    """Stand where another member of the same configuration stands, but for the values in `live`, which are to be copied."""
    learner.interrupt()  # whatever was under way
    like = learner.flat.values
    learner.lagged = torch.zeros_like(like) if facts["lagged"] else None
    learner.previous = torch.zeros_like(like) if facts["previous"] else None
    learner.redoing = bool(facts["redoing"])
    learner.step, learner.committed = int(facts["step"]), int(facts["committed"])
    learner.optimizer.load({}, int(facts["updates"]))
    _set_scale(learner, facts)


def _set_scale(learner: Learner, facts: dict[str, Any]) -> None:
    scale = learner.scale
    scale.value, scale.good = float(facts["loss_scale"]), int(facts["good_steps"])
    scale.before = float(facts.get("loss_scale_before", scale.value))  # files of earlier versions lack it


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _kinds(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Tensors by kind and parameter."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.tensors.items():
        kind, _, parameter = name.partition(".")
        kinds.setdefault(kind, {})[parameter] = tensor
    return kinds


def _vector(learner: Learner, tensors: dict[str, Tensor]) -> Tensor:
    """A vector (P,) of named tensors."""
    missing = [name for name in learner.flat.names if name not in tensors]
    if missing:
        raise BadInput("training state", f"a tensor for {missing[0]}", "none", "Resume with the network it was saved with.")
    vector = torch.empty_like(learner.flat.values)
    learner.flat.fill(vector, tensors)
    return vector


@torch.no_grad()
def _load_network(learner: Learner, weights: dict[str, Tensor]) -> None:
    """Copy weights and buffers in place (the network's tensors are views)."""
    own = learner.network.state_dict()
    if {*own} != {*weights}:
        odd = sorted({*own} ^ {*weights})
        raise BadInput("weights", "this network's tensors", f"a difference in {odd[:3]}", "Use the network they were saved with.")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise BadInput(name, f"shape {tuple(tensor.shape)}", tuple(weights[name].shape), "Use the network it was saved with.")
        tensor.copy_(weights[name])
