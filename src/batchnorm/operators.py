"""The operators that a compiler sees: ``torch.ops.batchnorm.*``.

They write to nothing they are given, so a graph may run them again, reorder them or drop them. Statistics
come out as values, and what moves running statistics is ordinary torch operations beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.errors import NonFiniteError, TooFewValuesError
from batchnorm.kernels.aten import vector_dtype
from batchnorm.kernels.contract import PIECEWISE_LINEAR
from batchnorm.kernels.select import select
from batchnorm.layout import values_per_channel

_library = torch.library.Library("batchnorm", "DEF")
_library.define(
    "training(Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, int axis, float eps, str? activation)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor inv_std, Tensor saved, Tensor count)"
)
_library.define(
    "training_backward(Tensor dy, Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor mean,"
    " Tensor inv_std, Tensor saved, int axis, str? activation, bool with_residual)"
    " -> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual)"
)
_library.define("check_finite(Tensor count, Tensor mean, Tensor var) -> (Tensor, Tensor, Tensor)")
_library.define("check_count(Tensor count) -> Tensor")
_library.define("first_time(Tensor count) -> Tensor")


def recomputing() -> bool:
    """Whether this forward runs inside a backward, that is, re-runs a checkpointed segment.

    Activation checkpointing, reentrant or not, calls the forward a second time while torch's backward
    is under way. The batch was counted the first time.
    """
    return torch._C._current_graph_task_id() != -1


def _bits(residual: Tensor | None, activation: str | None) -> bool:
    return residual is not None and activation in PIECEWISE_LINEAR


def _training(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, mean, var, inv_std, _ = select(z).forward(z, axis, gamma, beta, eps, residual, activation, None)
    # an engine may lay its vectors out in one piece, which torch forbids an operator's outputs
    var, inv_std = var.clone(), inv_std.clone()
    # asked when the graph runs: a graph that is re-run by a checkpoint tells of no value
    count = torch.full((), 0 if recomputing() else values_per_channel(z.shape, axis), device=z.device)
    if not _bits(residual, activation):
        return y, mean, var, inv_std, z.new_empty(0, dtype=torch.bool), count
    # engines keep bits in forms of their own; in a graph the form is one that every engine can make
    return y, mean, var, inv_std, (y > 0) & (y < 6) if activation == "relu6" else y > 0, count


def _training_fake(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var, inv_std = (z.new_empty(z.shape[axis], dtype=vector_dtype(z)) for _ in range(3))
    saved = (
        torch.empty_like(z, dtype=torch.bool)
        if _bits(residual, activation)
        else z.new_empty(0, dtype=torch.bool)
    )
    return torch.empty_like(z), mean, var, inv_std, saved, z.new_empty((), dtype=torch.long)


def _training_backward(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    saved: Tensor,
    axis: int,
    activation: str | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    extra: Tensor | None = residual
    if saved.numel():
        slope = 0.01 if activation == "leaky_relu" else 0.0
        dy = torch.where(saved, dy, dy * slope)
        activation, extra = None, None
    dz, dbeta, dgamma, dresidual = select(z).backward(
        dy, z, axis, mean, inv_std, gamma, beta, activation, extra, True, with_residual
    )
    if dresidual is None:
        dresidual = z.new_empty(0)
    elif dresidual is dy:
        dresidual = dy.clone()
    return dz, dgamma, dbeta.clone(), dresidual


def _training_backward_fake(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    saved: Tensor,
    axis: int,
    activation: str | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = torch.empty_like(z) if with_residual else z.new_empty(0)
    return torch.empty_like(z), torch.empty_like(mean), torch.empty_like(mean), dresidual


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, gamma, beta, residual, axis, _, activation = inputs
    _, mean, var, inv_std, saved, count = output
    ctx.mark_non_differentiable(mean, var, inv_std, saved, count)
    smooth = residual is not None and activation is not None and activation not in PIECEWISE_LINEAR
    ctx.save_for_backward(z, gamma, beta, residual if smooth else None, mean, inv_std, saved)
    ctx.axis, ctx.activation = axis, activation


def _autograd_backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    z, gamma, beta, residual, mean, inv_std, saved = ctx.saved_tensors
    need = ctx.needs_input_grad
    dz, dgamma, dbeta, dresidual = torch.ops.batchnorm.training_backward(
        dy, z, gamma, beta, residual, mean, inv_std, saved, ctx.axis, ctx.activation, need[3]
    )
    return (
        dz if need[0] else None,
        dgamma.to(gamma.dtype) if need[1] else None,
        dbeta.to(beta.dtype) if need[2] else None,
        dresidual if need[3] else None,
        None,
        None,
        None,
    )


def _raise_unless_finite(mean: Tensor, var: Tensor) -> None:
    finite = torch.isfinite(mean) & torch.isfinite(var)
    if not bool(finite.all()):
        channels = torch.nonzero(~finite)[:, -1].unique().tolist()
        raise NonFiniteError(
            f"batch_norm: the batch holds NaN or inf in {len(channels)} of {mean.shape[-1]} channels "
            f"(first: {channels[:5]}).",
            why="statistics taken from it would be NaN, and stay so.",
            mend='look upstream of this layer; or on_nonfinite="skip" leaves the statistics as they were.',
        )


def _check_finite(count: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _raise_unless_finite(mean, var)
    return count.clone(), mean.clone(), var.clone()


def _check_count(count: Tensor) -> Tensor:
    least = int(count.min())
    if least < 2:
        raise TooFewValuesError(
            f"batch_norm: training needs at least 2 values per channel, and the mask keeps {least}.",
            why="a single value equals its own mean, so the output is the bias and no gradient reaches the input.",
            mend='a batch with more unmasked positions; or eval mode; or on_single_value="running".',
        )
    return count.clone()


def _first_time(count: Tensor) -> Tensor:
    return torch.zeros_like(count) if recomputing() else count.clone()


for _name, _function in (
    ("training", _training),
    ("training_backward", _training_backward),
    ("check_finite", _check_finite),
    ("check_count", _check_count),
    ("first_time", _first_time),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("batchnorm::training", _training_fake, lib=_library)
torch.library.register_fake("batchnorm::training_backward", _training_backward_fake, lib=_library)
torch.library.register_fake(
    "batchnorm::check_finite", lambda *told: tuple(torch.empty_like(t) for t in told), lib=_library
)
torch.library.register_fake("batchnorm::check_count", torch.empty_like, lib=_library)
torch.library.register_fake("batchnorm::first_time", torch.empty_like, lib=_library)
torch.library.register_vmap(
    "batchnorm::check_count", lambda info, dims, count: (_check_count(count), dims[0]), lib=_library
)
torch.library.register_autograd(
    "batchnorm::training", _autograd_backward, setup_context=_setup_context, lib=_library
)


def training(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize with the batch's own statistics, as one operator in a graph.

    Parameters
    ----------
    z, gamma, beta, residual, axis, eps, activation
        As for `batchnorm.autograd.normalize_batch`.

    Returns
    -------
    y : Tensor
        Of the shape of ``z``.
    count : Tensor of int64, shape ()
        Values per channel m; 0 where a checkpoint re-runs the graph, so that nothing moves twice.
    mean, var : Tensor, shape (C,)
        The batch's statistics, divisor m.
    """
    y, mean, var, _, _, count = torch.ops.batchnorm.training(z, gamma, beta, residual, axis, eps, activation)
    return y, count, mean, var


