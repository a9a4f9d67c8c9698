"""What a network costs at test time: its parameters, its operations, and the time of one answer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Costs:
    """Counted for one sample in inference mode.

    ``numbers`` are parameters and running statistics. ``linear`` and ``norm`` are multiplications and
    additions in linear maps (convolutions are such; as torch counts them) and in batch norms, two a value;
    activations are not counted.
    """

    numbers: int
    layers: int
    linear: int
    norm: int
    milliseconds: float

    @property
    def operations(self) -> int:
        """All of them."""
        return self.linear + self.norm


@torch.no_grad()
def count(model: nn.Module, sample: Tensor, *, calls: int = 200) -> Costs:
    """Count what one answer costs, by running it.

    Parameters
    ----------
    model : nn.Module
        In inference mode.
    sample : Tensor, shape (1, ...)
        What is asked.
    calls : int, optional
        To take the median time of.

    Returns
    -------
    Costs
        Of one sample.
    """
    weighted = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, _BatchNorm))]
    norms: list[int] = []
    hooks = [
        m.register_forward_hook(lambda layer, inputs, output: norms.append(2 * output.numel()))
        for m in weighted
        if isinstance(m, _BatchNorm)
    ]
    try:
        with FlopCounterMode(display=False) as linear:
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        model(sample)
        times.append((time.perf_counter() - start) * 1e3)
    numbers = sum(p.numel() for p in model.parameters())
    numbers += sum(b.numel() for b in model.buffers() if b.is_floating_point())
    return Costs(numbers, len(weighted), linear.get_total_flops(), sum(norms), statistics.median(times))
