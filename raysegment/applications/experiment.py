"""An experiment: variants of a training run, each with the same seeds, judged on the same held-out archive.

    synthesize → stage → for each seed and variant: train → segment → evaluate → results.csv, summary.json, report.md

It calls the functions of the verbs, with the same files between them. Run again in the same folder it goes on where it was
interrupted; more variants or seeds may be asked for then, what is finished is not computed twice.

A seed decides the first weights, the order of the tiles, their variation and dropout; the archives are the same for all.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student

from raysegment import config as configuration
from raysegment.applications.evaluate import evaluate
from raysegment.applications.segment import SegmentConfig, segment
from raysegment.applications.synthesize import synthesize
from raysegment.applications.worlds import ArchiveConfig
from raysegment.archive.files import committed
from raysegment.archive.manifest import Manifest
from raysegment.climate.checks import BadInput
from raysegment.console import Console, table
from raysegment.elastic.runs import jsonable
from raysegment.elastic.settings import flat, identity, plain
from raysegment.elastic.train import TrainConfig, train
from raysegment.feed.session import ensure_ray
from raysegment.feed.stage import StageConfig, stage

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIDENCE = 0.95
OWN_KEYS = ("shards", "out", "name", "learn.seed")  # every run has its own

# What is measured of a run, how it is called in tables, and how it is written.
MEASURES = {
    "iou_background": ("background", ".3f"),
    "iou_cyclone": ("cyclone", ".3f"),
    "iou_river": ("river", ".3f"),
    "iou_mean": ("mean IoU", ".3f"),
    "mlperf_iou": ("MLPerf", ".3f"),
    "samples_per_s": ("samples/s", ".1f"),
    "train_s": ("training s", ".0f"),
}
SCORES = ("iou_background", "iou_cyclone", "iou_river", "iou_mean", "mlperf_iou")  # those whose differences are reported
SHOWN = ("iou_cyclone", "iou_river", "iou_mean", "samples_per_s")  # those for which a terminal has room
Row = dict[str, Any]  # variant, seed and the measures of one run


@dataclass(frozen=True)
class BaseConfig:
    """What all runs share: a shipped configuration of `train` (or a YAML file), and keys of `train` over it."""

    config: str = "small"
    train: dict[str, Any] = field(default_factory=dict)

    def mapping(self) -> dict[str, Any]:
        """The keys of the configuration file."""
        shipped = CONFIGS / f"{self.config}.yaml"
        return configuration.read_yaml(shipped if shipped.exists() else self.config)


@dataclass(frozen=True)
class ExperimentConfig:
    """A `question`, and the `variants` of `base` (name: keys of `train`) that answer it, each trained with all `seeds`.

    The first variant is the one that the others are compared with.
    """

    question: str = ""
    out: str = "runs/experiment"
    archive: ArchiveConfig = field(default_factory=ArchiveConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question: expected what the experiment is to answer, got nothing")
        if len(self.variants) < 2:
            raise ValueError(f"variants: expected at least two to compare, got {', '.join(self.variants) or 'none'}")
        for name in self.variants:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(name)):
                raise ValueError(f"variants: expected names of letters, digits, dots, dashes and underscores, got {name!r}")
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected two or more different ones from 0 on (one has no spread), got {self.seeds}")
        for where, keys in (("base.train", self.base.train), *((f"variants.{n}", k) for n, k in self.variants.items())):
            for key in (key for key, _ in flat(keys) if key in OWN_KEYS):
                raise ValueError(f"{where}.{key}: expected none, every run has its own; `seeds` gives learn.seed")

    @property
    def folder(self) -> Path:
        return Path(self.out).absolute()

    @property
    def runs(self) -> Iterator[tuple[int, str]]:
        """(seed, variant) in the order of work: a seed's variants beside each other, as they are compared."""
        return ((seed, variant) for seed in self.seeds for variant in self.variants)

    def run(self, variant: str, seed: int) -> TrainConfig:
        """One training run; BadInput when a key is no key of `train`."""
        keys = [*flat(self.base.train), *flat(self.variants[variant]), ("learn.seed", seed)]
        mapping = configuration.apply_overrides(self.base.mapping(), [f"{key}={json.dumps(value)}" for key, value in keys])
        out = self.folder / "runs" / variant / f"seed-{seed}"
        mapping |= {"shards": str(self.folder / "shards"), "out": str(out), "name": f"{variant}-{seed}"}
        return configuration.load(TrainConfig, mapping, f"variants.{variant}")


def run_experiment(config: ExperimentConfig, console: Console) -> dict[str, Any]:
    """Everything in `config.out`; returns what `summary.json` holds, and where the files are.

    `variants` {name: {measure: mean, std}}, `differences` {name: {score: mean, standard_error, low, high}} from the first
    variant, `sentences`, `runs`, `results`, `summary`, `report`.
    """
    _check(config)
    _claim(config)
    with console.phase("start Ray"):
        ensure_ray()
    _prepare(config, console)
    rows = [_measure(config, variant, seed, console) for seed, variant in config.runs]
    result = _publish(config, rows)
    _print(config, rows, result)
    return result


