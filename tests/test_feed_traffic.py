"""Transfers stay within every node's object store, and whatever fails is told, counted and waited for (without a Ray)."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError

from raysegment.climate.checks import BadInput
from raysegment.feed import traffic as module
from raysegment.feed.depots import AT_ONCE, Depots
from raysegment.feed.nodes import Node
from raysegment.feed.placement import plan, wanted
from raysegment.feed.traffic import Traffic, room

NAMES = ("a", "b", "c", "d")


class World:
    """Depots that do nothing, in any order; `busy` has the shards that each node's object store holds at the moment."""

    def __init__(self, sizes, store_bytes, random, failing):
        self.sizes, self.random, self.failing = sizes, random, failing
        self.busy: dict[str, Counter] = {name: Counter() for name in NAMES}
        self.results: dict[object, object] = {}
        self.done: Counter = Counter()
        nodes = {name: Node(name, name, store_bytes) for name in NAMES}
        self.depots = Depots(nodes, dict.fromkeys(NAMES, "/"), {name: self.actor(name) for name in NAMES})
        self.most: Counter = Counter()

    def actor(self, name):
        methods = {"read": self.sizes.__getitem__, "lend": lambda shard: 0, "receive": self.sizes.__getitem__}
        return SimpleNamespace(**{method: self.method(name, method, count) for method, count in methods.items()})

    def method(self, name, method, count):
        remote = partial(self.work, name, method, count)
        return SimpleNamespace(
            remote=remote, options=lambda num_returns: SimpleNamespace(remote=lambda *a: (remote(*a), object()))
        )

    def work(self, name, method, count, shard, _):
        ref = object()
        error = self.failing.get((name, method, shard))
        self.results[ref] = error or count(shard)
        self.done[name, method, shard] += 1
        return ref

    def wait(self, refs, num_returns):
        self.random.shuffle(refs)
        return refs[:1], refs[1:]

    def get(self, ref):
        result = self.results[ref]
        if isinstance(result, Exception):
            raise result
        return result


def watched(traffic: Traffic, world: World) -> Traffic:
    """With the most that any node had in flight noted."""
    plain = traffic._count

    def count(transfer, sign):
        plain(transfer, sign)
        for name in NAMES:
            world.most[name, "bytes"] = max(world.most[name, "bytes"], traffic._bytes[name])
            world.most[name, "shards"] = max(world.most[name, "shards"], traffic._flights[name])

    traffic._count = count
    return traffic


def carried_out(world, transfers, heard=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ray", SimpleNamespace(wait=world.wait, get=world.get))
        traffic = watched(Traffic(world.depots, world.sizes, heard or (lambda *news: None)), world)
        traffic.carry_out(transfers)
    return traffic


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_store_takes_more_than_its_quarter(sizes, replicas, random):
    world = World(sizes, 4 * 60, random, {})
    goal = wanted([str(shard) for shard in range(len(sizes))], NAMES, replicas)
    traffic = carried_out(world, plan(goal, dict.fromkeys(NAMES, frozenset()), sizes))
    assert (traffic.bytes_read, traffic.passed_bytes) == (sum(sizes), (replicas - 1) * sum(sizes))
    assert traffic.failed == {}
    assert set(world.done.values()) == {1}
    for name in NAMES:
        assert world.most[name, "bytes"] <= room(world.depots.nodes[name]) == 60
        assert world.most[name, "shards"] <= AT_ONCE
        assert traffic._bytes[name] == traffic._flights[name] == 0


@given(st.data(), st.randoms(use_true_random=False))
def test_what_a_lost_node_should_have_sent_or_had_is_told(data, random):
    sizes = [10] * 20
    goal = wanted([str(shard) for shard in range(20)], NAMES, 3)
    transfers = plan(goal, dict.fromkeys(NAMES, frozenset()), sizes)
    mine = [(t.shard, "read" if t.sender == "b" else "receive") for t in transfers if "b" in t.nodes]
    last = data.draw(st.integers(0, len(mine) - 1))
    failing = {("b", method, shard): ActorDiedError() for shard, method in mine[last:]}
    world = World(sizes, 4 * 60, random, failing)
    traffic = carried_out(world, transfers)
    assert list(world.depots.lost) == ["b"]
    written = {(transfer.shard, name) for transfer in transfers for name in transfer.writers} - set(traffic.failed)
    assert traffic.written_bytes == 10 * len(written)
    lost_reads = {transfer.shard for transfer in transfers if transfer.sender == "b"}
    assert all(name == "b" or shard in lost_reads for shard, name in traffic.failed)
    assert any(name == "b" for _, name in traffic.failed)


@given(st.randoms(use_true_random=False))
def test_a_damaged_source_ends_it_after_what_is_under_way(random):
    refusal = RayTaskError("read", "Traceback …", BadInput("shard", "whole", "damaged", "Stage again"))
    world = World([10] * 30, 4 * 60, random, {(name, "read", 3): refusal for name in NAMES})
    goal = wanted([str(shard) for shard in range(30)], NAMES, 4)
    with pytest.raises(BadInput, match="expected whole, got damaged"):
        carried_out(world, plan(goal, dict.fromkeys(NAMES, frozenset()), [10] * 30))
    started = {shard for _, method, shard in world.done if method == "read"}
    finished = Counter(shard for _, method, shard in world.done if method == "receive")
    assert len(started) < 30
    assert finished == dict.fromkeys(started - {3}, 3)


def test_progress_counts_copies():
    heard = []
    world = World([10] * 6, 4 * 60, np.random.default_rng(0), {})
    goal = wanted([str(shard) for shard in range(6)], NAMES, 2)
    carried_out(
        world, plan(goal, {**dict.fromkeys(NAMES, frozenset()), "a": frozenset({0})}, [10] * 6), lambda *news: heard.append(news)
    )
    done = [done for done, _, _ in heard]
    assert done == sorted(done)
    assert heard[-1][0] == heard[-1][1] > 0
