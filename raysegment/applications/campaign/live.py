"""What a person sees while a campaign runs: a table that changes on a terminal, plain lines elsewhere; TensorBoard always."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.live import Live
from rich.table import Table
from tensorboardX import SummaryWriter

from raysegment.applications.campaign.journal import Journal, Record
from raysegment.applications.campaign.pictures import short
from raysegment.applications.campaign.space import CampaignConfig
from raysegment.console import Console

_SHOWN, _AGAIN_S = 20, 0.5  # rows of the table; seconds between two looks


@contextmanager
def watching(config: CampaignConfig, journal: Journal, console: Console) -> Iterator[None]:
    """While inside, show every line that is written into the journal."""
    board = Board(config, journal)
    shown = Screen(config, journal, console) if console.stream.isatty() else Lines(config, journal, console)
    listeners = [board.hear, shown.hear]
    journal.listeners += listeners
    try:
        with shown.live if isinstance(shown, Screen) else board.open():
            yield
    finally:
        for listener in listeners:
            journal.listeners.remove(listener)
        board.close()


class Screen:
    """A live table of the trials, the newest last."""

    def __init__(self, config: CampaignConfig, journal: Journal, console: Console):
        self.config, self.journal = config, journal
        self.live = Live(self.table(), console=console.rich, refresh_per_second=4, transient=True)
        self._drawn = 0.0

    def hear(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() - self._drawn > _AGAIN_S or line["event"] in ("ended", "phase"):
            self._drawn = time.monotonic()
            self.live.update(self.table())

    def table(self) -> Table:
        """The state as it is."""
        records = list(self.journal.records.values())
        ended = sum(bool(record.status) for record in records)
        table = Table(title=f"{self.config.question or self.config.out}  {ended} of {len(records)} ended", title_justify="left")
        keys = (key.rsplit(".", 1)[-1] for key in self.config.search)
        for name in ("trial", *keys, "step", self.config.metric, "loss", "IoU", "state"):
            table.add_column(name, justify="right")
        for record in records[-_SHOWN:]:
            table.add_row(*_cells(self.config, record))
        return table


class Lines:
    """One line for every trial that begins, goes on or ends."""

    def __init__(self, config: CampaignConfig, journal: Journal, console: Console):
        self.config, self.journal, self.console = config, journal, console

    def hear(self, line: Mapping[str, Any]) -> None:
        if line["event"] in ("added", "resumed", "ended"):
            record = self.journal.records[line["trial"]]
            point = ", ".join(f"{key.rsplit('.', 1)[-1]} {short(value)}" for key, value in record.point.items())
            self.console.say(f"  {record.trial} ({point}): {self._what(line, record)}")

    def _what(self, line: Mapping[str, Any], record: Record) -> str:
        if line["event"] == "added":
            return "begins"
        if line["event"] == "resumed":
            return f"goes on from step {line['step']}"
        step, value, _, iou, state = _cells(self.config, record)[-5:]
        reason = f": {record.reason}" if record.reason else ""
        return f"{state} at step {step}, {self.config.metric} {value}{', IoU ' + iou if iou else ''}{reason}"


def _cells(config: CampaignConfig, record: Record) -> list[str]:
    last = record.last
    numbers = [short(last.get(key)) for key in ("step", "value", "loss", "iou")]
    return [record.trial, *(short(record.point.get(key)) for key in config.search), *numbers, record.status or "running"]


class Board:
    """TensorBoard's files in `tensorboard/TRIAL`: the readings by step."""

    def __init__(self, config: CampaignConfig, journal: Journal):
        self.config, self.journal = config, journal
        self._writers: dict[str, SummaryWriter] = {}

    def hear(self, line: Mapping[str, Any]) -> None:
        if line["event"] == "report":
            writer = self._writer(line["trial"])
            for key in ("value", "loss", "iou"):
                if line[key] is not None:
                    writer.add_scalar(self.config.metric if key == "value" else f"trial/{key}", line[key], line["step"])
        elif line["event"] == "ended" and line["trial"] in self._writers:
            self._writers.pop(line["trial"]).close()

    @contextmanager
    def open(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, trial: str) -> SummaryWriter:
        if trial not in self._writers:
            self._writers[trial] = SummaryWriter(str(self.config.folder / "tensorboard" / trial))
        return self._writers[trial]
