"""Faults injected on purpose: which member dies before which step, once, and on record."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KINDS = ("kill",)


@dataclass(frozen=True)
class Fault:
    """`kind` happens to member `member` when it is about to compute step `step`."""

    kind: str
    step: int
    member: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@step={self.step},member={self.member}"


@dataclass(frozen=True)
class Plan:
    """All faults of a run."""

    faults: tuple[Fault, ...] = ()

    @staticmethod
    def parse(text: str) -> Plan:
        """`"kill@step=12,member=1; kill@step=20"` → the plan; ValueError where it cannot be read."""
        return Plan(tuple(_fault(part.strip()) for part in text.split(";") if part.strip()))

    def fire(self, step: int, member: int, folder: Path, record: Callable[[Fault], None]) -> None:
        """Let happen what is due; a mark in `folder` remembers it, so that the restarted member is spared."""
        for fault in self.faults:
            mark = folder / str(fault).replace("@", "-")
            if (fault.step, fault.member) == (step, member) and not mark.exists():
                folder.mkdir(parents=True, exist_ok=True)
                mark.touch()
                record(fault)
                os.kill(os.getpid(), signal.SIGKILL)


def _fault(text: str) -> Fault:
    kind, at, rest = text.partition("@")
    try:
        options = dict(part.split("=") for part in rest.split(","))
        numbers = {key.strip(): int(value) for key, value in options.items()}
        if kind not in KINDS or not at or "step" not in numbers or min(numbers.values()) < 0:
            raise ValueError
        return Fault(kind, **numbers)
    except (ValueError, TypeError):
        raise ValueError(f"chaos: expected faults like kill@step=12,member=1 separated by `;`, got {text!r}") from None
