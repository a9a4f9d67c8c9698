"""From the statistics of mini-batches to those of the population: moving average, average, merge, blend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import skips
from batchnorm.compiling import compiling

WIDE = frozenset({torch.float32, torch.float64})
"""Dtypes in which running statistics are kept."""


class Tracking(NamedTuple):
    """Running statistics, and how a batch moves them.

    For each channel, with ``k`` the number of batches counted with this one::

        w = momentum, or 1 / k where momentum is None
        running_mean = (1 - w) * running_mean + w * mean
        running_var  = (1 - w) * running_var  + w * var * (m / (m - 1) if correction else 1)

    With ``skip_nonfinite`` a channel whose batch mean or variance is not finite keeps its statistics; in a plain
    average that batch counts as one equal to the average so far. A channel that still holds the mean 0 and the
    variance 1 it began with has no average yet, and takes on its first batch whole.

    Parameters
    ----------
    running_mean, running_var : Tensor, shape (C,)
        Population mean [z] and variance [z]**2.
    num_batches_tracked : Tensor of int64, shape (), or None
        Batches seen; required where momentum is None.
    momentum : float or None
        Weight of the NEW batch; None is the plain average.
    correction : int
        1: divisor m - 1 in running_var (torch); 0: divisor m (Keras, flax, ONNX).
    skip_nonfinite : bool
        Leave a channel alone whose batch is not finite.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    correction: int = 1
    skip_nonfinite: bool = True


def _no_grad() -> AbstractContextManager:
    # in a graph nothing here has a derivative anyway, and an exported program with a change of mode in it
    # can be saved but not loaded
    return nullcontext() if compiling() else torch.no_grad()


def commit(
    tracking: Tracking, count: int | Tensor, mean: Tensor, var: Tensor, unbiased: bool = False
) -> None:
    """Move running statistics toward those of one batch, in place.

    Written without a branch on values, so that a compiler can follow it and no device is waited for. A count that
    is a Python number stays one: made a tensor, it would be copied to the device, and the host would wait.

    Parameters
    ----------
    tracking : Tracking
        What to move, and how.
    count : int or Tensor, shape () or (C,)
        Values per channel m. A channel with fewer than two stays as it is.
    mean, var : Tensor, shape (C,)
        The batch's mean and variance.
    unbiased : bool, default False
        Whether the variance has divisor m - 1; else it has m.
    """
    running_mean, running_var = tracking.running_mean, tracking.running_var
    known = not isinstance(count, Tensor)
    amount: Any = count
    if known and not compiling() and count < 2:
        return
    with _no_grad():
        mean, var = mean.to(running_mean.dtype), var.to(running_var.dtype)
        enough: Any = count > 1
        still: Tensor | None = None if known else ~enough.expand(mean.shape)
        if tracking.skip_nonfinite:
            # infinity and NaN differ from 0 when taken from themselves; a mean that is either spoils its variance
            bad = (var - var) != 0
            bad = skips.count(running_mean, bad if known else bad & enough)
            still = bad if still is None else bad | still
        if tracking.num_batches_tracked is not None:
            tracking.num_batches_tracked.add_(1 if known else enough.any())
        if tracking.correction and not unbiased:
            m = amount if known else amount.to(var.dtype)
            var = var * (m / (m - 1) if known else m / (m - 1).clamp(min=1))
        elif unbiased and not tracking.correction:
            m = amount if known else amount.to(var.dtype)
            var = var * ((m - 1) / m if known else (m - 1) / m.clamp(min=1))
        weight: float | Tensor
        if tracking.momentum is not None:
            weight = tracking.momentum
        else:
            counted = tracking.num_batches_tracked
            seen = torch.ones_like(mean) if counted is None else counted
            begun = (running_mean != 0) | (running_var != 1)
            weight = torch.where(begun, 1 / seen.clamp(min=1).to(mean.dtype), 1.0)
        moved = [running_mean, running_var]
        batch = [mean, var]
        if still is not None:
            batch = [torch.where(still, old, new) for old, new in zip(moved, batch, strict=True)]
        if compiling() or isinstance(weight, Tensor):
            for old, new in zip(moved, batch, strict=True):
                old.lerp_(new, weight)
        else:
            torch._foreach_lerp_(moved, batch, weight)  # one launch


def count_empty(tracking: Tracking, empty: int | Tensor = 1) -> None:
    """Count a batch without any value: it was tracked, as in torch.

    Parameters
    ----------
    tracking : Tracking
        Whose counts move.
    empty : int or Tensor, shape (), default 1
        0 or False where the batch had values after all: nothing moves.
    """
    with _no_grad():
        if tracking.num_batches_tracked is not None:
            tracking.num_batches_tracked.add_(empty)


def merge(
    count: Tensor, mean: Tensor, m2: Tensor, count_b: int | Tensor, mean_b: Tensor, m2_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of two sets of values, exactly (Chan, Golub and LeVeque 1983).

    Parameters
    ----------
    count, mean, m2 : Tensor
        Count, mean, and sum of squared deviations from it, of the first set; float64 keeps every digit.
    count_b, mean_b, m2_b : Tensor
        Of the second.

    Returns
    -------
    count, mean, m2 : Tensor
        Of both together. The spread between the two means is in ``m2``.
    """
    total = count + count_b
    share = count_b / total.clamp(min=1) if isinstance(total, Tensor) else count_b / max(total, 1)
    delta = mean_b.to(mean.dtype) - mean
    return total, mean + delta * share, m2 + m2_b.to(m2.dtype) + delta * delta * (count * share)


def blend(
    prior: float, mean: Tensor, var: Tensor, count: float, batch_mean: Tensor, batch_var: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix two distributions, the first worth ``prior`` samples and the second ``count``.

    ::

        m  = (prior * mean + count * batch_mean) / (prior + count)
        var = (prior * var + count * batch_var) / (prior + count) + spread between the means

    Parameters
    ----------
    prior : float
        How many samples the first is worth; 0 keeps nothing of it, inf everything.
    mean, var : Tensor, shape (C,)
        Of the first.
    count : float
        How many samples the second is worth.
    batch_mean, batch_var : Tensor, shape (C,)
        Of the second.

    Returns
    -------
    mean, var : Tensor, shape (C,)
        Of the mixture.
    """
    share = 0.0 if prior == float("inf") else count / (prior + count)
    delta = batch_mean - mean
    blended = var * (1 - share) + batch_var * share + delta * delta * (share * (1 - share))
    return mean + delta * share, blended
