"""Examples for a run's page: tiles with their labels, and what the run's newest checkpoint says of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raysegment.applications.labellers import parse_labeller
from raysegment.applications.maps import TITLES
from raysegment.applications.report_figures import Picture, load_pyplot, painted
from raysegment.archive.manifest import Manifest
from raysegment.archive.places import Place
from raysegment.archive.quantise import dequantise
from raysegment.archive.shards import ShardSet, Tile
from raysegment.climate.channels import CYCLONE, INDEX, RIVER
from raysegment.climate.grid import Grid

_FIELD = "TMQ"
_LOOKED_AT = 32  # tiles among which those with the most to see are chosen
_SHOWN = 3


@dataclass(frozen=True)
class Example:
    """A tile: its name, precipitable water (h, w) in kg m⁻², labels and prediction (h, w)."""

    name: str
    vapour: NDArray[np.float32]
    truth: NDArray[np.uint8]
    predicted: NDArray[np.uint8]


def draw_examples(checkpoint: str | Path | Place, shards: str, whose: str) -> list[Picture]:
    """One picture of a few tiles of a shard set, `whose` in words; BadInput where either cannot be read."""
    examples = list(_examples(checkpoint, ShardSet(shards)))
    pyplot = load_pyplot()
    height, width = examples[0].truth.shape
    size = (11, max(1.2, 3.4 * height / width) * len(examples) + 0.6)
    figure, panels = pyplot.subplots(len(examples), 3, figsize=size, squeeze=False, layout="constrained")
    for row, example in zip(panels, examples, strict=True):
        row[0].imshow(example.vapour, origin="lower", cmap="Greys", interpolation="nearest")
        for panel, mask in zip(row[1:], (example.truth, example.predicted), strict=True):
            panel.imshow(painted(mask), origin="lower", interpolation="nearest")
        row[0].set_ylabel(example.name, fontsize=6)
        for panel in row:
            panel.set(xticks=[], yticks=[])
    for panel, title in zip(panels[0], ("precipitable water", "label", "network"), strict=True):
        panel.set_title(title, loc="left", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    pyplot.close(figure)
    kinds = f"red: {TITLES[CYCLONE]}, blue: {TITLES[RIVER]}"
    return [Picture(f"Tiles {whose}, labels and what the newest checkpoint says ({kinds})", "image/png", content.getvalue())]


def _examples(checkpoint: str | Path | Place, shards: ShardSet) -> Iterator[Example]:
    """The tiles with the most pixels of the rarest kind to see, of some that lie evenly in the set."""
    labeller = parse_labeller(checkpoint.text if isinstance(checkpoint, Place) else checkpoint)
    numbers = sorted({number * len(shards) // _LOOKED_AT for number in range(_LOOKED_AT)})
    tiles = [tile for tile in map(shards.tile, numbers) if tile.intact]
    rare = lambda tile: tuple(int((tile.mask == kind).sum()) for kind in (CYCLONE, RIVER))
    for tile in sorted(tiles, key=rare, reverse=True)[:_SHOWN]:
        fields = dequantise(tile.fields)  # (16, h, w)
        predicted, _ = labeller.label(fields, _grid(shards.manifest))
        yield Example(_name(tile), fields[INDEX[_FIELD]], tile.mask, predicted)


def _grid(manifest: Manifest) -> Grid:
    """A grid of the tiles' size and spacing: where it lies is all the same to a network."""
    (height, width), (dlat, dlon) = manifest.tile, manifest.spacing_deg
    return Grid(np.linspace(-dlat, dlat, height) * (height - 1) / 2, np.linspace(0.0, dlon * (width - 1), width))


def _name(tile: Tile) -> str:
    origin = tile.origin
    return f"{Path(origin.source).stem} {origin.time}".strip()[-28:] + f"\nrow {origin.row}, column {origin.column}"
