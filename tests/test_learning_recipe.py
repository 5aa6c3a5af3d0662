"""The recipe: optimizers, LARC, clipping and average against loops over tensors, and no option without a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from raysegment.archive.manifest import Manifest
from raysegment.elastic.worker import make_learner
from raysegment.learning.augment import AugmentConfig
from raysegment.learning.exchange import MODES
from raysegment.learning.flat import Flat
from raysegment.learning.losses import RULES, LossConfig, class_weights
from raysegment.learning.optim import LARC_MODES, OPTIMIZERS, SCHEDULES, OptimConfig, Optimizer, learning_rate
from raysegment.learning.step import PRECISIONS, LearnConfig
from raysegment.networks import NETWORKS, NetworkConfig
from raysegment.networks.blocks import NORMS, POLES
from tests import small_training, test_learning_augment, test_learning_parts, test_learning_step, test_networks_shapes

STEPS = 6


# the update, tensor by tensor in float64, from the papers' formulas


@dataclass
class ByHand:
    """One tensor that learns alone; `layer` is False for a bias or norm."""

    w: torch.Tensor
    layer: bool
    m: torch.Tensor | float = 0.0
    v: torch.Tensor | float = 0.0
    t: int = 0
    bounded: bool | None = None  # whether LARC made the last step shorter

    def update(self, g: torch.Tensor, lr: float, c: OptimConfig) -> None:
        """w ← w − rate·u."""
        self.t += 1
        decay = c.weight_decay if self.layer else 0.0
        if c.optimizer == "sgd":
            self.w = self.w - lr * self._momentum(g, decay, lr, c)
            return
        u = self._adam(g, c) + decay * self.w
        if c.optimizer == "lamb" and self.layer and self.w.norm() > 0 and u.norm() > 0:
            u = self.w.norm() / u.norm() * u
        self.w = self.w - lr * self._larc(u, u.norm(), lr, c) * u

    def _momentum(self, g: torch.Tensor, decay: float, lr: float, c: OptimConfig) -> torch.Tensor:
        """LARC is in front of the momentum, and its λ contains the decay."""
        g = self._larc(g, g.norm() + decay * self.w.norm(), lr, c) * (g + decay * self.w)
        self.m = c.momentum * self.m + g
        return g + c.momentum * self.m if c.nesterov else self.m

    def _adam(self, g: torch.Tensor, c: OptimConfig) -> torch.Tensor:
        first, second = c.betas
        self.m = first * self.m + (1 - first) * g
        self.v = second * self.v + (1 - second) * g * g
        return self.m / (1 - first**self.t) / ((self.v / (1 - second**self.t)).sqrt() + c.eps)

    def _larc(self, direction: torch.Tensor, slope: torch.Tensor, lr: float, c: OptimConfig) -> float:
        """What LARC multiplies the rate by: min(λ, lr)/lr or λ, λ = η‖w‖/(slope + ε); 1 where w or the direction is zero."""
        if not (c.larc and self.layer and self.w.norm() > 0 and direction.norm() > 0):
            return 1.0
        local = float(c.trust * self.w.norm() / (slope + c.larc_eps))
        self.bounded = local < lr
        return min(local, lr) / lr if c.larc_mode == "clip" else local


def start() -> Flat:
    """A convolution, a norm, a convolution of much larger weights and one that begins as zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net[2].weight *= 30
        net[3].weight.zero_()
    return Flat(net)


