"""`raysegment replay RUN --steps a:b`: some steps of a run computed once more, here, and held against what the run logged.

Training gives the same bits for any number of members (see docs/elastic.md), so one process can check what any fleet did:
it takes the nearest checkpoint at or before step a, computes to step b with the same arithmetic, and compares each step's
line and every digest of the state that the run has put down.

    12:24   the steps 12 … 23; the state "at step 12" is that before step 12, as in a checkpoint's name
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raysegment import config as configuration
from raysegment.archive.manifest import Manifest, manifest_bytes, set_id
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import Damaged, list_checkpoints, read_checkpoint, read_facts
from raysegment.elastic.runs import Run, environment, jsonable, read_lines
from raysegment.elastic.safe import state_sha256, step_of
from raysegment.elastic.settings import TrainConfig, other_values
from raysegment.elastic.worker import ensure_equal_bits, make_learner
from raysegment.feed.batches import StepInput
from raysegment.feed.direct import DirectStream
from raysegment.feed.order import Order
from raysegment.feed.quarantine import FILE, Quarantine
from raysegment.feed.store import TileStore
from raysegment.learning.state import TrainState, restore, views
from raysegment.learning.step import Learner, StepInfo

_COMPARED = ("loss", "grad_norm", "lr", "samples", "quarantined", "skipped", "cursor", "tiles")  # of a step's line
_SEED = "the seed"


@dataclass(frozen=True)
class Span:
    """The steps [first, last)."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise BadInput("--steps", "a:b with 0 <= a < b", f"{self.first}:{self.last}", "Write for example --steps 12:24.")

    @staticmethod
    def parse(text: str) -> Span:
        """ "12:24", or "12" for that step alone."""
        first, colon, last = text.partition(":")
        if not first.isdecimal() or (colon and not last.isdecimal()):
            raise BadInput("--steps", "two whole numbers a:b", text, "Write for example --steps 12:24.")
        return Span(int(first), int(last) if colon else int(first) + 1)


@dataclass(frozen=True)
class Difference:
    """Where the run and its replay part: `step` (None: not about one), what, and both values."""

    step: int | None
    what: str
    logged: Any
    found: Any


