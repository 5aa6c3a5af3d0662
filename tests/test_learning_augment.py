"""Augmentation: keyed by (seed, position), true to the physics, and the mask goes with the fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.climate.channels import INDEX
from raysegment.climate.grid import Grid, vorticity
from raysegment.learning.augment import AugmentConfig, augment, binomial, draw

ALL = AugmentConfig(roll=True, mirror=True, gain=0.2, offset=0.3, drop=0.3, noise=0.1, smooth=0.5)
FIELDS = torch.randn(6, 16, 8, 12, generator=torch.Generator().manual_seed(0))
MASK = torch.randint(0, 3, (6, 8, 12), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def run(config, positions=range(6), seed=0, zero=None):
    index = torch.tensor([position % 6 for position in positions])
    return augment(FIELDS[index], MASK[index], list(positions), seed, config, zero)


def test_nothing_switched_on_is_the_identity():
    fields, mask = run(AugmentConfig())
    assert torch.equal(fields, FIELDS)
    assert torch.equal(mask, MASK)


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(0, 2**63))
@settings(max_examples=20, deadline=None)
def test_only_seed_and_position_matter(order, cut, seed):
    fields, mask = run(ALL, range(6), seed)
    for positions in (order[:cut], order[cut:]):
        if positions:
            part, part_mask = run(ALL, positions, seed)
            assert torch.equal(part, fields[list(positions)])
            assert torch.equal(part_mask, mask[list(positions)])


def test_seed_and_position_do_matter():
    same = [run(ALL, [position] * 2, seed)[0] for position, seed in ((0, 0), (6, 0), (0, 1))]
    assert torch.equal(same[0][0], same[0][1])
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


@pytest.mark.parametrize("name", ["roll", "mirror", "gain", "offset", "drop", "noise", "smooth"])
def test_every_option_matters_and_leaves_the_input_alone(name):
    before = FIELDS.clone()
    config = AugmentConfig(**{name: True if name in ("roll", "mirror") else 0.5})
    fields, mask = run(config, range(6, 30))
    kept = FIELDS[torch.arange(24) % 6]
    assert not torch.equal(fields, kept)
    assert torch.equal(mask, MASK[torch.arange(24) % 6]) == (name not in ("roll", "mirror"))
    assert torch.equal(FIELDS, before)


def test_mask_travels_with_the_fields():
    """A channel that equals the mask still does after rolling and mirroring."""
    fields = MASK[:, None].float().expand(-1, 16, -1, -1).clone()
    moved, moved_mask = augment(fields, MASK, range(6), 3, AugmentConfig(roll=True, mirror=True))
    assert torch.equal(moved[:, INDEX["TMQ"]], moved_mask.float())
    assert not torch.equal(moved_mask, MASK)


def test_mirrored_storm_turns_the_other_way():
    """Vorticity (here of V850 and U850 in m/s) changes sign with the hemisphere, also when 0 m/s is not 0 in the tile."""
    grid = Grid(np.linspace(10.0, 24.0, 8), np.arange(12) * 2.0)
    mean, std = np.linspace(-3, 3, 16), np.linspace(1, 2, 16)
    zero = torch.from_numpy(-mean / std)
    wind = FIELDS[:1].numpy().astype(np.float64) * std[:, None, None] + mean[:, None, None]
    position = next(p for p in range(99) if draw(0, p, 12, 16, AugmentConfig(mirror=True)).mirror)
    moved, _ = augment(FIELDS[:1], MASK[:1], [position], 0, AugmentConfig(mirror=True), zero)
    turned = moved.numpy() * std[:, None, None] + mean[:, None, None]
    for u, v in (("U850", "V850"), ("UBOT", "VBOT")):
        before = vorticity(wind[0, INDEX[u]], wind[0, INDEX[v]], grid)
        south = Grid(-grid.lat[::-1], grid.lon)
        after = vorticity(turned[0, INDEX[u]], turned[0, INDEX[v]], south)
        np.testing.assert_allclose(after, -before[::-1], atol=1e-10)
    np.testing.assert_allclose(turned[0, INDEX["PSL"]], wind[0, INDEX["PSL"], ::-1], rtol=1e-6)


def test_some_channel_always_stays():
    for position in range(50):
        assert (draw(1, position, 12, 16, AugmentConfig(drop=1.0)).gain != 0).sum() == 1
    lost = np.mean([draw(1, p, 12, 16, AugmentConfig(drop=0.25)).gain == 0 for p in range(400)])
    assert lost == pytest.approx(0.25, abs=0.02)


def test_frequencies_and_amplitudes():
    draws = [draw(5, p, 12, 16, ALL) for p in range(600)]
    assert {d.columns for d in draws} == set(range(12))
    assert np.mean([d.mirror for d in draws]) == pytest.approx(0.5, abs=0.07)
    assert np.mean([d.smooth for d in draws]) == pytest.approx(0.5, abs=0.07)
    gains = np.concatenate([d.gain[d.gain != 0] for d in draws])
    assert (gains.min(), gains.max()) == (pytest.approx(0.8, abs=0.01), pytest.approx(1.2, abs=0.01))
    offsets = np.concatenate([d.offset for d in draws])
    assert np.abs(offsets).max() == pytest.approx(0.3, abs=0.01)
    noise = augment(torch.zeros(1, 16, 64, 64), torch.zeros(1, 64, 64), [0], 0, AugmentConfig(noise=0.1))[0]
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)


def test_switching_one_thing_on_does_not_move_the_others():
    assert draw(0, 7, 12, 16, AugmentConfig(roll=True)).columns == draw(0, 7, 12, 16, ALL).columns


def test_binomial_filter():
    spike = torch.zeros(1, 5, 6)
    spike[0, 2, 0] = 16.0
    expected = torch.zeros(5, 6)
    expected[1:4, [5, 0, 1]] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(binomial(spike)[0], expected)
    torch.testing.assert_close(binomial(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))
    assert torch.equal(binomial(FIELDS.flip(-2)), binomial(FIELDS).flip(-2))


@pytest.mark.parametrize(
    "bad", [{"gain": -1.0}, {"gain": 1.0}, {"drop": 1.5}, {"smooth": -0.1}, {"noise": float("nan")}], ids=str
)
def test_bad_configurations_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        AugmentConfig(**bad)