def _check(config: ExperimentConfig) -> None:
    """Wrong keys and variants that are the same are found before anything starts."""
    known: dict[str, str] = {}
    for variant in config.variants:
        key = json.dumps(identity(config.run(variant, config.seeds[0])), sort_keys=True)
        if key in known:
            raise BadInput(f"variants.{variant}", "another run in every variant", f"the same as {known[key]}", "Leave one out.")
        known[key] = variant


def _claim(config: ExperimentConfig) -> None:
    """Make the experiment's folder, or check that it holds the same archive; `train` refuses other runs by itself."""
    path, now = config.folder / "experiment.yaml", plain(config)
    before = yaml.safe_load(path.read_text()) if path.exists() else now
    if before.get("archive") != now["archive"]:
        expected, remedy = f"the archive that is there, {before.get('archive')}", "Give another folder as `out`."
        raise BadInput(config.folder, expected, now["archive"], remedy)
    with committed(path) as temporary:
        temporary.write_text(yaml.safe_dump(now, sort_keys=False))


def _prepare(config: ExperimentConfig, console: Console) -> None:
    """Both archives, and shards of the first; BadInput when a run does not fit them."""
    out = config.folder
    for name, synthetic in config.archive.parts().items():
        if len(list((out / name).glob("*.nc"))) < synthetic.snapshots:
            with console.phase(f"synthesize {synthetic.snapshots} snapshots into {out / name}") as report:
                synthesize(out / name, synthetic, progress=report)
    with console.phase(f"stage into {out / 'shards'}") as report:
        stage([out / "archive"], None, out / "shards", StageConfig(), progress=report)
    manifest = Manifest.load(out / "shards")
    for seed, variant in config.runs:
        config.run(variant, seed).resolved(manifest)


def _measure(config: ExperimentConfig, variant: str, seed: int, console: Console) -> Row:
    """Train one run, let it label the held-out archive, compare with the truth."""
    held_out, masks = config.folder / "heldout", config.folder / "masks" / variant / f"seed-{seed}"
    with console.phase(f"train {variant} with seed {seed}") as report:
        trained = train(config.run(variant, seed), report)
    with console.phase(f"segment the held-out snapshots by {variant} with seed {seed}") as report:
        segment([held_out], trained["checkpoint"], masks, SegmentConfig(max_skipped=0), report)
    found = evaluate(masks, held_out)
    iou = {f"iou_{name}": math.nan if value is None else value for name, value in found["iou"].items()}
    speed = {"samples_per_s": trained["samples_per_s"], "train_s": trained["seconds"]}
    return {"variant": variant, "seed": seed, **iou, "mlperf_iou": found["mlperf_iou"], **speed}


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n − 1) of some values."""

    mean: float
    std: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(float(np.mean(values)), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, its standard error, and the interval that holds the true mean with 95 % confidence.

    With d the n differences: s = std(d)/√n, low and high = mean(d) ∓ t s, with t of Student's distribution of n − 1 degrees
    of freedom.
    """

    mean: float
    standard_error: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float], reference: Sequence[float]) -> Difference:
        spread, count = Spread.of(np.subtract(values, reference).tolist()), len(values)
        error = spread.std / math.sqrt(count)
        reach = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
        return Difference(spread.mean, error, spread.mean - reach, spread.mean + reach)

    @property
    def clear(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def spreads(rows: Sequence[Row]) -> dict[str, dict[str, Spread]]:
    """Of every measure, by variant."""
    return {name: {measure: Spread.of(_values(rows, name, measure)) for measure in MEASURES} for name in _names(rows)}


def differences(rows: Sequence[Row]) -> dict[str, dict[str, Difference]]:
    """Of every score from the first variant's with the same seed, by variant."""
    first, *others = _names(rows)
    reference = {score: _values(rows, first, score) for score in SCORES}
    return {name: {s: Difference.of(_values(rows, name, s), reference[s]) for s in SCORES} for name in others}


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def _values(rows: Sequence[Row], variant: str, measure: str) -> list[float]:
    """A variant's values in the order of seeds."""
    own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])
    return [row[measure] for row in own]


def sentence(name: str, first: str, rows: Sequence[Row]) -> str:
    """What the mean IoU and the speed of a variant say, compared with the first's."""
    own, other = (_values(rows, variant, "iou_mean") for variant in (name, first))
    found = Difference.of(own, other)
    word = "higher" if found.mean > 0 else "lower"
    agreeing = sum((a - b) * found.mean > 0 for a, b in zip(own, other, strict=True))
    interval = f"the 95 % interval, {found.low:+.3f} to {found.high:+.3f}, "
    verdict = "leaves out zero" if found.clear else "holds zero, so these seeds do not tell the two apart"
    fast, slow = (float(np.mean(_values(rows, variant, "samples_per_s"))) for variant in (name, first))
    return (
        f"`{name}`: mean IoU {abs(found.mean):.3f} {word} than `{first}` (standard error {found.standard_error:.3f}, "
        f"{word} with {agreeing} of {len(own)} seeds); {interval}{verdict}. "
        f"It trained {fast / slow:.2f} times as many samples per second."
    )


