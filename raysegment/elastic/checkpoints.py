"""A checkpoint is a folder that exists whole or not at all, and that proves by SHA-256 that nothing in it has changed.

    checkpoints/step-00000120/
        weights.safetensors   what `segment` needs: parameters and running statistics of the network
        state.safetensors     what training needs besides: optimizer, lagged gradient, …
        checkpoint.json       network, channels, statistics, spacing, classes, provenance, step, cursor, digests; written last

The folder of checkpoints is a path or a URI (see `shelves` for what differs). Writing has two phases: any writer makes a
draft, which no reader takes for a checkpoint; one process decides which drafts count and publishes them. Readers trust
nothing: the newest whose digests agree is the newest checkpoint, the one before it is used when it does not.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import dacite
import torch
from torch import Tensor

from raysegment.archive.files import inside
from raysegment.archive.places import Place
from raysegment.archive.retry import forbidden, is_forbidden
from raysegment.climate.checks import BadInput
from raysegment.elastic import packed
from raysegment.elastic.packed import BLOCK, unpack
from raysegment.elastic.shelves import FACTS, shelf
from raysegment.networks import NetworkConfig

WEIGHTS, STATE = "weights.safetensors", "state.safetensors"
_FORMAT = 1
_OTHER = "Use the version of raysegment that wrote it."
_RETRAIN = "Use an older checkpoint of the run, or train again"
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*")

Where = str | Path | Place
Found = Path | Place  # a path on a disk, a place in an object store


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says about itself, all of it readable as JSON.

    `channels` (C) are what the network reads, in this order; `mean`, `std` (C) their moments in the training tiles, in SI
    units; `spacing_deg` (dlat, dlon); `training` whatever the trainer wants back besides tensors.
    """

    step: int
    cursor: int
    network: NetworkConfig
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    spacing_deg: tuple[float, float]
    classes: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std) == self.network.channels:
            counts = (len(self.channels), len(self.mean), len(self.std), self.network.channels)
            raise ValueError(f"checkpoint: expected as many names, means and deviations as network channels, got {counts}")
        if len(self.classes) != self.network.classes:
            raise ValueError(f"checkpoint: expected {self.network.classes} class names, got {self.classes}")


