"""`raysegment report RUN`: a run as one HTML file that needs nothing else, no network either.

Everything is read from the run's own files, also while it is under way. Pictures are inside the file, as data; a
Content-Security-Policy forbids whatever is not.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from raysegment.applications.pictures import draw_files
from raysegment.applications.report_examples import draw_examples
from raysegment.applications.report_figures import Picture, draw_curves, draw_masks, draw_shares, draw_validation, draw_world
from raysegment.archive.files import committed
from raysegment.archive.masks import MASK_SUFFIX
from raysegment.archive.snapshots import list_sources
from raysegment.climate.checks import BadInput
from raysegment.elastic.checkpoints import FACTS, find_checkpoint, list_checkpoints
from raysegment.elastic.runs import Run, summarise
from raysegment.elastic.settings import flat
from raysegment.feed.quarantine import FILE, Quarantine

NAME = "report.html"
_EXAMPLES = 4  # masks that are shown
_ANY = 2**31  # damaged tiles
_LISTED = 200  # events that are listed
_TOLD = ("lost", "node_lost", "fault", "failure", "save_failed", "checkpoint_failed", "replace", "straggler",
         "roster_restarted", "memory_off", "fenced", "stop", "start", "end")  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff }
body { margin: 2rem auto; padding: 0 1rem; max-width: 70rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccd2d9 }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption { color: #57606a }
table { border-collapse: collapse; font-size: 13px }
td, th { text-align: left; vertical-align: top; padding: .15rem .8rem .15rem 0 }
th { border-bottom: 1px solid #ccd2d9 } td:first-child { white-space: nowrap } code { font-size: 12px; overflow-wrap: anywhere }
.facts { display: flex; flex-wrap: wrap; gap: 1.5rem; margin: 1rem 0 } .facts b { display: block; font-size: 1.3rem }
.wrong { color: #a40e26 }
"""


@dataclass(frozen=True)
class History:
    """A run's files, read: configuration, lines of its logs, summary (None while it is under way), newest checkpoint's facts."""

    folder: Path
    config: Mapping[str, Any]
    steps: Sequence[dict[str, Any]]
    events: Sequence[Mapping[str, Any]]
    quarantined: int
    summary: Mapping[str, Any] | None
    checkpoint: Mapping[str, Any]

    @property
    def planned(self) -> int:
        """Steps that the run was to take."""
        return int(self.config.get("steps", 0))

    @property
    def figures(self) -> Mapping[str, Any]:
        """The summary, or what can be said before there is one."""
        if self.summary is not None:
            return self.summary
        account = Run(self.folder).account(len(self.steps), int(self.config["learn"]["global_batch"]))
        return {**(summarise(list(self.steps), 0.0) if self.steps else {}), **account}


def read_history(folder: str | Path) -> History:
    """The run in a folder; BadInput where there is none, or a file of it is damaged."""
    run = Run(folder)
    if not run.config.is_file():
        raise BadInput(folder, "the folder of a run", "no config.yaml in it", "Give the folder that `train` was told as `out`.")
    config = _read(run.config, lambda path: yaml.safe_load(path.read_text()))
    if not isinstance(config.get("learn"), Mapping):
        raise BadInput(run.config, "the configuration of a training run", "one without `learn`", "Give a run's folder.")
    return History(
        run.folder,
        config,
        _lines(run.steps),
        _lines(run.events),
        _damaged(run),
        _read(run.summary, lambda path: json.loads(path.read_text())) if run.summary.exists() else None,
        _newest_facts(run),
    )


