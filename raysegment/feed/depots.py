"""A process on every node that keeps the node's copies of a shard set, and the driver's line to all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from raysegment.archive.copies import Copies
from raysegment.archive.files import committed
from raysegment.archive.manifest import MANIFEST, STAGE_AGAIN, Manifest, manifest_bytes, set_id
from raysegment.archive.places import Place
from raysegment.archive.reader import Damaged
from raysegment.climate.checks import BadInput
from raysegment.feed.nodes import Node
from raysegment.feed.placement import PLACEMENT

NODE = "{node}"  # in the name of a folder: the node's name
AT_ONCE = 4  # things a depot does at once, that reading, hashing, sending and writing go on side by side
_CLAIM = ".node"
_NOTHING = object()


@dataclass(frozen=True, eq=False)
class Goods:
    """The shard set that is distributed: where it is, its manifest as bytes and as values."""

    place: Place
    text: bytes
    manifest: Manifest

    @staticmethod
    def of(shards: str | Path | Place) -> Goods:
        """The set in a folder or below a URI; BadInput when it is not complete."""
        place = Place.of(shards)
        text = manifest_bytes(place)
        return Goods(place, text, Manifest.parse(text, place))

    @property
    def id(self) -> str:
        return set_id(self.text)

    @property
    def sizes(self) -> list[int]:
        """Bytes of every shard."""
        return [shard.bytes for shard in self.manifest.shards]

    @property
    def names(self) -> list[str]:
        return [shard.file for shard in self.manifest.shards]

    def folder(self, to: str, node: str) -> Path:
        """Where a node keeps the set below `to`: as a training run's cache does."""
        return Path(os.path.abspath(os.path.expanduser(to.replace(NODE, node)))) / "shards" / self.id[:16]


@dataclass(frozen=True)
class Survey:
    """What is in a node's folder: numbers of the whole shards, free bytes of the disk, the node that claimed it last."""

    held: frozenset[int]
    free_bytes: int
    claimed_by: str


@dataclass(frozen=True)
class Settlement:
    """What a node is told at the end: the placement, the manifest (None: not all shards are here), what it need not keep."""

    placement: str
    manifest: bytes | None
    unassigned: tuple[int, ...]


class Depot:
    """What a node's process does: prove, read, lend, receive and settle the copies in its folder."""

    def __init__(self, node: str, folder: Path, goods: Goods):
        self._node, self._folder, self._place = node, folder, goods.place
        self._copies = Copies(folder, goods.manifest.shards)

    def claim(self) -> None:
        """Write this node's name into the folder, where no other node must see it."""
        self._copies.prepare()
        (self._folder / _CLAIM).write_text(self._node)

    def survey(self) -> Survey:
        held = self._copies.whole()
        return Survey(held, self._copies.free_bytes, (self._folder / _CLAIM).read_text())

    def read(self, shard: int, share: bool) -> tuple[int, NDArray[np.uint8] | None]:
        """Bytes read from the source and kept, and what they are if they are to be shared; BadInput for a damaged source."""
        file = self._copies.shards[shard].file
        try:
            data = self._place.read(file)
            self._copies.take(shard, memoryview(data))
        except FileNotFoundError as error:
            got = f"{error}, asked from {self._node}"
            raise BadInput(f"{self._place}/{file}", "a file that every node reaches", got, STAGE_AGAIN) from None
        except Damaged as error:
            raise BadInput(f"{self._place}/{file}", "a shard as its manifest has it", error, STAGE_AGAIN) from None
        return len(data), np.frombuffer(data, np.uint8) if share else None

    def lend(self, shard: int, share: bool) -> tuple[int, NDArray[np.uint8]]:
        """0 bytes read from the source, and those of the copy here."""
        assert share
        return 0, self._copies.read(shard)

    def receive(self, shard: int, data: NDArray[np.uint8]) -> int:
        """Bytes taken over from another node."""
        self._copies.take(shard, data.data)
        return data.nbytes

    def settle(self, last: Settlement) -> int:
        """Make the node's share official; how many files were removed."""
        if last.manifest is None:  # not, or no longer, a complete set
            (self._folder / MANIFEST).unlink(missing_ok=True)
        removed = self._copies.remove(last.unassigned)
        with committed(self._folder / PLACEMENT) as temporary:
            temporary.write_text(last.placement)
        if last.manifest is not None:
            with committed(self._folder / MANIFEST) as temporary:
                temporary.write_bytes(last.manifest)
        return removed


# In Ray's books a depot takes no CPU: it must not wait for trainers that hold them all. A node that is lost stays lost.
_Actor: Any = ray.remote(Depot)
_OPTIONS = {"num_cpus": 0, "max_concurrency": AT_ONCE, "max_restarts": 0}


@dataclass
class Depots:
    """The nodes' depots: `actors` that can still be talked to, and of those that cannot, why (`lost`)."""

    nodes: dict[str, Node]
    folders: dict[str, str]
    actors: dict[str, Any]
    lost: dict[str, str] = field(default_factory=dict)

    def ask(self, method: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What every node answers, given its own argument if there are any; one that does not answer is lost.

        BadInput when a node cannot use its folder.
        """
        refs = {}
        for name, actor in self.actors.items():
            refs[name] = getattr(actor, method).remote(*(() if arguments is None else (arguments[name],)))
        answers = {name: self._answer(name, ref) for name, ref in refs.items()}
        return {name: answer for name, answer in answers.items() if answer is not _NOTHING}

    def lose(self, name: str, error: Exception) -> None:
        """Talk to a node no more."""
        self.actors.pop(name, None)
        self.lost.setdefault(name, first_line(error))

    def _answer(self, name: str, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if not isinstance(error.cause, OSError):
                raise
            expected, got = "a folder on the node's own disk that this user can write", error.cause.strerror or error.cause
            raise BadInput(f"node {name}: {self.folders[name]}", expected, got, "Name another folder with --to") from None
        except RayActorError as error:
            self.lose(name, error)
            return _NOTHING


@contextmanager
def open_depots(nodes: Sequence[Node], goods: Goods, to: str) -> Iterator[Depots]:
    """A depot on every node, ended on leaving; each claims its folder below `to`. BadInput where that cannot be made."""
    folders, held = {node.name: goods.folder(to, node.name) for node in nodes}, ray.put(goods)
    actors = {
        node.name: _Actor.options(scheduling_strategy=node.only, **_OPTIONS).remote(node.name, folders[node.name], held)
        for node in nodes
    }
    named = {name: str(folder) for name, folder in folders.items()}
    depots = Depots({node.name: node for node in nodes}, named, dict(actors))
    try:
        depots.ask("claim")
        yield depots
    finally:
        for actor in actors.values():
            ray.kill(actor)


def first_line(error: object) -> str:
    """An error in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
