"""What is trained: operations, parameters and bytes of the networks that have been measured, each with its source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from raysegment.climate.checks import BadInput


@dataclass(frozen=True)
class Workload:
    """A network on its data.

    `tflop` training operations a sample; `parameters`; `tensors` gradients that a control plane negotiates; `sample_bytes` on
    disk; `samples` of an epoch (0: `samples_per_gpu` for each GPU, as in 2018); `activation_gib` kept for backward a sample
    in float32 (half of it in 16 bits); `control`: flat, tree or none; `wire_bytes` a gradient's element has on the wire.
    """

    tflop: float
    parameters: float
    tensors: int
    sample_bytes: float
    samples: int
    samples_per_gpu: int
    activation_gib: float
    control: str
    source: str
    wire_bytes: int = 4

    def gradient_bytes(self) -> float:
        return self.wire_bytes * self.parameters

    def epoch_samples(self, gpus: float) -> float:
        return self.samples or self.samples_per_gpu * gpus


_2018 = (
    "Kurth et al. 2018; operations as the paper counts them, parameters from the layer table; activations [16 GB held batch 2]"
)
_SAMPLE = 56.6e6  # 16 channels of float32 on 768 × 1152
WORKLOADS = {
    "deepcam": Workload(
        1.966, 56.45e6, 330, 63.7e6, 121_266, 0, 6.0, "none", "MLPerf HPC DeepCAM; operations and parameters from its layer table"
    ),
    "deeplab": Workload(14.41, 43.7e6, 170, _SAMPLE, 0, 250, 12.0, "tree", _2018),
    "tiramisu": Workload(4.188, 7.5e6, 70, _SAMPLE, 0, 250, 12.0, "tree", _2018),
    "tiramisu_4ch": Workload(3.703, 7.134e6, 70, _SAMPLE, 0, 250, 12.0, "tree", _2018),
}  # fmt: skip
ALIASES = {"deeplabv3+": "deeplab", "deeplabv3plus": "deeplab"}


def workload(name: str, where: object = "--network") -> Workload:
    """The workload of a network's name; BadInput suggests one."""
    known = ALIASES.get(name, name)
    if known not in WORKLOADS:
        likely = difflib.get_close_matches(name, WORKLOADS, n=1, cutoff=0.4)
        remedy = f"Did you mean {likely[0]}?" if likely else "Use one of these."
        raise BadInput(where, f"one of {', '.join(WORKLOADS)}", name, remedy)
    return WORKLOADS[known]