def report(
    folder: str | Path, out: Path | None = None, masks: Sequence[Path] = (), sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Write the page of a run to `out` (default: `report.html` in its folder); where it is and what it shows.

    `masks`: mask files or folders to show examples of (default: those below the run's folder, or where there are none some
    tiles as the newest checkpoint labels them); `sources`: the files they were made of, drawn beneath them.
    """
    history = read_history(folder)
    target = out or history.folder / NAME
    examples = _examples(history, masks, sources)
    with committed(target) as temporary:
        temporary.write_text(page(history, examples), encoding="utf-8")
    return {
        "report": str(target),
        "bytes": target.stat().st_size,
        "complete": history.summary is not None,
        "steps": len(history.steps),
        "masks": len(examples),
    }


def page(history: History, examples: Sequence[Picture] = ()) -> str:
    """The HTML of a run."""
    name = str(history.config.get("name", "run"))
    sections = [
        ("Learning", _figures([*draw_curves(history.steps), *draw_validation(history.events)])),
        ("Where the time went", _figures(draw_shares(history.steps)) + _time_table(history)),
        ("World size and faults", _figures(draw_world(history.steps, history.events)) + _counts(history)),
        ("Masks", _figures(examples)),
        ("Events", _event_table(history)),
        ("Configuration", _table(("key", "value"), [(key, json.dumps(value)) for key, value in flat(history.config)])),
        ("Provenance", _provenance(history)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections if content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(name)}: {escape(history.folder.name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(name)}</h1>\n{_headline(history)}\n{body}</body>\n</html>\n"
    )


# ---------------------------------------------------------------- what is read


def _read(path: Path, how: Any) -> Mapping[str, Any]:
    try:
        held = how(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(path, "a readable file of a run", str(error).replace("\n", " "), "Restore it.") from None
    if not isinstance(held, Mapping):
        raise BadInput(path, "keys with values", type(held).__name__, "Restore it.")
    return held


def _lines(path: Path) -> list[dict[str, Any]]:
    """The finished lines; none where there is no file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise BadInput(path, "one JSON object per line", error, "The file is damaged; restore it.") from None


def _damaged(run: Run) -> int:
    """How many tiles have been left out."""
    quarantine = Quarantine(_ANY, _ANY, run.folder / FILE)
    quarantine.refresh()
    return quarantine.count


def _newest_facts(run: Run) -> Mapping[str, Any]:
    """What the newest checkpoint in the run's folder says of itself; nothing where there is none."""
    found = list_checkpoints(run.checkpoints) if run.checkpoints.is_dir() else []
    path = Path(str(found[-1])) / FACTS if found else None
    return _read(path, lambda facts: json.loads(facts.read_text())) if path is not None and path.is_file() else {}


# ---------------------------------------------------------------- examples


def _examples(history: History, masks: Sequence[Path], sources: Sequence[str]) -> list[Picture]:
    found = [file for path in masks or [history.folder] for file in _mask_files(path)]
    if not found and not masks:
        return _of_shards(history)
    if masks and not found:
        raise BadInput(masks[0], f"files *{MASK_SUFFIX}", "none", "Make them with `raysegment segment … --labeller RUN`.")
    by_name = {Path(source).stem: source for source in (list_sources(sources) if sources else [])}
    return [_example(path, by_name.get(path.name.removesuffix(MASK_SUFFIX))) for path in found[:_EXAMPLES]]


def _of_shards(history: History) -> list[Picture]:
    """Tiles that the run is validated with, or else trained on, where they and a checkpoint are still there."""
    held_out = str(history.config.get("validation", {}).get("shards", ""))
    shards, whose = (held_out, "that are not trained on") if held_out else (str(history.config["shards"]), "of the training set")
    place = str(history.config.get("checkpoint", {}).get("place", "")) or history.folder / "checkpoints"
    try:
        found = find_checkpoint(place)
        return draw_examples(found if isinstance(found, Path) else found.text, shards, whose)
    except (BadInput, OSError):  # moved, or nothing saved yet: a page without examples
        return []


def _mask_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob(f"*{MASK_SUFFIX}") if not file.name.startswith("."))


def _example(mask: Path, source: Path | str | None) -> Picture:
    """A mask on the water vapour it was made of, or alone."""
    if source is None:
        return draw_masks(mask)
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_files(source, [mask], Path(folder) / "example.png")
        return Picture(f"{mask.name} on its source", "image/png", drawn.read_bytes())


# ---------------------------------------------------------------- what is written


