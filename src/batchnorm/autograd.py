"""The differentiable operator: how one batch gets from the engines' operations into torch's graph.

There are five ways into the same formulas, and `normalize_batch` / `normalize_population` choose:

- **torch's own**, in eager and in compiled graphs, where the engine `torch` serves and there is neither mask nor
  pooling: torch's batch norm with what is ours around it (`batchnorm.kernels.torch`), differentiated by torch.
- **eager**: an ``autograd.Function`` that calls the engine directly: its fused pair, or its slots
  (`batchnorm.steps`) where a mask or a pooling takes part. Running statistics move inside the fused call.
- **compiled**: under ``torch.compile`` the operators of `batchnorm.operators`, which write to nothing; the
  running statistics move by ordinary torch operations in the same graph.
- **visible**: where a tracer or an exporter writes a graph down (`batchnorm.written`), torch's own batch norm.
- **composite**: where something watches or transforms torch operations (``torch.func``, forward-mode
  derivatives, tensor subclasses, dispatch modes, meta tensors), plain torch operations, differentiated by
  torch. Derivatives of derivatives go this way too.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from batchnorm import operators, steps, visible
from batchnorm.compiling import compiling
from batchnorm.kernels import aten, cpu
from batchnorm.kernels import torch as own
from batchnorm.kernels.activations import CODES, activate
from batchnorm.kernels.contract import Engine, Moments, Norm
from batchnorm.kernels.select import by_torch, select
from batchnorm.layout import values_per_channel
from batchnorm.population import Tracking
from batchnorm.running_update import Sink, tell
from batchnorm.steps import Between, Constants
from batchnorm.written import written_down

# asked at every call, so found once
_transforming, _modes = torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack


def observed(z: Tensor) -> bool:
    """Whether torch operations on ``z`` are transformed or watched, so that they must be visible."""
    return (
        (type(z) is not Tensor and type(z) is not torch.nn.Parameter)
        or z.is_meta
        or z.is_neg()
        or _transforming()
        or _modes() > 0
        or forward_ad._current_level >= 0
    )


def _negative(norm: Norm, statistics: Any) -> bool:
    """Whether values in memory have the other sign, as an engine would not know."""
    beside = statistics[:2] if isinstance(statistics, tuple) else ()
    return any(t is not None and t.is_neg() for t in (norm.gamma, norm.beta, norm.residual, *beside))


def _seen_by_torch(z: Tensor, norm: Norm) -> bool:
    """Whether torch's own batch norm serves, and no transform is at work that knows no statistics written inside."""
    if compiling():
        return by_torch(z, norm)
    return by_torch(z, norm) and not (_transforming() or forward_ad._current_level >= 0)


def _train_by_torch(z: Tensor, norm: Norm, tracking: Tracking | Sink | None) -> Tensor:
    """Normalize with torch's own batch norm, and move or tell the statistics."""
    y, mean, unbiased = own.train(z, norm)
    if tracking is None:
        return y
    m = values_per_channel(z.shape, norm.axis)
    compiled = compiling() and not torch.compiler.is_exporting()
    count = operators.first_time(z.device) * m if compiled else m
    if isinstance(tracking, Tracking):
        tell(tracking, [(count, mean, unbiased)], unbiased=True)
    else:
        tracking(count, mean, unbiased * ((m - 1) / m))
    return y


def _record(tracking: Tracking | Sink | None, count: int | Tensor, mean: Tensor, var: Tensor) -> None:
    if isinstance(tracking, Tracking):
        tell(tracking, [(count, mean, var)])
    elif tracking is not None:
        tracking(count, mean, var)


