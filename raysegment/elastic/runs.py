"""A run folder: what was asked, what happened step by step, what came out.

config.yaml     the resolved configuration
steps.jsonl     one line per step, each step once, in order (written by the roster)
events.jsonl    the environment, generations, losses, failures, injected faults, checkpoints (written by whoever it happens to)
roster.json     the newest generation and its members, so that numbers of generations never go back
run.json        the run's own identity
checkpoints/    see `checkpoints`
summary.json    written last: the run is complete
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from raysegment.archive.files import committed
from raysegment.climate.checks import BadInput
from raysegment.elastic.settings import TrainConfig, other_values, plain

CAUSES = ("load_s", "compute_s", "exchange_s", "optimizer_s", "checkpoint_s")
_PACKAGES = ("raysegment", "ray", "torch", "numpy", "scipy", "pyarrow", "netCDF4", "h5py", "safetensors")
_SHARES = (0.16, 0.5, 0.84)


class Run:
    """The files of one run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).absolute()

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def steps(self) -> Path:
        return self.folder / "steps.jsonl"

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    def prepare(self, config: TrainConfig) -> None:
        """Make the folder, or check that it is of the same run: BadInput names the keys that differ."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.exists():
            self._check_same(config)
        with committed(self.config) as temporary:
            temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False))
        if not self.summary.exists():
            self.event("environment", **environment())

    def _check_same(self, config: TrainConfig) -> None:
        try:
            differing = other_values(yaml.safe_load(self.config.read_text()), config)
        except (yaml.YAMLError, AttributeError, TypeError) as error:
            raise BadInput(self.config, "the configuration of a run", error, "Choose another run folder.") from None
        if differing:
            remedy = "Give the same configuration to continue, or another folder as `out`."
            raise BadInput(self.folder, "a new folder or a run of the same configuration", f"other values of {differing}", remedy)

    @property
    def key(self) -> str:
        """What tells this run from any other, also from one that was in the same folder before."""
        path = self.folder / "run.json"
        if not path.exists():
            with committed(path) as temporary:
                temporary.write_text(json.dumps({"id": uuid.uuid4().hex}) + "\n")
        return json.loads(path.read_text())["id"]

    def is_still(self, key: str) -> bool:
        """Whether the folder is that run's: it may have been removed meanwhile, and another run begun in its place."""
        try:
            return json.loads((self.folder / "run.json").read_text())["id"] == key
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError):  # a file system that is away for a moment says nothing of it
            return True

    def finished(self) -> dict[str, Any] | None:
        """The summary, when the run is complete."""
        return json.loads(self.summary.read_text()) if self.summary.exists() else None

    def finish(self, summary: Mapping[str, Any]) -> None:
        with committed(self.summary) as temporary:
            temporary.write_text(json.dumps(jsonable(summary), indent=1) + "\n")

    def event(self, kind: str, **facts: Any) -> None:
        """Append one event; a single write, so that several processes may."""
        line = json.dumps(jsonable({"time": time.time(), "event": kind, **facts})) + "\n"
        with self.events.open("ab", buffering=0) as file:
            file.write(line.encode())

    def untouched(self) -> bool:
        """Whether nothing has been begun in the folder."""
        return all(path.name == "fleet.lock" for path in self.folder.glob("*"))

    def account(self, steps: int, global_batch: int) -> dict[str, int]:
        """What happened to the run, from its events, and whether every position is in its log once.

        `generations` were formed; `faults` members lost, `faults_survived` of these those after which training went on,
        `faults_injected` on purpose; `steps_repeated` logged steps that were computed once more; `tiles_repeated`,
        `tiles_missing` positions that stand in the log more than once, or not at all.
        """
        events = self.read_events()
        count = {kind: sum(event["event"] == kind for event in events) for kind in ("generation", "lost", "fault")}
        lost = [event for event in events if event["event"] == "lost" and event["rank"] is not None]
        positions = Counter(line["cursor"] // global_batch for line in read_lines(self.steps)[0])
        return {
            "generations": count["generation"],
            "faults": len(lost),
            "faults_survived": len(lost),
            "faults_injected": count["fault"],
            "steps_repeated": sum(event["repeated"] for event in events if event["event"] == "generation"),
            "tiles_repeated": global_batch * sum(times - 1 for times in positions.values()),
            "tiles_missing": global_batch * sum(step not in positions for step in range(steps)),
        }

    def read_events(self) -> list[dict[str, Any]]:
        return read_lines(self.events)[0]


def environment() -> dict[str, Any]:
    """What a result also depends on: the package's git revision ("" where it is none's), Python, platform, versions."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"git": _revision(), "python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def _revision() -> str:
    """The commit of the sources that run, with + where they differ from it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed; a repository further up is somebody else's
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty=+"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class StepLog:
    """Appends to steps.jsonl what is not there yet, in order: a step computed again after a failure is not written twice."""

    def __init__(self, path: Path):
        mend(path)
        self.high_water = last_step(path)
        self._file = path.open("a")
        self._early: dict[int, Mapping[str, Any]] = {}  # lines that came before the one they follow

    def offer(self, step: int, facts: Mapping[str, Any]) -> None:
        """Write a step's line once those before it are written; nothing where it has been."""
        if step > self.high_water:
            self._early[step] = facts
        while self.high_water + 1 in self._early:
            self.high_water += 1
            self._file.write(json.dumps(jsonable({"step": self.high_water, **self._early.pop(self.high_water)})) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """On the disk before a checkpoint says that these steps are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def mend(path: Path) -> None:
    """Cut off a last line that its writer did not finish."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read_lines(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The finished lines of a JSON-lines file from a byte offset on, and the offset where the next one begins."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


def last_step(path: Path) -> int:
    """The newest step in a steps.jsonl, −1 when there is none."""
    if not path.exists():
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
    return int(json.loads(lines[-1])["step"]) if lines else -1


def summarise(steps: list[dict[str, Any]], flops_per_sample: float) -> dict[str, Any]:
    """What the step lines add up to; FLOP/s as in Kurth et al. 2018: median over steps, with 16 and 84 percentiles; best.

    `samples` were learnt from, `quarantined` positions had no usable tile; a step that had none at all has no FLOP/s.
    `loss_first` and `loss_last` are means over the first and last quarter of the steps, ten at most.
    """
    seconds = sorted(step["step_s"] for step in steps)
    paces = sorted(step["step_s"] / step["samples"] for step in steps if step["samples"]) or [math.inf]  # seconds per sample
    samples = sum(step["samples"] for step in steps)
    several = max(1, min(10, len(steps) // 4))
    low, middle, high = (_percentile(seconds, share) for share in _SHARES)
    fast, usual, slow = (_percentile(paces, share) for share in _SHARES)
    whole = sum(seconds)
    shares = {cause.removesuffix("_s"): sum(step[cause] for step in steps) / whole for cause in CAUSES}
    return {
        "steps": len(steps),
        "samples": samples,
        "quarantined": sum(step.get("quarantined", 0) for step in steps),  # lines of an older version lack it
        "samples_per_s": samples / whole,
        "loss_first": _mean([step["loss"] for step in steps[:several]]),
        "loss_last": _mean([step["loss"] for step in steps[-several:]]),
        "skipped": sum(bool(step["skipped"]) for step in steps),
        "step_s": {"median": middle, "p16": low, "p84": high},
        "flops_per_sample": flops_per_sample,
        "flop_s": {"sustained": flops_per_sample / usual, "p16": flops_per_sample / slow,
                   "p84": flops_per_sample / fast, "peak": flops_per_sample / paces[0]},
        "time_shares": {**shares, "other": 1 - sum(shares.values())},
    }  # fmt: skip


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def jsonable(value: Any) -> Any:
    """NaN and infinities as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
