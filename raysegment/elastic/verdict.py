"""Whether trying again helps: pure counting of failures and losses since the last step that was new."""

from __future__ import annotations

from typing import Any


class Verdict:
    """`hopeless` at once for bad input, after two errors in the code, after `most` of any kind, without one new step."""

    def __init__(self, most: int):
        self.most = most
        self.cause: dict[str, Any] | None = None
        self.losses = self.failures = self.lasting = 0

    def progress(self) -> None:
        """A step was finished that never was before."""
        self.losses = self.failures = self.lasting = 0
        self.cause = None

    def loss(self) -> None:
        """A member is gone."""
        self.losses += 1

    def failure(self, cause: dict[str, Any]) -> None:
        """A member says why it ends; what will not change by itself counts more than what a lost peer causes."""
        self.failures += 1
        self.lasting += bool(cause["lasting"])
        if self.cause is None or (cause["lasting"] and not self.cause["lasting"]) or cause["bad_input"]:
            self.cause = cause

    @property
    def hopeless(self) -> bool:
        if self.cause is not None and self.cause["bad_input"]:
            return True
        return self.lasting >= 2 or self.failures >= self.most or self.losses >= 4 * self.most
