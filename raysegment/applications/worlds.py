"""Synthetic archives to learn from and to validate on; imported by every trial of a campaign, so little is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from raysegment.climate.synthetic import SyntheticConfig

OTHER_WORLD = 1000  # added to the seed for the held-out archive: other planets, other weather


@dataclass(frozen=True)
class ArchiveConfig:
    """Synthetic weather: `snapshots` to learn from and `held_out` of other planets, maps of `height` × `width` cells."""

    snapshots: int = 128
    held_out: int = 24
    height: int = 72
    width: int = 144
    seed: int = 2018

    def __post_init__(self) -> None:
        self.parts()  # which refuses impossible sizes

    def parts(self) -> dict[str, SyntheticConfig]:
        """The two archives by the name of their folder."""
        sizes = {"height": self.height, "width": self.width}
        return {
            "archive": SyntheticConfig(snapshots=self.snapshots, seed=self.seed, **sizes),
            "heldout": SyntheticConfig(snapshots=self.held_out, seed=self.seed + OTHER_WORLD, **sizes),
        }
