"""The order of tiles: a bijection per epoch, the same union for any group of workers, resumable from one integer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.feed.order import Order, mix, permute

seeds = st.integers(0, 2**63)


@st.composite
def orders(draw) -> Order:
    micro, block = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    window = block * draw(st.integers(0, 6))
    return Order(draw(st.integers(1, 200)), micro * draw(st.integers(1, 12)), micro, draw(seeds), window, block)


@given(st.integers(1, 3000), st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_a_bijection(size, keys):
    assert sorted(permute(place, size, keys) for place in range(size)) == list(range(size))


@given(orders(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_tile_once_per_epoch(order, epoch):
    positions = range(epoch * order.tiles, (epoch + 1) * order.tiles)
    assert sorted(order.tile(position) for position in positions) == list(range(order.tiles))


@given(orders(), st.integers(0, 10**9), st.integers(1, 17))
@settings(deadline=None)
def test_every_group_of_workers_shares_the_same_step(order, step, world_size):
    shares = [order.micro_batches(step, rank, world_size) for rank in range(world_size)]
    assert [p for share in shares for micro in share for p in micro] == list(order.step_positions(step))
    assert all(len(micro) == order.micro_batch for share in shares for micro in share)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(orders(), st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=5))
@settings(deadline=None)
def test_changing_the_group_at_any_step_continues_the_same_line(order, first, phases):
    consumed, step = [], first
    for steps, world_size in phases:
        for _ in range(steps):
            for rank in range(world_size):
                consumed += [p for micro in order.micro_batches(step, rank, world_size) for p in micro]
            step += 1
    assert consumed == list(range(order.cursor(first), order.cursor(step)))


@given(orders(), st.integers(0, 500), st.integers(0, 9), st.integers(1, 6), st.data())
@settings(deadline=None)
def test_a_workers_line_is_its_steps_one_after_the_other(order, first, steps, world_size, data):
    rank, size = data.draw(st.integers(0, world_size - 1)), data.draw(st.integers(1, 7))
    line = order.line(first, first + steps, rank, world_size)
    expected = [m for step in range(first, first + steps) for m in order.micro_batches(step, rank, world_size)]
    assert [list(micro) for micro in line] == expected
    chunks = [line.positions(start, start + size) for start in range(0, line.count, size)]
    assert [p for chunk in chunks for p in chunk] == [p for micro in expected for p in micro]
    assert all(chunks)


@pytest.mark.parametrize("window", [0, 4096])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 1000, 10**9])
def test_any_number_of_tiles_is_served_at_once(tiles, window):
    order = Order(tiles, 6, 2, seed=7, window=window, block=max(1, window // 32))
    found = [order.tile(position) for position in range(3 * tiles if tiles < 10 else 2000)]
    assert all(0 <= tile < tiles for tile in found)
    if tiles == 10**9:
        assert len(set(found)) == len(found)
    if tiles == 10**9 and not window:
        assert max(found) > 9e8
        assert min(found) < 1e8


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 6), seeds, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_a_window_needs_its_own_blocks_only(tiles, block, blocks, seed, epoch):
    """Whoever consumes a window's tiles needs as many blocks as it is long; the last block's end may be made up for."""
    order = Order(tiles, 1, 1, seed, block * blocks, block)
    needed = []
    for start in range(0, tiles, order.window):
        places = range(start, min(start + order.window, tiles))
        needed.append({order.tile(epoch * tiles + place) // block for place in places})
    spare = -tiles % block
    assert all(len(window) <= blocks + spare for window in needed)
    assert sum(len(window) for window in needed) <= -(-tiles // block) + spare


@pytest.mark.parametrize("window", [0, 20])
def test_epochs_and_seeds_shuffle_differently(window):
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        order = Order(100, 10, 1, seed, window, max(1, window // 5))
        return tuple(order.tile(number * 100 + place) for place in range(100))

    shuffles = {epoch(seed, number) for seed in range(5) for number in range(5)}
    assert len(shuffles) == 25
    assert tuple(range(100)) not in shuffles


def test_small_permutations_are_all_reached_about_equally_often():
    counts: dict[tuple[int, ...], int] = {}
    order = Order(4, 4, 1, seed=3)
    for epoch in range(2400):
        key = tuple(order.tile(4 * epoch + place) for place in range(4))
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert max(counts.values()) < 200  # 100 expected of each


def test_a_step_may_straddle_epochs():
    order = Order(tiles=10, global_batch=4, micro_batch=2, seed=1)
    assert [order.epoch(position) for position in order.step_positions(2)] == [0, 0, 1, 1]
    assert order.steps(1) == 3
    assert order.steps(2) == 5
    assert order.steps(0.5) == 2


def test_the_hash_is_splitmix64():
    assert mix(0) == 0xE220A8397B1DCDAF  # first output of the published generator seeded with 0


@pytest.mark.parametrize(("tiles", "batch", "micro"), [(0, 4, 2), (10, 5, 2), (10, 0, 1), (10, 4, 0)])
def test_impossible_orders_are_refused(tiles, batch, micro):
    with pytest.raises(ValueError, match="expected"):
        Order(tiles, batch, micro)


@pytest.mark.parametrize(("window", "block"), [(5, 2), (-2, 1), (4, 0)])
def test_impossible_windows_are_refused(window, block):
    with pytest.raises(ValueError, match="expected"):
        Order(10, 4, 2, 0, window, block)
