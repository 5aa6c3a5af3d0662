"""Losses, optimizer, FLOPs and normalisation against loops, closed forms and libraries."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raysegment.climate.channels import CHANNELS, INDEX, NAMES
from raysegment.feed.session import worker_environment
from raysegment.learning.flat import Flat, Statistics
from raysegment.learning.flops import training_flops
from raysegment.learning.losses import LossConfig, class_weights, loss, soft_jaccard, weighted_cross_entropy
from raysegment.learning.normalise import Normaliser
from raysegment.learning.optim import OptimConfig, Optimizer, learning_rate
from raysegment.networks import NetworkConfig, TiramisuConfig, build
from tests.helpers import ROOT

LOGITS = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
MASK = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
WEIGHTS = torch.tensor([0.5, 7.0, 2.0])


# losses


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_cross_entropy_equals_a_loop_over_pixels(gamma):
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                scores, truth = LOGITS[b, :, y, x].double(), int(MASK[b, y, x])
                p = float(scores.exp()[truth] / scores.exp().sum())
                total -= float(WEIGHTS[truth]) * (1 - p) ** gamma * math.log(p)
    got = weighted_cross_entropy(LOGITS, MASK, WEIGHTS, gamma)
    assert float(got) == pytest.approx(total / 40, rel=1e-5)


def test_jaccard_equals_a_loop_over_pixels():
    ratios = []
    for k in range(3):
        both = union = 1.0
        for b in range(2):
            for y in range(4):
                for x in range(5):
                    scores = LOGITS[b, :, y, x].double()
                    p, t = float(scores.exp()[k] / scores.exp().sum()), float(MASK[b, y, x] == k)
                    both += p * t
                    union += p + t - p * t
        ratios.append(both / union)
    assert float(soft_jaccard(LOGITS, MASK)) == pytest.approx(1 - sum(ratios) / 3, rel=1e-5)


@pytest.mark.parametrize("config", [LossConfig(), LossConfig(focal_gamma=2.0), LossConfig(jaccard=1.0)], ids=str)
def test_loss_is_least_at_the_truth(config):
    sure = 30.0 * nn.functional.one_hot(MASK.long(), 3).permute(0, 3, 1, 2).float()
    assert float(loss(sure, MASK, WEIGHTS, config)) == pytest.approx(0.0, abs=1e-4)
    assert float(loss(LOGITS, MASK, WEIGHTS, config)) > 0.1
    start = nn.Parameter(LOGITS.clone())
    for _ in range(200):
        (gradient,) = torch.autograd.grad(loss(start, MASK, WEIGHTS, config), start)
        start.data -= 20.0 * gradient
    assert torch.equal(start.argmax(1), MASK.long())


def test_loss_is_float32():
    assert weighted_cross_entropy(LOGITS.bfloat16(), MASK, WEIGHTS).dtype == torch.float32
    assert loss(LOGITS.bfloat16(), MASK, WEIGHTS, LossConfig(focal_gamma=1.0, jaccard=1.0)).dtype == torch.float32


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "inverse_eighth"},
        {"weights": "inverse"},
        {"weights": "none"},
        {"focal_gamma": 1.0},
        {"jaccard": 0.5},
    ],
    ids=str,
)
def test_every_loss_option_matters(changed):
    def outcome(config: LossConfig) -> float:
        weights = class_weights((982, 1, 17), config.weights)
        return float(loss(LOGITS, MASK, torch.tensor(weights), config))

    assert outcome(LossConfig(**changed)) != outcome(LossConfig())


@given(
    st.lists(st.integers(0, 10**9), min_size=3, max_size=3).filter(any),
    st.sampled_from(["inverse_sqrt", "inverse_eighth", "none", "inverse"]),
)
def test_class_weights(counts, rule):
    weights = class_weights(counts, rule)
    counts = [max(count, 1) for count in counts]
    assert sum(c * w for c, w in zip(counts, weights, strict=True)) == pytest.approx(sum(counts))
    exponent = {"inverse_sqrt": -0.5, "inverse_eighth": -0.125, "none": 0.0, "inverse": -1.0}[rule]
    assert weights[1] / weights[0] == pytest.approx((counts[1] / counts[0]) ** exponent)


def test_class_weights_of_the_paper():
    """0.982 / 0.00071 / 0.017 gave cyclones 37 times and rivers 7.6 times the weight of the background."""
    ground, cyclone, river = class_weights((982000, 710, 17000))
    assert (cyclone / ground, river / ground) == (pytest.approx(37, rel=0.01), pytest.approx(7.6, rel=0.01))


# optimizer


def learn(config: OptimConfig, steps: int = 3, gradient_scale: float = 1.0) -> torch.Tensor:
    """Parameters after some steps of a tiny network with fixed gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    flat = Flat(net)
    optimizer = Optimizer(flat, config)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.apply(gradient_scale * torch.randn(flat.values.numel(), generator=generator), step)
    return torch.cat([flat.values, *([optimizer.ema] if optimizer.ema is not None else [])])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizer_equals_torch(name):
    config = OptimConfig(optimizer=name, schedule="constant", weight_decay=0.1, lr=0.03)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    weights, rest = ([p for p in net.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    plain = (
        torch.optim.SGD(groups, lr=0.03, momentum=0.9)
        if name == "sgd"
        else {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](groups, lr=0.03)
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        gradient = torch.randn(sum(p.numel() for p in net.parameters()), generator=generator)
        for p, piece in zip(weights + rest, gradient.split([p.numel() for p in weights + rest]), strict=True):
            p.grad = piece.view(p.shape)
        plain.step()
    expected = torch.cat([p.detach().flatten() for p in weights + rest])
    torch.testing.assert_close(learn(config), expected, rtol=1e-5, atol=1e-6)


BASE = OptimConfig(lr=0.01, weight_decay=0.1, total_steps=5)
SGD = replace(BASE, optimizer="sgd", larc=True, trust=0.02)
LAMB = replace(BASE, optimizer="lamb")


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        (BASE, {"optimizer": "adam"}),
        (BASE, {"optimizer": "sgd"}),
        (BASE, {"optimizer": "lamb"}),
        (BASE, {"lr": 0.02}),
        (BASE, {"weight_decay": 0.2}),
        (BASE, {"betas": (0.8, 0.999)}),
        (BASE, {"betas": (0.9, 0.9)}),
        (BASE, {"eps": 0.1}),
        (BASE, {"larc": True}),
        (replace(BASE, larc=True), {"larc_mode": "scale"}),
        (replace(BASE, larc=True), {"trust": 1e-3}),
        (replace(BASE, larc=True), {"larc_eps": 10.0}),
        (SGD, {"momentum": 0.5}),
        (SGD, {"nesterov": True}),
        (SGD, {"weight_decay": 0.5}),
        (SGD, {"larc": False}),
        (SGD, {"larc_mode": "scale"}),
        (SGD, {"trust": 0.01}),
        (SGD, {"larc_eps": 10.0}),
        (LAMB, {"lr": 0.02}),
        (LAMB, {"weight_decay": 0.2}),
        (LAMB, {"betas": (0.8, 0.999)}),
        (LAMB, {"betas": (0.9, 0.9)}),
        (LAMB, {"eps": 0.1}),
        (LAMB, {"larc": True}),
        (replace(LAMB, larc=True), {"larc_mode": "scale"}),
        (replace(LAMB, larc=True), {"trust": 1e-3}),
        (replace(LAMB, larc=True), {"larc_eps": 10.0}),
        (BASE, {"schedule": "polynomial"}),
        (BASE, {"schedule": "constant"}),
        (replace(BASE, schedule="polynomial"), {"power": 2.0}),
        (BASE, {"warmup_steps": 2}),
        (BASE, {"total_steps": 9}),
        (BASE, {"final_lr": 0.5}),
        (replace(BASE, optimizer="sgd"), {"clip_norm": 0.5}),
        (BASE, {"ema": 0.9}),
        (replace(BASE, ema=0.9), {"ema": 0.5}),
    ],
    ids=str,
)
def test_every_option_matters(base, changed):
    plain, other = learn(base), learn(replace(base, **changed))
    assert plain.shape != other.shape or not torch.equal(plain, other)


def test_larc_clip_is_the_formula_on_the_mean_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    flat = Flat(net)
    config = OptimConfig(optimizer="sgd", momentum=0.0, lr=0.5, larc=True, trust=0.02, weight_decay=0.1, schedule="constant")
    before, gradient = flat.values.clone(), torch.randn(flat.values.numel())
    gradient[:12] *= 1e-3  # the first layer's λ is above lr, the second's below
    Optimizer(flat, config).apply(gradient.clone(), 0)
    start = 0
    for p in flat.parameters:
        w, g = before[start : start + p.numel()], gradient[start : start + p.numel()]
        start += p.numel()
        rate = 0.5
        if p.ndim > 1:
            g_decayed = g + 0.1 * w
            rate = min(0.02 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8), 0.5)
            g = g_decayed
        torch.testing.assert_close(p.detach().flatten(), w - rate * g)


