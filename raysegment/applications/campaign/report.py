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
    config: CampaignConfig, search: Sequence[Row], spread: Sequence[Confirmed], saved: Saving | None,
    shares: dict[str, float], seconds: float, again: Sequence[Row], pictures: Sequence[Path],
) -> str:  # fmt: skip
    """The whole report."""
    explained = _EXPLAINED.get(config.metric, "IoU of one class on the validation tiles").format(target=config.target)
    lines = [
        f"# {config.question or 'Campaign ' + config.folder.name}", "",
        f"{len(search)} trials, {config.searcher} search, {config.scheduler} scheduler, seed {config.seed}"
        f"{', scale ' + config.scale if config.scale else ''}. Metric: {config.metric}, {explained}.", "",
        "## Answer", "", *_answer(config, search), "",
        "## Confidence", "", *_confidence(config, spread), "",
        "## Cost", "", *_cost(search, saved, again, seconds), "",
        *_along(config, search), *_importance(shares),
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
        verdict = "more than twice" if apart > 2 * error else "no more than twice"
        lines += ["", f"The first two are {_shown(apart)} apart, {verdict} the standard error of that difference, {_shown(error)}: "
                  + ("these seeds tell them apart." if apart > 2 * error else "these seeds do not tell them apart.")]  # fmt: skip
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
        same = "the same configuration" if saved.found.point == saved.best.point else words(saved.best.point)
        iou = f"IoU {saved.found.iou:.4f} against {saved.best.iou:.4f}, {100 * saved.iou_loss:+.2f} % below" if math.isfinite(
            saved.best.iou) else f"value {_shown(saved.found.value)} against {_shown(saved.best.value)}"  # fmt: skip
        lines += ["", f"All stopped trials were then let finish. The exhaustive search's best is {same}: {iou}. The search used "
                  f"{saved.samples} samples, **{100 * saved.share:.1f} %** of the exhaustive search's {saved.all_samples}."]  # fmt: skip
    return lines


def _along(config: CampaignConfig, search: Sequence[Row]) -> list[str]:
    """The best value for each choice, with everything else free."""
    better = min if mode(config.metric) == "min" else max
    lines: list[str] = []
    for dimension in config.dimensions:
        if dimension.kind != "choice":
            continue
        cells = []
        for value in dimension.values:
            own = [row for row in search if row.point[dimension.key] == value and row.status == FINISHED]
            known = [row.value for row in own if abs(row.value) < WORST]
            ious = [row.iou for row in own if math.isfinite(row.iou)]
            cells.append(f"| {short(value)} | {len(own)} | {_shown(better(known)) if known else '–'} "
                         f"| {max(ious):.3f} |" if ious else f"| {short(value)} | {len(own)} | {_shown(better(known)) if known else '–'} | – |")  # fmt: skip
        lines += [f"Along `{dimension.key}`:", "", f"| value | finished | best {config.metric} | best mean IoU |",
                  "|---|---:|---:|---:|", *cells, ""]  # fmt: skip
    return lines


def _importance(shares: dict[str, float]) -> list[str]:
    if not shares:
        return []
    found = ", ".join(f"`{key}` {100 * share:.0f} %" for key, share in shares.items())
    return [f"What decides whether a trial is among the best quarter (PED-ANOVA): {found}.", ""]


def _table(config: CampaignConfig, search: Sequence[Row]) -> list[str]:
    columns = [*config.search, "status", "steps", config.metric, "mean IoU", "samples"]
    return [
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
        *("| " + " | ".join([*(short(row.point[key]) for key in config.search), row.status + (f": {row.reason}" if row.status in (
            DIVERGED, FAILED) else ""), str(row.steps), _shown(row.value), _shown(row.iou), str(row.samples)]) + " |" for row in search),
    ]  # fmt: skip


def _shown(value: float) -> str:
    return "–" if not math.isfinite(value) or abs(value) >= WORST else f"{value:.4g}"
