"""Both networks: size, arithmetic, the circle of longitude, and that every option matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.learning.flops import training_flops
from raysegment.networks import DeepLabConfig, NetworkConfig, TiramisuConfig, build
from raysegment.networks.blocks import Conv, Up, drop

SMALL = NetworkConfig(
    channels=4,
    tiramisu=TiramisuConfig(first=4, growth=4, kernel=3, blocks=(1, 2, 2), dropout=0.0),
    deeplab=DeepLabConfig(width=4, blocks=(2, 1, 1, 1), rates=(1, 2, 40)),
)
NAMES = ("tiramisu", "deeplab")


def network(config: NetworkConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(config)


@pytest.mark.parametrize(
    ("config", "tflop", "millions"),
    [
        (NetworkConfig("tiramisu"), 4.188, 7.505),
        (NetworkConfig("tiramisu", channels=4, tiramisu=TiramisuConfig(first=48)), 3.703, 7.134),
        (NetworkConfig("deeplab"), 13.02, 43.7),
    ],
    ids=["tiramisu", "tiramisu of Piz Daint", "deeplab"],
)
def test_paper_size(config, tflop, millions):
    with torch.device("meta"):
        net = build(config)
    whole = training_flops(net, (768, 1152), config.channels) / 1e12
    assert whole == pytest.approx(tflop, rel=5e-4)
    assert training_flops(net, (768 // 3, 1152 // 3), config.channels) * 9 / 1e12 == pytest.approx(whole, rel=1e-4)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pole", ["zeros", "replicate"])
def test_longitude_is_a_circle(name, pole):
    net = network(replace(SMALL, name=name, pole=pole)).double().eval()
    fields = torch.randn(2, 4, 16, 24, dtype=torch.float64)
    logits = net(fields)
    assert logits.shape == (2, 3, 16, 24)
    for columns in (1, 2, 3, net.multiple - 1, net.multiple, net.multiple + 1, 23):
        torch.testing.assert_close(net(fields.roll(columns, 3)), logits.roll(columns, 3), rtol=1e-12, atol=1e-12)
    # one pixel at the date line reaches the other side of the map, and no pole reaches the other
    bump = fields.clone()
    bump[:, :, 8, 0] += 1.0
    assert (net(bump) - logits).abs()[0, :, 8, -1].min() > 0


def test_nothing_crosses_a_pole():
    for kernel, pole in ((3, "zeros"), (5, "replicate")):
        conv = Conv(1, 1, kernel, pole=pole)
        north = torch.zeros(1, 1, 8, 12)
        north[0, 0, -1, 3] = 1.0
        assert conv(north)[0, 0, : 8 - kernel // 2 - 1].abs().max() == 0
        assert conv(north)[0, 0, -1].abs().max() > 0


@given(
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    dilation=st.integers(1, 4),
    width=st.sampled_from([4, 6, 12]),
)
@settings(max_examples=30, deadline=None)
def test_convolution_equals_torch_circular_padding(kernel, stride, dilation, width):
    conv = Conv(3, 2, kernel, stride=stride, dilation=dilation, bias=True).double()
    fields = torch.randn(2, 3, 8, width, dtype=torch.float64, requires_grad=True)
    reach = dilation * (kernel // 2)
    turns = torch.arange(-reach, width + reach) % width
    expected = torch.nn.functional.conv2d(fields[..., turns], conv.weight, conv.bias, stride, (reach, 0), dilation)
    got = conv(fields)
    torch.testing.assert_close(got, expected)
    seen = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, fields, seen), torch.autograd.grad(expected, fields, seen), strict=True):
        torch.testing.assert_close(a, b)


def test_transposed_convolution_equals_its_definition():
    up = Up(2, 3, bias=True).double()
    fields = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    expected = up.bias.detach()[None, :, None, None].repeat(1, 1, 6, 8)
    for y in range(3):
        for x in range(4):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= 2 * y + dy < 6:
                        tap = up.weight.detach()[:, :, dy + 1, dx + 1]
                        expected[0, :, 2 * y + dy, (2 * x + dx) % 8] += fields[0, :, y, x] @ tap
    torch.testing.assert_close(up(fields).detach(), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["batch", "none", "half"])
def test_gradient_in_every_parameter(name, norm):
    net = network(replace(SMALL, name=name, norm=norm))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(2, 4, 16, 24))
    assert logits.dtype == torch.bfloat16
    torch.nn.functional.cross_entropy(logits.float(), torch.randint(0, 3, (2, 16, 24))).backward()
    silent = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_do_not_divide_are_named(name):
    net = network(replace(SMALL, name=name))
    multiple = net.multiple
    with pytest.raises(ValueError, match=rf"divisible by {multiple}, got {2 * multiple + 1} × {3 * multiple}") as error:
        net(torch.zeros(1, 4, 2 * multiple + 1, 3 * multiple))
    assert f"height {2 * multiple} or {3 * multiple}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_memory_format_does_not_matter(name):
    net = network(replace(SMALL, name=name)).eval()
    fields = torch.randn(1, 4, 16, 16)
    plain = net(fields)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(fields.contiguous(memory_format=torch.channels_last)), plain, rtol=1e-4, atol=1e-4)


T, D = SMALL.tiramisu, SMALL.deeplab


@pytest.mark.parametrize(
    "changed",
    [
        replace(SMALL, channels=5),
        replace(SMALL, classes=4),
        replace(SMALL, norm="none"),
        replace(SMALL, norm="half"),
        replace(SMALL, norm_momentum=0.5),
        replace(SMALL, pole="replicate"),
        replace(SMALL, tiramisu=replace(T, first=8)),
        replace(SMALL, tiramisu=replace(T, growth=8)),
        replace(SMALL, tiramisu=replace(T, kernel=5)),
        replace(SMALL, tiramisu=replace(T, blocks=(2, 2, 2))),
        replace(SMALL, tiramisu=replace(T, dropout=0.5)),
        replace(SMALL, tiramisu=replace(T, dropout=0.5, dropout_on_logits=True)),
        replace(SMALL, name="deeplab"),
        replace(SMALL, name="deeplab", pole="replicate"),
        replace(SMALL, name="deeplab", deeplab=replace(D, width=8)),
        replace(SMALL, name="deeplab", deeplab=replace(D, blocks=(1, 1, 1, 1))),
        replace(SMALL, name="deeplab", deeplab=replace(D, rates=(1, 2, 3))),
        replace(SMALL, name="deeplab", deeplab=replace(D, linear_tail=True)),
    ],
    ids=str,
)
def test_every_option_matters(changed):
    """After one training forward, logits or running statistics differ from the plain network's."""

    def outcome(config: NetworkConfig) -> torch.Tensor:
        net = network(config, seed=3)
        torch.manual_seed(5)
        logits = net(torch.randn(1, config.channels, 16, 24, generator=torch.Generator().manual_seed(7)))
        return torch.cat([logits.flatten(), *(b.float().flatten() for b in net.buffers())]).detach()

    base = replace(SMALL, name=changed.name)
    if changed.tiramisu.dropout_on_logits:
        base = replace(base, tiramisu=replace(changed.tiramisu, dropout_on_logits=False))
    if changed == base:  # the network's name itself
        base = replace(base, name="tiramisu")
    plain, other = outcome(base), outcome(changed)
    assert plain.shape != other.shape or not torch.equal(plain, other)


