"""From a mean gradient to new weights: schedule, LARC, optimizer, moving average.

The schedule is a pure function of the step. LARC (You, Gitman and Ginsburg 2017; local rate λ = η‖w‖/‖g‖) is taken on the
mean gradient of the whole batch. Two traps of the 2018 code are avoided: a factor 1/N in λ (its learning rates had to
grow like N³), and a factor on the gradient in front of Adam, which divides it out again. So around Adam and LAMB the same
rule bounds the update u itself, λ = η‖w‖/‖u‖.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from raysegment.learning.flat import Flat
from raysegment.networks.blocks import choose

OPTIMIZERS = ("adamw", "adam", "sgd", "lamb")
SCHEDULES = ("cosine", "polynomial", "constant")
LARC_MODES = ("clip", "scale")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, LARC and schedule.

    `weight_decay` is decoupled in adamw and lamb, part of the gradient in adam and sgd; biases and norms are spared, also by
    the factors of lamb and LARC. `larc_mode`: "clip" makes a layer's rate min(λ, lr), "scale" makes it λ·lr (LARS); around
    lamb, whose updates are all as long as the weights, λ is `trust` itself. `clip_norm` bounds the norm of the mean
    gradient, `ema` is the decay of the moving average of weights; 0 switches either off. `final_lr` is the share of
    `lr` left at `total_steps`.
    """

    optimizer: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    larc: bool = False
    larc_mode: str = "clip"
    trust: float = 2e-3
    larc_eps: float = 1e-8
    schedule: str = "cosine"
    warmup_steps: int = 0
    total_steps: int = 1000
    power: float = 0.9
    final_lr: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        choose("optim.optimizer", self.optimizer, OPTIMIZERS)
        choose("optim.schedule", self.schedule, SCHEDULES)
        choose("optim.larc_mode", self.larc_mode, LARC_MODES)
        for name in ("lr", "trust", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optim.{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("weight_decay", "larc_eps", "warmup_steps", "clip_norm", "power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optim.{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas: expected two shares in [0, 1), got {self.betas}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"optim.final_lr: expected a share in [0, 1], got {self.final_lr}")
        if self.total_steps < 1:
            raise ValueError(f"optim.total_steps: expected at least 1, got {self.total_steps}")
        if self.nesterov and not self.momentum:
            raise ValueError("optim.nesterov: expected a momentum above 0 with it, got 0")


def learning_rate(step: int, config: OptimConfig) -> float:
    """The rate of a step (0, 1, …): linear warm-up that ends at lr with the last warm-up step, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = config.total_steps - config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / left) if left > 0 else 1.0
    share = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "polynomial": (1 - done) ** config.power}
    if config.schedule == "constant":
        return config.lr
    return config.lr * (config.final_lr + (1 - config.final_lr) * share[config.schedule])


class Optimizer:
    """Applies mean gradients to a network's flat parameters; its state is a few vectors (P,) and a count."""

    def __init__(self, flat: Flat, config: OptimConfig):
        self.flat, self.config = flat, config
        split = flat.split
        self.parts = [part for part in (flat.values[:split], flat.values[split:]) if part.numel()]
        self._grads = [part for part in (flat.grads[:split], flat.grads[split:]) if part.numel()]
        folded = config.larc and config.optimizer == "sgd"  # LARC's λ contains the decay then
        self._decays = [0.0 if folded else config.weight_decay, 0.0][: len(self.parts)]
        self.states = [_fresh_state(part, config) for part in self.parts]  # by name, for each part
        self.ema = flat.values.clone() if config.ema else None

    @torch.no_grad()
    def apply(self, gradient: Tensor, step: int) -> float:
        """One update by the mean gradient (P,), which is used up; returns the learning rate."""
        config, flat, lr = self.config, self.flat, learning_rate(step, self.config)
        if config.clip_norm:
            clip_(gradient, config.clip_norm)
        if gradient is not flat.grads:
            flat.grads.copy_(gradient)
        if config.larc and config.optimizer == "sgd":
            larc_gradient_(_layers(flat, flat.values), _layers(flat, flat.grads), lr, config)
            self._step(lr)
        elif config.larc or config.optimizer == "lamb":
            self._step_in_proportion(lr)
        else:
            self._step(lr)
        if self.ema is not None:
            self.ema.lerp_(flat.values, 1 - config.ema)
        return lr

    def _step_in_proportion(self, lr: float) -> None:
        """A step of Adam whose length in each layer is then set by LAMB, by LARC, or by LARC after LAMB."""
        config, flat = self.config, self.flat
        before = flat.values.clone()
        if config.optimizer == "lamb":
            self._step(1.0)
            lamb_update_(flat, before, lr)
        else:
            self._step(lr)
        if config.larc:
            larc_update_(_layers(flat, flat.values), _layers(flat, before), lr, config)

    def _step(self, lr: float) -> None:
        """One of torch's own updates, by its functional form: an object of torch.optim imports the compiler when it is made,
        a second of every worker's start."""
        update = _sgd if self.config.optimizer == "sgd" else _adam
        for part, grad, state, decay in zip(self.parts, self._grads, self.states, self._decays, strict=True):
            update(part, grad, state, decay, lr, self.config)

    def vectors(self) -> dict[str, Tensor]:
        """The optimizer's state: its own vectors by name, whole (P,), and `step` where it counts."""
        names = sorted({name for state in self.states for name in state} - {"step"})
        found = {name: torch.cat([state[name] for state in self.states]) for name in names}
        if self.ema is not None:
            found["ema"] = self.ema
        return found

    @property
    def count(self) -> int:
        """Updates made, as far as the optimizer counts them (Adam's bias correction)."""
        return int(self.states[0].get("step", torch.zeros(())))

    def load(self, vectors: dict[str, Tensor], count: int) -> None:
        """Take over a state that `vectors` and `count` gave."""
        for name, vector in vectors.items():
            if name == "ema":
                assert self.ema is not None
                self.ema.copy_(vector)
                continue
            for state, piece in zip(self.states, vector.split([p.numel() for p in self.parts]), strict=True):
                state[name].copy_(piece)
        for state in self.states:
            if "step" in state:
                state["step"].fill_(count)


def _fresh_state(part: Tensor, config: OptimConfig) -> dict[str, Tensor]:
    """The optimizer's vectors before the first step."""
    if config.optimizer == "sgd":
        return {"momentum_buffer": torch.zeros_like(part)} if config.momentum else {}
    count = torch.zeros((), dtype=torch.float32, device=part.device)
    return {"step": count, "exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}


def _sgd(part: Tensor, grad: Tensor, state: dict[str, Tensor], decay: float, lr: float, config: OptimConfig) -> None:
    sgd(
        [part], [grad], [state.get("momentum_buffer")], fused=True, weight_decay=decay, momentum=config.momentum, lr=lr,
        dampening=0.0, nesterov=config.nesterov, maximize=False,
    )  # fmt: skip


def _adam(part: Tensor, grad: Tensor, state: dict[str, Tensor], decay: float, lr: float, config: OptimConfig) -> None:
    """Adam; with the decay decoupled (AdamW) unless the configuration asks for `adam`."""
    adam(
        [part], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
        decoupled_weight_decay=config.optimizer != "adam", amsgrad=False, beta1=config.betas[0], beta2=config.betas[1], lr=lr,
        weight_decay=decay, eps=config.eps, maximize=False,
    )  # fmt: skip


def clip_(gradient: Tensor, most: float) -> None:
    """Scale a vector down to the norm `most` where it is longer."""
    gradient *= torch.clamp(most / torch.linalg.vector_norm(gradient).clamp_min(1e-30), max=1.0)


def larc_gradient_(weights: list[Tensor], grads: list[Tensor], lr: float, config: OptimConfig) -> None:
    """g ← (g + d·w) · f per layer, f from λ = η‖w‖ / (‖g‖ + d‖w‖ + ε): min(λ/lr, 1) in mode clip, λ in mode scale.

    d is the weight decay. A layer whose weight or gradient is zero keeps f = 1.
    """
    sizes, slopes = _norms(weights), _norms(grads)
    local = config.trust * sizes / (slopes + config.weight_decay * sizes + config.larc_eps)
    if config.weight_decay:
        for grad, weight in zip(grads, weights, strict=True):
            grad.add_(weight, alpha=config.weight_decay)
    factor = (local / lr).clamp_max(1.0) if config.larc_mode == "clip" else local
    factor = torch.where((sizes > 0) & (slopes > 0), factor, 1.0)
    for grad, f in zip(grads, factor, strict=True):
        grad *= f


def lamb_update_(flat: Flat, before: Tensor, lr: float) -> None:
    """w ← w₀ − lr·(‖w₀‖/‖u‖)·u per layer (You et al. 2020, algorithm 2, φ the identity) where AdamW has made w = w₀ − u.

    u is Adam's bias-corrected direction plus d·w₀, d the weight decay. AdamW ran at rate 1, because w₀ − w has most digits
    of u then. A layer whose w₀ or u is zero moves by −lr·u, as biases and norms do.
    """
    steps = flat.values - before  # −u (P,)
    sizes, slopes = _norms(_layers(flat, before)), _norms(_layers(flat, steps))
    ratio = torch.where((sizes > 0) & (slopes > 0), sizes / slopes, 1.0)
    for step, r in zip(_layers(flat, steps), ratio, strict=True):
        step *= r
    torch.add(before, steps, alpha=lr, out=flat.values)


def larc_update_(weights: list[Tensor], before: list[Tensor], lr: float, config: OptimConfig) -> None:
    """w ← w₀ + f·(w − w₀) per layer with the update u = (w − w₀)/lr and λ = η‖w₀‖ / (‖u‖ + ε); f as in `larc_gradient_`."""
    steps = [weight - start for weight, start in zip(weights, before, strict=True)]
    sizes, slopes = _norms(before), _norms(steps) / lr
    local = config.trust * sizes / (slopes + config.larc_eps)
    factor = (local / lr).clamp_max(1.0) if config.larc_mode == "clip" else local
    factor = torch.where((sizes > 0) & (slopes > 0), factor, 1.0)
    for weight, start, step, f in zip(weights, before, steps, factor, strict=True):
        weight.copy_(torch.where(f == 1, weight, start + f * step))


def _layers(flat: Flat, vector: Tensor) -> list[Tensor]:
    """The tensors of a vector (P,) that LAMB and LARC treat one by one: all but biases and norms."""
    return flat.views(vector)[: flat.weights]


def _norms(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