class Damaged(BadInput):
    """A checkpoint that is not whole: an older one may be. Missing rights, or a store that does not answer, are not that."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and found whole. `state` is empty where only the weights were asked for."""

    path: Found
    facts: Facts
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is written but does not count yet; `asdict` of it is JSON, `Draft(**…)` the way back.

    `tag` is the writer's with a number of this draft's own, `sha256` that of the draft's record (and so of all its files).
    """

    step: int
    tag: str
    sha256: str

    def __post_init__(self) -> None:
        if self.step < 0 or not _TAG.fullmatch(self.tag):
            raise ValueError(f"draft: expected a step and a tag of letters, digits, - and _, got {self.step}, {self.tag!r}")


def write_checkpoint(
    folder: Where, facts: Facts, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], keep: int = 3
) -> Found:
    """The new checkpoint `folder/step-…`, published; afterwards only the newest `keep` remain. For a lone writer."""
    target = Place.of(folder).below(step_name(facts.step))
    if not _is_whole(target):
        target = Place.of(publish(folder, draft(folder, facts, weights, state, "alone")))
    prune(folder, keep)
    return _found(target)


def draft(place: Where, facts: Facts, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], tag: str) -> Draft:
    """A draft of the checkpoint, wholly on the storage; OSError or BadInput where that is full or forbidden.

    `tag` names the writer; what it wrote for nothing is found by it (`remove_orphans`). No copy of the tensors is made.
    """
    store, step = shelf(Place.of(place)), step_name(facts.step)
    made = Draft(facts.step, f"{tag}-{secrets.token_hex(4)}", "")
    try:
        files = {}
        for file, tensors in ((WEIGHTS, weights), (STATE, state)):
            digest = _Digest()
            store.write(step, made.tag, file, lambda tensors=tensors, digest=digest: digest.of(packed.blocks(tensors)))
            files[file] = {"name": store.named(file, made.tag), **digest.entry}
        content = _record_json(facts, files)
        store.write(step, made.tag, FACTS, lambda: iter([memoryview(content)]))
        store.seal(step, made.tag)
    except Exception:
        with suppress(OSError, BadInput):  # a storage that cannot be written to; the orphan is found later
            discard(place, made)
        raise
    return Draft(made.step, made.tag, hashlib.sha256(content).hexdigest())


def publish(place: Where, draft: Draft) -> Found:
    """Make a draft the checkpoint of its step; BadInput when it is not whole. To be done by one process at a time.

    Everything is read back before. A whole checkpoint of that step stays, and the draft goes: publishing twice is harmless.
    """
    place = Place.of(place)
    store, step = shelf(place), step_name(draft.step)
    target = place.below(step)
    if _is_whole(target):
        store.discard(step, draft.tag)
        return _found(target)
    drafted, record = store.drafted(step, draft.tag), store.named(FACTS, draft.tag)
    _verify(drafted, record, draft.sha256)
    store.install(step, draft.tag)
    return _found(target)


def discard(place: Where, draft: Draft) -> None:
    """Delete a draft that will not be published; nothing where it has been published or is gone."""
    shelf(Place.of(place)).discard(step_name(draft.step), draft.tag)


def prune(place: Where, keep: int) -> list[str]:
    """Delete what is older than the newest `keep` checkpoints (that are there by record and size); the names deleted."""
    assert keep >= 1, keep
    place = Place.of(place)
    store = shelf(place)
    names = store.steps()
    whole = (name for name in reversed(names) if damage(place.below(name), data=False) is None)
    oldest = next(islice(whole, keep - 1, None), None)
    doomed = names[: names.index(oldest)] if oldest else []
    for name in doomed:
        store.remove(name)
    return doomed


def remove_orphans(folder: Where, keep_tags: Collection[str] = ()) -> list[str]:
    """Delete drafts that nobody published, except those of the writers `keep_tags`; the names (step/tag) deleted.

    For the process that publishes, and for the drafts of writers that are dead.
    """
    store = shelf(Place.of(folder))
    orphans = [(step, tag) for step, tag in store.drafts() if tag.rpartition("-")[0] not in keep_tags]
    for step, tag in orphans:
        store.discard(step, tag)
    return [f"{step}/{tag}" for step, tag in orphans]


def read_checkpoint(path: Where, training: bool = True) -> Checkpoint:
    """The checkpoint at `path` (its folder, or a folder of checkpoints, or a run's): BadInput when it is not whole.

    With `training=False` the optimizer's state is neither read nor needed. All digests are checked, each file is read once.
    """
    place = Place.of(path)
    if _is_checkpoint(place):
        return _read_at(place, training)
    for folder in (place, place.below("checkpoints")):
        newest = read_newest(folder, training)
        if newest is not None:
            return newest
    raise _no_checkpoint(path)


def read_facts(path: Where) -> Facts:
    """What the checkpoint in the folder `path` says of itself, its record's digest checked; no tensor is read."""
    place = Place.of(path)
    return _facts(place, _record(place, FACTS))


def read_newest(folder: Where, training: bool = True) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole, or None; what is newer and damaged is passed over."""
    for path in reversed(list_checkpoints(folder)):
        try:
            return _read_at(Place.of(path), training)
        except Damaged:
            continue
    return None


def find_checkpoint(path: Where) -> Found:
    """The checkpoint that `path` means: itself, or the newest whole one of a folder of checkpoints or of a run."""
    place = Place.of(path)
    if _is_checkpoint(place):
        return _found(place)
    for folder in (place, place.below("checkpoints")):
        newest = newest_valid(folder)
        if newest is not None:
            return newest
    raise _no_checkpoint(path)


def list_checkpoints(folder: Where) -> list[Found]:
    """All checkpoints of a folder, oldest first, whole or not."""
    place = Place.of(folder)
    return [_found(place.below(name)) for name in shelf(place).steps()]


def newest_valid(folder: Where, data: bool = True) -> Found | None:
    """The newest checkpoint of a folder whose digests agree, or None; `data` as for `damage`. Older ones are not looked at."""
    return next((path for path in reversed(list_checkpoints(folder)) if damage(path, data) is None), None)


def damage(path: Where, data: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None when it is whole; with `data=False` the tensors' files only have their size."""
    try:
        _verify(Place.of(path), FACTS, data=data)
    except Damaged as error:
        return str(error)
    return None


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


@dataclass
class _Digest:
    """What passed by: bytes and SHA-256."""

    entry: dict[str, Any] = field(default_factory=dict)

    def of(self, blocks: Iterator[memoryview]) -> Iterator[memoryview]:
        """The same blocks, counted; anew each time."""
        digest, size = hashlib.sha256(), 0
        for block in blocks:
            digest.update(block)
            size += len(block)
            yield block
        self.entry = {"bytes": size, "sha256": digest.hexdigest()}


def _is_checkpoint(place: Place) -> bool:
    return place.name.startswith("step-") or place.size(FACTS) is not None


def _is_whole(place: Place) -> bool:
    return place.size(FACTS) is not None and damage(place) is None


def _no_checkpoint(path: Where) -> BadInput:
    expected = f"a checkpoint ({FACTS}, {WEIGHTS}) or a run folder with one"
    return BadInput(path, expected, "none", "Check the path, or train first.")


def _found(place: Place) -> Found:
    return place.local or place


def _read_at(place: Place, training: bool) -> Checkpoint:
    record = _record(place, FACTS)
    facts = _facts(place, record)
    weights = _tensors(place, record, WEIGHTS)
    state = _tensors(place, record, STATE) if training else {}
    return Checkpoint(_found(place), facts, weights, state)


def _tensors(place: Place, record: Mapping[str, Any], file: str) -> dict[str, Tensor]:
    name, size, sha256 = _entry(place, record, file)
    content, digest, start = torch.empty(size, dtype=torch.uint8), hashlib.sha256(), 0
    target = content.numpy().data
    for block in _blocks(place, name, size):
        digest.update(block)
        target[start : start + len(block)] = block
        start += len(block)
    _agree(place, name, sha256, digest.hexdigest(), start)
    try:
        return unpack(content)
    except ValueError as error:
        raise Damaged(place.shown(name), "a file of tensors", error, _OTHER) from error


def _verify(place: Place, record_name: str, record_sha256: str = "", data: bool = True) -> None:
    """`Damaged` unless record and files are as they were written."""
    record = _record(place, record_name, record_sha256)
    _facts(place, record)
    for file in (WEIGHTS, STATE):
        name, size, sha256 = _entry(place, record, file)
        if not data:
            _agree(place, name, size, _size(place, name), size)
            continue
        digest = hashlib.sha256()
        for block in _blocks(place, name, size):
            digest.update(block)
        _agree(place, name, sha256, digest.hexdigest(), size)


def _agree(place: Place, name: str, want: object, got: object, size: int) -> None:
    if got != want:
        raise Damaged(place.shown(name), f"SHA-256 or size {want}", f"{got} over {size} bytes", f"It is damaged. {_RETRAIN}.")


def _record_json(facts: Facts, files: Mapping[str, Any]) -> bytes:
    record = {"format": _FORMAT, **asdict(facts), "files": files}
    return json.dumps({**record, "sha256": _digest(record)}, indent=1).encode()


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON; computed before writing and after reading."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _record(place: Place, name: str, sha256: str = "") -> dict[str, Any]:
    """What a record says, its digests checked: its own, and `sha256` of its bytes where that is given."""
    shown, content = place.shown(name), _read(place, name)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise Damaged(shown, f"SHA-256 {sha256}", "another", f"The draft is damaged. {_RETRAIN}.")
    try:
        record = json.loads(content)
        want = record.pop("sha256")
        version, files = record.pop("format"), record["files"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(shown, "a checkpoint's facts", f"{type(error).__name__}: {error}", f"{_RETRAIN}.") from None
    if version != _FORMAT:
        raise Damaged(shown, f"format {_FORMAT}", version, _OTHER)
    if _digest({"format": version, **record}) != want or not isinstance(files, dict):
        raise Damaged(shown, f"SHA-256 {want}", "another", f"The file is damaged. {_RETRAIN}.")
    return record


def _entry(place: Place, record: Mapping[str, Any], file: str) -> tuple[str, int, str]:
    """(name, bytes, SHA-256) of a file."""
    try:
        entry = record["files"][file]
        name, size, sha256 = entry.get("name", file), int(entry["bytes"]), entry["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(place.shown(FACTS), f"size and digest of {file}", error, _OTHER) from error
    _check_inside(place, name)
    return name, size, sha256


def _check_inside(place: Place, name: Any) -> None:
    """`Damaged` where a record names a file that is not in the checkpoint's own folder."""
    with suppress(BadInput):
        if isinstance(name, str) and Path(name).name == name and (place.local is None or inside(place.local, name)):
            return
    raise Damaged(place.shown(FACTS), "a file in the checkpoint's own folder", repr(name), f"{_RETRAIN}.")


def _facts(place: Place, record: dict[str, Any]) -> Facts:
    content = {key: value for key, value in record.items() if key != "files"}
    try:
        return dacite.from_dict(Facts, content, dacite.Config(cast=[tuple, float]))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise Damaged(place.shown(FACTS), "a checkpoint of this version", error, _OTHER) from error


def _size(place: Place, name: str) -> int | None:
    try:
        return place.size(name)
    except OSError as error:
        raise _unreadable(place, name, error) from None


def _read(place: Place, name: str) -> bytes:
    try:
        return (place.local / name).read_bytes() if place.local else place.read(name)
    except OSError as error:
        raise _unreadable(place, name, error) from None


def _blocks(place: Place, name: str, size: int) -> Iterator[bytes]:
    """The bytes of a file that should be `size` long; `Damaged` where it is not."""
    try:
        if (have := _size(place, name)) != size:
            expected = f"a file of {size} bytes"
            raise Damaged(place.shown(name), expected, "none" if have is None else f"{have}", f"It is damaged. {_RETRAIN}.")
        if place.local is None:
            yield from (place.read_range(name, start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))
            return
        with (place.local / name).open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise _unreadable(place, name, error) from None


def _unreadable(place: Place, name: str, error: OSError) -> Exception:
    """`Damaged` for a file that is absent, or that a disk cannot read; a store that does not answer says nothing about it."""
    if is_forbidden(error):
        return forbidden(place.shown(name), error)
    if place.local is None and not isinstance(error, FileNotFoundError):
        return error
    return Damaged(place.shown(name), "a readable file of a checkpoint", error.strerror or error, f"{_RETRAIN}.")
