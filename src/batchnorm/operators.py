"""The operators that a compiler sees: ``torch.ops.batchnorm.*``.

They write to nothing they are given, so a graph may run them again, reorder them or drop them. Statistics
come out as values, and what moves running statistics is ordinary torch operations beside them.

An operator has no optional output: what a call has no use for is an empty tensor (`_nothing`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm import steps
from batchnorm.compiling import compiling
from batchnorm.errors import NonFiniteError
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
    " Tensor? fallback_var, int axis, float eps, str? activation)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor center, Tensor inv_std, Tensor side, Tensor divisor,"
    " Tensor count)"
)
_library.define(
    "training_backward(Tensor dy, Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? mask,"
    " Tensor center, Tensor inv_std, Tensor side, Tensor divisor, int axis, float eps, str? activation,"
    " bool with_residual)"
    " -> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual)"
)
_library.define("check_finite(Tensor count, Tensor mean, Tensor var) -> (Tensor, Tensor, Tensor)")
_library.define("check_count(Tensor count) -> Tensor")
_library.define("first_time(Device device) -> Tensor")


def recomputing() -> bool:
    """Whether this forward runs inside a backward, that is, re-runs a checkpointed segment.

    Activation checkpointing, reentrant or not, calls the forward a second time while torch's backward
    is under way. The batch was counted the first time.
    """
    return torch._C._current_graph_task_id() != -1


def _nothing(z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return z.new_empty(0, dtype=dtype)


def _asked(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    fallback_mean: Tensor | None,
    fallback_var: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Norm, Tensor | None, Constants | None]:
    fallback = None if fallback_mean is None or fallback_var is None else (fallback_mean, fallback_var)
    return z, Norm(axis, eps, gamma, beta, residual, activation), mask, fallback


def _training(*given: Any) -> tuple[Tensor, ...]:
    z, norm, mask, fallback = _asked(*given)
    engine, axis = select(z), norm.axis
    if mask is None:
        y, mean, var, inv_std, _ = engine.forward(z, norm, None)  # type: ignore[misc] # None is for masks
        # an engine may lay its vectors out in one piece, which torch forbids an operator's outputs
        var, inv_std = var.clone(), inv_std.clone()
        center, divisor = _nothing(z), _nothing(z)
        count = torch.full((), values_per_channel(z.shape, axis), device=z.device)
    else:
        y, told, (center, inv_std), _, divisor = steps.forward(engine, z, norm, mask, fallback, save=False)
        dtype = vector_dtype(z)
        mean, var, count = told.mean.to(dtype, copy=True), told.var().to(dtype), told.count.to(torch.long)
        divisor = divisor.clone()
    if recomputing():
        # asked when the graph runs: a graph that is re-run by a checkpoint tells of no value
        count = torch.zeros_like(count)
    return y, mean, var, center, inv_std, side_of(y, norm), divisor, count


def side_of(y: Tensor, norm: Norm) -> Tensor:
    """Give the sides of the kink as bools, which every engine can make; empty where a backward needs none."""
    saved = None if norm.saves_residual else norm.saved(y)
    return _nothing(y, torch.bool) if saved is None else saved


def _training_fake(*given: Any) -> tuple[Tensor, ...]:
    z, norm, mask, _ = _asked(*given)

    def vector() -> Tensor:
        return z.new_empty(z.shape[norm.axis], dtype=vector_dtype(z))

    with_side = norm.needs_saved and not norm.saves_residual
    side = torch.empty_like(z, dtype=torch.bool) if with_side else _nothing(z, torch.bool)
    center = _nothing(z) if mask is None else vector()
    divisor = _nothing(z) if mask is None else z.new_empty((), dtype=exact_dtype(z.device))
    count = z.new_empty((), dtype=torch.long)
    return torch.empty_like(z), vector(), vector(), center, vector(), side, divisor, count


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
    axis: int,
    eps: float,
    activation: str | None,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if side.numel():
        dy = torch.where(side, dy, dy * find(activation).slope)
        activation = None
    norm = Norm(axis, eps, gamma, beta, None, activation, residual is not None)
    moments, engine = Moments(center, inv_std), select(z)
    if mask is None:
        dz, dbeta, dgamma, dresidual = engine.backward(dy, z, norm, moments, residual, True, with_residual)
    else:
        dz, dbeta, dgamma, dresidual = steps.backward(
            engine, dy, z, norm, moments, residual, divisor, mask, None, with_residual
        )
    if dresidual is None:
        dresidual = _nothing(z, z.dtype)
    elif dresidual is dy:
        dresidual = dy.clone()
    return dz, dgamma, dbeta.clone(), dresidual


def _training_backward_fake(dy: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inv_std, with_residual = rest[5], rest[-1]
    dresidual = torch.empty_like(z) if with_residual else _nothing(z, z.dtype)
    return torch.empty_like(z), torch.empty_like(inv_std), torch.empty_like(inv_std), dresidual


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, gamma, beta, residual, mask, _, _, axis, eps, activation = inputs
    _, mean, _, center, inv_std, side, divisor, _ = output
    ctx.mark_non_differentiable(*output[1:])
    norm = Norm(axis, eps, residual=residual, activation=activation)
    kept = residual if norm.saves_residual else None
    ctx.save_for_backward(
        z, gamma, beta, kept, mask, mean if mask is None else center, inv_std, side, divisor
    )
    ctx.norm = axis, eps, activation


def _autograd_backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gamma, beta = ctx.saved_tensors[1:3]
    need = ctx.needs_input_grad
    dz, dgamma, dbeta, dresidual = torch.ops.batchnorm.training_backward(
        dy, *ctx.saved_tensors, *ctx.norm, need[3]
    )
    return (
        dz if need[0] else None,
        dgamma.to(gamma.dtype) if need[1] else None,
        dbeta.to(beta.dtype) if need[2] else None,
        dresidual if need[3] else None,
        *(None,) * 6,
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
    z: Tensor, norm: Norm, mask: Tensor | None = None, fallback: Constants | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize with the batch's own statistics, as one operator in a graph.

    Parameters
    ----------
    z, norm, mask, fallback
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
    axis, eps, gamma, beta, residual, activation, _ = norm
    y, mean, var, *_, count = torch.ops.batchnorm.training(
        z, gamma, beta, residual, mask, *(fallback or (None, None)), axis, eps, activation
    )
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
