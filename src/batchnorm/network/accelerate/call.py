"""What stands in a rewritten graph: a norm, and what is done to its output, called as one.

The statistics move as torch's own layer moves them: a NaN goes through, and counts are the graph's.
Whatever our engine has no kernel for goes the way it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.autograd import normalize_batch, normalize_population, observed
from batchnorm.kernels.aten import activate
from batchnorm.kernels.select import select
from batchnorm.population import Tracking

NATIVE = frozenset({"cpu"})
"""Engines that are faster than torch's own batch norm; elsewhere a graph runs as it was written."""


def _written(
    z: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    y = F.batch_norm(z, mean, var, gamma, beta, training, momentum, eps)
    return activate(y if residual is None else y + residual, activation)


def fused_training(eps: float, activation: str | None) -> Callable[..., Tensor]:
    """Make the call of a norm in training, with what follows it.

    Parameters
    ----------
    eps : float
        Added to the variance.
    activation : str or None
        One of `batchnorm.kernels.contract.ACTIVATIONS`.

    Returns
    -------
    callable
        Of (z, running_mean, running_var, gamma, beta, momentum, residual).
    """

    def batch_norm_training(
        z: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        momentum: float,
        residual: Tensor | None,
    ) -> Tensor:
        tracking = (
            None
            if mean is None or var is None
            else Tracking(mean, var, None, None, None, momentum, 1, False)
        )
        engine = select(z)
        if (
            engine.name in NATIVE
            and not observed(z)
            and engine.takes(z, 1, gamma, beta, residual, tracking)
        ):
            return normalize_batch(z, gamma, beta, residual, 1, eps, activation, tracking)
        return _written(z, mean, var, gamma, beta, True, momentum, eps, residual, activation)

    return batch_norm_training


def fused_inference(eps: float, activation: str | None) -> Callable[..., Tensor]:
    """Make the call of a norm in inference, with what follows it.

    Parameters
    ----------
    eps, activation
        As for :func:`fused_training`.

    Returns
    -------
    callable
        Of (z, running_mean, running_var, gamma, beta, residual).
    """

    def batch_norm_inference(
        z: Tensor,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        engine = select(z)
        if engine.name in NATIVE and not observed(z) and engine.takes(z, 1, gamma, beta, residual, Tracking(mean, var)):
            return normalize_population(z, gamma, beta, residual, mean, var, 1, eps, activation)
        return _written(z, mean, var, gamma, beta, False, 0.0, eps, residual, activation)

    return batch_norm_inference
