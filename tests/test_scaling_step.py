"""The time of a step: closed forms, enumeration and simulation against the formulas; machines and their sources."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.applications.scaling import machines
from raysegment.applications.scaling.step import CAUSES, Rates, Where, all_reduce_s, exchange, largest_of, times
from raysegment.applications.scaling.workloads import WORKLOADS
from raysegment.climate.checks import BadInput

RATES = Rates(0.3, 6e-3, 0.15, 0.8, 0.7, 0.03, 0.5, 0.1, 1.0)
SUMMIT = machines.find("summit")
HERE = Where(SUMMIT, WORKLOADS["deeplab"], 1024, 2, "fp16")


@pytest.mark.parametrize("name", machines.names())
def test_every_number_of_a_machine_has_a_source(name: str, tmp_path) -> None:
    machine = machines.find(name)
    assert not machine.generic
    assert all(machine.sources.values())
    again = tmp_path / "again.yaml"
    again.write_text(machines.as_text(machine))
    assert machines.read(again) == machine


def test_the_machines_that_were_asked_for_have_files() -> None:
    asked = "summit piz_daint cori_gpu abci juwels_booster perlmutter frontier dgx_a100 dgx_h100"
    assert set(asked.split()) <= set(machines.names())


def test_a_number_without_a_source_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(machines.as_text(SUMMIT).replace("EE Times 2018'", "'").replace("source: EE Times 2018\n", "source: ''\n"))
    with pytest.raises(BadInput, match="Say where the number comes from"):
        machines.read(path)


def test_an_unknown_machine_is_a_generic_one_of_that_name() -> None:
    machine = machines.find("horeka")
    assert (machine.name, machine.generic) == ("horeka", True)
    assert machines.near("sumit") == ["summit"]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
def test_the_largest_of_normals(count: int) -> None:
    drawn = np.random.default_rng(0).standard_normal((4000, count)).max(axis=1)
    assert largest_of(count) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 4000**0.5)


def test_the_largest_of_two_and_three_normals_in_closed_form() -> None:
    assert largest_of(2) == pytest.approx(np.pi**-0.5, abs=1e-5)
    assert largest_of(3) == pytest.approx(1.5 * np.pi**-0.5, abs=1e-5)


def _simulated(ranks: int, lag: int, persistent: float, jitter: float = 0.03, steps: int = 300) -> float:
    """Mean step over 1 s of compute when a rank may begin a step once all have ended the one `lag` + 1 before it."""
    random = np.random.default_rng(1)
    own = 1 + jitter * np.sqrt(persistent) * random.standard_normal(ranks)
    ends, all_ended = np.zeros(ranks), [0.0] * (lag + 1)
    for _ in range(steps):
        begin = np.maximum(ends, all_ended[-1 - lag])
        ends = begin + own + jitter * np.sqrt(1 - persistent) * random.standard_normal(ranks)
        all_ended.append(float(ends.max()))
    return (all_ended[-1] - all_ended[100]) / (len(all_ended) - 101)


def test_straggling_at_lag_0_is_what_a_simulation_finds() -> None:
    found = _simulated(256, 0, 0.0) - 1
    assert found == pytest.approx(0.03 * largest_of(256), rel=0.05)


def test_lag_1_hides_jitter_that_changes_and_keeps_what_stays() -> None:
    assert _simulated(256, 1, 0.0) - 1 < 0.05 * 0.03 * largest_of(256)
    own = 1 + 0.03 * np.random.default_rng(1).standard_normal(256)
    assert _simulated(256, 1, 1.0) == pytest.approx(own.max(), rel=1e-3)


def test_the_exchange_is_what_sending_buckets_one_by_one_takes() -> None:
    """Enumerate: bucket i is ready after i/n of backward, and is sent when the one before it has been."""
    for overlap in (0.0, 0.3, 1.0):
        for gpus in (8, 96, 6144):
            here, rates = replace(HERE, gpus=gpus), replace(RATES, overlap=overlap)
            compute_s = 0.03
            bucket_s = all_reduce_s(here, rates.efficiency, here.workload.gradient_bytes() / 8)
            backward_s, sent = overlap * 2 / 3 * compute_s, 0.0
            for number in range(1, 9):
                sent = max(sent, backward_s * number / 8) + bucket_s
            assert exchange(here, rates, compute_s) == pytest.approx(sent - backward_s, rel=1e-9)


def test_wire_times_on_summit() -> None:
    """175 MB: hierarchical and tree about 25 ms at every size from 384 on, a flat ring hundreds at 27,360 (reference, 4.5)."""
    tree = [float(all_reduce_s(replace(HERE, gpus=gpus, algorithm="tree"), 1.0, 175e6)) for gpus in (384, 6144, 27360)]
    assert all(0.020 < seconds < 0.028 for seconds in tree)
    assert tree[-1] / tree[0] < 1.02
    assert float(all_reduce_s(replace(HERE, gpus=27360, algorithm="flat_ring"), 1.0, 175e6)) > 0.3


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30000), st.integers(1, 8), st.sampled_from(machines.names()), st.sampled_from(sorted(WORKLOADS)))
def test_times_are_finite_and_never_negative_and_causes_can_be_left_out(gpus: int, batch: int, name: str, network: str) -> None:
    here = Where(machines.find(name), WORKLOADS[network], gpus, batch, "fp16")
    found = times(here, RATES)
    assert tuple(found) == CAUSES
    assert all(np.isfinite(value) and value >= 0 for value in found.values())
    for cause in CAUSES[1:]:
        assert times(here, RATES, {cause})[cause] == 0
    alone = times(replace(here, gpus=1), RATES)
    assert alone["exchange"] == alone["straggling"] == 0


@given(st.integers(2, 15000))
@settings(max_examples=30, deadline=None)
def test_more_gpus_never_make_a_step_with_local_files_shorter(gpus: int) -> None:
    fewer, more = (sum(times(replace(HERE, gpus=g), RATES, {"input"}).values()) for g in (gpus, 2 * gpus))
    assert more >= fewer * (1 - 1e-9)


def test_input_counts_where_memory_holds_too_little_and_disks_are_slow() -> None:
    here = Where(machines.find("horeka"), WORKLOADS["deepcam"], 64, 2, "fp16")
    slow = replace(RATES, disk=0.3)
    assert times(here, slow)["input"] > 0.1 * times(here, slow)["compute"]
    assert times(replace(here, gpus=512), slow)["input"] < 1e-6  # an eighth for each node: it is kept


def test_a_flat_control_plane_is_what_2018_could_not_afford() -> None:
    large = replace(HERE, gpus=27360)
    assert times(replace(large, control="flat"), RATES)["control"] > 1.0
    assert times(replace(large, control="tree"), RATES)["control"] < 0.01
    assert times(replace(large, control="none"), RATES)["control"] < times(replace(large, control="tree"), RATES)["control"]