@pytest.mark.parametrize("mode", ["clip", "scale"])
def test_larc_around_adam_bounds_the_relative_update_whatever_the_gradient_scale(mode):
    config = OptimConfig(lr=0.5, larc=True, larc_mode=mode, trust=0.01, weight_decay=0.0, schedule="constant")
    start, small, large = learn(config, steps=0), learn(config, 1, 1e-3), learn(config, 1, 1e3)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)
    rate = 0.01 * (0.5 if mode == "scale" else 1.0)
    assert float((small - start)[:54].norm() / start[:54].norm()) == pytest.approx(rate, rel=1e-3)


def test_schedule_is_a_function_of_the_step():
    config = OptimConfig(lr=1.0, warmup_steps=4, total_steps=12, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.1 + 0.9 / 2)
    assert rates[12] == rates[13] == pytest.approx(0.1)
    assert [learning_rate(s, replace(config, schedule="constant")) for s in (4, 99)] == [1.0, 1.0]
    assert learning_rate(8, replace(config, schedule="polynomial", power=2.0, final_lr=0.0)) == pytest.approx(0.25)
    assert learning_rate(5, OptimConfig(lr=1.0, warmup_steps=3, total_steps=3)) == 0.0


@pytest.mark.parametrize(
    "bad",
    [{"optimizer": "adamm"}, {"schedule": "cos"}, {"larc_mode": "clap"}, {"lr": 0.0}, {"momentum": 1.0}, {"betas": (0.9,)},
     {"final_lr": 2.0}, {"total_steps": 0}, {"ema": -0.1}, {"warmup_steps": -1}, {"nesterov": True, "momentum": 0.0}],
    ids=str,
)  # fmt: skip
def test_bad_optimizers_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected"):
        OptimConfig(**bad)


