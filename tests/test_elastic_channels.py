"""Networks of some channels: chosen by name, in the order given, recorded in the run, never mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysegment import config as configuration
from raysegment.archive.manifest import Manifest
from raysegment.archive.shards import open_shards
from raysegment.climate.channels import INDEX, NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run
from raysegment.elastic.settings import TrainConfig, identity, plain
from raysegment.elastic.worker import make_learner
from raysegment.feed.stream import FeedConfig, open_stream
from raysegment.learning.augment import AugmentConfig
from raysegment.learning.step import Learner
from raysegment.networks import NetworkConfig
from tests.small_archive import fields_and_mask
from tests.small_training import config, write_shards

FOUR = ("TMQ", "U850", "V850", "PSL")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def learner(shards: Path, channels: tuple[str, ...], augment: AugmentConfig | None = None) -> Learner:
    asked = config(shards, shards.parent / "run", channels=channels)
    asked = replace(asked, learn=replace(asked.learn, precision="fp32", augment=augment or AugmentConfig()))
    manifest = Manifest.load(shards)
    return make_learner(asked.resolved(manifest), manifest, "cpu")


def first_micro_batch(shards: Path):
    """The first two tiles that a run sees, and their numbers."""
    asked, manifest = config(shards, shards), Manifest.load(shards)
    order = asked.order(manifest)
    step = next(open_stream(shards, order, 0, 1, config=FeedConfig(kind="direct")))
    return step.micro_batches[0], [order.tile(position) for position in step.micro_batches[0].positions.tolist()]


def si_units(one: Learner, fields: torch.Tensor) -> np.ndarray:
    """Normalised fields (m, C, H, W) in SI units."""
    column = lambda values: np.array(values)[:, None, None]
    return fields.numpy() * column(one.normaliser.std) + column(one.normaliser.mean)


@pytest.mark.parametrize(("channels", "message"), [
    (["TMQ", "U85"], "did you mean 'U850'"),
    (["PSL", "TMQ", "PSL"], "each name once"),
    ("TMQ,PSL", r"expected a list like \[TMQ, PSL\], got a text"),
])  # fmt: skip
def test_names_that_are_no_channels_are_refused(channels, message):
    with pytest.raises(BadInput, match=message):
        configuration.load(TrainConfig, {"channels": channels})


def test_channels_come_from_the_command_line_as_a_list():
    mapping = configuration.apply_overrides({}, ["channels=[TMQ,U850,V850,PSL]"])
    assert configuration.load(TrainConfig, mapping).channels == FOUR
    with pytest.raises(ValueError, match="did you mean 'TMQ'"):
        TrainConfig(channels=("TMQQ",))


@pytest.mark.parametrize("channels", [(), FOUR, ("PSL",), tuple(reversed(NAMES))])
def test_the_network_is_as_wide_as_its_channels(shards, channels):
    manifest, asked = Manifest.load(shards), config(shards, "run", channels=channels)
    resolved = asked.resolved(manifest)
    assert resolved.network.channels == len(channels or NAMES)
    assert resolved.resolved(manifest) == resolved
    explicit = replace(asked, network=replace(asked.network, channels=resolved.network.channels))
    assert explicit.resolved(manifest) == resolved
    with pytest.raises(BadInput, match=f"expected {len(channels or NAMES)} channels and 3 classes, got 3 and 3"):
        replace(asked, network=NetworkConfig(channels=3)).resolved(manifest)


def test_a_run_of_other_channels_is_refused(tmp_path):
    run = Run(tmp_path)
    run.prepare(config(tmp_path, tmp_path, channels=FOUR))
    run.prepare(config(tmp_path, tmp_path, channels=FOUR, workers=2))
    for other in (("TMQ", "U850", "PSL", "V850"), ("TMQ", "U850", "V850"), ()):
        with pytest.raises(BadInput, match=r"other values of channels \(\['TMQ', 'U850', 'V850', 'PSL'\] there"):
            run.prepare(config(tmp_path, tmp_path, channels=other))


def test_naming_all_channels_is_naming_none(tmp_path):
    every = config(tmp_path, tmp_path, channels=NAMES)
    before = plain(config(tmp_path, tmp_path))
    assert identity(every) == identity(before) == identity(json.loads(json.dumps(plain(every))))
    del before["channels"]  # a run from before there was the key
    assert identity(every) == identity(before)


@pytest.mark.parametrize("channels", [FOUR, ("PSL", "V850", "TMQ"), tuple(reversed(NAMES)), ()])
def test_the_network_sees_the_named_channels_in_the_order_given(shards, channels):
    one, (micro, tiles) = learner(shards, channels), first_micro_batch(shards)
    fields, _ = one.prepare(micro)
    scale = np.array(one.normaliser.scale)[:, None, None]
    for seen, tile in zip(si_units(one, fields), tiles, strict=True):
        truth = fields_and_mask(tile)[0][[INDEX[name] for name in channels or NAMES]]
        assert np.abs((seen - truth) / scale).max() < 0.01  # float16 of the shards


def test_moments_are_those_of_the_named_channels(shards):
    manifest = open_shards(shards).manifest
    one = learner(shards, ("PSL", "TMQ"))
    assert one.normaliser.names == ("PSL", "TMQ")
    assert one.normaliser.mean == (manifest.mean[7], manifest.mean[0])
    assert one.normaliser.std == (manifest.std[7], manifest.std[0])


def test_permuted_channels_are_the_same_network_with_its_first_weights_permuted(shards):
    one, other = learner(shards, FOUR), learner(shards, ("PSL", "V850", "TMQ", "U850"))
    weights = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    weights["enter.conv.weight"] = weights["enter.conv.weight"][:, [3, 2, 0, 1]]
    other.network.load_state_dict(weights)
    micro, _ = first_micro_batch(shards)
    logits = [each.network.eval()(each.prepare(micro)[0]) for each in (one, other)]
    assert torch.allclose(*logits, atol=1e-5)
    shuffled = other.network(one.prepare(micro)[0])
    assert not torch.allclose(logits[0], shuffled, atol=1e-2)


@pytest.mark.parametrize("channels", [("V850", "TMQ", "VBOT"), ("U850", "V850"), ("TMQ", "PSL"), ()])
def test_mirrored_tiles_turn_northward_winds_and_nothing_else(shards, channels):
    names = channels or NAMES
    micro, tiles = first_micro_batch(shards)
    one = learner(shards, channels, AugmentConfig(mirror=True))
    mirrored = 0
    for shift in range(8):  # some of these positions are mirrored, some are not
        moved = replace(micro, positions=micro.positions + shift)
        fields, mask = one.prepare(moved)
        for seen, own, tile in zip(si_units(one, fields), mask, tiles, strict=True):
            truth, labels = fields_and_mask(tile)
            truth = truth[[INDEX[name] for name in names]]
            if not np.array_equal(own.numpy(), labels):
                mirrored += 1
                assert np.array_equal(own.numpy(), labels[::-1])
                north = np.array([-1 if name in ("V850", "VBOT") else 1 for name in names])[:, None, None]
                truth = north * truth[:, ::-1]
            assert np.abs((seen - truth) / np.array(one.normaliser.scale)[:, None, None]).max() < 0.01
    assert 0 < mirrored < 16
