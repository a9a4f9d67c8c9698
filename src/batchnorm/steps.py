"""A training step and its backward, made of the engine's slots, where a mask or a pooling of ranks takes part.

Where nothing stands between the slots, the engine's fused `forward` and `backward` are the short cut.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from batchnorm.errors import TooFewValuesError
from batchnorm.kernels import aten
from batchnorm.kernels.contract import Engine, Moments, Norm, Statistics

Constants = tuple[Tensor, Tensor]
"""Mean and variance (divisor m) that are constants, shape (C,) each."""


class Between(Protocol):
    """What stands between the two halves of a step, and of its backward: pooling over ranks.

    One object goes down from the layer, through `batchnorm.functional.train`, to where a step is made. It is
    kept until the backward, so it holds names and no tensors, and it may be called from torch's backward thread.
    None in its place means that nothing stands there, and the engine's fused pair serves.

    Every rank calls each method equally often and in the same order, an empty batch included: no slot is left
    out because of values. What a method returns must have the same bits on every rank. gamma and beta get the
    local sums as their gradients; only the input gradient sees the pooled ones.
    """

    def statistics(self, local: Statistics) -> Statistics:
        """Give the statistics to normalize with, from those of this rank; both in float64, ``count`` exact.

        Runs without a gradient being recorded. With a mask ``count`` is what the mask keeps. It looks for fewer
        than two values itself, for it knows whether a rank had a mask, and where looking must wait for a device.
        """

    def sums(self, local: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Give sum_dy and sum_dy_zhat of all, from those of this rank; both in float64.

        The input gradient divides them by the count that `statistics` gave.
        """

    def differentiable(self, local: Statistics) -> Statistics:
        """As `statistics`, in torch operations that torch differentiates; for transforms and derivatives of
        derivatives. Where that cannot be, raise an error that says why.
        """

    def operator(
        self, z: Tensor, norm: Norm, mask: Tensor | None, fallback: Constants | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give (y, count, mean, var) of a whole step as one differentiable operator in a compiled graph.

        As `batchnorm.operators.training` does without pooling: an opaque operator made of :func:`forward`, its
        backward of :func:`backward`, this object made anew inside from what an operator may be given (its
        name). ``count`` is -1 where `batchnorm.operators.recomputing`: neither values, nor a batch without any.
        """


class Step(NamedTuple):
    """What a step gives.

    ``statistics`` are those of the batch, pooled where ranks are; ``moments`` what z was normalized with, and
    ``count`` what the backward divides by: infinite where the moments are constants.
    """

    y: Tensor
    statistics: Statistics
    moments: Moments
    saved: Tensor | None
    count: Tensor  # type: ignore[assignment]


def check_count(count: Tensor) -> None:
    """Raise `TooFewValuesError` unless every count is 2 or more.

    Parameters
    ----------
    count : Tensor, any shape
        Values per channel.
    """
    least = int(count.min())
    if least < 2:
        raise TooFewValuesError(
            f"batch_norm: training needs at least 2 values per channel, and the mask keeps {least}.",
            why="a single value equals its own mean, so the output is the bias and no gradient reaches the input.",
            mend='a batch with more unmasked positions; or eval mode; or on_single_value="running".',
        )


def choose(
    count: Tensor, mean: Tensor, var: Tensor, fallback: Constants | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Let the fallback serve where fewer than two values are.

    Parameters
    ----------
    count : Tensor
        Values per channel.
    mean, var : Tensor, shape (C,)
        Theirs.
    fallback : (mean, var) or None
        Constants.

    Returns
    -------
    count : Tensor
        Infinite where the constants serve.
    mean, var : Tensor, shape (C,)
        What to normalize with; differentiable, and without a branch on values.
    """
    if fallback is None:
        return count, mean, var
    enough = count > 1
    mean = torch.where(enough, mean, fallback[0].to(mean.dtype))
    var = torch.where(enough, var, fallback[1].to(var.dtype))
    return torch.where(enough, count, inf), mean, var


def forward(
    engine: Engine,
    z: Tensor,
    norm: Norm,
    mask: Tensor | None = None,
    fallback: Constants | None = None,
    between: Between | None = None,
    save: bool = True,
) -> Step:
    """Take statistics, pool them, and normalize with them.

    Parameters
    ----------
    engine : Engine
        What serves z.
    z : Tensor
        Input.
    norm : Norm
        What is done with it.
    mask : Tensor of bool or None
        Values that count.
    fallback : (mean, var) or None
        What serves where fewer than two values do; None raises.
    between : Between or None
        What pools.
    save : bool, default True
        Whether a backward will come.

    Returns
    -------
    Step
        Nothing is written to.
    """
    exact = aten.exact_dtype(z.device)
    # unrounded where they are merged with others, which takes more time
    statistics = engine.batch_statistics(z, norm.axis, mask, None if between is None else exact)
    if between is not None:
        statistics = between.statistics(statistics)
    elif fallback is None:
        check_count(statistics.count)
    count, mean, var = choose(statistics.count, statistics.mean, statistics.var(), fallback)
    dtype = aten.vector_dtype(z)
    moments = Moments(mean.to(dtype), (var.to(exact) + norm.eps).rsqrt().to(dtype))
    y, saved = engine.normalize(z, norm, moments, mask=mask, save=save)
    return Step(y, statistics, moments, saved, count)


def backward(
    engine: Engine,
    dy: Tensor,
    z: Tensor,
    norm: Norm,
    moments: Moments,
    saved: Tensor | None,
    count: Tensor,
    mask: Tensor | None = None,
    between: Between | None = None,
    with_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Take the sums, pool them, and make the input gradient of them.

    Parameters
    ----------
    engine, z, norm, mask, between
        As for :func:`forward`; ``norm`` as a backward is given it.
    dy : Tensor
        Gradient of y.
    moments, saved, count
        As :func:`forward` gave them.
    with_residual : bool, default False
        Whether the residual's gradient is asked for.

    Returns
    -------
    dz, sum_dy, sum_dy_zhat : Tensor
        The sums are this rank's own: the gradients of beta and gamma.
    dresidual : Tensor or None
        Gradient of the residual.
    """
    dtype = aten.vector_dtype(z) if between is None else aten.exact_dtype(z.device)
    local = engine.backward_reduce(dy, z, norm, moments, saved, mask=mask, dtype=dtype)
    sums = local if between is None else between.sums(local)
    dz, dresidual = engine.backward_input(dy, z, norm, moments, saved, sums, count, with_residual, mask=mask)
    return dz, *local, dresidual
