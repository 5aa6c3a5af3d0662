"""A run's log as MLPerf's: lines `:::MLLOG {json}` in the order of time, with the keys of MLPerf HPC's DeepCAM benchmark.

A view of what the run has recorded, for tools that read such logs; not a submission. Format: mlcommons/logging, `mllog`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raysegment.applications.report import History

PREFIX = ":::MLLOG "
_POINT, _BEGIN, _END = "POINT_IN_TIME", "INTERVAL_START", "INTERVAL_END"


def mlperf_lines(history: History) -> list[str]:
    """The lines of a run, complete or under way: what was asked, when it ran, what each step and each validation gave."""
    records = sorted(_records(history), key=lambda record: record[0])  # stable: what has one time keeps its order
    return [PREFIX + json.dumps(_line(*record)) for record in records]


def _line(time_s: float, event: str, key: str, value: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "namespace": "",
        "time_ms": round(1000 * time_s),
        "event_type": event,
        "key": key,
        "value": value,
        "metadata": {"file": "events.jsonl" if event != _POINT else "config.yaml", "lineno": 0, **metadata},
    }


Record = tuple[float, str, str, Any, Mapping[str, Any]]


def _records(history: History) -> Iterator[Record]:
    times = [line["time"] for line in (*history.events, *history.steps)]
    if not times:
        return
    began = min(times)
    ready = next((event["time"] for event in history.events if event["event"] == "ready"), began)
    yield began, _BEGIN, "init_start", None, {}
    for key, value in _asked(history).items():
        yield began, _POINT, key, value, {}
    yield ready, _END, "init_stop", None, {}
    yield ready, _BEGIN, "run_start", None, {}
    yield from _steps(history)
    yield from _validations(history)
    status = "success" if history.summary is not None else "aborted"
    yield max(times), _END, "run_stop", None, {"status": status, "step_num": len(history.steps)}


def _asked(history: History) -> dict[str, Any]:
    """The configuration under MLPerf's names."""
    learn = history.config["learn"]
    optim = learn["optim"]
    environment = next((event for event in history.events if event["event"] == "environment"), {})
    start = next((event for event in history.events if event["event"] == "start"), {})
    digest = start.get("manifest_sha256") or history.checkpoint.get("provenance", {}).get("manifest_sha256")
    return {
        "submission_benchmark": "deepcam",
        "submission_division": "open",
        "submission_org": "",
        "submission_platform": history.config.get("device", ""),
        "seed": learn["seed"],
        "global_batch_size": learn["global_batch"],
        "batchnorm_group_size": learn["micro_batch"],
        "number_of_ranks": max((step["world"] for step in history.steps), default=0),
        "opt_name": optim["optimizer"],
        "opt_lr": optim["lr"],
        "opt_betas": optim["betas"],
        "opt_eps": optim["eps"],
        "opt_weight_decay": optim["weight_decay"],
        "scheduler_type": optim["schedule"],
        "scheduler_lr_warmup_steps": optim["warmup_steps"],
        "dataset_digest": digest,
        "git_revision": environment.get("git"),
        **{f"version_{name}": held for name, held in environment.get("packages", {}).items()},
    }


def _steps(history: History) -> Iterator[Record]:
    for step in history.steps:
        where = {"step_num": step["step"] + 1, "world": step["world"], "generation": step["generation"]}
        yield step["time"], _POINT, "train_loss", step["loss"], where | {"file": "steps.jsonl", "lineno": step["step"] + 1}
        yield step["time"], _POINT, "learning_rate", step.get("lr"), where | {"file": "steps.jsonl", "lineno": step["step"] + 1}


def _validations(history: History) -> Iterator[Record]:
    """MLPerf's own score: the mean over samples and classes of the intersection over the union."""
    for number, event in enumerate(history.events, 1):
        if event["event"] == "validation":
            where = {"step_num": event["step"], "file": "events.jsonl", "lineno": number}
            yield event["time"], _BEGIN, "eval_start", None, where
            yield event["time"], _POINT, "eval_accuracy", event["mlperf"], where | {"mean_iou": event["mean_iou"]}
            yield event["time"], _END, "eval_stop", None, where
        elif event["event"] in ("lost", "checkpoint"):
            facts = {key: value for key, value in event.items() if key not in ("time", "event")}
            yield event["time"], _POINT, event["event"], facts, {"file": "events.jsonl", "lineno": number}