def _headline(history: History) -> str:
    """State, and the figures that one asks for first."""
    done, figures = len(history.steps), history.figures
    state = "complete" if history.summary is not None else '<span class="wrong">not complete</span>'
    facts = {"state": state, "steps": f"{done} of {history.planned or '?'}"}
    if done:
        facts |= {
            "loss, first → last": f"{_number(figures['loss_first'])} → {_number(figures['loss_last'])}",
            "samples/s": _number(figures["samples_per_s"]),
            "faults survived": str(figures.get("faults_survived", "unknown")),
            "steps computed again": str(figures.get("steps_repeated", "unknown")),
        }
    if history.summary is not None:
        flops = figures["flop_s"]
        facts["TFLOP/s, sustained (peak)"] = f"{_number(flops['sustained'] / 1e12)} ({_number(flops['peak'] / 1e12)})"
    cells = "".join(f"<div><b>{value}</b>{escape(name)}</div>" for name, value in facts.items())
    written = time.strftime("%Y-%m-%d %H:%M", time.gmtime(history.steps[-1]["time"])) if done else "no step yet"
    return f'<p>{escape(str(history.folder))}, last step {written} UTC</p>\n<div class="facts">{cells}</div>'


def _figures(pictures: Iterable[Picture]) -> str:
    return "".join(
        f'<figure><img alt="{escape(picture.title)}" src="data:{picture.kind};base64,'
        f'{base64.b64encode(picture.content).decode()}"><figcaption>{escape(picture.title)}</figcaption></figure>\n'
        for picture in pictures
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td><code>{escape(str(cell))}</code></td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n" if body else ""


def _time_table(history: History) -> str:
    shares = history.figures.get("time_shares", {})
    return _table(("share of the steps' time", "%"), [(cause, f"{max(0.0, 100 * share):.2f}") for cause, share in shares.items()])


def _counts(history: History) -> str:
    figures = history.figures
    keys = ("generations", "faults", "faults_survived", "faults_injected", "steps_repeated", "tiles_repeated", "tiles_missing")
    rows = [(key.replace("_", " "), figures[key]) for key in keys if key in figures]
    return _table(("what", "how often"), [*rows, ("tiles quarantined", history.quarantined)])


def _event_table(history: History) -> str:
    """How many of each kind, and those that somebody on call asks about."""
    if not history.events:
        return ""
    kinds = Counter(str(event["event"]) for event in history.events)
    told = [event for event in history.events if event["event"] in _TOLD]
    began = min(event["time"] for event in history.events)
    rows = [(f"{event['time'] - began:.1f}", event["event"], _facts(event)) for event in told[:_LISTED]]
    more = f"<p>… and {len(told) - _LISTED} more in events.jsonl</p>" if len(told) > _LISTED else ""
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return f"<p>{escape(counted)}</p>\n" + _table(("s after the start", "event", "facts"), rows) + more


def _facts(event: Mapping[str, Any]) -> str:
    held = {key: value for key, value in event.items() if key not in ("time", "event", "ladder")}
    return ", ".join(f"{key} {value}" for key, value in held.items())[:300]


def _provenance(history: History) -> str:
    known = history.checkpoint.get("provenance", {})
    environment = next((event for event in reversed(history.events) if event["event"] == "environment"), {})
    start = next((event for event in history.events if event["event"] == "start"), {})
    figures = history.summary or {}
    rows = {
        "run": _read_key(history),
        "manifest of the shards, SHA-256": known.get("manifest_sha256") or start.get("manifest_sha256"),
        "labels of the shards": known.get("labels"),
        "seed": history.config.get("learn", {}).get("seed"),
        "device": start.get("device"),
        "newest checkpoint, step": history.checkpoint.get("step"),
        "weights, SHA-256": figures.get("weights_sha256") or known.get("weights_sha256"),
        "state, SHA-256": figures.get("state_sha256") or known.get("state_sha256"),
        "resumed from": figures.get("resumed_from"),
        "git revision": environment.get("git") or None,
        "Python": environment.get("python"),
        "platform": environment.get("platform"),
        **environment.get("packages", {"torch": known.get("torch")}),
    }
    return _table(("what", "value"), [(key, value) for key, value in rows.items() if value is not None])


def _read_key(history: History) -> str | None:
    path = history.folder / "run.json"
    return str(_read(path, lambda file: json.loads(file.read_text())).get("id")) if path.exists() else None


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
