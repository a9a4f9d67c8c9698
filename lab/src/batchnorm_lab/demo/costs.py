"""What a network costs at test time: its parameters, its operations, and the time of one answer."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass
class Costs:
    """Counted for one sample in inference mode.

    ``numbers`` are parameters and running statistics. ``linear`` and ``norm`` are multiplications and
    additions in linear maps (convolutions are such) and in batch norms; activations are not counted.
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


def operations_of(layer: nn.Module, output: Tensor) -> int:
    """Count multiplications and additions of one call of a layer.

    Parameters
    ----------
    layer : nn.Module
        A convolution, a linear layer or a batch norm.
    output : Tensor
        What it gave.

    Returns
    -------
    int
        For K inputs to a value: K multiplications, K - 1 additions, 1 more for a bias. A batch norm at
        test time is one multiplication and one addition a value.
    """
    values = output.numel()
    if isinstance(layer, _BatchNorm):
        return 2 * values
    inputs = next(layer.parameters())[0].numel()
    return values * (2 * inputs - 1 + (layer.bias is not None))


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
    found = {"linear": 0, "norm": 0, "layers": 0}

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        key = "norm" if isinstance(layer, _BatchNorm) else "linear"
        found[key] += operations_of(layer, output)
        found["layers"] += 1

    watched = (nn.Linear, nn.modules.conv._ConvNd, _BatchNorm)
    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, watched)]
    try:
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
    return Costs(numbers, found["layers"], found["linear"], found["norm"], statistics.median(times))
