"""The verb `scale`: fit measured points, predict throughput, plan a job, check the model; as tables and dictionaries."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raysegment.applications.scaling import check, points, recorded
from raysegment.applications.scaling.check import Left
from raysegment.applications.scaling.fit import Model, fit, read, write
from raysegment.applications.scaling.goodput import Faults
from raysegment.applications.scaling.pictures import draw
from raysegment.applications.scaling.plan import job_of, plan
from raysegment.applications.scaling.predict import Prediction, Query, predict, where
from raysegment.applications.scaling.recorded import History, Recorded
from raysegment.climate.checks import BadInput
from raysegment.elastic.runs import Run, read_lines

MODEL = Path("model.yaml")
_ABOVE = (256, 512)


@dataclass(frozen=True)
class Table:
    """What is shown: a title, column names, rows."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


def scale_fit(path: Path, out: Path) -> tuple[dict[str, Any], Table]:
    """Fit the points of a CSV file and write the model; what each system's points could not tell stays at its prior."""
    model = fit(points.read(path))
    write(model, out)
    systems = list(dict.fromkeys(point.system for point in model.points))
    priors = {system: model.at_prior(system) for system in systems}
    rows = [[system, len(model.of(system)), _step_of(model, system), ", ".join(priors[system]) or "–"]
            for system in systems]  # fmt: skip
    result = {"model": str(out), "points": len(model.points), "at_prior": priors, "warnings": list(model.warnings)}
    return result, Table(
        f"{len(model.points)} points", ["system", "points", "largest: modelled / measured", "at its prior"], rows
    )


def _step_of(model: Model, system: str) -> str:
    last = max(model.of(system), key=lambda point: point.gpus)
    found = predict(model, Query(system, last.gpus, last.local_batch, last.network, last.precision))
    return f"{found.samples_per_s:.0f} / {last.samples_per_s:g} samples/s on {last.gpus}"


def model_of(path: Path | None) -> Model:
    """The model of a file; without one, model.yaml here, or else what is known of the 2018 system."""
    if path is not None or MODEL.exists():
        return read(path or MODEL)
    return check.paper_model()


def scale_predict(model: Model, query: Query) -> tuple[dict[str, Any], Table]:
    """One prediction."""
    found = predict(model, query)
    return found.as_dict(), Table(_title(found), ["what", "value"], list(_prediction_rows(found)))


def _title(found: Prediction) -> str:
    what = f"{found.system}: {found.network} in {found.precision} on {found.gpus} GPUs"
    return f"{what}, local batch {found.local_batch}, lag {found.lag}"


def _prediction_rows(found: Prediction) -> Iterable[list[Any]]:
    yield ["samples/s (90 % interval)", f"{found.samples_per_s:.1f} ({found.low:.1f} … {found.high:.1f})"]
    yield ["efficiency over single GPUs", f"{found.efficiency:.3f} ({found.efficiency_low:.3f} … {found.efficiency_high:.3f})"]
    yield ["step, s", f"{found.step_s:.4f}"]
    for cause, share in found.shares.items():
        yield [f"of it {cause}", f"{100 * share:.1f} %"]


def read_runs(folders: Sequence[Path]) -> Recorded:
    """What the records of training runs say of failures and saving; BadInput for a folder without steps."""
    return recorded.read([_history(Run(folder)) for folder in folders]) if folders else recorded.NOTHING


def _history(run: Run) -> History:
    steps = read_lines(run.steps)[0]
    if not steps:
        raise BadInput(run.folder, "the folder of a training run", "no steps.jsonl with a step", "Give a run's `out` as --run.")
    try:
        history = History(run.read_events(), steps)
        recorded.read([history])
    except (KeyError, TypeError) as error:
        raise BadInput(run.folder, "records of this version", repr(error), "Give another run.") from None
    return history


