"""What stands in a rewritten graph: a norm, and what is done to its output, called as one.

The statistics move as torch's own layer moves them: a NaN goes through, and counts are the graph's.
Whatever our engine has no kernel for goes the way it was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from batchnorm.autograd import normalize_batch, normalize_population, observed
from batchnorm.functional import Options
from batchnorm.kernels import cpu
from batchnorm.kernels.activations import activate
from batchnorm.kernels.contract import Norm
from batchnorm.kernels.select import select
from batchnorm.population import Tracking

NATIVE = frozenset({"cpu"})
"""Engines that are faster than torch's own batch norm; elsewhere a graph runs as it was written."""

ALONE, JOINED = 65536, 8192
"""Values of z up to which torch's own calls are as fast: of a norm alone, and of one that is joined, in training.

What a call costs decides there. Measured with 1 and 2 threads in NCHW and channels_last."""


def _torch_is_faster(z: Tensor, training: bool, activation: str | None, residual: Tensor | None) -> bool:
    if activation is None and residual is None:
        return z.numel() <= ALONE
    return training and z.numel() <= JOINED


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


def torch_training(activation: str | None) -> Callable[..., Tensor]:
    """Make the call of a norm in training, with what follows it.

    Parameters
    ----------
    activation : str or None
        One of `batchnorm.kernels.contract.ACTIVATIONS`.

    Returns
    -------
    callable
        Of (z, running_mean, running_var, gamma, beta, momentum, eps, residual).
    """

    def batch_norm_training(
        z: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        momentum: float,
        eps: float,
        residual: Tensor | None,
    ) -> Tensor:
        if not _torch_is_faster(z, True, activation, residual):
            tracking = None
            if mean is not None and var is not None:
                tracking = Tracking(mean, var, momentum=momentum, skip_nonfinite=False)
            engine, norm = select(z), Norm(1, eps, gamma, beta, residual, activation)
            if engine.name in NATIVE and not observed(z) and cpu.takes(z, norm, mean, var):
                return normalize_batch(z, norm, tracking)
        return _written(z, mean, var, gamma, beta, True, momentum, eps, residual, activation)

    return batch_norm_training


def torch_inference(activation: str | None) -> Callable[..., Tensor]:
    """Make the call of a norm in inference, with what follows it.

    Parameters
    ----------
    activation : str or None
        As for :func:`torch_training`.

    Returns
    -------
    callable
        Of (z, running_mean, running_var, gamma, beta, eps, residual).
    """

    def batch_norm_inference(
        z: Tensor,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        residual: Tensor | None,
    ) -> Tensor:
        if not _torch_is_faster(z, False, activation, residual):
            engine, norm = select(z), Norm(1, eps, gamma, beta, residual, activation)
            if engine.name in NATIVE and not observed(z) and cpu.takes(z, norm, mean, var):
                return normalize_population(z, norm, mean, var)
        return _written(z, mean, var, gamma, beta, False, 0.0, eps, residual, activation)

    return batch_norm_inference


def ours(step: Callable[..., Tensor], options: Options) -> Callable[..., Tensor]:
    """Make the call of a layer of ours, with what follows it.

    Parameters
    ----------
    step : callable
        `batchnorm.functional.train_step` or ``infer_step``.
    options : Options
        With the activation.

    Returns
    -------
    callable
        Of (z, gamma, beta, residual, and what else ``step`` takes).
    """

    def batch_norm(*arguments: Any) -> Tensor:
        return step(*arguments, options)

    return batch_norm
