"""A checkpoint is a folder that exists whole or not at all, and that proves by SHA-256 that nothing in it has changed.

    checkpoints/step-00000120/
        weights.safetensors   what `segment` needs: parameters and running statistics of the network
        state.safetensors     what training needs besides: optimizer, lagged gradient, …
        checkpoint.json       network, channels, statistics, spacing, classes, provenance, step, cursor, digests; written last

Files are written into a folder of a temporary name, fsynced, and the folder renamed. Readers trust nothing: the newest
folder whose digests agree is the newest checkpoint, the one before it is used when it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dacite
from safetensors.torch import load, save
from torch import Tensor

from raysegment.archive.files import fsync
from raysegment.climate.checks import BadInput
from raysegment.networks import NetworkConfig

WEIGHTS, STATE, FACTS = "weights.safetensors", "state.safetensors", "checkpoint.json"
_FORMAT = 1
_OTHER = "Use the version of raysegment that wrote it."
_RETRAIN = "Use an older checkpoint of the run, or train again"


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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and found whole. `state` is empty where only the weights were asked for."""

    path: Path
    facts: Facts
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


def write_checkpoint(
    folder: str | Path, facts: Facts, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], keep: int = 3
) -> Path:
    """The new checkpoint `folder/step-…`, committed; afterwards only the newest `keep` remain."""
    assert keep >= 1, keep
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{facts.step:08d}"
    if target.exists() and damage(target) is None:
        return target
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        contents = {WEIGHTS: save(_plain(weights)), STATE: save(_plain(state))}
        for name, content in contents.items():
            _write(temporary / name, content)
        _write(temporary / FACTS, _facts_json(facts, contents))
        fsync(temporary)
        _put(temporary, target)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep]:
        _remove(old)
    return target


def read_checkpoint(path: str | Path, training: bool = True) -> Checkpoint:
    """The checkpoint at `path` (its folder, or a folder of checkpoints, or a run's): BadInput when it is not whole.

    With `training=False` the optimizer's state is neither read nor needed.
    """
    path = find_checkpoint(path)
    names = (WEIGHTS, STATE) if training else (WEIGHTS,)
    record, contents = _verified(path, names)
    state = load(contents[STATE]) if training else {}
    return Checkpoint(path, _facts(path, record), load(contents[WEIGHTS]), state)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest whole one of a folder of checkpoints or of a run."""
    path = Path(path)
    if (path / FACTS).exists() or path.name.startswith("step-"):
        return path
    for folder in (path, path / "checkpoints"):
        newest = newest_valid(folder)
        if newest is not None:
            return newest
    raise BadInput(path, f"a checkpoint ({FACTS}, {WEIGHTS}) or a run folder with one", "none", "Check the path, or train first.")


def list_checkpoints(folder: str | Path) -> list[Path]:
    """All checkpoints of a folder, oldest first, whole or not."""
    return sorted(path for path in Path(folder).glob("step-*") if path.is_dir())


def newest_valid(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder whose digests agree, or None."""
    return next((path for path in reversed(list_checkpoints(folder)) if damage(path) is None), None)


def damage(path: str | Path) -> str | None:
    """What is wrong with a checkpoint, or None when it is whole."""
    try:
        _facts(Path(path), _verified(Path(path), (WEIGHTS, STATE))[0])
    except BadInput as error:
        return str(error)
    return None


def remove_orphans(folder: str | Path) -> list[Path]:
    """Delete what writers that died left half-written; to be called while nobody writes."""
    orphans = sorted(Path(folder).glob(".step-*.tmp"))
    for orphan in orphans:
        shutil.rmtree(orphan, ignore_errors=True)
    return orphans


def _facts_json(facts: Facts, contents: Mapping[str, bytes]) -> bytes:
    files = {name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in contents.items()}
    record = {"format": _FORMAT, **asdict(facts), "files": files}
    return json.dumps({**record, "sha256": _digest(record)}, indent=1).encode()


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON; computed before writing and after reading."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _verified(path: Path, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record and the contents of the named files, all digests checked; each file is read once."""
    record = _record(path)
    contents = {}
    for name in names:
        content = _read(path / name)
        got = hashlib.sha256(content).hexdigest()
        want = record["files"].get(name, {}).get("sha256")
        if got != want:
            raise BadInput(path / name, f"SHA-256 {want}", f"{got} over {len(content)} bytes", f"It is damaged. {_RETRAIN}.")
        contents[name] = content
    return record, contents


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read(path / FACTS))
        want = record.pop("sha256")
        version, files = record.pop("format"), record["files"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BadInput(path / FACTS, "a checkpoint's facts", f"{type(error).__name__}: {error}", f"{_RETRAIN}.") from None
    if version != _FORMAT:
        raise BadInput(path / FACTS, f"format {_FORMAT}", version, _OTHER)
    if _digest({"format": version, **record}) != want or not isinstance(files, dict):
        raise BadInput(path / FACTS, f"SHA-256 {want}", "another", f"The file is damaged. {_RETRAIN}.")
    return record


def _facts(path: Path, record: dict[str, Any]) -> Facts:
    content = {key: value for key, value in record.items() if key != "files"}
    try:
        return dacite.from_dict(Facts, content, dacite.Config(cast=[tuple, float]))
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise BadInput(path / FACTS, "a checkpoint of this version", error, _OTHER) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(path, "a readable file of a checkpoint", error.strerror or error, f"{_RETRAIN}.") from None


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put(temporary: Path, target: Path) -> None:
    """Rename to `target`; a damaged checkpoint of that name moves out of the way first."""
    if target.exists():
        _remove(target)
    try:
        temporary.rename(target)
    except OSError:  # another writer was faster
        if damage(target) is not None:
            raise


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no reader sees half of it."""
    grave = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    with suppress(FileNotFoundError):
        path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, contiguous, each with memory of its own, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
