"""Elastic training on Ray that finds tropical cyclones and atmospheric rivers in climate fields."""

__version__ = "0.1.0"