def _asks(z: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None) -> bool:
    """Whether a gradient is asked for, so that a node goes into torch's graph."""
    return torch.is_grad_enabled() and (
        z.requires_grad
        or (gamma is not None and gamma.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def _recorded(z: Tensor, norm: Norm) -> bool:
    return _asks(z, norm.gamma, norm.beta, norm.residual)


class _Kept(NamedTuple):
    """What a forward gives to the node of its backward; the moments as one tensor of shape (2, C)."""

    y: Tensor
    moments: Tensor
    saved: Tensor | None
    mask: Tensor | None = None


class _How(NamedTuple):
    """What a backward must know besides tensors.

    ``count`` is what the sums are divided by, None for z's own; ``constant``: the moments do not depend on z.
    """

    engine: Engine
    axis: int
    eps: float
    activation: str | None
    added: bool
    count: Tensor | None = None  # type: ignore[assignment]
    constant: bool = False
    between: Between | None = None


def _run(
    engine: Engine,
    z: Tensor,
    norm: Norm,
    tracking: Tracking | Sink | None,
    mask: Tensor | None,
    fallback: Constants | None,
    between: Between | None,
    save: bool,
) -> tuple[_Kept, Tensor | None]:
    """Let the engine normalize, and move or tell the statistics; also give what the backward divides by."""
    moved = tracking if type(tracking) is Tracking else None
    if between is None and (mask is None or (engine.fuses_masks and moved is tracking)):
        found = engine.forward(z, norm, moved, mask)
        if found is not None:
            y, mean, var, inv_std, saved = found
            if moved is not tracking:
                _record(tracking, values_per_channel(z.shape, norm.axis), mean, var)
            return _Kept(y, torch.stack((mean, inv_std)), saved, mask), None
    y, told, moments, saved, divisor = steps.forward(engine, z, norm, mask, fallback, between, save)
    dtype = aten.vector_dtype(z)
    _record(tracking, told.count, told.mean.to(dtype), told.var().to(dtype))
    return _Kept(y, torch.stack(moments), saved, mask), divisor


class _Node(torch.autograd.Function):
    # what is differentiated has been computed when this is called: no operation of it is torch's to record
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        kept: _Kept,
        how: _How,
    ) -> Tensor:
        y, moments, saved, mask = kept
        # as many, and of one form, by whatever way they came: a checkpoint compares those of both its runs
        ctx.save_for_backward(z, gamma, beta, moments, saved, mask)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, pair, saved, mask = ctx.saved_tensors
        engine, axis, eps, activation, added, count, constant, between = ctx.how
        need, whole = ctx.needs_input_grad, constant or count is None
        quick = not constant and whole and mask is None and engine is cpu.engine
        if quick and not _functorch.is_legacy_batchedtensor(dy):
            found = cpu.backward_at_once(dy, z, gamma, beta, pair, saved, axis, activation, added, need)
            if found is not None:
                return found
        norm, moments = Norm(axis, eps, gamma, beta, None, activation, added), Moments(*pair.unbind())
        if torch.is_grad_enabled() or observed(dy) or _functorch.is_legacy_batchedtensor(dy):
            fixed = constant or (count is not None and bool(count.isinf().all()))
            found = _by_torch(engine, dy, z, norm, moments, saved, mask, between, fixed, need)
            return *found, None, None
        if between is None and whole and (mask is None or engine.fuses_masks):
            dz, sum_dy, sum_dy_zhat, dresidual = engine.backward(
                dy, z, norm, moments, saved, not constant, need[3], mask
            )
        else:
            dz, sum_dy, sum_dy_zhat, dresidual = steps.backward(
                engine, dy, z, norm, moments, saved, count, mask, between, need[3]
            )
        dgamma = _as(gamma, sum_dy_zhat) if need[1] else None
        dbeta = _as(beta, sum_dy) if need[2] else None
        return dz if need[0] else None, dgamma, dbeta, dresidual, None, None


# Function.apply without what it does for torch.func, which `observed` has sent elsewhere
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Node).apply


cpu.watch(
    Tensor,
    # what records, transforms or watches the operations of this thread, and what each says where it does not
    (
        (torch._C._get_tracing_state, None),
        (_transforming, False),
        (_modes, 0),
    ),
    ((vars(forward_ad), "_current_level", -1),),
    (torch._C._current_graph_task_id, -1),
    torch.is_grad_enabled,
    _apply,
    cpu.engine,
    CODES,
)


def _node(engine: Engine, z: Tensor, norm: Norm, kept: _Kept, *rest: Any) -> Tensor:
    axis, eps, gamma, beta, residual, activation, _ = norm
    if norm.saves_residual:
        kept = kept._replace(saved=residual)  # the very input, so that derivatives of derivatives reach it
    how = _How(engine, axis, eps, activation, residual is not None, *rest)
    return _apply(z, gamma, beta, residual, kept, how)


