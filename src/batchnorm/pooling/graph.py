"""A pooled step as two operators that a compiler sees, in an order that it must keep.

Messages go out in the order in which the operators run, and that order must be the same on every rank. A
compiler may reorder what does not depend on each other, and does so on a rank whose batch is empty. So each
operator takes a ticket, a tensor without a meaning, and gives the next one: the order of the forward, and
through the ticket's gradient that of the backward, is then a dependence of data.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch._guards import TracingContext

from batchnorm import steps
from batchnorm.kernels.activations import find
from batchnorm.kernels.aten import exact_dtype, vector_dtype
from batchnorm.kernels.contract import Moments, Norm
from batchnorm.kernels.select import select
from batchnorm.layout import values_per_channel
from batchnorm.operators import recomputing, side_of
from batchnorm.pooling.ranks import RankPooling, pools
from batchnorm.steps import Constants

_library = torch.library.Library("batchnorm", "FRAGMENT")
_library.define(
    "pooled(Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? mask, Tensor? fallback_mean,"
    " Tensor? fallback_var, Tensor ticket, int axis, float eps, str? activation, str pooling)"
    " -> (Tensor y, Tensor mean, Tensor var, Tensor center, Tensor inv_std, Tensor side, Tensor divisor,"
    " Tensor count, Tensor next)"
)
_library.define(
    "pooled_backward(Tensor dy, Tensor z, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? mask,"
    " Tensor center, Tensor inv_std, Tensor side, Tensor divisor, Tensor ticket, int axis, float eps,"
    " str? activation, str pooling, bool with_residual)"
    " -> (Tensor dz, Tensor dgamma, Tensor dbeta, Tensor dresidual, Tensor next)"
)


class _Chain:
    """The last ticket of the graph that is being traced."""

    ticket: Tensor | None = None


_chain = _Chain()
_traced: list[Any] = [lambda: None]


def _begins() -> bool:
    """Whether this is the first pooled step of the graph that is being traced; asked while it is."""
    context = TracingContext.try_get()
    if context is not None and _traced[0]() is context:
        return False
    _traced[0] = (lambda: None) if context is None else ref(context)
    return True


# asked while the Python is followed: torch.compiler.assume_constant_result, which imports the compiler, and triton
_begins._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pooled(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    fallback_mean: Tensor | None,
    fallback_var: Tensor | None,
    ticket: Tensor,
    axis: int,
    eps: float,
    activation: str | None,
    pooling: str,
) -> tuple[Tensor, ...]:
    # what a graph left behind holds its saved tensors
    _chain.ticket = None
    norm, engine, between = Norm(axis, eps, gamma, beta, residual, activation), select(z), _between(pooling)
    m, dtype = values_per_channel(z.shape, axis), vector_dtype(z)
    if between is None and mask is None and m != 1:
        # nobody to pool with: the bits are those of a layer that does not pool
        if m:
            y, mean, var, inv_std, _ = engine.forward(z, norm, None)  # type: ignore[misc] # None is for masks
        else:
            y, mean = torch.empty_like(z), z.new_zeros(z.shape[axis], dtype=dtype)
            var = inv_std = torch.ones_like(mean)
        var, inv_std, center = var.clone(), inv_std.clone(), mean.clone()
        divisor = torch.full((), max(m, 1), dtype=exact_dtype(z.device), device=z.device)
        count = torch.full((), m, device=z.device)
    else:
        fallback = None if fallback_mean is None or fallback_var is None else (fallback_mean, fallback_var)
        y, told, (center, inv_std), _, divisor = steps.forward(
            engine, z, norm, mask, fallback, between, save=False
        )
        mean, var, count = told.mean.to(dtype, copy=True), told.var().to(dtype), told.count.to(torch.long)
        divisor = divisor.to(exact_dtype(z.device), copy=True)
    if recomputing():
        # neither values nor an empty batch: nothing moves a second time
        count = torch.full_like(count, -1)
    return y, mean, var, center, inv_std, side_of(y, norm), divisor, count, torch.zeros_like(ticket)


def _between(pooling: str) -> Pooling | None:
    made = Pooling.load(pooling)
    return made if pools(made.groups) else None


def _pooled_fake(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    residual, ticket, axis, eps, activation = rest[2], *rest[6:10]

    def vector() -> Tensor:
        return z.new_empty(z.shape[axis], dtype=vector_dtype(z))

    norm = Norm(axis, eps, residual=residual, activation=activation)
    with_side = norm.needs_saved and not norm.saves_residual
    side = torch.empty_like(z, dtype=torch.bool) if with_side else z.new_empty(0, dtype=torch.bool)
    divisor = z.new_empty((), dtype=exact_dtype(z.device))
    count = z.new_empty((), dtype=torch.long)
    vectors = [vector() for _ in range(4)]
    return torch.empty_like(z), *vectors, side, divisor, count, torch.empty_like(ticket)


def _pooled_backward(
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
    ticket: Tensor,
    axis: int,
    eps: float,
    activation: str | None,
    pooling: str,
    with_residual: bool,
) -> tuple[Tensor, ...]:
    _chain.ticket = None
    if side.numel():
        dy = torch.where(side, dy, dy * find(activation).slope)
    if side.numel() or (residual is None and not z.numel()):
        activation = None
    norm = Norm(axis, eps, gamma, beta, None, activation, residual is not None)
    dz, dbeta, dgamma, dresidual = steps.backward(
        select(z),
        dy,
        z,
        norm,
        Moments(center, inv_std),
        residual,
        divisor,
        mask,
        _between(pooling),
        with_residual,
    )
    if dresidual is None:
        dresidual = z.new_empty(0)
    elif dresidual is dy:
        dresidual = dy.clone()
    dtype = vector_dtype(z)
    return dz, dgamma.to(dtype, copy=True), dbeta.to(dtype, copy=True), dresidual, torch.zeros_like(ticket)


def _pooled_backward_fake(dy: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inv_std, ticket, with_residual = rest[5], rest[8], rest[-1]
    dresidual = torch.empty_like(z) if with_residual else z.new_empty(0)
    return (
        torch.empty_like(z),
        torch.empty_like(inv_std),
        torch.empty_like(inv_std),
        dresidual,
        torch.empty_like(ticket),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    z, gamma, beta, residual, mask, _, _, _, axis, eps, activation, pooling = inputs
    center, inv_std, side, divisor = output[3:7]
    ctx.mark_non_differentiable(*output[1:-1])
    norm = Norm(axis, eps, residual=residual, activation=activation)
    kept = residual if norm.saves_residual else None
    ctx.save_for_backward(z, gamma, beta, kept, mask, center, inv_std, side, divisor)
    ctx.norm = axis, eps, activation, pooling


def _autograd_backward(ctx: Any, dy: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    gamma, beta = ctx.saved_tensors[1:3]
    need = ctx.needs_input_grad
    dz, dgamma, dbeta, dresidual, ticket = torch.ops.batchnorm.pooled_backward(
        dy, *ctx.saved_tensors, rest[-1], *ctx.norm, need[3]
    )
    return (
        dz if need[0] else None,
        dgamma.to(gamma.dtype) if need[1] else None,
        dbeta.to(beta.dtype) if need[2] else None,
        dresidual if need[3] else None,
        None,
        None,
        None,
        ticket if need[7] else None,
        *(None,) * 4,
    )


for _name, _function in (("pooled", _pooled), ("pooled_backward", _pooled_backward)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
torch.library.register_fake("batchnorm::pooled", _pooled_fake, lib=_library)
torch.library.register_fake("batchnorm::pooled_backward", _pooled_backward_fake, lib=_library)
torch.library.register_autograd(
    "batchnorm::pooled", _autograd_backward, setup_context=_setup_context, lib=_library
)


class Pooling(RankPooling):
    """What stands between the two halves of a step where ranks pool, also where a compiler looks on."""

    def operator(
        self, z: Tensor, norm: Norm, mask: Tensor | None, fallback: Constants | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalize with the statistics of all ranks, as one operator in a graph.

        Parameters
        ----------
        z, norm, mask, fallback
            As for `batchnorm.autograd.normalize_batch`.

        Returns
        -------
        y : Tensor
            Of the shape of ``z``.
        count : Tensor of int64, shape ()
            Values per channel of all ranks; -1 where a checkpoint re-runs the graph, so that nothing moves twice.
        mean, var : Tensor, shape (C,)
            Of all ranks, divisor m.
        """
        axis, eps, gamma, beta, residual, activation, _ = norm
        begins = _begins()
        ticket = torch.zeros((), device=z.device) if begins else _chain.ticket
        y, mean, var, _, _, _, _, count, following = torch.ops.batchnorm.pooled(
            z,
            gamma,
            beta,
            residual,
            mask,
            *(fallback or (None, None)),
            ticket,
            axis,
            eps,
            activation,
            self.dump(),
        )
        _chain.ticket = following
        return y, count, mean, var
