"""A campaign in Markdown: the answer, how sure it is, what it cost, the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from raysegment.applications.campaign.journal import DIVERGED, FAILED, FINISHED, STOPPED
from raysegment.applications.campaign.measures import WORST, mode
from raysegment.applications.campaign.pictures import short
from raysegment.applications.campaign.results import Confirmed, Row, Saving
from raysegment.applications.campaign.space import CampaignConfig, Point

_EXPLAINED = {
    "loss": "mean loss over the last tenth of a trial's steps",
    "mean_iou": "mean IoU of the validation tiles at a trial's last report",
    "mlperf_iou": "MLPerf's IoU of the validation tiles at a trial's last report",
    "seconds_to_iou": "seconds of training until the mean IoU of the validation tiles reaches {target:g}",
}


def report(
    config: CampaignConfig, search: Sequence[Row], rest: Sequence[Row], again: Sequence[Row], spread: Sequence[Confirmed],
    saved: Saving | None, shares: dict[str, float], seconds: float, pictures: Sequence[Path],
) -> str:  # fmt: skip
    """The whole report; `rest` are the stopped trials, finished, `again` the best with further seeds."""
    explained = _EXPLAINED.get(config.metric, "IoU of one class on the validation tiles").format(target=config.target)
    lines = [
        f"# {config.question or 'Campaign ' + config.folder.name}", "",
        f"{len(search)} trials, {config.searcher} search, {config.scheduler} scheduler, seed {config.seed}"
        f"{', scale ' + config.scale if config.scale else ''}. Metric: {config.metric}, {explained}.", "",
        "## Answer", "", *_answer(config, search), "",
        "## Confidence", "", *_confidence(config, spread), "",
        "## Cost", "", *_cost(search, saved, again, seconds), "",
        *_along(config, [*search, *rest]), *_importance(shares),
        "## Trials", "", *_table(config, search), "",
        *(f"![{path.stem}]({path.name})" for path in pictures), "",
    ]  # fmt: skip
    return "\n".join(lines)


def words(point: Point) -> str:
    """A point as the command line takes it."""
    return ", ".join(f"`{key}={short(value)}`" for key, value in point.items())


def _answer(config: CampaignConfig, search: Sequence[Row]) -> list[str]:
    best = search[0]
    iou = f", mean IoU {best.iou:.3f}" if math.isfinite(best.iou) else ""
    reached = _shown(best.value) if abs(best.value) < WORST else "never reached"
    return [
        f"Best: {words(best.point)} with {config.metric} {reached}{iou} after {best.steps} steps.",
        "`raysegment train best.yaml` repeats it."
        + (" Its weights went through several segments with other values (see its folder)." if best.segments > 1 else ""),
    ]


def _confidence(config: CampaignConfig, spread: Sequence[Confirmed]) -> list[str]:
    if not spread:
        return ["One seed for each trial: nothing is known of the spread. `confirm_seeds=2` trains the best three again."]
    lines = [
        f"- {words(each.point)}: {config.metric} {_shown(each.mean)} ± {_shown(each.std)} over {len(each.values)} seeds"
        + (f", mean IoU {sum(each.ious) / len(each.ious):.3f}" if all(map(math.isfinite, each.ious)) else "")
        for each in spread
    ]
    if len(spread) > 1 and all(math.isfinite(each.std) for each in spread[:2]):
        first, second = spread[:2]
        apart, error = abs(first.mean - second.mean), math.hypot(first.std, second.std) / math.sqrt(len(first.values))
        clear = apart > 2 * error
        lines += ["", f"The first two are {_shown(apart)} apart, {'more' if clear else 'no more'} than twice the standard error "
                  f"of that difference, {_shown(error)}: these seeds {'' if clear else 'do not '}tell them apart."]  # fmt: skip
    return lines


def _cost(search: Sequence[Row], saved: Saving | None, again: Sequence[Row], seconds: float) -> list[str]:
    counts = {status: sum(row.status == status for row in search) for status in (FINISHED, STOPPED, DIVERGED, FAILED)}
    spent, whole = sum(row.samples for row in search), sum(row.samples_whole for row in search)
    lines = [
        f"{', '.join(f'{count} {status}' for status, count in counts.items() if count)}; {spent} samples, "
        f"{100 * spent / max(1, whole):.1f} % of the {whole} that all trials to their end would be; {seconds:.0f} s in all."
    ]
    if again:
        lines.append(f"Training the best again took {sum(row.samples for row in again)} samples more.")
    if saved is not None:
        lines += ["", *_saved(saved)]
    return lines


def _saved(saved: Saving) -> list[str]:
    """What stopping early saved and cost."""
    same = "the same configuration" if saved.found.point == saved.best.point else words(saved.best.point)
    lost = f"value {_shown(saved.found.value)} against {_shown(saved.best.value)}"
    if math.isfinite(saved.best.iou):
        lost = f"mean IoU {saved.found.iou:.4f} found, {saved.best.iou:.4f} there is, {100 * saved.iou_loss:.2f} % less"
    return [
        f"All stopped trials were then let finish. The exhaustive search's best is {same}: {lost}. The search used "
        f"{saved.samples} samples, **{100 * saved.share:.1f} %** of the exhaustive search's {saved.all_samples}."
    ]


def _along(config: CampaignConfig, rows: Sequence[Row]) -> list[str]:
    """The best value for each choice, with everything else free."""
    lines: list[str] = []
    for dimension in config.dimensions:
        if dimension.kind == "choice":
            own = [[row for row in rows if row.point[dimension.key] == value] for value in dimension.values]
            cells = [_cell(config, value, found) for value, found in zip(dimension.values, own, strict=True)]
            head = f"| `{dimension.key}` | finished | best {config.metric} | mean of {config.metric} | best mean IoU |"
            lines += [head, "|---|---:|---:|---:|---:|", *cells, ""]
    return lines


def _cell(config: CampaignConfig, value: object, rows: Sequence[Row]) -> str:
    done = [row for row in rows if row.status == FINISHED]
    known = [row.value for row in done if abs(row.value) < WORST]
    best = (min if mode(config.metric) == "min" else max)(known, default=math.nan)
    mean = sum(known) / len(known) if known else math.nan
    iou = max((row.iou for row in done if math.isfinite(row.iou)), default=math.nan)
    return f"| {short(value)} | {len(done)} | {_shown(best)} | {_shown(mean)} | {_shown(iou)} |"


def _importance(shares: dict[str, float]) -> list[str]:
    if not shares:
        return []
    found = ", ".join(f"`{key}` {100 * share:.0f} %" for key, share in shares.items())
    return [f"What decides whether a trial is among the best quarter (PED-ANOVA): {found}.", ""]


def _table(config: CampaignConfig, search: Sequence[Row]) -> list[str]:
    columns = [*config.search, "status", "steps", config.metric, "mean IoU", "samples"]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *(_line(config, row) for row in search)]


def _line(config: CampaignConfig, row: Row) -> str:
    status = f"{row.status}: {row.reason}" if row.status in (DIVERGED, FAILED) else row.status
    numbers = [str(row.steps), _shown(row.value), _shown(row.iou), str(row.samples)]
    return "| " + " | ".join([*(short(row.point[key]) for key in config.search), status, *numbers]) + " |"


def _shown(value: float) -> str:
    return "–" if not math.isfinite(value) or abs(value) >= WORST else f"{value:.4g}"
