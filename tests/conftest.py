"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before Ray is imported: a thread that outlives its test must not start a Ray of its own when it finds none
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import pytest
import ray
import torch
from hypothesis import HealthCheck, settings

from raysegment.feed.session import ensure_ray
from tests.s3 import object_store as object_store
from tests.s3 import s3_server as s3_server

torch.set_num_threads(1)  # tensors here are so small that a second thread costs more than it does
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # no test is about a time


@pytest.fixture(scope="session")
def end_of_ray() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def two_cpus(end_of_ray: None) -> None:
    """A local Ray of two CPUs: the one of the modules before, unless there is none or another; it ends with the session."""
    if not ray.is_initialized() or ray.cluster_resources().get("CPU") != 2:
        ray.shutdown()
        ensure_ray(num_cpus=2)
