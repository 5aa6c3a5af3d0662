"""Small campaigns for tests: a network of a few hundred weights, trials of seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysegment import config as configuration
from raysegment.applications.campaign.space import CampaignConfig

SMALL = {
    "steps": 10,
    "network": {"tiramisu": {"first": 8, "growth": 4, "kernel": 3, "blocks": [1, 1]}},
    "learn": {"global_batch": 4, "micro_batch": 2},
    "feed": {"kind": "direct"},
}


def campaign_mapping(out: Path, shards: Path, **changes: Any) -> dict[str, Any]:
    """A grid of two learning rates, as the mapping of a file."""
    mapping = {
        "out": str(out),
        "train": {**SMALL, "shards": str(shards)},
        "search": {"learn.optim.lr": [1e-5, 1e-2]},
        "searcher": "grid",
        "scheduler": "fifo",
    }
    return {**mapping, **changes}


def campaign(out: Path, shards: Path, **changes: Any) -> CampaignConfig:
    return configuration.load(CampaignConfig, campaign_mapping(out, shards, **changes))
