"""All parameters in one vector, all gradients in another, all running statistics in a third.

The module's tensors become views, so that exchange, optimizer and average work on a few long vectors instead of on
hundreds of short tensors, and nothing is ever copied together or apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Flat:
    """A network's parameters as `values` (P,) with `grads` (P,), weights first, then those of one dimension or none.

    Built once the network is on its device and in its memory format; moving the network afterwards would tear it apart.
    """

    def __init__(self, network: nn.Module):
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        named.sort(key=lambda item: item[1].ndim < 2)  # stable: weights, then biases and norms
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        sizes = [p.numel() for p in self.parameters]
        self.weights = sum(p.ndim >= 2 for p in self.parameters)  # how many tensors are weights
        self.split = sum(sizes[: self.weights])  # where in the vectors they end
        device = self.parameters[0].device
        self.values = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.grads = torch.zeros_like(self.values)
        for p, value, grad in zip(self.parameters, self.views(self.values), self.views(self.grads), strict=True):
            assert p.dtype == torch.float32, "parameters are kept in float32; autocast does the rest"
            value.copy_(p.data)
            p.data, p.grad = value, grad

    def views(self, vector: Tensor) -> list[Tensor]:
        """The tensors that lie in a vector (P,), one per parameter, in the parameter's shape and memory format."""
        views, start = [], 0
        for p in self.parameters:
            views.append(vector[start : start + p.numel()].as_strided(p.shape, p.stride(), vector.storage_offset() + start))
            start += p.numel()
        return views

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Contiguous copies of a vector's tensors by the parameter's name."""
        return {name: view.detach().clone(memory_format=torch.contiguous_format) for name, view in self._items(vector)}

    def fill(self, vector: Tensor, tensors: dict[str, Tensor]) -> None:
        """Copy named tensors into a vector."""
        for name, view in self._items(vector):
            view.copy_(tensors[name])

    def _items(self, vector: Tensor) -> list[tuple[str, Tensor]]:
        return list(zip(self.names, self.views(vector), strict=True))


class Statistics:
    """The running means and variances of all batch norms as one vector `values` (S,).

    In training every micro-batch is normalised by its own statistics; the running ones change once per step, by the
    mean over the step's micro-batches, each weighing as many usable tiles as it has:
    running ← (1 − momentum) · running + momentum · mean. While this is entered the norms write the plain statistics of a
    micro-batch into `values` (their momentum is 1 meanwhile), from where the step takes them; `num_batches_tracked` counts
    steps.
    """

    def __init__(self, network: nn.Module):
        self.norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        buffers: list[Tensor] = [b for m in self.norms for b in (m.running_mean, m.running_var) if b is not None]
        device = next(network.parameters()).device
        self.values = torch.cat([b.flatten() for b in buffers]) if buffers else torch.zeros(0, device=device)
        start = 0
        for m in self.norms:
            size = m.num_features
            m.running_mean = self.values[start : start + size]
            m.running_var = self.values[start + size : start + 2 * size]
            start += 2 * size
        momenta = [m.momentum if m.momentum is not None else 0.1 for m in self.norms]
        per_value: Sequence[Tensor] = [torch.full((2 * m.num_features,), k) for m, k in zip(self.norms, momenta, strict=True)]
        self.momentum = torch.cat(list(per_value)).to(device) if per_value else torch.zeros(0, device=device)
        self.kept = self.values.clone()

    def __enter__(self) -> Statistics:
        self.kept = self.values.clone()
        self._momenta = [m.momentum for m in self.norms]
        self._counts = [m.num_batches_tracked for m in self.norms]
        for m in self.norms:
            m.momentum, m.num_batches_tracked = 1.0, None  # type: ignore[assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        for m, momentum, count in zip(self.norms, self._momenta, self._counts, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count
        self.values.copy_(self.kept)

    def update(self, mean: Tensor) -> None:
        """Take the mean statistics (S,) of a step's micro-batches into the running ones."""
        self.values.lerp_(mean, self.momentum)
        for m in self.norms:
            if m.num_batches_tracked is not None:
                m.num_batches_tracked += 1
