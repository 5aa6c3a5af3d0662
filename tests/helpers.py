"""Small things that several tests need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def real_data(name: str) -> Path:
    """Path of a real weather file, or a skip with the reason where it is absent.

    Looks where RAYSEGMENT_DATA points, otherwise in `shared/data` beside the repository.
    """
    folder = Path(os.environ.get("RAYSEGMENT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"real data absent: {name} not in {folder} (set RAYSEGMENT_DATA)")
    return folder / name
