"""Fields as they are staged: float16 of (x − reference) / scale, with the published constants of each channel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.channels import CHANNELS, NAMES
from raysegment.climate.checks import BadInput

REFERENCE = np.array([channel.reference for channel in CHANNELS], np.float32)
SCALE = np.array([channel.scale for channel in CHANNELS], np.float32)


def quantise(values: NDArray[np.float32], where: object = "fields") -> NDArray[np.float16]:
    """Fields (…, 16, h, w) in SI units → float16 of (x − reference) / scale; BadInput for what is not finite there."""
    out = np.empty(values.shape, np.float16)
    bad = []
    with np.errstate(over="ignore", invalid="ignore"):
        for number, name in enumerate(NAMES):  # one channel at a time stays in the cache
            out[..., number, :, :] = (values[..., number, :, :] - REFERENCE[number]) / SCALE[number]
            if not np.isfinite(out[..., number, :, :]).all():
                bad.append(name)
    if bad:
        got = f"{', '.join(bad)} beyond it"
        raise BadInput(where, "finite fields within the range of float16", got, "Check the units and fill values")
    return out


def dequantise(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """Staged fields (…, 16, h, w) → SI units, to float16's 11 bits."""
    return values.astype(np.float32) * SCALE[:, None, None] + REFERENCE[:, None, None]
