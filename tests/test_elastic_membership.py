"""Members and their roster as processes: killed, stopped, cut off, busy; the roster itself killed."""

from __future__ import annotations

import json
import signal
import time
from itertools import pairwise

import pytest

from raysegment.elastic.roster import Address
from raysegment.elastic.settings import ElasticConfig
from raysegment.elastic.wire import MEMBER, Refused, connect
from tests.members import RosterProcess, add_up, find, kill, start, steps_of, wait_for
from tests.small_training import config

PATIENCE = 1.0


class Fleet:
    """Members of a test, and where they write."""

    def __init__(self, folder, most=3):
        self.folder, self.out = folder, folder / "sums"
        elastic = ElasticConfig(cells=(1, most), workers_per_cell=1, patience_s=PATIENCE)
        self.config = config(folder / "shards", folder, elastic=elastic)
        self.roster = RosterProcess(self.config, folder)
        self.members = {}

    def add(self, uid, steps=10**6, trick=""):
        self.members[uid] = start(add_up, self.roster.file, uid, PATIENCE, self.out, steps, trick)
        return self.members[uid]

    def steps(self, size=0, generation=0):
        return [row for row in steps_of(self.out) if row[4] == size or not size if row[3] >= generation]

    def wait(self, size, generation=0, count=5):
        return wait_for(lambda: self.steps(size, generation)[count - 1 :], f"{count} steps of {size} members")

    def events(self, kind):
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def logged(self):
        """Steps in the log, which may be growing: a line that is not finished does not count."""
        return [json.loads(line)["step"] for line in (self.folder / "steps.jsonl").read_text().split("\n")[:-1]]

    def end(self):
        for process in self.members.values():
            process.kill()
        self.roster.end()


@pytest.fixture
def fleet(tmp_path):
    made = Fleet(tmp_path)
    yield made
    made.end()


def wait_for_step_after(fleet, moment, size):
    """Until a group of `size` has made a step after a moment."""
    wait_for(lambda: [row[0] for row in fleet.steps(size) if row[0] > moment], f"a step of {size}")


def test_members_come_are_killed_and_come_again(fleet):
    for uid in "abc":
        fleet.add(uid)
    fleet.wait(3)
    wait_for_step_after(fleet, kill(fleet.members["b"]), 2)
    fleet.add("d")
    fleet.wait(3, generation=3)
    kill(fleet.members["a"])
    kill(fleet.members["c"])
    fleet.wait(1, generation=4)
    assert [event["member"] for event in fleet.events("lost")][:1] == ["b"]
    logged = fleet.logged()
    assert logged == list(range(len(logged)))


def test_a_stopped_member_is_let_go_and_comes_back_as_another(fleet):
    for uid in "ab":
        fleet.add(uid)
    fleet.wait(2)
    wait_for_step_after(fleet, kill(fleet.members["b"], signal.SIGSTOP), 1)
    assert "silent" in fleet.events("lost")[0]["why"]
    kill(fleet.members["b"], signal.SIGCONT)
    fleet.wait(2, generation=fleet.steps(1)[-1][3] + 1)


def test_a_stopped_member_that_does_not_return_is_replaced(fleet):
    for uid in "ab":
        fleet.add(uid)
    fleet.wait(2)
    kill(fleet.members["b"], signal.SIGSTOP)
    fleet.members["b"].join(30)
    assert fleet.members["b"].exitcode == -signal.SIGKILL
    assert [event["member"] for event in fleet.events("replace")] == ["b"]


def test_a_stopped_member_is_replaced_when_the_roster_that_let_it_go_is_dead(fleet):
    for uid in "ab":
        fleet.add(uid)
    fleet.wait(2)
    kill(fleet.members["b"], signal.SIGSTOP)
    wait_for(lambda: fleet.events("lost"), "the stopped member to be let go")
    fleet.roster.kill()
    fleet.roster.start(resume=True)  # it knows nothing of that member
    fleet.members["b"].join(60)
    assert fleet.members["b"].exitcode == -signal.SIGKILL
    assert fleet.events("replace") == []


def test_a_busy_interpreter_is_no_sign_of_death(fleet):
    """Both hold the interpreter's lock three times as long as a member may be silent; the hearts beat on."""
    for uid in "ab":
        fleet.add(uid, trick="hold the lock")
    wait_for(lambda: [row for row in fleet.steps(2) if row[2] > 30], "steps after the busy one")
    rows = [row for row in fleet.steps() if row[1] == "a"]
    assert max(later[0] - earlier[0] for earlier, later in pairwise(rows)) > 2.5 * PATIENCE
    assert fleet.events("lost") == []


def test_members_go_on_without_the_roster_and_keep_their_places_with_the_next(fleet):
    for uid in "abc":
        fleet.add(uid)
    fleet.wait(3)
    fleet.roster.kill()
    moment = time.monotonic()
    wait_for_step_after(fleet, moment, 3)
    before = fleet.steps()[-1][3]
    fleet.roster.start(resume=True)
    logged = len(fleet.logged())
    wait_for(lambda: len(fleet.logged()) > logged + 50, "lines in the log")
    assert {row[3] for row in fleet.steps() if row[0] > moment} == {before}  # no new generation was needed
    found = fleet.logged()
    assert found == list(range(len(found)))
    kill(fleet.members["b"])
    fleet.wait(2, generation=before + 1)


def test_numbers_of_generations_do_not_go_back_when_everything_was_killed(fleet):
    for uid in "ab":
        fleet.add(uid)
    fleet.wait(2)
    for process in fleet.members.values():
        kill(process)
    fleet.roster.kill()
    last = json.loads((fleet.folder / "roster.json").read_text())["generation"]
    fleet.roster.start(resume=False)
    fleet.add("c")
    fleet.wait(1, generation=last + 1)


def test_nobody_without_the_token_is_heard(fleet):
    address = find(fleet.roster.file)()
    hello = {"uid": "x", "facts": {}}
    with pytest.raises(Refused):
        connect((address.host, address.port), "another token", MEMBER, hello, 5.0)
    wait_for(lambda: fleet.events("refused"), "the refusal in the log")
    connect((address.host, address.port), address.token, MEMBER, hello, 5.0).close()


def test_a_fenced_member_commits_nothing(fleet):
    """One that speaks for an old generation, or for one it has no place in, is not heard."""
    fleet.add("a")
    fleet.wait(1)
    address: Address = find(fleet.roster.file)()
    line = connect((address.host, address.port), address.token, MEMBER, {"uid": "x", "facts": {"generation": 1}}, 5.0)
    record = {"op": "record", "generation": 1, "step": 10**6, "line": {}}
    draft = {"op": "commit", "generation": 1, "draft": DRAFT, "seconds": 0.0}
    line.sendall(json.dumps(record).encode() + b"\n" + json.dumps(draft).encode() + b"\n")
    wait_for(lambda: len(fleet.events("fenced")) == 2, "two refusals")
    assert 10**6 not in fleet.logged()
    line.close()


DRAFT = {"step": 5, "tag": "x-1", "sha256": "0"}
