"""A network as a labeller: any grid in, probabilities of the classes as they occur out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import torch

from raysegment.applications.labellers import NetworkLabeller, _pad, parse_labeller, without_weights
from raysegment.applications.mask_layout import Group
from raysegment.applications.segment import BadSource, SegmentConfig, label_group
from raysegment.archive.masks import read_masks, read_probabilities
from raysegment.archive.snapshots import open_source
from raysegment.climate.channels import CLASSES, INDEX, NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.synthetic import SyntheticConfig, generate
from raysegment.elastic.checkpoints import Facts, read_checkpoint, write_checkpoint
from raysegment.feed.stream import FeedConfig
from raysegment.learning.metrics import confusion, iou
from raysegment.learning.optim import OptimConfig
from raysegment.learning.step import LearnConfig
from raysegment.networks import NetworkConfig, TiramisuConfig, build
from tests import layouts
from tests.small_archive import fields_and_mask
from tests.small_training import config, write_shards
from tests.training_members import alone

TINY = NetworkConfig(tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1, 1), dropout=0.0))
SNAPSHOT = generate(SyntheticConfig(snapshots=8, height=24, width=48), 1)


def write(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A checkpoint that reads `names`; its first weights for a channel are the same wherever the channel stands."""
    torch.manual_seed(3)
    places, weights = [INDEX.get(name, 0) for name in names], build(TINY).state_dict()
    weights["enter.conv.weight"] = weights["enter.conv.weight"][:, places]
    fields = SNAPSHOT.fields[places]
    mean, std = (tuple(values.tolist()) for values in (fields.mean((1, 2)), fields.std((1, 2)) + 1e-12))
    network = replace(TINY, channels=len(names))
    facts = Facts(7, 56, network, names, mean, std, (7.5, 7.5), CLASSES, {"class_weights": [1.0, 5.0, 2.0]})
    return write_checkpoint(folder, facts, weights, {})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path)


def labeller(path: Path) -> NetworkLabeller:
    made = parse_labeller(path)
    assert isinstance(made, NetworkLabeller)
    return made


def test_probabilities_sum_to_one_and_the_mask_is_their_maximum(checkpoint: Path) -> None:
    mask, probabilities = labeller(checkpoint).label(SNAPSHOT.fields, SNAPSHOT.grid)
    assert probabilities.shape == (3, 24, 48)
    assert np.allclose(probabilities.sum(0), 1.0, atol=1e-5)
    assert np.array_equal(mask, probabilities.argmax(0))


@pytest.mark.parametrize("shape", [(24, 48), (25, 48), (24, 50), (73, 144), (11, 21)])
def test_any_grid_gives_its_own_shape(checkpoint: Path, shape: tuple[int, int]) -> None:
    fields = np.random.default_rng(0).normal(size=(16, *shape)).astype(np.float32)
    mask, _ = labeller(checkpoint).label(fields, Grid.global_(*shape))
    assert mask.shape == shape


def test_turning_the_map_turns_the_mask(checkpoint: Path) -> None:
    fields, grid = SNAPSHOT.fields, SNAPSHOT.grid
    one = labeller(checkpoint).probabilities(fields, grid)
    other = labeller(checkpoint).probabilities(np.roll(fields, 8, axis=2), grid)
    assert np.allclose(np.roll(one, 8, axis=2), other, atol=2e-2)  # bf16


def test_finer_map_is_labelled_at_the_training_spacing(checkpoint: Path) -> None:
    coarse, fine = SNAPSHOT.grid, Grid(np.linspace(-86.25, 86.25, 47), np.arange(96) * 3.75)
    field = np.repeat(np.repeat(SNAPSHOT.fields, 2, 1)[:, :47], 2, 2)
    shares = [np.bincount(labeller(checkpoint).label(f, g)[0].ravel(), minlength=3) / g.shape[0] / g.shape[1]
              for f, g in ((SNAPSHOT.fields, coarse), (field, fine))]  # fmt: skip
    assert np.allclose(*shares, atol=0.15)


