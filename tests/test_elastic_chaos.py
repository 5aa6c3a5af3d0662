"""Faults on purpose: what is written is what is read, each fires once, and a node's end takes the node and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysegment.applications.fake_cluster import fake_cluster, wait_for
from raysegment.applications.vanilla import VanillaConfig, vanilla
from raysegment.elastic import chaos
from raysegment.elastic.chaos import KINDS, OPTIONS, OWN, PLACES, Blow, Fault, Injector, Plan, Random, claim, unfired
from tests.small_training import config, write_shards

numbers = st.integers(0, 10**9)
positive = st.floats(1e-3, 1e6)


@st.composite
def faults(draw) -> Fault:
    kind = draw(st.sampled_from(KINDS))
    allowed = OPTIONS[kind]
    return Fault(
        kind, draw(numbers), draw(numbers),
        at=draw(st.sampled_from(PLACES)) if "at" in allowed else "step",
        factor=draw(st.floats(1.001, 1e6)) if "factor" in allowed else 0.0,
        steps=draw(numbers) if "steps" in allowed else 0,
        for_s=draw(positive) if "for" in allowed else 0.0,
    )  # fmt: skip


randoms = st.builds(Random, numbers, positive, st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple))
plans = st.builds(Plan, st.lists(faults(), unique=True).map(tuple), st.none() | randoms)


# ---------------------------------------------------------------- grammar


@given(plans)
def test_a_plan_is_its_text(plan):
    assert Plan.parse(str(plan)) == plan
    assert str(Plan.parse(str(plan))) == str(plan)


@given(faults(), faults())
def test_two_faults_have_two_marks(one, other):
    assert (one.mark == other.mark) == (one == other)
    assert "/" not in one.mark


def test_what_may_be_written():
    text = "kill@step=120,member=1; stop@step=200, member=2, for=3s; node@step=300,at=commit;"
    plan = Plan.parse(f"{text} slow@step=350,factor=5,steps=9; enospc@step=400; seed=7,every=5s")
    assert plan.faults == (
        Fault("kill", 120, 1), Fault("stop", 200, 2, for_s=3.0), Fault("node", 300, at="commit"),
        Fault("slow", 350, factor=5.0, steps=9), Fault("enospc", 400),
    )  # fmt: skip
    assert plan.random == Random(7, 5.0, ("kill", "stop", "node"))
    assert str(plan).startswith("kill@step=120,member=1; stop@step=200,member=2,for=3; node@step=300,member=0,at=commit; slow@")
    assert Plan.parse("") == Plan.parse(" ; ") == Plan()
    assert str(Plan()) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kill", r"faults like.* kind@step=NUMBER, got 'kill'"),
        ("kill@", "faults like.* each key once"),
        ("burn@step=1", "faults like.* a kind among kill, .*got 'burn'"),
        ("kill@step=x", "faults like.* a number as `step`, got 'x'"),
        ("kill@step=1.5", "faults like.* a number as `step`"),
        ("kill@member=1", "faults like.* a step, got 'member=1'"),
        ("kill@step=-1", "faults like.* no negative number"),
        ("kill@step=1,rank=2", "faults like.* of step, member, .*got 'rank=2'"),
        ("kill@step=1,step=2", "faults like.* each key once.*got 'step=2'"),
        ("kill@step=1,for=2", "faults like.* of kill step and member and at, got 'for'"),
        ("kill@step=1,at=lunch", "faults like.* `at` among step, .*got 'lunch'"),
        ("stop@step=1,for=inf", "faults like.* no negative number"),
        ("slow@step=1", "faults like.* a factor above 1"),
        ("slow@step=1,factor=1", "faults like.* a factor above 1"),
        ("slow@step=1,factor=nan", "faults like.* a factor above 1"),
        ("kill@step=1,factor=2", "faults like.* a factor above 1 for slow"),
        ("enospc@step=1,at=commit", "faults like.* of enospc step and member, got 'at'"),
        ("kill@step=1; kill@step=1,member=0", "each once, got 'kill@step=1,member=0' twice"),
        ("seed=7", "seed=7,every=5s.* seed and every"),
        ("every=5s", "seed and every"),
        ("seed=7,every=0", "`every` above 0"),
        ("seed=7,every=5m", "a number as `every`, got '5m'"),
        ("seed=7,every=5s,kinds=kill+burn", "among kill, .*got 'kill\\+burn'"),
        ("seed=7,every=5s,kinds=kill+kill", "each once"),
        ("seed=7,every=5s; seed=8,every=5s", "one random part"),
    ],
)
def test_what_cannot_be_read_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Plan.parse(text)


@given(randoms)
def test_chance_repeats_itself(chance):
    blows = list(islice(chance, 200))
    assert blows == list(islice(Plan.parse(str(chance)).random or (), 200))
    assert all(0.5 * chance.every_s <= blow.after_s <= 1.5 * chance.every_s for blow in blows)
    assert {blow.kind for blow in blows} <= {*chance.kinds}
    assert all(0 <= blow.member(3) < 3 for blow in blows)


def test_chance_hits_everybody_with_everything():
    blows = list(islice(Random(7, 5.0, KINDS), 500))
    assert {blow.kind for blow in blows} == {*KINDS}
    assert {blow.member(4) for blow in blows} == {0, 1, 2, 3}
    assert abs(sum(blow.after_s for blow in blows) / 500 - 5.0) < 0.3
    assert next(iter(Random(8, 5.0))) != next(iter(Random(7, 5.0)))
    assert all(Plan.parse(str(blow.fault(3, 4))).faults == (blow.fault(3, 4),) for blow in blows)
    assert Blow(1.0, "slow", 0.9).fault(10, 2) == Fault("slow", 10, 1, factor=5.0, steps=20)


# ---------------------------------------------------------------- due and done


@given(plans, numbers, numbers, st.sampled_from(PLACES))
def test_due_is_what_was_asked_for(plan, step, member, at):
    due = plan.due(step, member, at)
    for fault in plan.faults:
        assert (fault in due) == (fault.member == member and fault.at == at and fault.step <= step)
        assert fault in plan.due(fault.step, fault.member, fault.at)
        assert fault not in plan.due(fault.step - 1, fault.member, fault.at)


def test_a_fault_is_claimed_once(tmp_path):
    plan = Plan.parse("kill@step=3; kill@step=4")
    folder = tmp_path / "run" / "chaos"
    assert unfired(folder, plan) == [*plan.faults]
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim(folder, plan.faults[0]), range(64)))
    assert sum(claims) == 1
    assert unfired(folder, plan) == [plan.faults[1]]


def test_what_others_must_do_is_handed_back_once(tmp_path, monkeypatch):
    killed, recorded = [], []
    monkeypatch.setattr("os.kill", lambda *how: killed.append(how))
    text = "slow@step=2,factor=3; enospc@step=5; kill@step=5; term@step=1,at=commit; roster@step=4,member=1"
    plan = Plan.parse(text)
    members = [Injector(plan, tmp_path / "chaos", recorded.append) for _ in range(2)]
    handed = []
    for _ in range(2):  # a member that starts again, and the one that goes on
        for step in range(8):
            handed += [(step, fault.kind) for member in range(2) for fault in members[member].fire(step, member)]
            members[0].fire(step, 0, "commit")
        members = [members[0], Injector(plan, tmp_path / "chaos", recorded.append)]
    assert handed == [(2, "slow"), (4, "roster"), (5, "enospc")]
    assert killed == [(os.getpid(), signal.SIGTERM), (os.getpid(), signal.SIGKILL)]
    assert len(recorded) == len(plan.faults)
    assert not unfired(tmp_path / "chaos", plan)
    assert {fault.kind for fault in recorded} - {kind for _, kind in handed} <= {*OWN}


# ---------------------------------------------------------------- deeds on processes of the test's own


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for something that must become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def state(pid: int) -> str:
    """What /proc says a process does: R, S, T (stopped), Z (ended, not collected); "" when it is gone."""
    return chaos._status(Path(f"/proc/{pid}")).get("State", "")[:1]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_goes_on(sleeper):
    chaos.strike(Fault("stop", 0, for_s=0.5), sleeper.pid)
    eventually(lambda: state(sleeper.pid) == "T")
    eventually(lambda: state(sleeper.pid) == "S")
    chaos.strike(Fault("slow", 0, factor=2.0), sleeper.pid)
    assert sleeper.poll() is None
    chaos.strike(Fault("term", 0), sleeper.pid)
    assert sleeper.wait(20) == -signal.SIGTERM


class Tree:
    """A process named raylet with two children, one of which has a child; the pids as they come to life."""

    def __init__(self, folder: Path, *words: str):
        name = folder / "raylet"
        if not name.exists():
            name.symlink_to("/bin/bash")
        script = "sleep 1000 & bash -c 'sleep 1000 & wait' & wait"
        self.raylet = subprocess.Popen([name, "-c", script, *words])
        eventually(lambda: len(chaos.descendants(self.raylet.pid)) == 3)
        self.below = chaos.descendants(self.raylet.pid)

    def end(self) -> None:
        for pid in self.below:
            chaos.end(pid)
        self.raylet.kill()
        self.raylet.wait()


@pytest.fixture
def trees(tmp_path) -> Iterator[tuple[Tree, Tree]]:
    """Two nodes; the second is a session's head."""
    both = Tree(tmp_path, "--node-id=1"), Tree(tmp_path, "--node-id=2", "--head")
    yield both
    for tree in both:
        tree.end()


