"""What is said, and how, when an input cannot be used: expected, got, remedy, which file or key."""

from __future__ import annotations


class BadInput(ValueError):
    """An input at the border (file, key, option) that cannot be used; the command line turns it into exit code 2.

    `where` names the file or the key; the message reads `where: expected …, got …. Remedy`.
    """

    def __init__(self, where: object, expected: str, got: object, remedy: str):
        self.where, self.expected, self.got, self.remedy = str(where), expected, str(got), remedy
        super().__init__(f"{self.where}: expected {expected}, got {self.got}. {remedy}")

    def __reduce__(self):  # survives the trip between Ray processes
        return BadInput, (self.where, self.expected, self.got, self.remedy)
