"""What a person sees while a verb works: a bar on a terminal, plain lines elsewhere, always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Report = Callable[..., None]  # report(done, total, note="")
_LINE_EVERY_S = 10.0


class Console:
    """Progress and tables on `stream`; results proper go to standard output and are not this class's business."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.rich = RichConsole(file=self.stream, highlight=False)

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[Report]:
        """A phase of work: yields `report(done, total, note)`; says how long it took."""
        start = time.monotonic()
        with self._bar(title) if self.stream.isatty() else self._lines(title) as report:
            yield report
        self.say(f"✓ {title} ({time.monotonic() - start:.1f} s)")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Report]:
        bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        columns = (TextColumn("{task.description}"), *bar, TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self.rich, transient=True) as progress:
            task = progress.add_task(title, total=None, note="")

            def report(done: int, total: int, note: str = "") -> None:
                progress.update(task, completed=done, total=total, note=note)

            yield report

    @contextmanager
    def _lines(self, title: str) -> Iterator[Report]:
        self.say(f"… {title}")
        last = time.monotonic()

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY_S:
                last = time.monotonic()
                self.say(f"  {title}: {done}/{total} {note}".rstrip())

        yield report


def table(title: str, columns: list[str], rows: list[list[Any]], stream: TextIO | None = None) -> None:
    """A small table on standard output (or `stream`)."""
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    RichConsole(file=stream or sys.stdout, width=None if (stream or sys.stdout).isatty() else 120, highlight=False).print(shown)
