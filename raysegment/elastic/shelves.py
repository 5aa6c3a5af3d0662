"""Where checkpoints stand: on a disk, where a folder is renamed into view, or in an object store, where nothing can be.

    disk      .step-00000120.TAG.tmp/ (weights, state, checkpoint.json)  →  step-00000120/
    objects   step-00000120/weights.TAG.safetensors, state.TAG.safetensors, checkpoint.TAG.json  →  …/checkpoint.json

TAG is a draft's own, so no two writers touch the same file. What has no checkpoint.json of that name is no checkpoint. A
checkpoint comes into view in one operation, after its data, and goes out of view in one operation, before its data.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raysegment.archive.files import fsync
from raysegment.archive.places import Place

FACTS = "checkpoint.json"

Blocks = Callable[[], Iterator[memoryview]]  # called again where a write is tried again

_STEP = re.compile(r"step-(\d+)")
_DRAFT = re.compile(r"\.step-\d+\.(.+)\.tmp")
_OBJECT = re.compile(r"(?:checkpoint|weights|state)\.(.+)\.(?:json|safetensors)")


class Shelf(Protocol):
    """A folder of checkpoints. `file` is a name such as weights.safetensors, `tag` a draft's own."""

    @property
    def place(self) -> Place: ...

    def steps(self) -> list[str]:
        """Names of the checkpoints, oldest first, whole or not."""
        ...

    def drafted(self, step: str, tag: str) -> Place:
        """The folder that a draft's files are in."""
        ...

    def named(self, file: str, tag: str) -> str:
        """What a file of a draft is called there."""
        ...

    def write(self, step: str, tag: str, file: str, blocks: Blocks) -> None:
        """Write a file of a draft; when this returns it outlasts the machine."""
        ...

    def seal(self, step: str, tag: str) -> None:
        """All files of a draft are written: make their names last, too."""
        ...

    def install(self, step: str, tag: str) -> None:
        """Make a draft the checkpoint of that step, in place of a damaged one."""
        ...

    def remove(self, step: str) -> None:
        """Delete a checkpoint so that nobody sees half of it."""
        ...

    def drafts(self) -> list[tuple[str, str]]:
        """(step, tag) of what is not part of a checkpoint: drafts, and what remained of a deletion."""
        ...

    def discard(self, step: str, tag: str) -> None:
        """Delete a draft's files."""
        ...


def shelf(place: Place) -> Shelf:
    return Objects(place) if place.local is None else Disk(place.local)


@dataclass(frozen=True)
class Disk:
    """Checkpoints in a folder of a file system that renames."""

    folder: Path

    @property
    def place(self) -> Place:
        return Place(str(self.folder))

    def steps(self) -> list[str]:
        return _in_order(entry.name for entry in self._entries() if entry.is_dir())

    def drafted(self, step: str, tag: str) -> Place:
        return Place(str(self._draft(step, tag)))

    def named(self, file: str, tag: str) -> str:
        return file

    def write(self, step: str, tag: str, file: str, blocks: Blocks) -> None:
        folder = self._draft(step, tag)
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for block in blocks():
                write_all(handle, block)
            os.fsync(handle)
        finally:
            os.close(handle)

    def seal(self, step: str, tag: str) -> None:
        for folder in (self._draft(step, tag), self.folder, self.folder.parent):
            fsync(folder)

    def install(self, step: str, tag: str) -> None:
        self.remove(step)
        os.rename(self._draft(step, tag), self.folder / step)
        fsync(self.folder)

    def remove(self, step: str) -> None:
        grave = self._draft(step, f"removed-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            os.rename(self.folder / step, grave)
        shutil.rmtree(grave, ignore_errors=True)

    def drafts(self) -> list[tuple[str, str]]:
        found = [_DRAFT.fullmatch(entry.name) for entry in self._entries()]
        return sorted((match.string.split(".")[1], match[1]) for match in found if match)

    def discard(self, step: str, tag: str) -> None:
        shutil.rmtree(self._draft(step, tag), ignore_errors=True)

    def _entries(self) -> list[os.DirEntry]:
        try:
            return list(os.scandir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _draft(self, step: str, tag: str) -> Path:
        return self.folder / f".{step}.{tag}.tmp"


@dataclass(frozen=True)
class Objects:
    """Checkpoints below a prefix of an object store, where each file appears whole and at once.

    Parts of an upload that was cut off are no file; the store deletes them where its owner has it do so.
    """

    place: Place

    def steps(self) -> list[str]:
        return _in_order(step for step, names in self._names().items() if FACTS in names)

    def drafted(self, step: str, tag: str) -> Place:
        return self.place.below(step)

    def named(self, file: str, tag: str) -> str:
        stem, dot, end = file.partition(".")
        return f"{stem}.{tag}{dot}{end}"

    def write(self, step: str, tag: str, file: str, blocks: Blocks) -> None:
        self.place.put(f"{step}/{self.named(file, tag)}", blocks)

    def seal(self, step: str, tag: str) -> None:
        """A file that is there is there to stay."""

    def install(self, step: str, tag: str) -> None:
        content = self.place.read(f"{step}/{self.named(FACTS, tag)}")
        self.place.put(f"{step}/{FACTS}", lambda: iter([memoryview(content)]))
        self.place.remove(f"{step}/{self.named(FACTS, tag)}")

    def remove(self, step: str) -> None:
        self.place.remove(f"{step}/{FACTS}")
        self.place.remove_folder(step)

    def drafts(self) -> list[tuple[str, str]]:
        """Nothing of a step whose record cannot be read: what belongs to it is not known."""
        found = {(step, tag) for step, names in self._names().items() for tag in map(_tag, names) if tag}
        published = {step: self._published(step) for step, _ in found}
        return sorted((step, tag) for step, tag in found if (own := published[step]) is not None and tag not in own)

    def discard(self, step: str, tag: str) -> None:
        self.place.remove(f"{step}/{self.named(FACTS, tag)}")
        if tag in (self._published(step) or ()):
            return
        names = self._names().get(step, [])
        doomed = [name for name in names if _tag(name) == tag]
        for name in doomed:
            self.place.remove(f"{step}/{name}")
        if len(doomed) == len(names):
            self.place.remove_folder(step)

    def _published(self, step: str) -> set[str] | None:
        """Tags of the files that a step's record names; empty where there is no record, None where it cannot be read."""
        try:
            files = json.loads(self.place.read(f"{step}/{FACTS}"))["files"]
            return {_tag(entry["name"]) for entry in files.values()}
        except FileNotFoundError:
            return set()
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def _names(self) -> dict[str, list[str]]:
        """Files by step."""
        found: dict[str, list[str]] = {}
        for path in self.place.walk():
            step, _, name = path.partition("/")
            if _STEP.fullmatch(step):
                found.setdefault(step, []).append(name)
        return found


def write_all(handle: int, block: memoryview) -> None:
    """Write a block to a file, in several pieces where the system takes it so; the interpreter is free meanwhile."""
    while block:
        block = block[os.write(handle, block) :]


def _tag(name: str) -> str:
    match = _OBJECT.fullmatch(name)
    return match[1] if match else ""


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if _STEP.fullmatch(name)), key=lambda name: int(name.removeprefix("step-")))
