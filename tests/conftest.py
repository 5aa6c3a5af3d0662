"""Fixtures that several rooms share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from raysegment.feed.session import ensure_ray
from tests.s3 import object_store as object_store
from tests.s3 import s3_server as s3_server


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A local Ray of two CPUs for one module's tests; ended with them, so that nothing of one module reaches the next."""
    ray.shutdown()
    ensure_ray(num_cpus=2)
    yield
    ray.shutdown()