def test_a_node_ends_as_a_whole_and_alone(trees):
    node, head = trees
    assert {chaos.find_raylet(pid) for pid in node.below} == {node.raylet.pid}
    assert chaos.kill_node(node.below[-1])
    assert node.raylet.wait(20) == -signal.SIGKILL
    eventually(lambda: all(state(pid) in ("", "Z") for pid in node.below))
    assert all(state(pid) == "S" for pid in (head.raylet.pid, *head.below))
    assert not chaos.kill_node(node.below[-1])  # gone


def test_the_head_node_and_processes_of_no_node_are_spared(trees, sleeper, tmp_path):
    node, head = trees
    assert not chaos.kill_node(head.below[0])
    assert not chaos.kill_node(head.raylet.pid)
    assert not chaos.kill_node(sleeper.pid)
    assert not chaos.kill_node()
    plan = Plan.parse("node@step=1")
    assert plan.fire(1, 0, tmp_path / "chaos", lambda fault: None) == []
    assert unfired(tmp_path / "chaos", plan) == [*plan.faults]  # not done, and not said to be done
    assert all(state(pid) == "S" for tree in (node, head) for pid in (tree.raylet.pid, *tree.below))
    assert sleeper.poll() is None


def test_a_process_of_the_node_ends_the_node_it_is_on(tmp_path):
    """The deed done from inside, by a process that must see it through."""
    name = tmp_path / "raylet"
    name.symlink_to("/bin/bash")
    code = "from raysegment.elastic.chaos import kill_node; kill_node()"
    script = f"sleep 1000 & sleep 1000 & {sys.executable} -c '{code}'; echo not reached; wait"
    raylet = subprocess.Popen([name, "-c", script], stdout=subprocess.PIPE)
    below = []
    eventually(lambda: below.extend(chaos.descendants(raylet.pid)) or raylet.poll() is not None)
    assert raylet.wait(60) == -signal.SIGKILL
    assert raylet.stdout is not None
    assert raylet.stdout.read() == b""
    eventually(lambda: all(state(pid) in ("", "Z") for pid in below))


