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


def torch_is_faster(values: int, training: bool, joined: bool) -> bool:
    """Whether torch's own calls are as fast as ours.

    Parameters
    ----------
    values : int
        Of z.
    training : bool
        The norm's mode.
    joined : bool
        Whether a sum or an activation is in its call.

    Returns
    -------
    bool
        By measurement.
    """
    return training and values <= JOINED if joined else values <= ALONE


def _served(z: Tensor, norm: Norm, mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether our kernels do what torch would: for these types, and where nobody looks at torch's operations."""
    return select(z).name in NATIVE and not observed(z) and bool(cpu.takes(z, norm, mean, var))


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

    joined = activation is not None

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
        if not torch_is_faster(z.numel(), True, joined or residual is not None):
            tracking = None
            if mean is not None and var is not None:
                tracking = Tracking(mean, var, momentum=momentum, skip_nonfinite=False)
            norm = Norm(1, eps, gamma, beta, residual, activation)
            if _served(z, norm, mean, var):
                y = None
                # in a backward the core moves no statistics, as our layers do not; torch's do
                if torch._C._current_graph_task_id() == -1:
                    y = cpu.train_at_once(z, gamma, beta, residual, 1, eps, activation, tracking)
                return normalize_batch(z, norm, tracking) if y is None else y
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

    joined = activation is not None

    def batch_norm_inference(
        z: Tensor,
        mean: Tensor,
        var: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        residual: Tensor | None,
    ) -> Tensor:
        if not torch_is_faster(z.numel(), False, joined or residual is not None):
            norm = Norm(1, eps, gamma, beta, residual, activation)
            if _served(z, norm, mean, var):
                y = cpu.infer_at_once(z, mean, var, gamma, beta, residual, 1, eps, activation)
                return normalize_population(z, norm, mean, var) if y is None else y
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
