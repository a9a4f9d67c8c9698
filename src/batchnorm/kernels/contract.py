"""The operations that every engine offers.

Notation: z is the input, ``z_hat = (z - mean) * inv_std``, ``u = gamma * z_hat + beta + residual``,
``y = activation(u)``. A channel holds m values. ``du = dy * activation'(u)``.

The operator is split where communication happens, so that masks, accumulation and pooling over ranks are
slots between operations and never kernels of their own; `forward` and `backward` are the fused pairs that
the speed comes from.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels.activations import find
from batchnorm.population import Tracking


class Norm(NamedTuple):
    """What is done with a tensor; passed down as one object.

    Parameters
    ----------
    axis : int
        The channel axis, non-negative.
    eps : float
        Added to the variance.
    gamma, beta : Tensor, shape (C,), or None
        Scale and place; any floating dtype.
    residual : Tensor or None
        Added before the activation, of z's shape and dtype. None in what a backward is given.
    activation : str or None
        One of `batchnorm.kernels.activations.ACTIVATIONS`.
    added : bool
        In what a backward is given: whether the forward added a residual.
    """

    axis: int
    eps: float
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None
    added: bool = False

    @property
    def needs_saved(self) -> bool:
        """Whether a backward needs ``saved``: u then cannot be computed from z and the moments alone."""
        return self.activation is not None and (self.added or self.residual is not None)

    @property
    def saves_residual(self) -> bool:
        """Whether what is saved is the residual itself; else the side of the kink of each element."""
        return self.needs_saved and find(self.activation).side is None

    def saved(self, u: Tensor) -> Tensor | None:
        """Give what a backward needs beside z and the moments, in torch's operations.

        Parameters
        ----------
        u : Tensor
            The pre-activation, or the output: they lie on the same side of a kink.

        Returns
        -------
        Tensor or None
            The residual, or the side of the kink of each element; None where nothing is needed.
        """
        side = find(self.activation).side
        return None if not self.needs_saved else self.residual if side is None else side(u)

    def check_saved(self, saved: Tensor | None) -> None:
        """Raise `ArgumentError` where a backward needs ``saved`` and has none.

        Parameters
        ----------
        saved : Tensor or None
            What the forward gave.
        """
        if saved is None and self.needs_saved:
            raise ArgumentError(
                f"backward: a residual was added before {self.activation}, and what the forward saved is missing.",
                why="the derivative of the activation would be taken at another value, without a sign of it.",
                mend="normalize(..., save=True) gives it; pass it on.",
            )


class Moments(NamedTuple):
    """The mean and ``1 / sqrt(var + eps)`` that z is normalized with, shape (C,) each."""

    mean: Tensor
    inv_std: Tensor


class Statistics(NamedTuple):
    """Of each channel: how many values, their mean, and the sum of squared deviations from it.

    ``count`` has shape (), or (C,) where channels have seen different numbers of values; it is exact.
    ``mean`` and ``m2`` have shape (C,). Of no value, both are 0.
    """

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    m2: Tensor

    def var(self) -> Tensor:
        """Variance with divisor m; 0 of no value.

        Returns
        -------
        Tensor, shape (C,)
            In the dtype of ``m2``.
        """
        return self.m2 / self.count.clamp(min=1).to(self.m2.dtype)


class Forward(NamedTuple):
    """What a fused training forward gives; ``var`` has divisor m, ``saved`` is as `Engine.normalize` gives it."""

    y: Tensor
    mean: Tensor
    var: Tensor
    inv_std: Tensor
    saved: Tensor | None


class Backward(NamedTuple):
    """What a fused backward gives: ``sum_dy`` is d(beta), ``sum_dy_zhat`` is d(gamma)."""

    dz: Tensor
    sum_dy: Tensor
    sum_dy_zhat: Tensor
    dresidual: Tensor | None


class Engine(Protocol):
    """What serves a tensor.

    Statistics and sums have length C and are float32, float64 for a float64 z or where ``dtype`` asks for it.
    gamma, beta, means and variances may have any floating dtype. Outputs have z's dtype and memory format.
    No operation but `forward` (through ``tracking``) writes to what it is given, unless ``out`` says so.

    A ``mask`` is boolean, broadcasts against z and has size 1 along the channel axis. Where it is False a
    value enters no sum, may be NaN, and 0 comes out of it.
    """

    name: str
    fuses_masks: bool
    """Whether `forward` and `backward` take a mask."""

    def batch_statistics(
        self, z: Tensor, axis: int, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        """Count, mean, and sum of squared deviations of each channel.

        ``dtype=torch.float64`` gives them unrounded, as pooling wants them.
        """

    def normalize(
        self,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        *,
        mask: Tensor | None = None,
        out: Tensor | None = None,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Give y, into ``out`` (which may be z) when it is given, and what the backward needs with it.

        The second is None unless ``save`` and ``norm.needs_saved``: then the residual itself where
        ``norm.saves_residual``, else the side of the kink of each element, in a form that only this engine
        reads. The form tells by its shape and values alone how it is laid out, never by its strides.
        """

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        """`normalize` with population statistics."""

    def backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        *,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give sum_dy and sum_dy_zhat, over du.

        Raises `ArgumentError` where ``norm.needs_saved`` and ``saved`` is None, as the other backwards do.
        """

    def backward_input(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor, Tensor],
        count: Tensor,
        with_residual: bool,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Give dz and du; ``count`` is what the sums are divided by, and where it is infinite the statistics
        are constants.
        """

    def forward(
        self, z: Tensor, norm: Norm, tracking: Tracking | None, mask: Tensor | None = None
    ) -> Forward | None:
        """Normalize with z's own statistics, and move the running statistics of ``tracking``.

        None, and nothing done, where ``mask`` keeps fewer than two values.
        """

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
        mask: Tensor | None = None,
    ) -> Backward:
        """Give every gradient; ``training=False`` takes the statistics for constants."""
