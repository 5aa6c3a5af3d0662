"""The rules of membership, without clocks and sockets: every order of events leaves them true."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysegment.climate.checks import BadInput
from raysegment.elastic.assembly import Assembly
from raysegment.elastic.ladder import Ladder
from raysegment.elastic.paces import _median_without

LADDER = Ladder(2.0)


def assembly(least=1, most=3, **changes) -> Assembly:
    return Assembly(LADDER, least, most, **changes)


def sent(machine: Assembly, op: str, uid: str | None = None) -> list[dict]:
    """Messages of a kind that have been sent (to somebody), and all forgotten."""
    found = [message for to, message in machine.out if message["op"] == op and uid in (None, to)]
    machine.out.clear()
    return found


def noted(machine: Assembly, event: str) -> list[dict]:
    return [note for note in machine.notes if note["event"] == event]


def gather(machine: Assembly, uids: str, committed: int = 0, now: float = 0.0) -> None:
    """Everybody connects and waits; time passes until they are appointed."""
    for uid in uids:
        machine.enter(uid, {"node": uid, "store": ["h", 1]}, now)
        machine.ready(uid, committed, "new", now)
    for uid in uids:
        machine.beat(uid, now + LADDER.silence_s)
    machine.tick(now + LADDER.silence_s)


def test_the_first_generation_waits_a_moment_for_those_who_start_together():
    machine = assembly(least=1, most=3)
    machine.enter("a", {}, 0.0)
    machine.ready("a", 0, "new", 0.0)
    assert machine.generation == 0
    machine.enter("b", {}, 1.0)
    machine.ready("b", 0, "new", 1.0)
    machine.beat("a", 2.5)
    machine.tick(2.5)
    assert machine.generation == 0
    machine.beat("a", 3.1)
    machine.beat("b", 3.1)
    machine.tick(3.1)
    assert (machine.generation, machine.members) == (1, ["a", "b"])
    full = assembly(most=2)
    for uid in "ab":
        full.enter(uid, {}, 0.0)
        full.ready(uid, 0, "new", 0.0)
    assert full.members == ["a", "b"]  # nobody else can come


def test_a_lost_member_breaks_the_generation_and_survivors_go_on_from_the_newest_state():
    machine = assembly()
    gather(machine, "abc")
    assert [m["rank"] for m in sent(machine, "generation")] == [0, 1, 2]
    machine.exit("b", "connection lost", 10.0)
    assert [m["generation"] for m in sent(machine, "broken")] == [1, 1, 1]
    machine.ready("a", 5, "generation", 10.1)
    assert machine.generation == 1  # c is missing, and lives
    machine.ready("c", 6, "generation", 10.2)
    appointed = sent(machine, "generation", "a")[0]
    assert machine.members == ["a", "c"]
    assert (appointed["source"], appointed["behind"], appointed["committed"]) == (1, [0], 6)
    assert not machine.is_current("b", 1)
    assert not machine.is_current("a", 1)
    assert machine.is_current("a", 2)


def test_a_newcomer_is_let_in_at_a_boundary_and_given_the_members_state():
    machine = assembly()
    gather(machine, "ab")
    machine.enter("c", {}, 10.0)
    machine.ready("c", 99, "file", 10.0)  # whatever it has: members know better
    assert len(sent(machine, "pending")) == 2
    assert machine.generation == 1
    for uid in "ab":
        machine.ready(uid, 7, "generation", 10.1)
    assert machine.members == ["a", "b", "c"]
    note = noted(machine, "generation")[-1]
    assert (note["source"], note["brought_up"], note["committed"], note["joined"]) == ("a", ["c"], 7, ["c"])


def test_without_members_the_newest_kept_state_counts_and_everybody_gets_it():
    machine = assembly(logged=12)
    for uid, (committed, origin) in {"a": (9, "file"), "b": (11, "kept"), "c": (11, "kept")}.items():
        machine.enter(uid, {}, 0.0)
        machine.ready(uid, committed, origin, 0.0)
    note = noted(machine, "generation")[-1]
    assert (note["source"], note["brought_up"], note["repeated"]) == ("b", ["a", "c"], 1)


def test_who_comes_back_after_a_generation_was_formed_without_it_is_fenced():
    machine = assembly()
    gather(machine, "ab")
    machine.beat("a", 5.0)
    machine.tick(5.0)  # b has been silent
    assert noted(machine, "lost")[-1]["member"] == "b"
    machine.ready("a", 3, "generation", 5.0)
    assert machine.members == ["a"]
    machine.enter("b", {"generation": 1, "holds": True}, 6.0)
    assert sent(machine, "welcome", "b")[0]["generation"] == 0
    assert not machine.is_current("b", 1)
    machine.ready("b", 50, "generation", 6.0)  # it went on alone, for nothing
    machine.ready("a", 4, "generation", 6.1)
    note = noted(machine, "generation")[-1]
    assert (note["source"], note["brought_up"], note["committed"]) == ("a", ["b"], 4)


def test_below_the_least_the_fleet_waits_and_says_so():
    machine = assembly(least=2, most=3)
    gather(machine, "ab")
    machine.exit("b", "connection lost", 10.0)
    machine.ready("a", 4, "generation", 10.0)
    assert machine.generation == 1
    assert noted(machine, "waits")[-1]["why"] == "1 of at least 2 members are there"
    machine.enter("c", {}, 20.0)
    machine.ready("c", 0, "new", 20.0)
    assert machine.members == ["a", "c"]


def test_a_member_that_all_others_wait_for_is_let_go_and_replaced_unless_it_returns():
    machine = assembly()
    gather(machine, "abc")
    pace = {"load_s": 0.0, "compute_s": 0.1, "micro_batches": 1}
    for uid in "ab":
        machine.reached(uid, 1, 0, pace, 10.0)
    for moment in (11.0, 14.9):
        for uid in "abc":
            machine.beat(uid, moment)
        machine.tick(moment)
        assert machine.members == ["a", "b", "c"]
        assert not machine.broken
    for uid in "abc":
        machine.beat(uid, 20.1)
    machine.tick(20.1)  # 10.1 s late: twice the limit of 10 s
    assert "late at step 0" in noted(machine, "lost")[-1]["why"]
    assert sent(machine, "ejected", "c")
    machine.beat("a", 36.2)
    machine.beat("b", 36.2)
    machine.tick(36.2)
    assert noted(machine, "replace")[-1]["member"] == "c"


def test_members_keep_their_places_when_the_roster_is_another():
    machine = assembly(generation=0)
    machine.resume(7, ["a", "b"], 0.0)
    machine.enter("a", {"generation": 7, "holds": True}, 1.0)
    assert sent(machine, "welcome", "a")[0]["generation"] == 7
    assert machine.is_current("a", 7)
    machine.beat("a", 6.1)
    machine.tick(6.1)  # b has not come back
    assert machine.broken
    machine.ready("a", 3, "generation", 6.2)
    assert (machine.generation, machine.members) == (8, ["a"])


def test_who_was_let_go_and_is_back_but_busy_holds_up_nobody():
    """Its connection is there again at once, while it still computes: others go on, and its loss is one loss."""
    machine = assembly()
    gather(machine, "abc")
    machine.exit("b", "connection lost", 10.0)
    machine.ready("a", 5, "generation", 10.0)
    for uid in "ac":
        machine.beat(uid, 16.1)
    machine.tick(16.1)  # c is not at the meeting
    assert machine.members == ["a"]
    machine.exit("a", "connection lost", 17.0)
    for moment in (17.0, 30.0, 60.0):
        machine.enter("c", {"generation": 1}, moment)
        machine.tick(moment)
    assert len(noted(machine, "lost")) == 3


def test_back_in_time_for_the_meeting_is_not_back_in_the_generation():
    machine = assembly()
    gather(machine, "abc")
    machine.exit("c", "connection lost", 10.0)
    machine.enter("c", {"generation": 1, "holds": False}, 10.1)  # connected, not ready
    machine.ready("a", 5, "generation", 10.2)
    machine.ready("b", 5, "generation", 10.3)
    assert machine.members == ["a", "b"]


def test_stopping_waits_for_nobody():
    machine = assembly(least=3)
    machine.stop("SIGTERM", 0.0)
    machine.tick(LADDER.meeting_s + 1)
    assert machine.done
    few = assembly(least=3)
    gather(few, "a")
    assert few.members == []
    few.stop("SIGTERM", 5.0)
    few.beat("a", 5.1)
    few.tick(5.1)
    assert few.members == ["a"]  # so that what it has is committed
    assert not few.done


def test_a_member_whose_update_broke_off_is_no_source():
    machine = assembly()
    gather(machine, "a")
    machine.enter("b", {"generation": 0}, 10.0)
    machine.ready("b", 50, "kept", 10.0)
    machine.ready("a", 7, "generation", 10.0)
    assert machine.members == ["a", "b"]
    machine.exit("c", "", 11.0)
    machine.ready("b", 50, "stale", 11.0)  # appointed, interrupted, not brought up to date
    machine.ready("a", 7, "generation", 11.0)
    note = noted(machine, "generation")[-1]
    assert (note["source"], note["committed"], note["brought_up"]) == ("a", 7, ["b"])


def test_stragglers_are_named_with_their_cause_and_ejected_when_wished():
    for eject in (False, True):
        machine = assembly(eject_stragglers=eject)
        gather(machine, "abc")
        for step in range(20):
            for uid, load in {"a": 0.0, "b": 0.01, "c": 0.5}.items():
                machine.reached(uid, 1, step, {"load_s": load, "compute_s": 0.1, "micro_batches": 2}, 3.0)
        machine.look_for_stragglers(3.0)
        note = noted(machine, "straggler")
        assert [(n["member"], n["rank"], n["cause"], n["node"], n["ejected"]) for n in note] == [("c", 2, "load", "c", eject)]
        assert note[0]["factor"] > 3
        assert machine.is_current("c", 1) != eject


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "exit", "ready", "beat", "tick", "reached", "stop"]),
        st.sampled_from("abcde"),
        st.integers(0, 9),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.integers(1, 3))
def test_whatever_happens_the_rules_hold(events, least):
    """Numbers of generations only grow; each has its own members, ranked once, none fewer than the least; no rank twice."""
    machine, now, generations = assembly(least, 5), 0.0, []
    for kind, uid, number in events:
        now += number / 3
        if kind == "enter":
            machine.enter(uid, {"generation": machine.generation, "holds": number > 4}, now)
        elif kind == "exit":
            machine.exit(uid, "gone", now)
        elif kind == "ready":
            machine.ready(uid, number, "generation" if number > 5 else "file", now)
        elif kind == "beat":
            machine.beat(uid, now)
        elif kind == "reached":
            machine.reached(uid, machine.generation, number, {}, now)
        elif kind == "tick":
            machine.tick(now)
        else:
            machine.stop("test", now)
        appointed = [(to, m) for to, m in machine.out if m["op"] == "generation"]
        machine.out.clear()
        if appointed:
            number = appointed[0][1]["generation"]
            assert all(number > before for before in generations)
            generations.append(number)
            assert sorted(m["rank"] for _, m in appointed) == list(range(len(appointed)))
            assert {m["generation"] for _, m in appointed} == {number}
            assert {m["size"] for _, m in appointed} == {len(appointed)}
            assert len(appointed) >= (1 if machine.stopping else least)
            assert len({(m["source"], tuple(m["behind"])) for _, m in appointed}) == 1
            assert [to for to, m in sorted(appointed, key=lambda a: a[1]["rank"])] == machine.members
        for other in "abcde":
            assert not machine.is_current(other, machine.generation - 1)


@pytest.mark.parametrize("patience", [0.1, 1000.0, float("nan")])
def test_an_impossible_patience_is_refused(patience):
    with pytest.raises(ValueError, match="patience_s"):
        Ladder(patience)


def test_the_ladder_rises_and_is_checked_against_rays_limits():
    times = [float(line.split()[0]) for line in LADDER.lines()]
    assert times == sorted(times)
    LADDER.check(0.5, 60.0)
    with pytest.raises(BadInput, match="HEALTH_CHECK_INTERVAL"):
        LADDER.check(30.0, 60.0)
    with pytest.raises(BadInput, match="START_TIMEOUT"):
        LADDER.check(0.5, 10.0)


@given(st.lists(st.sampled_from([0.5, 1.0, 1.0, 1.5, 4.0, 9.0]), min_size=1, max_size=12))
def test_the_median_of_the_others_is_found_without_going_through_them(values):
    for place, value in enumerate(values):
        others = values[:place] + values[place + 1 :]
        assert _median_without(sorted(values), value) == (median(others) if others else value)
