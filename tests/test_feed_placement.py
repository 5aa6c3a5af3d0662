"""Shards are dealt evenly, a node that comes or goes moves its own only, and no plan reads what some node holds."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysegment.feed.placement import Transfer, bytes_to_write, plan, wanted

SHARDS = [f"part-{number:05d}.arrow" for number in range(600)]
names = st.lists(st.text("abc.0123456789", min_size=1, max_size=8), min_size=1, max_size=9, unique=True)


def nodes(count: int) -> list[str]:
    return [f"10.0.0.{number}" for number in range(count)]


@given(names, st.data())
def test_every_shard_has_its_replicas_on_different_nodes(names, data):
    replicas = data.draw(st.integers(1, len(names)))
    seed, round_ = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    goal = wanted(SHARDS[:20], names, replicas, seed, round_)
    assert len(goal) == 20
    assert all(len(set(holders)) == len(holders) == replicas and set(holders) <= set(names) for holders in goal)
    shuffled = data.draw(st.permutations(names))
    assert wanted(SHARDS[:20], shuffled, replicas, seed, round_) == goal
    one_more = wanted(SHARDS[:20], names, min(replicas + 1, len(names)), seed, round_)
    assert all(set(fewer) <= set(more) for fewer, more in zip(goal, one_more, strict=True))


@pytest.mark.parametrize(("count", "replicas"), [(3, 1), (5, 2), (16, 1), (64, 3)])
def test_the_spread_is_binomial(count, replicas):
    mean = len(SHARDS) * replicas / count
    for seed in range(20):
        held = Counter(node for holders in wanted(SHARDS, nodes(count), replicas, seed) for node in holders)
        chi_square = sum((held[node] - mean) ** 2 / mean for node in nodes(count)) / (1 - replicas / count) * (1 - 1 / count)
        assert abs(chi_square - (count - 1)) < 5 * (2 * (count - 1)) ** 0.5 + 5
        assert all(abs(held[node] - mean) < 5 * mean**0.5 for node in nodes(count))


@given(st.integers(2, 9), st.integers(0, 8), st.integers(0, 9))
def test_a_node_that_leaves_moves_its_own_shards_only(count, gone, seed):
    before = nodes(count)
    after = [node for node in before if node != before[gone % count]]
    for replicas in range(1, count):
        for old, new in zip(wanted(SHARDS[:50], before, replicas, seed), wanted(SHARDS[:50], after, replicas, seed), strict=True):
            kept = [node for node in old if node in after]
            assert list(new[: len(kept)]) == kept, "those that stay keep it, in the same order"


def test_another_round_and_another_seed_are_other_draws():
    assert len({wanted(SHARDS, nodes(3), 1, seed, round_) for seed in range(3) for round_ in range(3)}) == 9
    first, second = (wanted(SHARDS, nodes(4), 1, 0, round_) for round_ in (0, 1))
    moved = sum(a != b for a, b in zip(first, second, strict=True)) / len(SHARDS)
    assert abs(moved - 0.75) < 5 * (0.75 * 0.25 / len(SHARDS)) ** 0.5


@given(names, st.data())
def test_a_plan_brings_about_what_is_wanted_and_reads_what_nobody_holds(names, data):
    shards = data.draw(st.integers(1, 12))
    sizes = data.draw(st.lists(st.integers(1, 100), min_size=shards, max_size=shards))
    goal = wanted(SHARDS[:shards], names, data.draw(st.integers(1, len(names))))
    held = {name: data.draw(st.frozensets(st.integers(0, shards - 1))) for name in names}
    transfers = plan(goal, held, sizes)
    assert len({transfer.shard for transfer in transfers}) == len(transfers)
    after, written = {name: set(held[name]) for name in names}, Counter()
    for transfer in transfers:
        holders = {name for name in names if transfer.shard in held[name]}
        assert transfer.read == (not holders)
        assert transfer.read or transfer.sender in holders
        for name in transfer.writers:
            assert transfer.shard not in after[name]
            assert name in goal[transfer.shard], "nobody gets what is not his"
            after[name].add(transfer.shard)
            written[name] += sizes[transfer.shard]
    assert all(shard in after[name] for shard, wants in enumerate(goal) for name in wants)
    assert bytes_to_write(transfers, sizes) == dict(written)
    assert plan(goal, after, sizes) == ()


def test_reading_and_sending_are_shared_out():
    everywhere = [tuple(nodes(3))] * 30
    readers = Counter(transfer.sender for transfer in plan(everywhere, dict.fromkeys(nodes(3), frozenset()), [1] * 30))
    assert set(readers.values()) == {10}
    held = {**dict.fromkeys(nodes(2), frozenset(range(30))), nodes(3)[2]: frozenset()}
    senders = Counter(transfer.sender for transfer in plan(everywhere, held, [1] * 30))
    assert senders == {"10.0.0.0": 15, "10.0.0.1": 15}


@pytest.mark.parametrize("replicas", [0, 4])
def test_as_many_replicas_as_nodes(replicas):
    with pytest.raises(ValueError, match="1 to 3 replicas"):
        wanted(SHARDS, nodes(3), replicas)


def test_a_transfer_has_different_ends():
    with pytest.raises(ValueError, match="different nodes"):
        Transfer(0, "a", ("a",), read=True)
