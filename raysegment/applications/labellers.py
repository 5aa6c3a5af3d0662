"""A labeller turns fields into a mask; a rule and a trained network are the same kind of thing.

`parse_labeller("rules:default")` or `parse_labeller("runs/x")` (a checkpoint, or a run's newest) gives one; it holds no
open file and no thread, so it travels to the processes that use it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raysegment.applications.tiles import Tiling, blended
from raysegment.archive.aliases import IVT
from raysegment.archive.places import Place
from raysegment.climate import channels
from raysegment.climate.checks import BadInput
from raysegment.climate.grid import Grid
from raysegment.climate.regrid import regrid, to_spacing
from raysegment.climate.rules import Rules, parse_rules, remedy_for
from raysegment.elastic.checkpoints import read_checkpoint
from raysegment.networks import build
from raysegment.networks.blocks import anchor, turn

SPACING_TOLERANCE = 0.1  # a grid within a tenth of the training spacing is fed as it is
MOST_CELLS, TILE = 1_200_000, (512, 1024)  # maps of more cells are labelled in pieces of this size, and a margin
HALO_CELLS = 32  # what is added on each side where a width does not divide, or a map does not close the circle


class Labeller(Protocol):
    """Fields (16, H, W) on a grid → mask (H, W) uint8 and, from networks, class probabilities (3, H, W)."""

    gives_probabilities: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def needs(self, path: Path, available: frozenset[str], has_ivt: bool) -> Collection[str]:
        """Of a file that gives these channels (and a map of IVT), which are read (and "IVT"); BadInput if it gives too few."""
        ...

    def label(self, fields: NDArray, grid: Grid, ivt: NDArray | None = None) -> tuple[NDArray[np.uint8], NDArray | None]: ...


@dataclass(frozen=True)
class RulesLabeller:
    """Heuristic rules as a labeller; `ivt (H, W)` in place of its stand-in where a file has it."""

    rules: Rules
    name: str
    gives_probabilities: ClassVar[bool] = False

    def needs(self, path: Path, available: frozenset[str], has_ivt: bool) -> Collection[str]:
        missing = self.rules.missing(available, has_ivt)
        if missing:
            got = f"no {', no '.join(missing)} (and {'a' if has_ivt else 'no'} map of IVT)"
            raise BadInput(path, f"the channels of {self.name}", got, remedy_for(available, has_ivt))
        return self.rules.reads(has_ivt) & {*available, IVT}

    def label(self, fields: NDArray, grid: Grid, ivt: NDArray | None = None) -> tuple[NDArray[np.uint8], NDArray | None]:
        return self.rules.label(fields, grid, ivt), None


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint in memory.

    `places` of the network's channels among the 16, their `mean` and `std` (C, 1, 1), class `weights` of its loss (3, 1, 1).
    """

    network: nn.Module
    places: list[int]
    mean: torch.Tensor
    std: torch.Tensor
    weights: torch.Tensor
    spacing_deg: tuple[float, float]


