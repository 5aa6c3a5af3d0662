"""The Ray cluster this process talks to: the one it was started in, or a local one of its own."""

from __future__ import annotations

import logging
import os

import ray

from raysegment.climate.checks import BadInput


def ensure_ray(num_cpus: int | None = None, resources: dict[str, float] | None = None, log_to_driver: bool = False) -> None:
    """Connect to Ray unless this process already is: RAY_ADDRESS (set in submitted jobs) or else a fresh local Ray.

    `address="local"` never joins a cluster that somebody else left behind on the machine. The dashboard stays on:
    without it Ray Train never returns the placement groups of trials that Tune stopped. BadInput where RAY_ADDRESS
    is a dashboard's.
    """
    if ray.is_initialized():
        return
    quiet_data()
    for name, value in _driver_environment().items():
        os.environ.setdefault(name, value)
    if address := ray_address():
        ray.init(address=address, runtime_env={"env_vars": worker_environment()}, log_to_driver=log_to_driver)
        return
    os.environ.update(worker_environment())  # inherited; a runtime_env would leave the processes started ahead unused
    ray.init(
        address="local", num_cpus=num_cpus, resources=resources, log_to_driver=log_to_driver, logging_level=logging.WARNING
    )


def ray_address() -> str:
    """RAY_ADDRESS, "" where it is not set. BadInput where it is a dashboard's, which takes jobs but no drivers."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        remedy = "Submit the command with cluster/submit.sh, set RAY_ADDRESS=HEAD:PORT, or unset it for a local Ray."
        raise BadInput("RAY_ADDRESS", "the Ray that this command is to use, HEAD:PORT", f"a dashboard's, {address}", remedy)
    return address


def quiet_data() -> None:
    """Ray Data tells every execution's plan and progress; this process hears its warnings only."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _driver_environment() -> dict[str, str]:
    """What Ray Train reads from the driver: keep track of runs, for the dashboard; look after workers twice a second,
    after nodes that are announced to end once."""
    return {
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def worker_environment() -> dict[str, str]:
    """What Ray's processes must see: where the package is, and what drivers see, for those that drive trials."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    own = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([here, *paths])),
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        # Ray Train computes in a thread, for which glibc has an arena that maps and unmaps every large tensor anew
        "MALLOC_ARENA_MAX": "1",
        # Ray starts workers at 15. Ours step back by themselves once they train: whoever starts is first, and soon there
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112 - Ray spells it so
    }
    return {**{name: os.environ.get(name, value) for name, value in _driver_environment().items()}, **own}