def _as(vector: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.dtype is vector.dtype else gradient.to(vector.dtype)


def _by_torch(
    engine: Engine,
    dy: Tensor,
    z: Tensor,
    norm: Norm,
    moments: Moments,
    saved: Tensor | None,
    mask: Tensor | None,
    between: Between | None,
    constant: bool,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Give the gradients by differentiating the composite, so that they can be differentiated themselves."""
    slope, create_graph = None, torch.is_grad_enabled()
    residual = saved if norm.saves_residual else None
    if norm.needs_saved and residual is None and z.numel():
        # the side of a kink is data; the residual itself has no further part
        norm.check_saved(saved)
        with torch.no_grad():
            ones, zeros = torch.ones_like(z), torch.zeros_like(moments.mean)
            _, slope = engine.backward_input(
                ones, z, norm, moments, saved, (zeros, zeros), aten.counted(inf, z), True, mask=mask
            )
    if residual is None and need[3]:
        residual = torch.zeros_like(z).requires_grad_()
    with torch.enable_grad():
        # aliases: a gradient is that of this use, though gamma may have been made of z
        own = z.view_as(z)
        given = (norm.gamma, norm.beta, residual)
        gamma, beta, added = rest = [None if t is None else t.view_as(t) for t in given]
        used = norm._replace(gamma=gamma, beta=beta, residual=added)
        y = _composite(own, used, moments if constant else None, mask, between=between, slope=slope)
        wanted = [t for t, needed in zip([own, *rest], need, strict=False) if needed and t is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    return tuple(next(found) if needed else None for needed in need[:4])


def _composite(
    z: Tensor,
    norm: Norm,
    moments: Moments | None = None,
    mask: Tensor | None = None,
    tracking: Tracking | Sink | None = None,
    fallback: Constants | None = None,
    between: Between | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """The operator as torch operations. ``moments``: constants; ``slope``: in place of the activation."""
    wide = z.to(aten.compute_dtype(z))
    wide, norm = aten.kept(mask, wide), norm._replace(residual=aten.kept(mask, norm.residual))
    if moments is None:
        statistics = aten.batch_statistics(wide, norm.axis, mask)
        if between is not None:
            statistics = between.differentiable(statistics)
        elif mask is not None and fallback is None:
            statistics = statistics._replace(count=operators.check_count(statistics.count))
        count, mean, var = statistics.count, statistics.mean, statistics.var()
        if tracking is not None:
            dtype = aten.vector_dtype(z)
            whole = mask is None and between is None
            told: int | Tensor = values_per_channel(z.shape, norm.axis) if whole else count
            _record(tracking, told, mean.detach().to(dtype), var.detach().to(dtype))
        _, mean, var = steps.choose(count, mean, var, fallback)
        moments = Moments(mean, (var + norm.eps).rsqrt())
    u, _ = aten.pre_activation(wide, norm, moments)
    return aten.kept(mask, (activate(u, norm.activation) if slope is None else u * slope).to(z.dtype))


def normalize_batch(
    z: Tensor,
    norm: Norm,
    tracking: Tracking | Sink | None,
    mask: Tensor | None = None,
    fallback: Constants | None = None,
    between: Between | None = None,
) -> Tensor:
    """Normalize with the batch's own statistics, which ``tracking`` is moved by or told.

    Parameters
    ----------
    z : Tensor
        Input; at least two values per channel where there is neither mask nor pooling.
    norm : Norm
        What is done with it.
    tracking : Tracking, callable or None
        Running statistics to move; or what is called with (count, mean, variance).
    mask : Tensor of bool or None
        Values that count: broadcasts against ``z``, of size 1 along the channel axis. 0 comes out of the others.
    fallback : (mean, var) or None
        Constants that serve where a mask or a pooling leaves fewer than two values; None raises.
    between : Between or None
        What pools statistics over ranks.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``z``.
    """
    if between is None and written_down():
        if mask is None and (tracking is None or isinstance(tracking, Tracking)):
            return visible.train(z, norm, tracking)
        return _composite(z, norm, None, mask, tracking, fallback)
    if mask is None and between is None and _seen_by_torch(z, norm):
        return _train_by_torch(z, norm, tracking)
    if compiling():
        operator = operators.training if between is None else between.operator
        y, count, mean, var, *_ = operator(z, norm, mask, fallback)
        _record(tracking, count, mean, var)
        return y
    if observed(z) or _negative(norm, tracking):
        return _composite(z, norm, None, mask, tracking, fallback, between)
    engine = select(z, norm)
    if not _recorded(z, norm):
        return _run(engine, z, norm, tracking, mask, fallback, between, False)[0].y
    with torch.no_grad():
        kept, entered = _run(engine, z, norm, tracking, mask, fallback, between, True)
    return _node(engine, z, norm, kept, entered, False, between)


def normalize_population(
    z: Tensor,
    norm: Norm,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None = None,
    inplace: bool = False,
    momentum: float | None = None,
) -> Tensor:
    """Normalize with population statistics, which are constants.

    Parameters
    ----------
    z, norm, mask
        As for `normalize_batch`; one value per channel is enough.
    mean, var : Tensor, shape (C,)
        Population statistics.
    inplace : bool, default False
        Write into ``z``; only where no gradient is asked for, and without a mask.
    momentum : float or None
        Of no use here; a graph that is written down for others has it beside the statistics, as torch's would.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``z``.
    """
    if compiling() or written_down():
        # compilers fuse torch's own operator, and exporters know its name
        return visible.infer(z, norm, mean, var, mask, momentum)
    if mask is None and _seen_by_torch(z, norm):
        if _recorded(z, norm):
            # copies: the live buffers may move before the backward comes
            mean, var = torch.stack((mean, var)).unbind()
        y = own.infer(z, norm, mean, var)
        return z.copy_(y) if inplace else y
    if observed(z) or _negative(norm, (mean, var)):
        wide = aten.compute_dtype(z)
        return _composite(z, norm, Moments(mean, (var.to(wide) + norm.eps).rsqrt()), mask)
    recorded = _recorded(z, norm)
    if mask is None and not recorded:
        return select(z, norm).infer(z, norm, mean, var, z if inplace else None)
    dtype = aten.vector_dtype(z)
    # a copy of the mean: the live buffer may move before the backward comes
    moments = Moments(mean.to(dtype, copy=True), aten.inverse_deviation(var, norm.eps, dtype))
    engine = select(z)
    with torch.no_grad():
        y, saved = engine.normalize(z, norm, moments, mask=mask, save=recorded)
    if not recorded:
        return y
    return _node(engine, z, norm, _Kept(y, torch.stack(moments), saved, mask), aten.counted(inf, z), True)