@dataclass(frozen=True)
class NetworkLabeller:
    """A checkpoint as a labeller: it takes the network's channels out of the 16 by name.

    Maps of another spacing are regridded to the network's own, and the probabilities back. Maps larger than `tile` (rows,
    columns; without it, of more than MOST_CELLS) are labelled in pieces that overlap (see `tiles`), with the same result.
    A network that sees the whole map at once is given whole maps.
    """

    checkpoint: Path | Place
    name: str
    tile: tuple[int, int] | None = None
    gives_probabilities: ClassVar[bool] = True

    def needs(self, path: Path, available: frozenset[str], has_ivt: bool) -> Collection[str]:
        return [channels.NAMES[place] for place in self._loaded.places]

    @cached_property
    def _loaded(self) -> _Loaded:
        read = read_checkpoint(self.checkpoint, training=False)
        network = build(read.facts.network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        network.load_state_dict(read.weights)
        column = lambda values: torch.tensor(values, dtype=torch.float32)[:, None, None]
        weights = read.facts.provenance.get("class_weights", [1.0] * len(read.facts.classes))
        places = [channels.INDEX[name] for name in read.facts.channels]
        mean, std = column(read.facts.mean), column(read.facts.std)
        return _Loaded(network.eval(), places, mean, std, column(weights), read.facts.spacing_deg)

    def label(self, fields: NDArray, grid: Grid, ivt: NDArray | None = None) -> tuple[NDArray[np.uint8], NDArray]:
        probabilities = self.probabilities(fields, grid)
        return probabilities.argmax(0).astype(np.uint8), probabilities

    def probabilities(self, fields: NDArray, grid: Grid) -> NDArray[np.float32]:
        """Class probabilities (3, H, W) on the map's own grid."""
        dlat, dlon = self._loaded.spacing_deg
        near = abs(grid.dlat / dlat - 1) < SPACING_TOLERANCE and abs(grid.dlon / dlon - 1) < SPACING_TOLERANCE
        own = grid if near else to_spacing(grid, dlat, dlon)
        seen = regrid(fields[self._loaded.places], grid, own)  # (C, H, W)
        result = regrid(self._infer(seen, own.periodic), own, grid)
        return (result / result.sum(0)).astype(np.float32)

    @torch.inference_mode()
    def _infer(self, fields: NDArray, periodic: bool) -> NDArray[np.float32]:
        own = self._loaded
        normal = (torch.from_numpy(np.ascontiguousarray(fields, np.float32)) - own.mean) / own.std
        multiple = int(own.network.multiple)  # pyright: ignore[reportArgumentType]
        padded, rows, columns = _pad(normal[None], multiple, periodic)
        whole = own.network.reach is None or (self.tile is None and padded.shape[-1] * padded.shape[-2] <= MOST_CELLS)
        result = self._classify(padded) if whole else self._classify_pieces(padded)
        return result[:, rows, columns].numpy()

    def _classify_pieces(self, padded: torch.Tensor) -> torch.Tensor:
        """The same as `_classify`, piece by piece. Strides begin where they would in the whole map, which to the network goes
        on around the circle, whether or not the source does."""
        network = self._loaded.network
        multiple, reach = int(network.multiple), int(network.reach)  # pyright: ignore[reportArgumentType]
        columns = anchor(padded, multiple)
        infer = lambda piece: self._classify(piece, torch.zeros_like(columns))
        result = torch.from_numpy(blended(turn(padded, columns), Tiling.of(self.tile or TILE, reach, multiple), True, infer))
        return turn(result[None], -columns)[0]

    def _classify(self, padded: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Normalised fields (1, C, h, w) → probabilities (3, h, w); `columns` as the network has them."""
        own = self._loaded
        with torch.autocast("cpu", torch.bfloat16):
            logits = own.network(padded.contiguous(memory_format=torch.channels_last), columns)
        return without_weights(logits[0].float().softmax(0), own.weights)


def without_weights(probabilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Probabilities (3, …) of a network trained with a class-weighted loss → those of the classes as they occur.

    Weighted cross-entropy is least at q_k ∝ w_k p_k, so p_k ∝ q_k / w_k.
    """
    unweighted = probabilities / weights
    return unweighted / unweighted.sum(0)


def parse_labeller(spec: str | Path, tile: tuple[int, int] | None = None) -> Labeller:
    """`rules:PRESET`, or a checkpoint or run folder, or the URI of such (for pieces of `tile`); BadInput when it is neither."""
    if str(spec).startswith("rules:"):
        return RulesLabeller(parse_rules(str(spec)), str(spec))
    place = Place.of(spec)
    if place.local is not None and not place.local.exists():
        raise BadInput(spec, "rules:PRESET, or the folder of a checkpoint or run", "no such folder", "Check the path.")
    read = read_checkpoint(place, training=False)
    path, facts = read.path.resolve() if isinstance(read.path, Path) else read.path, read.facts
    unknown = [name for name in facts.channels if name not in channels.INDEX]
    if unknown:
        expected, got = f"a network of channels among {', '.join(channels.NAMES)}", ", ".join(unknown)
        raise BadInput(path, expected, got, "Use the version of raysegment that wrote it.")
    digest = str(facts.provenance.get("weights_sha256", ""))[:12]
    return NetworkLabeller(path, f"network {facts.network.name} at step {facts.step} {digest}".strip(), tile)


def _pad(fields: torch.Tensor, multiple: int, periodic: bool) -> tuple[torch.Tensor, slice, slice]:
    """Fields (1, C, H, W) grown to sizes that divide by `multiple`, and the slices that cut the map out again.

    Latitude repeats its edge rows. Longitude goes on around the circle where there is one and repeats its edge where not.
    """
    height, width = fields.shape[-2:]
    south = (-height % multiple) // 2
    west = 0 if periodic and width % multiple == 0 else min(HALO_CELLS, width)
    east = west + (-(width + 2 * west) % multiple) if west else 0
    east = min(east, width)
    rows = torch.arange(-south, height + (-height % multiple) - south).clamp(0, height - 1)
    columns = torch.arange(-west, width + east)
    columns = columns % width if periodic else columns.clamp(0, width - 1)
    return fields[..., rows, :][..., columns], slice(south, south + height), slice(west, west + width)
