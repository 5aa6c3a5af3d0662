"""Smooth random fields on the sphere: sums of plane waves through the ball, isotropic, without seam or pole.

A wave cos(k·x + φ) of three-dimensional space, seen on the unit sphere, knows no longitude and no pole; a few hundred of
them with random directions are a Gaussian field with the chosen spectrum (random Fourier features, Rahimi & Recht 2007).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raysegment.climate.grid import EARTH_RADIUS_KM, Grid, unit_vectors


def sphere_points(grid: Grid) -> NDArray[np.float32]:
    """Unit vectors (H, W, 3) of the cell centres."""
    return unit_vectors(grid.lat[:, None], grid.lon[None, :]).astype(np.float32)


def smooth_noise(rng: np.random.Generator, points: NDArray, scale_km: float, waves: int = 128, octaves: float = 2.0) -> NDArray:
    """A field (H, W) of zero mean and unit variance with wavelengths from `scale_km` down by `octaves` powers of two.

    Amplitude grows with wavelength (a red spectrum): variance per octave ∝ wavelength².
    """
    wavelength_km = scale_km * 2.0 ** (-octaves * rng.random(waves))
    direction = rng.standard_normal((waves, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    wavenumber = (2 * np.pi * EARTH_RADIUS_KM / wavelength_km)[:, None] * direction
    amplitude = wavelength_km / np.sqrt(0.5 * np.sum(wavelength_km**2))
    phase = rng.uniform(0.0, 2 * np.pi, waves)
    return np.cos(points @ wavenumber.T.astype(np.float32) + phase.astype(np.float32)) @ amplitude.astype(np.float32)


def folded(rng: np.random.Generator, points: NDArray, scale_km: float, displacement_km: float) -> NDArray:
    """Points (H, W, 3) displaced along the sphere by a smooth random flow, so that noise evaluated there is drawn out
    into filaments as a tracer is by wind."""
    push = np.stack([smooth_noise(rng, points, scale_km, 64) for _ in range(3)], -1)
    moved = points + push * np.float32(displacement_km / EARTH_RADIUS_KM)
    return (moved / np.linalg.norm(moved, axis=-1, keepdims=True)).astype(np.float32)