# ---------------------------------------------------------------- deeds on a cluster of fake nodes


@ray.remote(max_retries=0)
def fire(text: str, folder: Path) -> None:
    Plan.parse(text).fire(1, 0, folder, lambda fault: None)


@pytest.mark.ray
def test_a_node_of_a_cluster_ends_and_the_head_does_not(tmp_path):
    plan = Plan.parse("node@step=1")
    ray.shutdown()
    with fake_cluster(nodes=2) as cluster:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        ray.get(fire.options(num_cpus=0, scheduling_strategy=here).remote(str(plan), tmp_path / "head"))
        assert unfired(tmp_path / "head", plan) == [*plan.faults]
        victim, other = cluster.nodes
        there = NodeAffinitySchedulingStrategy(victim.id, soft=False)
        with pytest.raises(ray.exceptions.RayError):
            ray.get(fire.options(num_cpus=1, scheduling_strategy=there).remote(str(plan), tmp_path / "node"), timeout=60)
        assert not unfired(tmp_path / "node", plan)
        cluster.wait_dead(victim)
        wait_for(lambda: cluster.bury() == [victim], 10, "the node's own end to be noticed")
        cluster.kill_node(other)
        cluster.wait_dead(other)
        cluster.add_node()
        assert cluster.wait_alive(1) < 60
        assert ray.get(ray.remote(num_cpus=1)(lambda: 5).remote()) == 5
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
def test_plain_ray_train_recovers_and_repeats_steps(tmp_path):
    """The comparison measures what it says: 25 steps, a checkpoint every 20, so the steps from 20 on are done again."""
    settings = VanillaConfig(kills=("worker",), variants=("tuned",), after_steps=25, checkpoint_steps=20)
    result = vanilla(config(write_shards(tmp_path / "shards"), tmp_path / "run"), settings, tmp_path / "vanilla")["tuned"]
    trial = result["trials"]["worker"]
    assert result["start_s"] > 0
    assert (trial["workers_before"], trial["workers_after"]) == (3, 3)
    assert 0 < trial["resumed_s"] <= trial["recovery_s"] < 120
    assert 25 <= trial["step"] < 40
    assert trial["repeated_steps"] == trial["step"] - 19