def scale_plan(
    model: Model, query: Query, epochs: float | None, faults: Faults, cost_s: float | None, runs: Recorded = recorded.NOTHING,
    given: Collection[str] = (),
) -> tuple[dict[str, Any], Table]:  # fmt: skip
    """The plan of a job. `runs` and `given` say which of the figures come from records and which were given."""
    if cost_s is None:
        cost_s = runs.values.get("checkpoint_s")
    found = plan(model, query, epochs, faults, cost_s)
    values = {**asdict(faults), "checkpoint_s": found.checkpoint_s}
    figures = {name: {"value": values[name], "source": runs.source(name, given)} for name in recorded.FIGURES}
    rows: list[list[Any]] = [
        ["epochs", f"{found.epochs:.1f}"],
        ["hours (90 % interval)", f"{found.hours:.3g} ({found.hours_low:.3g} … {found.hours_high:.3g})"],
        ["hours without faults; waiting instead of shrinking", f"{found.hours_without_faults:.3g}; {found.hours_waiting:.3g}"],
        ["GPU-hours", f"{found.gpu_hours:.4g}"],
        ["goodput; waiting instead of shrinking", f"{found.goodput:.4f}; {found.goodput_waiting:.4f}"],
        ["hours between failures", f"{found.mtbf_hours:.3g}"],
        ["seconds between checkpoint files", f"{found.checkpoint_interval_s:.0f}"],
        ["memory of a GPU, GiB (estimate)", f"{found.memory_gib:.1f}"],
        ["reads from the shared file system: once, TB, in at least s; then, GB/s",
         f"{found.staged_bytes / 1e12:.2f}, {found.staging_s:.0f}; {found.shared_read_bytes_per_s / 1e9:.2f}"],
        ["limits, in this order", ", ".join(f"{name} {100 * found.lost[name]:.1f} %" for name in found.limits)],
        *([name, f"{one['value']:.3g} ({one['source']})"] for name, one in figures.items()),
    ]
    return {**found.as_dict(), "figures": figures}, Table(_title(found.prediction), ["what", "value"], rows)


# ---------------------------------------------------------------- check


def scale_check(path: Path | None, pictures: Path | None = None) -> tuple[dict[str, Any], list[Table]]:
    """The runs of 2018 from what was known below 1,024 GPUs, their ablation, and points of a file that are left out in turn.

    With `pictures`, a folder: scaling, time shares and goodput of each run.
    """
    more = points.read(path) if path is not None else []
    model = check.paper_model(more)
    runs = check.paper_runs(model)
    tables = [Table("published runs", ["run", "predicted efficiency", "90 % interval", "published", "allowed"], [
        [_title(found), found.efficiency, f"{found.efficiency_low:.3f} … {found.efficiency_high:.3f}", published, f"± {allowed}"]
        for found, published, allowed in runs])]  # fmt: skip
    ablations = {}
    for query, _, _ in check.RUNS:
        found = dict(check.ablation(model, query))
        ablations[query.system] = {name: {"efficiency": p.efficiency, "step_s": p.step_s} for name, p in found.items()}
        rows = [[name, p.efficiency, p.step_s, *(100 * p.shares[c] for c in p.shares)] for name, p in found.items()]
        columns = ["with", "efficiency", "step s", *(f"{cause} %" for cause in runs[0][0].shares)]
        tables.append(Table(f"{query.system} on {query.gpus} GPUs", columns, rows))
    left = {"largest of each system": list(check.leave_largest(more))}
    left |= {f"all above {gpus} GPUs": check.leave_above(more, gpus) for gpus in _ABOVE if more}
    tables += [_left_table(name, rows) for name, rows in left.items() if rows]
    drawn = [picture for query, published, _ in check.RUNS for picture in _draw(model, query, published, pictures)]
    return {
        "pictures": drawn,
        "paper": {p.system: {"gpus": p.gpus, "efficiency": p.efficiency, "low": p.efficiency_low, "high": p.efficiency_high,
                             "published": published, "allowed": allowed, "met": abs(p.efficiency - published) <= allowed}
                  for p, published, allowed in runs},
        "ablation": ablations,
        "left_out": {name: {**check.summary(rows), "errors": [[*one.point.configuration, one.error] for one in rows]}
                     for name, rows in left.items() if rows},
    }, tables  # fmt: skip


def _draw(model: Model, query: Query, published: float, folder: Path | None) -> list[str]:
    if folder is None:
        return []
    return draw(model, query, published, job_of(where(model, query), predict(model, query).step_s, None), Faults(), folder)


def _left_table(name: str, rows: list[Left]) -> Table:
    found = check.summary(rows)
    errors = f"median {100 * found['median']:.1f} %, worst {100 * found['worst']:.1f} %"
    title = f"left out: {name}; {errors}, inside {found['inside']:.2f}"
    columns = ["system", "GPUs", "local batch", "measured", "predicted", "90 % interval", "error %"]
    return Table(title, columns, [
        [one.point.system, one.point.gpus, one.point.local_batch, f"{one.point.samples_per_s:g}", f"{one.predicted:.0f}",
         f"{one.low:.0f} … {one.high:.0f}{'' if one.inside else ' (outside)'}", f"{100 * one.error:+.1f}"] for one in rows
    ])  # fmt: skip


def needed(value: Any, option: str, remedy: str) -> Any:
    """An option's value; BadInput when it was not given."""
    if value is None:
        raise BadInput(option, "a value", "nothing", remedy)
    return value
