"""Machines: what the hardware's makers or its measurement say, each number with its source (configs/machines/*.yaml)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from raysegment import config
from raysegment.climate.checks import BadInput

FOLDER = Path(__file__).parents[2] / "configs" / "machines"
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Machine:
    """One kind of node and what connects them; rates in bytes/s per direction, latencies in seconds.

    `disk_bytes_per_s` is a node's local disk (0: none, nodes share `shared_bytes_per_s`); `carriers` are the ranks of a node
    that carry the inter-node part of an exchange, `jitter` the relative spread of a rank's step where it has been measured
    (0: not). `generic` machines have no file: their numbers are typical ones, and priors about them are wide.
    """

    name: str
    gpus: int
    gpus_per_node: int
    peak_fp32_tflops: float
    peak_fp16_tflops: float
    gpu_memory_gib: float
    intra_bytes_per_s: float
    node_bytes_per_s: float
    intra_latency_s: float
    inter_latency_s: float
    launch_s: float
    host_memory_gib: float
    disk_bytes_per_s: float
    shared_bytes_per_s: float
    carriers: int = 0
    jitter: float = 0.0
    generic: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        low = [f.name for f in fields(self) if isinstance(getattr(self, f.name), int | float) and not getattr(self, f.name) >= 0]
        zero = [name for name in _POSITIVE if getattr(self, name) <= 0]
        if low or zero:
            raise ValueError(f"machine {self.name}: expected numbers above 0, got {[(n, getattr(self, n)) for n in low + zero]}")

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of one GPU's matrix units; bf16 as fp16."""
        return 1e12 * (self.peak_fp32_tflops if precision == "fp32" else self.peak_fp16_tflops)

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_node)


_POSITIVE = (
    "gpus", "gpus_per_node", "peak_fp32_tflops", "peak_fp16_tflops", "gpu_memory_gib", "intra_bytes_per_s", "node_bytes_per_s",
    "inter_latency_s", "host_memory_gib", "shared_bytes_per_s",
)  # fmt: skip


def names() -> list[str]:
    """Machines with a file."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "generic")


def find(name: str) -> Machine:
    """The machine of a shipped or given file (NAME or PATH.yaml); for a name with none, the generic one, under this name."""
    if name.endswith((".yaml", ".yml")):
        return read(Path(name))
    path = FOLDER / f"{name}.yaml"
    if path.exists():
        return read(path)
    return read(FOLDER / "generic.yaml", name=name, generic=True)


def near(name: str) -> list[str]:
    """Machines with a file whose names are like this one: a typing error, perhaps."""
    return difflib.get_close_matches(name, names(), n=1, cutoff=0.8)


def read(path: Path, **changes: Any) -> Machine:
    """A machine from its file; BadInput names a number that is missing, unknown, or without a source."""
    content = config.read_yaml(path)
    numbers = content.get("numbers")
    if not isinstance(numbers, dict):
        raise BadInput(path, "a group `numbers`", sorted(content), "See configs/machines/summit.yaml.")
    bare = [
        key for key, entry in numbers.items() if not isinstance(entry, dict) or not entry.get("source") or "value" not in entry
    ]
    if bare:
        raise BadInput(path, "`{value: …, source: …}` for every number", bare[0], "Say where the number comes from.")
    values = {"name": content.get("name", path.stem), **{key: entry["value"] for key, entry in numbers.items()}, **changes}
    sources = {key: entry["source"] for key, entry in numbers.items()}
    return config.load(Machine, {**values, "sources": sources}, path)


def as_text(machine: Machine) -> str:
    """The file of a machine: what `read` reads."""
    numbers = {key: {"value": getattr(machine, key), "source": source} for key, source in machine.sources.items()}
    return yaml.safe_dump({"name": machine.name, "numbers": numbers}, sort_keys=False, allow_unicode=True, width=128)