def test_flat_views_share_memory_in_any_layout():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fields = torch.randn(2, 3, 6, 6)
    expected = net(fields).detach()
    flat = Flat(net)
    torch.testing.assert_close(net(fields), expected)
    net(fields).square().sum().backward()
    assert flat.grads.abs().sum() > 0
    assert torch.equal(flat.named(flat.grads)["0.weight"], net[0].weight.grad)
    flat.values.zero_()
    assert all(not p.any() for p in net.parameters())


def test_running_statistics_change_once_per_step():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=0.3))
    statistics, batches = Statistics(net), [torch.randn(4, 1, 3, 3) * scale for scale in (1.0, 5.0)]
    kept, sums = statistics.values.clone(), torch.zeros(4)
    with statistics:
        for batch in batches:
            statistics.values.zero_()
            out = net[0](batch)
            net[1](out)
            sums += statistics.values
            torch.testing.assert_close(statistics.values[:2], out.mean((0, 2, 3)).detach())
            torch.testing.assert_close(statistics.values[2:], out.var((0, 2, 3)).detach())
    assert torch.equal(statistics.values, kept)
    statistics.update(sums / 2)
    torch.testing.assert_close(net[1].running_var, 0.7 * torch.ones(2) + 0.3 * sums[2:] / 2)
    assert int(net[1].num_batches_tracked) == 1