def gradients(flat: Flat) -> Iterator[torch.Tensor]:
    """Mean gradients (P,) of the steps; that of the second convolution is zero in the first step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        gradient = torch.randn(flat.values.numel(), generator=generator) * 10.0 ** (step - 2)
        if step == 0:
            flat.views(gradient)[1].zero_()
        yield gradient


BASE = OptimConfig(lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), warmup_steps=2, total_steps=9, trust=0.03)


@pytest.mark.parametrize("larc", ["", "clip", "scale"])
@pytest.mark.parametrize(
    "changed",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "nesterov": True, "weight_decay": 0.0},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "weight_decay": 0.0},
        {"optimizer": "lamb"},
        {"optimizer": "lamb", "weight_decay": 0.0, "schedule": "polynomial"},
        {"optimizer": "lamb", "eps": 1e-3, "larc_eps": 3.0},
    ],
    ids=str,
)
def test_update_equals_a_loop_over_tensors(changed, larc):
    config = replace(BASE, **changed, larc=bool(larc), larc_mode=larc or "clip")
    flat = start()
    optimizer = Optimizer(flat, config)
    hands = [ByHand(p.detach().double().clone(), p.ndim > 1) for p in flat.parameters]
    bounded = set()
    for step, gradient in enumerate(gradients(flat)):
        for hand, g in zip(hands, flat.views(gradient.double()), strict=True):
            hand.update(g.clone(), learning_rate(step, config), config)
            bounded.add(hand.bounded)
        optimizer.apply(gradient, step)
        for p, hand in zip(flat.parameters, hands, strict=True):
            torch.testing.assert_close(p.detach().double(), hand.w, rtol=2e-5, atol=2e-6)
    assert bounded - {None} == ({True, False} if larc else set())  # both sides of LARC's minimum were met


def test_lamb_moves_every_layer_by_the_same_share_whatever_the_gradient():
    for scale in (1e-4, 1e4):
        flat = start()
        before = flat.values.clone()
        config = replace(BASE, optimizer="lamb", schedule="constant", warmup_steps=0)
        Optimizer(flat, config).apply(scale * torch.randn(flat.values.numel()), 0)
        for old, new in list(zip(flat.views(before), flat.views(flat.values), strict=True))[:2]:
            assert float((new - old).norm() / old.norm()) == pytest.approx(config.lr, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_moves_where_the_rate_is_zero(optimizer):
    """The last step of a schedule that ends at zero, with and without LARC."""
    for larc in (False, True):
        flat = start()
        before = flat.values.clone()
        Optimizer(flat, replace(BASE, optimizer=optimizer, larc=larc)).apply(torch.ones_like(before), BASE.total_steps)
        assert torch.equal(flat.values, before)


def test_clipping_bounds_the_norm_of_the_mean_gradient_before_all_else():
    config = replace(BASE, optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0, clip_norm=2.0)
    for length, expected in ((7.0, 2.0), (1.5, 1.5)):
        flat = start()
        before, gradient = flat.values.clone(), torch.randn(flat.values.numel())
        gradient *= length / gradient.norm()
        Optimizer(flat, config).apply(gradient.clone(), 0)
        torch.testing.assert_close(before - flat.values, config.lr * gradient * expected / length, rtol=1e-4, atol=1e-6)


def test_average_follows_its_formula():
    flat = start()
    optimizer, average = Optimizer(flat, replace(BASE, ema=0.7)), flat.values.double().clone()
    assert optimizer.ema is not None
    for step, gradient in enumerate(gradients(flat)):
        optimizer.apply(gradient, step)
        average = 0.7 * average + 0.3 * flat.values.double()
        torch.testing.assert_close(optimizer.ema.double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_class_weights_come_from_the_manifest(tmp_path, rule):
    shards = small_training.write_shards(tmp_path / "shards")
    manifest = Manifest.load(shards)
    assert len({*manifest.class_counts}) == 3
    config = small_training.config(shards, tmp_path / "run")
    config = replace(config, learn=replace(config.learn, loss=LossConfig(weights=rule)))
    expected = torch.tensor(class_weights(manifest.class_counts, rule), dtype=torch.float32)
    assert torch.equal(make_learner(config, manifest, "cpu").weights, expected)


# no option without a test

# How a step is computed and not what comes out: each has a test that the result is the same, and none that it differs.
EXECUTION = {
    "LearnConfig.compile": "the same loss and gradient from compiled code",
    "LearnConfig.checkpointing": "activations are computed again instead of kept",
    "LearnConfig.overlap": "the exchange runs beside backward, and ends with the same bits",
    "LearnConfig.wire": "gradients are rounded on their way; with exchange fast alone, so `test_learning_exchange` tests it",
}


def cases(test: Callable) -> list[Any]:
    """The parameter sets of a test."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    return list(mark.args[1])


def chosen(config: Any) -> dict[str, Any]:
    """Values by "Class.field", also those of the configurations within."""
    found: dict[str, Any] = {}
    for one in fields(config):
        value = getattr(config, one.name)
        found[f"{type(config).__name__}.{one.name}"] = value
        if is_dataclass(value):
            found |= chosen(value)
    return found


def changes(kind: type, base: Any, changed: dict[str, Any]) -> set[tuple[str, Any]]:
    """What a case of one changed field says of that field: its value there."""
    assert len(changed) == 1, f"one field per case, or one may hide that the other is ignored: {changed}"
    ((name, value),) = changed.items()
    assert getattr(base, name) != value, f"{kind.__name__}: {changed} changes nothing"
    return {(f"{kind.__name__}.{name}", value)}


def exercised() -> set[tuple[str, Any]]:
    """(option, value) of all that some `test_every_option_matters` has compared with another value of the option."""
    found: set[tuple[str, Any]] = set()
    for base, changed in cases(test_learning_parts.test_every_option_matters):
        found |= changes(OptimConfig, base, changed)
    for changed in cases(test_learning_parts.test_every_loss_option_matters):
        found |= changes(LossConfig, LossConfig(), changed)
    for changed in cases(test_learning_step.test_every_option_matters):
        found |= changes(LearnConfig, test_learning_step.CONFIG, changed)
    for name in cases(test_learning_augment.test_every_option_matters_and_leaves_the_input_alone):
        found.add((f"AugmentConfig.{name}", True))
    plain = chosen(test_networks_shapes.SMALL)
    for config in cases(test_networks_shapes.test_every_option_matters):
        found |= {(name, value) for name, value in chosen(config).items() if value != plain[name]}
    return found


def test_no_option_is_without_a_test():
    """A field that is added to a configuration, but to no list of `test_every_option_matters`, fails here."""
    options = {f"AugmentConfig.{one.name}" for one in fields(AugmentConfig)}
    options |= {*chosen(LearnConfig()), *chosen(NetworkConfig())}
    tested = {name for name, _ in exercised()}
    assert options - tested - {*EXECUTION} == set()
    assert tested <= options, "a test of an option that is gone"
    assert not tested & {*EXECUTION}


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("OptimConfig.optimizer", OPTIMIZERS),
        ("OptimConfig.schedule", SCHEDULES),
        ("OptimConfig.larc_mode", LARC_MODES),
        ("LossConfig.weights", tuple(RULES)),
        ("LearnConfig.precision", tuple(PRECISIONS)),
        ("LearnConfig.exchange", MODES),
        ("NetworkConfig.name", NETWORKS),
        ("NetworkConfig.norm", NORMS),
        ("NetworkConfig.pole", POLES),
    ],
)
def test_no_choice_is_without_a_test(option, choices):
    bases = chosen(test_learning_step.CONFIG) | chosen(test_networks_shapes.SMALL)
    assert {*choices} == {bases[option]} | {value for name, value in exercised() if name == option}
