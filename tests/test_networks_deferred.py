"""Deferred maps against plain torch: the same logits, gradients, statistics and dropout, however the map is cut into bands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.networks import DeepLabConfig, NetworkConfig, TiramisuConfig, build, convolutions, deferred, kernels
from raysegment.networks.bands import bands
from raysegment.networks.blocks import Conv, Unit, Up
from raysegment.networks.deferred import Deferred, channel_sums, moments
from raysegment.networks.kernels import Geometry, weight_gradient

SMALL = NetworkConfig(
    channels=4,
    tiramisu=TiramisuConfig(first=4, growth=4, kernel=3, blocks=(1, 2, 2), dropout=0.3),
    deeplab=DeepLabConfig(width=4, blocks=(2, 1, 1, 1), rates=(1, 2, 40)),
)
LIMITS = (1, 3_000, 50_000, 2**30)  # bytes a band: a few rows, some, several samples, everything


@pytest.fixture(params=LIMITS, ids="{} bytes a band".format)
def limit(request, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (deferred, convolutions):
        monkeypatch.setattr(module, "bands", lambda *args: bands(*args, limit=request.param))
    return request.param


@given(
    batch=st.integers(1, 5), height=st.integers(1, 40), row_bytes=st.integers(1, 500), reach=st.integers(0, 3),
    whole=st.booleans(), limit=st.integers(1, 5000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_bands_cover_every_row_once_and_keep_the_limit(batch, height, row_bytes, reach, whole, limit):
    cut = list(bands(batch, height, row_bytes, reach, whole, limit))
    seen = [(sample, row) for b in cut for sample in range(b.first, b.last) for row in range(b.top, b.bottom)]
    assert seen == [(sample, row) for sample in range(batch) for row in range(height)]
    for b in cut:
        rows = b.bottom - b.top
        least = height if whole else max(1, 4 * reach)
        assert (b.last - b.first) * rows * row_bytes <= limit or (b.last - b.first == 1 and rows <= least)


def outcome(net: torch.nn.Module, engine: str, fields: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a training step leaves behind."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.engine, fields = engine, fields.clone().requires_grad_()
    net.zero_grad()
    torch.manual_seed(5)
    logits = net(fields)
    torch.nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), mask).backward()
    found = {"logits": logits.detach(), "fields": fields.grad}
    found |= {f"gradient of {name}": p.grad.clone() for name, p in net.named_parameters()}
    found |= {name: value.clone() for name, value in net.named_buffers()}
    net.load_state_dict(before)
    return found  # type: ignore[return-value]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.double().abs().max()) + 1e-12
        assert float((found[name].double() - value.double()).abs().max()) <= tolerance * scale + 1e-13, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("norm", ["batch", "half", "none"])
@pytest.mark.parametrize("name", ["tiramisu", "deeplab"])
def test_the_same_as_plain_torch(name, norm, training, limit):
    torch.manual_seed(0)
    net = build(replace(SMALL, name=name, norm=norm)).double().train(training)
    fields, mask = torch.randn(3, 4, 32, 24, dtype=torch.float64), torch.randint(0, 3, (3, 32, 24))
    assert_close(outcome(net, "deferred", fields, mask), outcome(net, "plain", fields, mask), 1e-10)


@pytest.mark.parametrize("config", [
    replace(SMALL, name="deeplab", deeplab=replace(SMALL.deeplab, linear_tail=True)),
    replace(SMALL, name="deeplab", deeplab=replace(SMALL.deeplab, blocks=(1, 1, 1, 1))),
    replace(SMALL, tiramisu=replace(SMALL.tiramisu, dropout_on_logits=True, kernel=5)),
], ids=["linear tail", "one unit a stage", "dropout on logits"])  # fmt: skip
def test_the_same_as_plain_torch_with_other_options(config, limit):
    torch.manual_seed(0)
    net = build(config).double()
    fields, mask = torch.randn(2, 4, 32, 16, dtype=torch.float64), torch.randint(0, 3, (2, 32, 16))
    assert_close(outcome(net, "deferred", fields, mask), outcome(net, "plain", fields, mask), 1e-10)


def errors(name: str, seed: int) -> tuple[float, float]:
    """Σ over logits, gradients and statistics of ‖error‖/‖exact‖ in float32: of deferred maps, and of plain torch."""
    torch.manual_seed(seed)
    net = build(replace(SMALL, name=name))
    fields, mask = torch.randn(2, 4, 32, 24), torch.randint(0, 3, (2, 32, 24))
    ours, plain = (outcome(net, engine, fields, mask) for engine in ("deferred", "plain"))
    exact = outcome(net.double(), "plain", fields.double(), mask)
    gradients, statistics = ([n for n in exact if word in n] for word in ("gradient", "running"))

    def whole(one: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
        return torch.cat([one[name].double().flatten() for name in names])

    def error(one: dict[str, torch.Tensor]) -> float:
        groups = (["logits"], ["fields"], gradients, statistics)
        return sum(float((whole(one, g) - whole(exact, g)).norm() / whole(exact, g).norm()) for g in groups)

    return error(ours), error(plain)


@pytest.mark.parametrize("name", ["tiramisu", "deeplab"])
def test_float32_is_as_close_to_float64_as_plain_torch_is(name, limit):
    """In the median over seeds: in one network of three some ReLU stands within rounding of zero, and either may miss it."""
    ratios = [ours / plain for ours, plain in (errors(name, seed) for seed in range(7))]
    assert sorted(ratios)[len(ratios) // 2] <= 3


@pytest.mark.parametrize("native", [True, False], ids=["multiplied as it is", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", [
    lambda: Unit(Conv(6, 5, 3), "batch", 0.1),
    lambda: Unit(Conv(6, 5, 1, stride=2), "batch", 0.1),
    lambda: Unit(Up(6, 5), "batch", 0.1),
], ids=["3×3", "1×1 stride 2", "transposed"])  # fmt: skip
def test_short_types_round_and_nothing_else(unit, dtype, native, limit, monkeypatch):
    """Half precision is float32 arithmetic on rounded operands, on every CPU: within a rounding or two of it."""
    monkeypatch.setattr(kernels, "multiplies", lambda asked: native or asked not in (torch.bfloat16, torch.float16))
    torch.manual_seed(0)
    layer = unit()
    pieces = [torch.randn(2, channels, 16, 12).to(dtype).to(memory_format=torch.channels_last) for channels in (4, 2)]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [Deferred(piece.to(dtype).requires_grad_()) for piece in pieces]
        out = layer(*inputs).tensor()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(out, [*(i.raw for i in inputs), *layer.parameters()], weights)
        return [out.detach(), *grads]

    with torch.no_grad():  # weights that are short already, so that the two differ in nothing but the arithmetic's type
        for p in layer.conv.parameters():
            p.copy_(p.to(dtype).float())
    epsilon = torch.finfo(dtype).eps
    for short, long in zip(run(dtype), run(torch.float32), strict=True):
        assert float((short.float() - long).abs().max()) <= 6 * epsilon * float(long.abs().max())


@given(
    size=st.sampled_from([1, 3, 5]), dilation=st.integers(1, 6), padded=st.booleans(), inputs=st.integers(1, 9),
    outputs=st.sampled_from([1, 8, 70]), batch=st.integers(1, 2), height=st.integers(1, 9), width=st.integers(2, 12),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_weight_gradient_by_products(size, dilation, padded, inputs, outputs, batch, height, width):
    how = Geometry(size, 1, dilation)
    rows = how.reach if padded else 0
    fields = torch.randn(batch, inputs, height + 2 * how.reach - 2 * rows, width + 2 * how.reach)
    _compare_weight_gradients(fields, torch.randn(batch, outputs, height, width), how, rows)


@given(height=st.integers(1, 6), width=st.integers(1, 8), batch=st.integers(1, 2))
@settings(max_examples=20, deadline=None)
def test_weight_gradient_with_stride_by_products(height, width, batch):
    fields = torch.randn(batch, 5, 2 * height + 1, 2 * width + 1)
    _compare_weight_gradients(fields, torch.randn(batch, 4, height, width), Geometry(3, 2), 0)


def _compare_weight_gradients(fields: torch.Tensor, grad: torch.Tensor, how: Geometry, rows: int) -> None:
    fields, grad = (t.contiguous(memory_format=torch.channels_last) for t in (fields, grad))
    weight = torch.zeros(grad.shape[1], fields.shape[1], how.size, how.size, dtype=torch.float64, requires_grad=True)
    out = torch.conv2d(fields.double(), weight, None, how.stride, (rows, 0), how.dilation)
    (expected,) = torch.autograd.grad(out, weight, grad.double())
    with pytest.MonkeyPatch.context() as patch:
        for by_products in (True, False):
            patch.setattr(kernels, "products", lambda dtype, answer=by_products: answer)
            found = weight_gradient(fields, grad, weight.detach().float(), how, rows).double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_moments_and_sums_are_those_of_the_whole_map(limit):
    maps = (5 + torch.randn(3, 7, 20, 10)).to(memory_format=torch.channels_last)
    found, wide = moments(maps), maps.double()
    assert found.count == 3 * 20 * 10
    torch.testing.assert_close(found.mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.var.double(), wide.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(channel_sums(maps).double(), wide.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_each_map_is_kept_once_for_backward():
    """Memory: the fields and each convolution's result, and no normalised, activated, padded or joined copy of them."""
    torch.manual_seed(0)
    net, results = build(replace(SMALL, tiramisu=replace(SMALL.tiramisu, dropout=0.0))), []
    for m in net.modules():
        if isinstance(m, Conv | Up):
            whole = m.with_moments
            m.with_moments = lambda *args, whole=whole: [results.append(r := whole(*args)), r][1]  # type: ignore[method-assign]
    saved: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.ndim == 4 and t.shape[0] == 2:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    fields = torch.randn(2, 4, 32, 24)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net(fields)
    assert results
    assert sum(saved.values()) <= 4 * (fields.numel() + sum(raw.numel() for raw, _ in results))


@pytest.mark.parametrize("engine", ["plain", "deferred"])
@pytest.mark.parametrize("name", ["tiramisu", "deeplab"])
def test_checkpointing_changes_nothing_but_memory(name, engine):
    torch.manual_seed(0)
    net = build(replace(SMALL, name=name))
    fields, mask = torch.randn(2, 4, 32, 24), torch.randint(0, 3, (2, 32, 24))
    kept = outcome(net, engine, fields, mask)
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in net.modules() if isinstance(m, Unit)]
    net.checkpointing = True
    again = outcome(net, engine, fields, mask)
    assert len(calls) > len(handles), "something was computed again"
    for name_, value in kept.items():
        assert torch.equal(again[name_], value), name_