def check_finite(
    told: list[tuple[int | Tensor, Tensor, Tensor]],
) -> list[tuple[int | Tensor, Tensor, Tensor]]:
    """Raise `NonFiniteError` unless every statistic is finite, in a graph too.

    Parameters
    ----------
    told : list of (count, mean, var)
        Statistics of batches, vectors of shape (C,).

    Returns
    -------
    list of (count, mean, var)
        The same: use them, for in a graph only what comes out of the check waits for it.
    """
    if not told:
        return told
    if not torch.compiler.is_compiling():
        for _, mean, var in told:
            _raise_unless_finite(mean, var)
        return told
    means, variances = (torch.stack([part[i] for part in told]) for i in (1, 2))  # type: ignore[misc]
    counts = torch.stack([torch.as_tensor(count, device=means.device) for count, _, _ in told])
    checked = torch.ops.batchnorm.check_finite(counts, means, variances)
    return list(zip(*(t.unbind() for t in checked), strict=True))


def check_count(count: Tensor) -> Tensor:
    """Raise `TooFewValuesError` unless a mask keeps two values a channel, in a graph too.

    Parameters
    ----------
    count : Tensor, any shape
        Values that the mask keeps.

    Returns
    -------
    Tensor
        ``count``: use it, for in a graph only what comes out of the check waits for it.
    """
    return torch.ops.batchnorm.check_count(count)


def first_time(count: Tensor) -> Tensor:
    """Give a count as it is; or 0, where a checkpoint re-runs the graph that asks.

    Parameters
    ----------
    count : Tensor, any shape
        Values per channel.

    Returns
    -------
    Tensor
        What to move running statistics by.
    """
    return torch.ops.batchnorm.first_time(count)
