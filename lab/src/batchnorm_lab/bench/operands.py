"""The tensors of one case, and the numbers that every contender is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm_lab.bench.shapes import Case

MOMENTUM, EPS = 0.1, 1e-5


class Operands(NamedTuple):
    """The tensors of one case. ``residual`` is None where the form has none."""

    z: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @property
    def channel_dim(self) -> int:
        """The axis of the channels."""
        return 2 if self.z.dim() == 3 else 1


def make_operands(case: Case, seed: int = 0) -> Operands:
    """Draw fresh random data for a case.

    Parameters
    ----------
    case : Case
        What is to be timed.
    seed : int, optional
        Of the generator.

    Returns
    -------
    Operands
        Values of z have a different mean and scale in every channel.
    """
    generator = torch.Generator().manual_seed(seed)
    channel_dim = 2 if case.layout == "nlc" else 1
    channels = case.shape[channel_dim]
    across = [1] * len(case.shape)
    across[channel_dim] = channels

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def place(values: Tensor) -> Tensor:
        values = values.to(getattr(torch, case.dtype))
        if case.layout == "channels_last":
            last = torch.channels_last if values.dim() == 4 else torch.channels_last_3d
            return values.contiguous(memory_format=last)
        return values.contiguous()

    z = draw(*case.shape)
    z.mul_(draw(channels).abs().add_(0.5).view(across)).add_(draw(channels).view(across))
    return Operands(
        z=place(z),
        residual=place(draw(*case.shape)) if case.form == "add_relu" else None,
        dy=place(draw(*case.shape)),
        weight=draw(channels).abs_().add_(0.5),
        bias=draw(channels),
        running_mean=torch.zeros(channels),
        running_var=torch.ones(channels),
    )