def test_dropout_drops_the_given_share_and_keeps_the_mean():
    torch.manual_seed(0)
    fields = torch.ones(3, 5, 60, 70).contiguous(memory_format=torch.channels_last).requires_grad_()
    for probability in (0.2, 0.5):
        dropped = drop(fields, probability, training=True)
        kept = dropped != 0
        assert float(kept.float().mean()) == pytest.approx(1 - probability, abs=0.01)
        assert float(dropped.detach().mean()) == pytest.approx(1.0, abs=0.01)
        assert torch.equal(torch.autograd.grad(dropped.sum(), fields)[0], dropped)
        for axis in ((1, 2, 3), (0, 2, 3)):  # no sample, no channel is special
            assert float((kept.float().mean(axis) - 1 + probability).abs().max()) < 0.02
    assert drop(fields, 0.5, training=False) is fields


def test_dropout_is_off_when_not_training():
    net = network(replace(SMALL, tiramisu=replace(T, dropout=0.5, dropout_on_logits=True))).eval()
    fields = torch.randn(1, 4, 16, 16)
    torch.testing.assert_close(net(fields), net(fields), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NetworkConfig("tiramisou"), "did you mean 'tiramisu'"),
        (lambda: NetworkConfig(norm="bath"), "did you mean 'batch'"),
        (lambda: NetworkConfig(pole="zero"), "did you mean 'zeros'"),
        (lambda: NetworkConfig(channels=0), "at least 1 channel"),
        (lambda: NetworkConfig(norm_momentum=0.0), "norm_momentum"),
        (lambda: TiramisuConfig(kernel=4), "odd number"),
        (lambda: TiramisuConfig(growth=0), "growth"),
        (lambda: TiramisuConfig(blocks=(2,)), "two or more"),
        (lambda: TiramisuConfig(dropout=1.0), "probability"),
        (lambda: DeepLabConfig(width=6), "multiple of 4"),
        (lambda: DeepLabConfig(blocks=(1, 1, 1)), "four counts"),  # type: ignore[arg-type]
        (lambda: DeepLabConfig(rates=()), "dilations"),
    ],
)
def test_bad_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_same_seed_same_network():
    for name in NAMES:
        a, b = (network(replace(SMALL, name=name), seed=11).state_dict() for _ in range(2))
        assert all(torch.equal(a[key], b[key]) for key in a)