def replay(
    folder: str | Path,
    steps: Span,
    shards: str = "",
    progress: Callable[[int, int, str], None] = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compute the steps again and compare; `equal` says how that ended, `differences` where, in the order of steps.

    `shards` is where the run's shard set is now, if not where it was. `progress(done, total, note)` hears of steps, `say` of
    checkpoints that are passed over. Nothing in the run's folder is changed. Raises
    BadInput where the run has not logged those steps, has no checkpoint to begin with, or cannot be equal by its nature.
    """
    started, run = time.perf_counter(), Run(folder)
    config = _config(run, shards)
    logged = _logged(run, steps)
    manifest = Manifest.load(config.shards)
    config = config.resolved(manifest)
    device = _device(config)
    with _bits_as_trained(config, device), tempfile.TemporaryDirectory() as scratch:
        learner = make_learner(config, manifest, device)
        begin, provenance = _begin(run, config, steps.first, learner, say)
        _check_exact(config, run, Span(learner.step, steps.last))
        states = _states_logged(run, config)
        found = _Found(config.order(manifest), config.learn.global_batch, {*states, steps.last})
        quarantine = _quarantine(run, manifest, Path(scratch))
        for info in found.steps(learner, _inputs(config, found.order, learner.step, steps.last, quarantine)):
            progress(info.step + 1 - found.began, steps.last - found.began, f"loss {info.loss:.4f}")
    known = {step: states[step] for step in sorted(states) if steps.first <= step <= steps.last and step in found.states}
    differences = [*_origin(run, config, provenance), *_lines_differ(logged, found.lines), *_states_differ(known, found.states)]
    return {
        "run": str(run.folder),
        "equal": not differences,
        "steps": [steps.first, steps.last],
        "from": begin,
        "from_step": found.began,
        "worlds": sorted({line["world"] for line in logged.values()}),
        "compared": {"steps": len(logged), "states": len(known)},
        "states": {step: {"logged": sha, "found": found.states[step]} for step, sha in known.items()},
        "state_sha256": found.states[steps.last],
        "differences": [vars(difference) for difference in differences],
        "environment": _other_environment(run),
        "seconds": time.perf_counter() - started,
    }


# ---------------------------------------------------------------- what the run left


def _config(run: Run, shards: str) -> TrainConfig:
    if not run.config.is_file():
        remedy = "Give the folder that `train` was told as `out`."
        raise BadInput(run.folder, "the folder of a run", "no config.yaml in it", remedy)
    config = configuration.load(TrainConfig, configuration.read_yaml(run.config), run.config)
    return replace(config, shards=shards) if shards else config


def _logged(run: Run, steps: Span) -> dict[int, dict[str, Any]]:
    """The lines of the steps; BadInput where one is missing."""
    lines = {line["step"]: line for line in read_lines(run.steps)[0]}
    missing = next((step for step in range(steps.first, steps.last) if step not in lines), None)
    if missing is not None:
        got = f"no line of step {missing}; there are {len(lines)}" + (f", the last of step {max(lines)}" if lines else "")
        raise BadInput(run.steps, f"the steps {steps.first}:{steps.last}", got, "Choose steps that the run has logged.")
    return {step: lines[step] for step in range(steps.first, steps.last)}


def _states_logged(run: Run, config: TrainConfig) -> dict[int, str]:
    """Digest of the state by step: of all checkpoints ever published, and of those that are there."""
    states = {}
    for path in list_checkpoints(_place(run, config)):
        try:
            states[step_of(path)] = read_facts(path).provenance["state_sha256"]
        except Damaged:
            continue
    events = (event for event in run.read_events() if event["event"] == "checkpoint")
    return states | {event["step"]: event["state_sha256"] for event in events if "state_sha256" in event}


def _place(run: Run, config: TrainConfig) -> str:
    """Where the checkpoints are; a run's folder may have been moved with them."""
    return config.checkpoint.place or str(run.checkpoints)


def _check_exact(config: TrainConfig, run: Run, steps: Span) -> None:
    """BadInput for steps of several members whose sums depend on who added what."""
    worlds = {line["world"] for line in read_lines(run.steps)[0] if steps.first <= line["step"] < steps.last}
    if config.learn.exchange == "fast" and worlds - {1}:
        remedy = "Only an exact exchange (learn.exchange=exact) gives the same bits for any number of members."
        raise BadInput(run.config, "learn.exchange exact or exact64", f"fast, with {max(worlds)} members", remedy)


def _quarantine(run: Run, manifest: Manifest, scratch: Path) -> Quarantine:
    """The run's damaged tiles, in a copy; any number of them is borne, for they are what a replay may find."""
    copy = scratch / FILE
    if (run.folder / FILE).exists():
        shutil.copyfile(run.folder / FILE, copy)
    quarantine = Quarantine(manifest.tiles, manifest.tiles, copy)
    quarantine.refresh()
    return quarantine


def _other_environment(run: Run) -> dict[str, list[Any]]:
    """What of the run's last logged environment is different here, as [there, here]."""
    logged = next((event for event in reversed(run.read_events()) if event["event"] == "environment"), {})
    there, here = ({**held, **held.get("packages", {})} for held in (logged, environment()))
    keys = [key for key in here if key != "packages" and logged]
    return {key: [there.get(key), here[key]] for key in keys if there.get(key) != here[key]}


# ---------------------------------------------------------------- computing again


def _device(config: TrainConfig) -> torch.device:
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _bits_as_trained(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """While inside, torch computes as in a worker of the run."""
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    ensure_equal_bits(config, device)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(mode)


def _begin(
    run: Run, config: TrainConfig, first: int, learner: Learner, say: Callable[[str], None]
) -> tuple[str, Mapping[str, Any]]:
    """Put the learner into the newest whole state at or before a step; where that is from and what it says of the run."""
    there = list_checkpoints(_place(run, config))
    for path in reversed([path for path in there if step_of(path) <= first]):
        try:
            whole = read_checkpoint(path)
        except Damaged as damage:
            say(f"passed over: {damage}")
            continue
        restore(learner, TrainState(whole.weights, whole.state, whole.facts.training))
        return str(path), whole.facts.provenance
    if first == 0:  # every member starts with what follows from the seed
        return _SEED, {}
    expected = f"a whole checkpoint at or before step {first}"
    got = ", ".join(str(step_of(path)) for path in there) or "none"
    remedy = "Choose steps after one of those, or begin with step 0, whose state follows from the seed; see checkpoint.keep."
    raise BadInput(_place(run, config), expected, f"checkpoints of the steps {got}", remedy)


def _inputs(config: TrainConfig, order: Order, first: int, last: int, quarantine: Quarantine) -> DirectStream:
    stream = DirectStream(TileStore(config.feed.source(config.shards)), order, last, quarantine)
    stream.replan(first, 0, 1)
    return stream


class _Found:
    """What the replay finds: `lines` as the log has them, and the digest of the state at the steps `at`."""

    def __init__(self, order: Order, batch: int, at: set[int]):
        self.order, self.batch, self.at = order, batch, at
        self.lines: dict[int, dict[str, Any]] = {}
        self.states: dict[int, str] = {}
        self.began = 0

    def steps(self, learner: Learner, inputs: Iterable[StepInput]) -> Iterator[StepInfo]:
        """Compute all inputs; settled wherever a state is asked for, and at the end."""
        self.began = learner.step
        self._look(learner)
        for item in inputs:
            yield from self._note(learner.run(item))
            if item.step + 1 in self.at:
                yield from self._note(learner.settle())
                self._look(learner)

    def _note(self, info: StepInfo | None) -> Iterator[StepInfo]:
        if info is not None:
            cursor = info.step * self.batch
            tiles = [int(self.order.tile(position)) for position in range(cursor, cursor + self.batch)]
            self.lines[info.step] = jsonable({**vars(info), "cursor": cursor, "tiles": tiles})
            yield info

    def _look(self, learner: Learner) -> None:
        if learner.step in self.at:
            state = views(learner)
            self.states[learner.step] = state_sha256(state.weights, state.tensors)


# ---------------------------------------------------------------- comparing


def _origin(run: Run, config: TrainConfig, provenance: Mapping[str, Any]) -> Iterator[Difference]:
    """What the checkpoint, or else the command's start, says of shards and configuration, against what there is."""
    start = next((event for event in run.read_events() if event["event"] == "start"), {})
    was, now = (provenance or start).get("manifest_sha256"), set_id(manifest_bytes(config.shards))
    if was not in (None, now):
        yield Difference(None, "manifest of the shards", was, now)
    if "config" in provenance and (keys := other_values(provenance["config"], config)):
        yield Difference(None, "configuration", "that of the checkpoint", keys)


def _lines_differ(logged: Mapping[int, Mapping[str, Any]], found: Mapping[int, Mapping[str, Any]]) -> Iterator[Difference]:
    for step, line in logged.items():
        for key in _COMPARED:
            if key in line and line[key] != found[step][key]:
                yield Difference(step, key, line[key], found[step][key])


def _states_differ(logged: Mapping[int, str], found: Mapping[int, str]) -> Iterator[Difference]:
    for step, sha256 in logged.items():
        if sha256 != found[step]:
            yield Difference(step, "state_sha256", sha256, found[step])
