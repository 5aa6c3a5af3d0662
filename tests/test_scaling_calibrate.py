"""Calibration: formulas recover links that are known, machine files say what was not measured; on Ray, a real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raysegment.applications.scale_calibrate import SIZES, machine_of, ring_of, training
from raysegment.applications.scaling import machines
from raysegment.applications.scaling.step import ring_s
from raysegment.cli import BAD_INPUT, main


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_ring_of_known_links_is_recovered(ranks: int) -> None:
    found = ring_of(ranks, [float(ring_s(ranks, size, 3e9, 20e-6)) for size in SIZES])
    assert found.latency_s == pytest.approx(20e-6, rel=0.01)
    assert found.bytes_per_s == pytest.approx(3e9, rel=0.01)


def test_jitter_is_the_spread_of_compute_without_the_first_steps() -> None:
    random = np.random.default_rng(0)
    compute = 0.1 * np.exp(0.05 * random.standard_normal((4, 200)))
    compute[:, :2] = 10
    found = training(np.stack([compute, np.full_like(compute, 0.01)], axis=2).tolist())
    assert found["jitter"] == pytest.approx(0.05, rel=0.1)
    assert found["exchange_s"] == pytest.approx(0.01)


def test_a_machine_file_says_what_was_not_measured(tmp_path: Path) -> None:
    group = ring_of(2, [1e-4, 2e-4, 3e-4, 1e-2])
    measured = {"members": 2, "nodes": 1, "per_node": 2, "backend": "gloo", "peaks": {"fp32": 1e11, "bf16": 2e11},
                "inside": group, "between": None, "compute_s": 0.1, "exchange_s": 0.01, "jitter": 0.04}  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(machines.as_text(machine_of("mine", measured)))
    machine = machines.find(str(path))
    assert (machine.jitter, machine.peak_fp16_tflops, machine.generic) == (0.04, 0.2, False)
    assert "one node" in machine.sources["node_bytes_per_s"]
    assert "not measured" in machine.sources["disk_bytes_per_s"]


def test_too_few_members_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "calibrate", "members=1"]) == BAD_INPUT
    assert "at least 2 members" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_this_machine_is_measured_by_ray_actors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.yaml"
    assert main(["scale", "calibrate", "members=2", "steps=6", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["inside"]["bytes_per_s"] > 1e6
    assert machines.read(out).intra_bytes_per_s == pytest.approx(found["inside"]["bytes_per_s"])
