"""A network as a labeller: any grid in, probabilities of the classes as they occur out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raysegment.applications.labellers import NetworkLabeller, _pad, parse_labeller, without_weights
from raysegment.climate.channels import CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.synthetic import SyntheticConfig, generate
from raysegment.elastic.checkpoints import Facts, write_checkpoint
from raysegment.networks import NetworkConfig, TiramisuConfig, build

TINY = NetworkConfig(tiramisu=TiramisuConfig(first=8, growth=4, kernel=3, blocks=(1, 1, 1), dropout=0.0))
SNAPSHOT = generate(SyntheticConfig(snapshots=8, height=24, width=48), 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    mean = tuple(float(v) for v in SNAPSHOT.fields.mean((1, 2)))
    std = tuple(float(v) for v in SNAPSHOT.fields.std((1, 2)) + 1e-12)
    facts = Facts(7, 56, TINY, NAMES, mean, std, (7.5, 7.5), CLASSES, {"class_weights": [1.0, 5.0, 2.0]})
    return write_checkpoint(tmp_path, facts, build(TINY).state_dict(), {})


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
