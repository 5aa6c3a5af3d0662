"""What a training sample costs in arithmetic, counted and not measured."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def training_flops(network: nn.Module, size: tuple[int, int], channels: int = 16) -> int:
    """Floating-point operations of forward and backward of one sample (1, channels, H, W): 3 × forward.

    Convolutions only, multiply and add counted separately, as the 2018 paper counts; nothing is computed (meta device).
    """
    shadow = copy.deepcopy(network).to("meta")
    fields = torch.empty((1, channels, *size), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(fields)
    return 3 * counter.get_total_flops()