# ---------------------------------------------------------------- results


def _publish(config: ExperimentConfig, rows: list[Row]) -> dict[str, Any]:
    """The results as files, the summary last; and that summary."""
    out = config.folder
    with committed(out / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(jsonable(row) for row in rows)
    with committed(out / "report.md") as temporary:
        temporary.write_text(report(config, rows))
    first = next(iter(config.variants))
    summary = jsonable({
        "question": config.question,
        "runs": len(rows),
        "variants": _plain(spreads(rows)),
        "differences": _plain(differences(rows)),
        "sentences": [sentence(name, first, rows) for name in config.variants if name != first],
        **{name: out / file for name, file in (("results", "results.csv"), ("report", "report.md"), ("summary", "summary.json"))},
    })  # fmt: skip
    with committed(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _plain(found: Mapping[str, Mapping[str, Spread | Difference]]) -> dict[str, Any]:
    return {name: {measure: asdict(value) for measure, value in values.items()} for name, values in found.items()}


def _print(config: ExperimentConfig, rows: list[Row], result: dict[str, Any]) -> None:
    columns = ["variant", *(MEASURES[measure][0] for measure in SHOWN)]
    table(config.question, columns, [[name, *cells] for name, cells in _spread_cells(rows, SHOWN)])
    print("\n".join([*result["sentences"], result["report"]]))


def report(config: ExperimentConfig, rows: Sequence[Row]) -> str:
    """The experiment in Markdown: what was done, the means with their spread, the differences, what they say."""
    first, *others = config.variants
    lines = [
        f"# {config.question.strip()}",
        "",
        *_setting(config),
        "",
        "## Mean ± sample standard deviation over the seeds",
        "",
        *_table(["variant", *(title for title, _ in MEASURES.values())], _spread_cells(rows)),
        "",
        "IoU by class and their mean from one summed confusion matrix; MLPerf: the mean over maps of MLPerf HPC's score.",
        "Training seconds include the start of the workers.",
        "",
        f"## Difference from `{first}` with the same seed, mean ± standard error",
        "",
        *_table(["variant", *(MEASURES[score][0] for score in SCORES)], _difference_cells(rows)),
        "",
        "Bold: the 95 % interval (Student's t) leaves out zero.",
        "",
        *(f"- {sentence(name, first, rows)}" for name in others),
        "",
        f"Every run: `results.csv`. All of it again: `raysegment experiment {Path(config.out) / 'experiment.yaml'}`.",
        "",
    ]
    return "\n".join(lines)


def _setting(config: ExperimentConfig) -> list[str]:
    """Archive, seeds, what all runs share and what each variant changes."""
    archive, seeds = config.archive, ", ".join(map(str, config.seeds))
    shared = " ".join(f"`{item}`" for item in [config.base.config, *_written(config.base.train)])
    changes = {name: ", ".join(f"`{item}`" for item in _written(keys)) for name, keys in config.variants.items()}
    return [
        f"Synthetic maps of {archive.height} × {archive.width} cells: {archive.snapshots} snapshots to learn from, "
        f"{archive.held_out} of other planets to judge by.",
        f"Seeds {seeds}: they decide first weights, order of the tiles, their variation and dropout.",
        f"All runs: {shared}.",
        "",
        *(f"- `{name}`: {change or 'nothing else'}" for name, change in changes.items()),
    ]


def _written(keys: Mapping[str, Any]) -> list[str]:
    """Keys and values as the command line takes them."""
    return [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in flat(keys)]


def _table(columns: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    body = ["| " + " | ".join([f"`{name}`", *cells]) + " |" for name, cells in rows]
    return ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1), *body]


def _spread_cells(rows: Sequence[Row], measures: Sequence[str] = tuple(MEASURES)) -> list[tuple[str, list[str]]]:
    """Mean ± standard deviation of the measures, by variant."""
    return [
        (name, [_pair(found[measure].mean, found[measure].std, MEASURES[measure][1]) for measure in measures])
        for name, found in spreads(rows).items()
    ]


def _difference_cells(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Mean ± standard error of every score's difference, by variant; clear ones in bold."""
    cells = []
    for name, found in differences(rows).items():
        pairs = [(value, _pair(value.mean, value.standard_error, "+.3f")) for value in found.values()]
        cells.append((name, [f"**{text}**" if value.clear else text for value, text in pairs]))
    return cells


def _pair(value: float, error: float, form: str) -> str:
    return "–" if math.isnan(value) else f"{value:{form}} ± {error:{form.lstrip('+')}}"
