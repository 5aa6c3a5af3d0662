"""A cell: one ordinary TorchTrainer with a fixed number of workers, driven from wherever its death takes only it along."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raysegment.elastic.runs import Run
from raysegment.elastic.settings import TrainConfig
from raysegment.elastic.worker import work


@dataclass(frozen=True)
class Room:
    """What a cell needs: `workers` of `per_worker` resources, on the node `node` ("" wherever Ray finds room), on one node
    if `together`."""

    workers: int
    per_worker: dict[str, float]
    gpu: bool
    node: str = ""
    together: bool = False


def drive(config: TrainConfig, cell: int, room: Room, roster: Any, driver: Any = None) -> dict[str, Any]:
    """Run a cell until training is over or the cell leaves; what Ray Train says of it. Blocks."""
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config, "cell": cell, "roster": roster, "driver": driver},
        torch_config=TorchConfig(backend="nccl" if room.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=room.workers, use_gpu=room.gpu, resources_per_worker=room.per_worker,
            placement_strategy="STRICT_PACK" if room.together else "PACK",
            label_selector={"ray.io/node-id": room.node} if room.node else None,
        ),
        run_config=RunConfig(
            name=f"{config.name}-cell{cell}-{time.time_ns():x}",  # never an old one's: what was reached is in our checkpoints
            storage_path=f"{config.out}/ray",
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )  # fmt: skip
    result = trainer.fit()
    return {"metrics": result.metrics, "path": result.path, "error": str(result.error) if result.error else ""}


@ray.remote(num_cpus=0, max_restarts=0)
class CellDriver:
    """A cell's driver in a process of its own."""

    def drive(self, config: TrainConfig, cell: int, room: Room, roster: Any) -> dict[str, Any]:
        """See `drive`."""
        Run(config.out).event("cell", cell=cell, node=room.node, what="driven", pid=os.getpid())
        return drive(config, cell, room, roster, ray.get_runtime_context().current_actor)