# memory, flops and normalisation


@pytest.mark.skipif(not sys.platform.startswith("linux") or not platform.libc_ver()[0], reason="glibc only")
def test_freed_memory_is_kept():
    """A tensor that was freed is written again without new pages from the system."""
    code = (
        "import resource, sys, torch\n"
        "from raysegment.learning.memory import keep_freed_memory\n"
        "assert sys.argv[1] == 'plain' or keep_freed_memory()\n"
        "faults = []\n"
        "for _ in range(60):\n"
        "    torch.ones(2**23)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "print(faults[-1] - faults[9])"
    )
    faults = [int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True, cwd=ROOT).stdout)
              for how in ("plain", "kept")]  # fmt: skip
    assert faults[1] < 0.1 * faults[0]


def test_freed_memory_is_kept_in_the_threads_of_rays_workers():
    """Ray Train computes in a thread; with what its processes are told, large tensors there come from kept memory, too."""
    code = (
        "import resource, threading, torch\n"
        "from raysegment.learning.memory import keep_freed_memory\n"
        "faults = []\n"
        "def work():\n"
        "    assert keep_freed_memory()\n"
        "    for _ in range(60):\n"
        "        torch.ones(2**25)\n"
        "        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start(); thread.join()\n"
        "print(faults[-1] - faults[9])"
    )
    told = {name: value for name, value in worker_environment().items() if name.startswith("MALLOC")}
    here = {name: value for name, value in os.environ.items() if name not in told}  # a local Ray's driver is told, too
    faults = [int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT,
                                 env={**here, **extra}).stdout) for extra in ({}, told)]  # fmt: skip
    assert faults[1] < 0.1 * faults[0]


def test_flops_equal_the_sum_over_layers():
    net = nn.Conv2d(16, 8, 3, padding=1)
    assert training_flops(net, (4, 6)) == 3 * 2 * 9 * 16 * 8 * 24
    tiramisu = build(NetworkConfig(tiramisu=TiramisuConfig(4, 4, 3, (1, 1))))
    assert training_flops(tiramisu, (8, 8)) * 4 == pytest.approx(training_flops(tiramisu, (16, 16)), rel=0.05)


def test_tiles_are_normalised_to_the_physical_moments():
    rng = np.random.default_rng(0)
    reference, scale = (np.array([getattr(c, key) for c in CHANNELS]) for key in ("reference", "scale"))
    mean, std = reference + 0.3 * scale, 1.7 * scale
    physical = mean[:, None, None] + std[:, None, None] * rng.standard_normal((2, 16, 4, 6))
    tiles = torch.from_numpy((physical - reference[:, None, None]) / scale[:, None, None]).half()
    normaliser = Normaliser.of(mean, std)
    expected = (physical - mean[:, None, None]) / std[:, None, None]
    got = normaliser.tiles(tiles)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.numpy(), expected, atol=3e-3)
    np.testing.assert_allclose(normaliser.zero().numpy(), -mean / std, rtol=1e-6)
    some = Normaliser.of(mean, std, ("TMQ", "U850", "V850", "PRECT"))
    torch.testing.assert_close(some.tiles(tiles), got[:, [INDEX[name] for name in some.names]])
    assert normaliser.names == NAMES


def test_bad_moments_are_refused():
    with pytest.raises(ValueError, match="16 finite"):
        Normaliser.of([float("nan")] * 16, [1.0] * 16)
    with pytest.raises(ValueError, match="positive"):
        Normaliser.of([0.0] * 16, [0.0] * 16)