@pytest.mark.parametrize("blocks", [(1, 1), (1, 1, 1)])
def test_a_network_sees_as_far_as_it_says(blocks: tuple[int, ...]) -> None:
    """No farther, and nearly as far: all weights positive, so that nothing cancels."""
    network = build(replace(TINY, channels=1, norm="none", tiramisu=replace(TINY.tiramisu, blocks=blocks))).double().eval()
    for weight in network.parameters():
        weight.data.abs_()
    reach, size, columns = int(network.reach), 96, torch.zeros(1, dtype=torch.int64)  # pyright: ignore[reportArgumentType]
    spots = torch.ones(1, 1, size, size, dtype=torch.float64)
    spots[..., size // 2 + 1, size // 2 + 1] = 1e3
    with torch.inference_mode():
        apart = (network(spots, columns) - network(torch.ones_like(spots), columns))[0, 0].abs() > 1e-9
    rows, cols = (torch.nonzero(apart.any(axis)).ravel() - size // 2 - 1 for axis in (1, 0))
    assert reach / 2 < max(rows.abs().max(), cols.abs().max()) <= reach


@pytest.mark.parametrize("width", [160, 158])
@pytest.mark.parametrize("tile", [(32, 48), (16, 8), (64, 1000)])
def test_pieces_give_what_the_whole_map_does(tmp_path: Path, width: int, tile: tuple[int, int]) -> None:
    """Whatever their size, and where the map has to be padded to close the circle, too."""
    path = write(tmp_path)
    grid, fields = Grid.global_(160, width), np.random.default_rng(2).normal(size=(16, 160, width)).astype(np.float32)
    fields += np.linspace(0, 40, width, dtype=np.float32)  # strides of the whole map begin where no piece's would
    grid = Grid(grid.lat[0] + 0.1 * np.arange(160), grid.lon)
    whole = labeller(path)
    loaded = replace(whole._loaded, spacing_deg=(grid.dlat, grid.dlon))
    for made in (whole, pieces := replace(whole, tile=tile)):
        made.__dict__["_loaded"] = loaded
    mask, probabilities = whole.label(fields, grid)
    cut, blended = pieces.label(fields, grid)
    np.testing.assert_allclose(blended, probabilities, atol=1e-6)
    assert np.array_equal(cut, mask)


def test_weights_of_the_loss_are_taken_out_again() -> None:
    truth, weights = torch.tensor([0.90, 0.04, 0.06]), torch.tensor([0.5, 8.0, 4.0])
    trained = truth * weights / (truth * weights).sum()
    assert torch.allclose(without_weights(trained, weights), truth)


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("shape", [(24, 48), (25, 47), (3, 40)])
def test_padding_divides_and_cuts_back(periodic: bool, shape: tuple[int, int]) -> None:
    fields = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(1, 1, *shape)
    padded, rows, columns = _pad(fields, 8, periodic)
    assert padded.shape[-2] % 8 == 0
    assert padded.shape[-1] % 8 == 0
    assert torch.equal(padded[..., rows, columns], fields)


def test_padding_goes_around_the_circle() -> None:
    fields = torch.arange(50.0).expand(1, 1, 8, 50)
    padded, _, columns = _pad(fields, 8, True)
    assert padded[0, 0, 0, columns.start - 1] == 49
    assert padded[0, 0, 0, columns.stop] == 0


def test_neither_rules_nor_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="rules:PRESET"):
        parse_labeller(tmp_path / "nothing")
    with pytest.raises(BadInput):
        parse_labeller(tmp_path)


def test_a_network_of_some_channels_sees_those_and_no_others(tmp_path: Path) -> None:
    some = labeller(write(tmp_path, ("TMQ", "PSL", "V850")))
    known = some.probabilities(SNAPSHOT.fields, SNAPSHOT.grid)
    for name in NAMES:
        fields = SNAPSHOT.fields.copy()
        fields[INDEX[name]] = fields[INDEX[name], ::-1]
        same = np.array_equal(some.probabilities(fields, SNAPSHOT.grid), known)
        assert same == (name not in ("TMQ", "PSL", "V850")), name


def test_a_file_may_lack_what_the_network_does_not_read(tmp_path: Path) -> None:
    """And what it lacks it is told by name; the mask is on the file's own grid, which is not the network's."""
    made = labeller(write(tmp_path / "network", ("TMQ", "PSL")))
    path = layouts.merra2(tmp_path / "x.nc")
    with open_source(path) as source:
        expected, _ = made.label(source.read(0).fields, layouts.GRID)
    with netCDF4.Dataset(path, "a") as data:
        for name in ("T500", "U850", "TS"):
            data.renameVariable(name, f"not_{name}")
        data["PS"][:] = np.nan
    label_group(Group("x", ((path, None),)), made, tmp_path, SegmentConfig(probabilities=True))
    masks, probabilities = read_masks(tmp_path / "x.mask.nc"), read_probabilities(tmp_path / "x.mask.nc")
    assert np.array_equal(masks.masks[0], expected)
    assert masks.axes.lon[0] == -180.0
    assert probabilities is not None
    assert np.array_equal(probabilities[0].argmax(0), expected)
    wind = labeller(write(tmp_path / "wind", ("TMQ", "U850")))
    with pytest.raises(BadSource) as caught:
        label_group(Group("y", ((path, None),)), wind, tmp_path, SegmentConfig())
    assert "none for U850" in caught.value.skipped.got


@pytest.mark.parametrize("shape", [(24, 48), (36, 72)])
def test_the_order_of_channels_is_the_networks_own_affair(tmp_path: Path, shape: tuple[int, int]) -> None:
    grid, fields = Grid.global_(*shape), np.random.default_rng(1).normal(size=(16, *shape)).astype(np.float32)
    one = labeller(write(tmp_path / "one", ("TMQ", "U850", "V850", "PSL"))).probabilities(fields, grid)
    other = labeller(write(tmp_path / "other", ("PSL", "V850", "TMQ", "U850"))).probabilities(fields, grid)
    assert np.allclose(one, other, atol=2e-2)  # bf16
    assert not np.allclose(one, labeller(write(tmp_path / "next", ("TMQ", "U850", "V850", "PS"))).probabilities(fields, grid))


def test_a_network_of_unknown_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"channels among TMQ, .* got CHLOROPHYLL"):
        parse_labeller(write(tmp_path, ("TMQ", "CHLOROPHYLL")))


def test_four_channels_from_training_to_the_mask(tmp_path: Path) -> None:
    """Cyclones lie where PSL is low, rivers where TMQ is high: who reads these finds both in maps it has not seen."""
    names = ("PSL", "U850", "TMQ", "V850")
    learn = LearnConfig(global_batch=6, micro_batch=3, seed=3, optim=OptimConfig(lr=3e-2))
    shards = write_shards(tmp_path / "shards")
    asked = config(shards, "", channels=names, steps=30, learn=learn, feed=FeedConfig(kind="direct"))
    facts = read_checkpoint(alone(asked, tmp_path / "run").run.folder).facts
    assert (facts.channels, facts.network.channels, len(facts.mean), len(facts.std)) == (names, 4, 4, 4)
    made, counts = labeller(tmp_path / "run"), np.zeros((3, 3))
    for seed in range(100, 104):
        fields, truth = fields_and_mask(seed)
        counts += confusion(made.label(fields, Grid.global_(16, 32))[0], truth, 3).numpy()
    assert iou(counts)[1:].min() > 0.6
