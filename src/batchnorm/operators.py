"""The operators that a compiler sees: ``torch.ops.batchnorm.*``.

They write to nothing they are given, so a graph may run them again, reorder them or drop them. Statistics
come out as values, and what moves running statistics is ordinary torch operations beside them.

An operator has no optional output: what a call has no use for is an empty tensor (`_nothing`).

Where ranks pool, a step is the same operator. Messages go out in the order in which operators run, and that order
must be the same on every rank; a compiler may reorder what does not depend on each other, and does so on a rank
whose batch is empty. So a step that pools takes a ticket, a tensor without a meaning, and gives the next one: the
order of the forward, and through the ticket's gradient that of the backward, is then a dependence of data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm import steps
from batchnorm.compiling import compiling
from batchnorm.errors import NonFiniteError, PoolingError
from batchnorm.kernels.activations import find
from batchnorm.kernels.aten import exact_dtype, vector_dtype
from batchnorm.kernels.contract import Moments, Norm
from batchnorm.kernels.select import select
from batchnorm.layout import values_per_channel
from batchnorm.steps import Constants
from batchnorm.written import written_down

_library = torch.library.Library("batchnorm", "DEF")
_library.define(
    "training(Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? mask, Tensor? fallback_mean,"
    " Tensor? fallback_var, Tensor? ticket, int axis, float eps, str? activation, str? pooling, float? momentum)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor center, Tensor inv_std, Tensor side, Tensor divisor,"
    " Tensor count, Tensor next)"
)
_library.define(
    "training_backward(Tensor dy, Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? mask,"
    " Tensor center, Tensor inv_std, Tensor side, Tensor divisor, Tensor? ticket, int axis, float eps,"
    " str? activation, str? pooling, float? momentum, bool with_residual)"
    " -> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual, Tensor next)"
)
_library.define("check_finite(Tensor count, Tensor mean, Tensor var) -> (Tensor, Tensor, Tensor)")
_library.define("check_count(Tensor count) -> Tensor")
_library.define("first_time(Device device) -> Tensor")


def _unknown(*_: Any) -> steps.Between | None:
    """Refuse, for nobody has said what pools."""
    raise PoolingError(
        "batch_norm: a graph that pools over ranks is run where nothing knows how to.",
        why="its statistics would be this rank's alone.",
        mend="import batchnorm.pooling.graph first.",
    )


between_of: Callable[[str, float, float | None], steps.Between | None] = _unknown
"""What pools, from what a graph holds of it; None: nobody to pool with. `batchnorm.pooling.graph` sets it."""


def recomputing() -> bool:
    """Whether this forward runs inside a backward, that is, re-runs a checkpointed segment.

    Activation checkpointing, reentrant or not, calls the forward a second time while torch's backward
    is under way. The batch was counted the first time.
    """
    return torch._C._current_graph_task_id() != -1


def _nothing(z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return z.new_empty(0, dtype=dtype)


def _next(ticket: Tensor | None, z: Tensor) -> Tensor:
    return _nothing(z) if ticket is None else torch.zeros_like(ticket)


def _training(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    fallback_mean: Tensor | None,
    fallback_var: Tensor | None,
    ticket: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
    pooling: str | None,
    momentum: float | None,
) -> tuple[Tensor, ...]:
    norm, engine = Norm(axis, eps, gamma, beta, residual, activation), select(z)
    between = None if pooling is None else between_of(pooling, eps, momentum)
    m, dtype = values_per_channel(z.shape, axis), vector_dtype(z)
    alone = between is None and mask is None
    if alone and (pooling is None or m != 1):
        if m or pooling is None:
            y, mean, var, inv_std, _ = engine.forward(z, norm, None)  # type: ignore[misc] # None is for masks
        else:  # nobody to pool with, and no value: any statistics will do
            y, mean = torch.empty_like(z), z.new_zeros(z.shape[axis], dtype=dtype)
            var = inv_std = torch.ones_like(mean)
        # an engine may lay its vectors out in one piece, which torch forbids an operator's outputs
        var, inv_std = var.clone(), inv_std.clone()
        count, center, divisor = torch.full((), m, device=z.device), _nothing(z), _nothing(z)
        if pooling is not None:
            center, divisor = mean.clone(), count.clamp(min=1).to(exact_dtype(z.device))
    else:
        fallback = None if fallback_mean is None or fallback_var is None else (fallback_mean, fallback_var)
        y, told, (center, inv_std), _, divisor = steps.forward(
            engine, z, norm, mask, fallback, between, save=False
        )
        mean, var, count = told.mean.to(dtype, copy=True), told.var().to(dtype), told.count.to(torch.long)
        divisor = divisor.to(exact_dtype(z.device), copy=True)
    if recomputing():
        # asked when the graph runs: a graph that is re-run by a checkpoint tells of no value, and of ranks not even
        # of an empty batch
        count = torch.full_like(count, 0 if pooling is None else -1)
    return y, mean, var, center, inv_std, side_of(y, norm), divisor, count, _next(ticket, z)


def side_of(y: Tensor, norm: Norm) -> Tensor:
    """Give the sides of the kink as bools, which every engine can make; empty where a backward needs none."""
    saved = None if norm.saves_residual else norm.saved(y)
    return _nothing(y, torch.bool) if saved is None else saved


def _training_fake(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    residual, mask, ticket, axis, eps, activation, pooling = *rest[2:4], *rest[6:11]

    def vector() -> Tensor:
        return z.new_empty(z.shape[axis], dtype=vector_dtype(z))

    norm = Norm(axis, eps, residual=residual, activation=activation)
    with_side = norm.needs_saved and not norm.saves_residual
    side = torch.empty_like(z, dtype=torch.bool) if with_side else _nothing(z, torch.bool)
    center, divisor = _nothing(z), _nothing(z)
    if mask is not None or pooling is not None:
        center, divisor = vector(), z.new_empty((), dtype=exact_dtype(z.device))
    count = z.new_empty((), dtype=torch.long)
    return torch.empty_like(z), vector(), vector(), center, vector(), side, divisor, count, _next(ticket, z)


def _training_backward(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    center: Tensor,
    inv_std: Tensor,
    side: Tensor,
    divisor: Tensor,
    ticket: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
    pooling: str | None,
    momentum: float | None,
    with_residual: bool,
) -> tuple[Tensor, ...]:
    if side.numel():
        dy = torch.where(side, dy, dy * find(activation).slope)
    if side.numel() or (residual is None and not z.numel()):
        activation = None
    norm = Norm(axis, eps, gamma, beta, None, activation, residual is not None)
    moments, engine = Moments(center, inv_std), select(z)
    if mask is None and pooling is None:
        dz, dbeta, dgamma, dresidual = engine.backward(dy, z, norm, moments, residual, True, with_residual)
    else:
        between = None if pooling is None else between_of(pooling, eps, momentum)
        dz, dbeta, dgamma, dresidual = steps.backward(
            engine, dy, z, norm, moments, residual, divisor, mask, between, with_residual
        )
    if dresidual is None:
        dresidual = _nothing(z, z.dtype)
    elif dresidual is dy:
        dresidual = dy.clone()
    dtype = vector_dtype(z)
    return dz, dgamma.to(dtype), dbeta.to(dtype, copy=True), dresidual, _next(ticket, z)


def _training_backward_fake(dy: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inv_std, ticket, with_residual = rest[5], rest[8], rest[-1]
    dresidual = torch.empty_like(z) if with_residual else _nothing(z, z.dtype)
    vectors = torch.empty_like(inv_std), torch.empty_like(inv_std)
    return torch.empty_like(z), *vectors, dresidual, _next(ticket, z)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, gamma, beta, residual, mask, _, _, ticket, *how = inputs
    _, mean, _, center, inv_std, side, divisor, *_ = output
    # the next ticket has a gradient, of which the order of the backward is made
    ctx.mark_non_differentiable(*output[1 : None if ticket is None else -1])
    norm = Norm(how[0], how[1], residual=residual, activation=how[2])
    kept = residual if norm.saves_residual else None
    center = center if center.numel() else mean
    ctx.save_for_backward(z, gamma, beta, kept, mask, center, inv_std, side, divisor)
    ctx.ordered, ctx.how = ticket is not None, how


def _autograd_backward(ctx: Any, dy: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    gamma, beta = ctx.saved_tensors[1:3]
    need = ctx.needs_input_grad
    ticket = rest[-1] if ctx.ordered else None
    dz, dgamma, dbeta, dresidual, following = torch.ops.batchnorm.training_backward(
        dy, *ctx.saved_tensors, ticket, *ctx.how, need[3]
    )
    return (
        dz if need[0] else None,
        dgamma.to(gamma.dtype) if need[1] else None,
        dbeta.to(beta.dtype) if need[2] else None,
        dresidual if need[3] else None,
        *(None,) * 3,
        following if need[7] else None,
        *(None,) * 5,
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
    steps.check_count(count)
    return count.clone()


def _first_time(device: torch.device) -> Tensor:
    # filled on the device: a copy of a number from the host would be waited for
    return torch.full((), not recomputing(), dtype=torch.long, device=device)


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
torch.library.register_fake(
    "batchnorm::first_time",
    lambda device: torch.empty((), dtype=torch.long, device=device),
    lib=_library,
)
torch.library.register_vmap(
    "batchnorm::check_count", lambda info, dims, count: (_check_count(count), dims[0]), lib=_library
)
torch.library.register_autograd(
    "batchnorm::training", _autograd_backward, setup_context=_setup_context, lib=_library
)


def training(
    z: Tensor,
    norm: Norm,
    mask: Tensor | None = None,
    fallback: Constants | None = None,
    ticket: Tensor | None = None,
    pooling: str | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalize with the batch's own statistics, or those of all ranks, as one operator in a graph.

    Parameters
    ----------
    z, norm, mask, fallback
        As for `batchnorm.autograd.normalize_batch`.
    ticket : Tensor, shape (), or None
        What the step before gave, where ranks pool.
    pooling : str or None
        What pools, for `between_of`.
    momentum : float or None
        Of the layer, which ranks compare.

    Returns
    -------
    y : Tensor
        Of the shape of ``z``.
    count : Tensor of int64, shape ()
        Values per channel m. Where a checkpoint re-runs the graph, so that nothing moves twice, 0, or -1 where ranks
        pool: neither values, nor an empty batch.
    mean, var : Tensor, shape (C,)
        The statistics, divisor m.
    ticket : Tensor
        For the next step that pools.
    """
    axis, eps, gamma, beta, residual, activation, _ = norm
    constants, how = fallback or (None, None), (axis, eps, activation, pooling, momentum)
    y, mean, var, *_, count, following = torch.ops.batchnorm.training(
        z, gamma, beta, residual, mask, *constants, ticket, *how
    )
    return y, count, mean, var, following


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
    if not compiling():
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
        ``count``: use it, for in a graph only what comes out of the check waits for it. A graph that is
        written down for others has no such check.
    """
    if written_down():
        return count
    return torch.ops.batchnorm.check_count(count)


def first_time(device: torch.device) -> Tensor:
    """Ask whether a graph runs for the first time, and not again for a checkpoint.

    It depends on nothing that a layer has, so that a compiler asks once for all layers of a graph.

    Parameters
    ----------
    device : torch.device
        Where the answer is wanted.

    Returns
    -------
    Tensor of int64, shape ()
        1, or 0 where a checkpoint runs the graph again: running statistics must not move. The question is asked
        when the graph runs; a graph that an accelerator has captured and replays repeats the answer it had.
    """
    return torch.ops.batchnorm.first_time(device)
