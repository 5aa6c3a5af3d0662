"""Checkpoints: what was written comes back bit for bit, and nothing damaged is ever taken for a checkpoint."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from raysegment.climate.channels import CLASSES, NAMES
from raysegment.climate.checks import BadInput
from raysegment.elastic import checkpoints
from raysegment.elastic.checkpoints import FACTS, STATE, WEIGHTS, Facts, newest_valid, read_checkpoint, write_checkpoint
from raysegment.networks import NetworkConfig


def facts(step: int = 3) -> Facts:
    return Facts(
        step=step,
        cursor=8 * step,
        network=NetworkConfig(name="deeplab", norm="none"),
        channels=NAMES,
        mean=tuple(float(index) / 3 for index in range(16)),
        std=(1e-8,) * 16,
        spacing_deg=(0.234, 0.3125),
        classes=CLASSES,
        provenance={"run": "storms", "shards": {"tiles": 64}},
        training={"schedule": {"warmup": 5}},
    )


def tensors(step: int = 3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=random), "norm.running_mean": torch.full((4,), float(step))}
    state = {"momentum/conv.weight": torch.randn(4, 3, 3, 3, generator=random).bfloat16(), "count": torch.tensor(step)}
    return weights, state


def write(folder, step: int = 3, keep: int = 3):
    return write_checkpoint(folder, facts(step), *tensors(step), keep=keep)


def test_what_was_written_comes_back(tmp_path):
    path = write(tmp_path)
    checkpoint = read_checkpoint(path)
    weights, state = tensors()
    assert checkpoint.facts == facts()
    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in state.items())
    assert not list(tmp_path.glob(".*"))


def test_weights_need_neither_this_package_nor_the_training_state(tmp_path):
    path = write(tmp_path)
    assert torch.equal(load_file(path / WEIGHTS)["conv.weight"], tensors()[0]["conv.weight"])
    assert json.loads((path / FACTS).read_text())["network"]["name"] == "deeplab"
    (path / STATE).unlink()
    assert read_checkpoint(path, training=False).state == {}
    with pytest.raises(BadInput, match="state"):
        read_checkpoint(path)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("name", [WEIGHTS, STATE, FACTS])
def test_a_missing_or_truncated_file_is_damage(tmp_path, name):
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    content = (newer / name).read_bytes()
    for size in [*range(0, len(content), max(1, len(content) // 50)), len(content) - 1]:
        (newer / name).write_bytes(content[:size])
        assert checkpoints.damage(newer) is not None, size
    assert newest_valid(tmp_path) == older
    (newer / name).unlink()
    assert newest_valid(tmp_path) == older
    (older / name).unlink()
    assert newest_valid(tmp_path) is None


@given(st.sampled_from([WEIGHTS, STATE, FACTS]), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_is_damage_or_changes_nothing(tmp_path_factory, name, where, bit):
    folder = tmp_path_factory.getbasetemp() / "flip"
    older, newer = write(folder, 1), write(folder, 2)
    content = bytearray((newer / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (newer / name).write_bytes(content)
    if checkpoints.damage(newer) is None:  # a bit of the JSON's own white space
        assert name == FACTS
        assert read_checkpoint(newer).facts == facts(2)
    else:
        assert newest_valid(folder) == older
    write(folder, 2)  # the trainer comes by again and replaces what is damaged
    assert newest_valid(folder) == newer
    assert checkpoints.damage(newer) is None


def test_a_writer_that_dies_leaves_no_checkpoint(tmp_path, monkeypatch):
    older = write(tmp_path, 1)

    def die(*_):
        raise KeyboardInterrupt

    for victim in ("_put", "fsync", "_facts_json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, victim, die)
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path, 2)
        assert newest_valid(tmp_path) == older
    (tmp_path / ".step-00000002.1.tmp").mkdir()  # as after kill -9
    assert newest_valid(tmp_path) == older
    assert len(checkpoints.remove_orphans(tmp_path)) == 1
    assert sorted(os.listdir(tmp_path)) == ["step-00000001"]


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    write(tmp_path / "checkpoints", 1)
    newest = write(tmp_path / "checkpoints", 2)
    assert read_checkpoint(tmp_path).path == newest
    assert read_checkpoint(tmp_path / "checkpoints").path == newest
    with pytest.raises(BadInput, match="run folder"):
        read_checkpoint(tmp_path / "elsewhere")


def test_facts_must_fit_together():
    with pytest.raises(ValueError, match="as many names"):
        Facts(0, 0, NetworkConfig(channels=3), NAMES, (0.0,) * 16, (1.0,) * 16, (1.0, 1.0), CLASSES)
