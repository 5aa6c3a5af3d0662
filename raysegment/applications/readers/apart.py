"""Readers in processes of their own: what one of them starts, maps or prints touches neither the others nor the result."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

_PAGE = 4096  # bytes
_END_S = 10.0  # so long a process may take to end by itself
Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Timing:
    """A pass: its start, first tile and stop on the machine's monotonic clock, s, and the bytes that it delivered."""

    start: float
    first: float
    stop: float
    bytes: int


class LeftOut(Exception):
    """A reader that cannot take part; the message is the reason, in one line."""


class Apart:
    """A process that runs `target(connection, *arguments)`: `tell` sends it a word, `hear` gives its next answer.

    A fresh interpreter, not multiprocessing's: that would import the command line with all of Ray into each of them. What
    libraries print is kept from both outputs; its last line is the reason when the process ends without a word.
    """

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], patience_s: float):
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "raysegment.applications.readers.apart", str(there.fileno())]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (open for as long as the process is)
        self._process = subprocess.Popen(
            command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said
        )
        there.close()
        self._here, self._patience_s = Connection(here.detach()), patience_s
        self.tell((target, arguments))

    def tell(self, word: object) -> None:
        try:
            self._here.send(word)
        except OSError:
            raise LeftOut(self._last_words()) from None

    def hear(self) -> Any:
        """The next answer; LeftOut when there is none, or it says that the target failed."""
        if not self._here.poll(self._patience_s):
            raise LeftOut(f"no answer within {self._patience_s:.0f} s")
        try:
            good, answer = self._here.recv()
        except (EOFError, OSError):
            raise LeftOut(self._last_words()) from None
        if not good:
            raise LeftOut(answer)
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return f"its process has ended: {lines[-1].strip()}" if lines else "its process has ended"

    def dismiss(self) -> None:
        """Let it end; does not wait."""
        self._here.close()

    def close(self) -> None:
        """End it, if need be by force."""
        self.dismiss()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def serve(handle: int) -> None:
    """The other side of `Apart`: run what it names and say how that went."""
    connection = Connection(handle)
    try:
        target, arguments = connection.recv()
        target(connection, *arguments)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the other side has closed
    except Exception as error:  # whatever a library raises is the reason why it is left out
        connection.send((False, _reason(error)))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def call_apart(function: Callable[..., Any], arguments: tuple[Any, ...], patience_s: float) -> Any:
    """What the function returns, computed in a process of its own; LeftOut when it fails."""
    process = Apart(_once, (function, arguments), patience_s)
    try:
        return process.hear()
    finally:
        process.close()


def _once(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send((True, function(*arguments)))


# ---------------------------------------------------------------- formats and consumers


def load(name: str) -> Any:
    """The module of a reader (see the package's docstring)."""
    return importlib.import_module(f"raysegment.applications.readers.{name}")


def write(name: str, source: Path, folder: Path) -> None:
    """The tiles of a shard set in the format of a reader."""
    module = load(name)
    folder.mkdir()
    module.write(source, folder)


class Consumers:
    """`world` processes that read their shares of one format, pass after pass; they open it at once."""

    def __init__(self, name: str, folder: Path, world: int, environment: dict[str, str], patience_s: float):
        arguments = [(name, folder, rank, world, environment) for rank in range(world)]
        self._apart = [Apart(_consume, each, patience_s) for each in arguments]

    def first_pass_s(self) -> float:
        """Seconds from opening the format to the first tile, workers and all, of the slowest; a whole pass of every consumer."""
        return max(opening_s + timing.first - timing.start for opening_s, timing in self._together())

    def one_pass(self) -> list[Timing]:
        """One pass of every consumer at once."""
        return [timing for _, timing in self._together()]

    def _together(self) -> list[tuple[float, Timing]]:
        for process in self._apart:
            process.tell("pass")
        return [process.hear() for process in self._apart]

    def dismiss(self) -> None:
        for process in self._apart:
            process.dismiss()

    def close(self) -> None:
        for process in self._apart:
            process.close()


def rate(timings: list[Timing]) -> float:
    """MiB/s of all consumers together: their bytes over the time from the first start to the last stop."""
    seconds = max(timing.stop for timing in timings) - min(timing.start for timing in timings)
    return sum(timing.bytes for timing in timings) / 2**20 / seconds


def _consume(connection: Connection, name: str, folder: Path, rank: int, world: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    module = load(name)
    started = time.monotonic()
    passes = module.passes(folder, rank, world)
    opening_s = time.monotonic() - started
    while connection.recv():
        connection.send((True, (opening_s, timed(passes))))


def timed(passes: Callable[[], Iterable[Sample]]) -> Timing:
    """Times of one pass in which every tile is touched."""
    start, first, count = time.monotonic(), 0.0, 0
    for sample in passes():
        first = first or time.monotonic()
        count += sum(touch(tensor) for tensor in sample)
    return Timing(start, first, time.monotonic(), count)


def touch(tensor: Tensor) -> int:
    """The tensor's bytes, of which one in every page was read: nobody gains by handing out what is not there yet."""
    flat = tensor.numpy().reshape(-1).view(np.uint8)
    flat[::_PAGE].max()
    return flat.size


if __name__ == "__main__":
    serve(int(sys.argv[1]))
