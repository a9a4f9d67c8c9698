"""The differentiable operator: how one batch gets from the engines' operations into torch's graph.

There are three ways into the same formulas, and `normalize_batch` / `normalize_population` choose:

- **eager**: an ``autograd.Function`` that calls the engine directly. Running statistics move inside the
  engine's call.
- **compiled**: under ``torch.compile`` and ``torch.export`` the operators of `batchnorm.operators`, which
  write to nothing; the running statistics move by ordinary torch operations in the same graph.
- **composite**: where something watches or transforms torch operations (``torch.func``, forward-mode
  derivatives, tensor subclasses, dispatch modes, meta tensors), plain torch operations, differentiated by
  torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.nn import functional as F

from batchnorm import operators
from batchnorm.kernels import aten
from batchnorm.kernels.contract import LEAKY_SLOPE, PIECEWISE_LINEAR, Engine, Forward
from batchnorm.kernels.select import select
from batchnorm.layout import values_per_channel, vector_shape
from batchnorm.population import Tracking
from batchnorm.recording import Sink, tell


def observed(z: Tensor) -> bool:
    """Whether torch operations on ``z`` are transformed or watched, so that they must be visible."""
    return (
        type(z) not in (Tensor, torch.nn.Parameter)
        or z.is_meta
        or z.is_neg()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def _record(tracking: Tracking | Sink, count: int | Tensor, mean: Tensor, var: Tensor) -> None:
    if isinstance(tracking, Tracking):
        tell(tracking, [(count, mean, var)])
    else:
        tracking(count, mean, var)


def _run(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
    tracking: Tracking | Sink | None,
) -> tuple[Engine, Forward]:
    """Let the engine normalize, and move or tell the statistics."""
    engine = select(z)
    if tracking is None or isinstance(tracking, Tracking):
        return engine, engine.forward(z, axis, gamma, beta, eps, residual, activation, tracking)
    result = engine.forward(z, axis, gamma, beta, eps, residual, activation, None)
    tracking(values_per_channel(z.shape, axis), result.mean, result.var)
    return engine, result


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for, so that a node goes into torch's graph."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _as(vector: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.dtype is vector.dtype else gradient.to(vector.dtype)


class _Training(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        axis: int,
        eps: float,
        activation: str | None,
        tracking: Tracking | Sink | None,
    ) -> Tensor:
        engine, result = _run(z, gamma, beta, residual, axis, eps, activation, tracking)
        y, mean, _, inv_std, saved = result
        smooth = residual is not None and activation is not None and activation not in PIECEWISE_LINEAR
        ctx.save_for_backward(z, gamma, beta, mean, inv_std, saved, residual if smooth else None)
        ctx.engine, ctx.axis, ctx.eps, ctx.activation = engine, axis, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, mean, inv_std, saved, residual = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled() or observed(dy) or _functorch.is_legacy_batchedtensor(dy):
            slope = None
            if ctx.activation in PIECEWISE_LINEAR:
                # constant almost everywhere, so the second derivative sees it as data
                with torch.no_grad():
                    slope = ctx.engine.backward(
                        torch.ones_like(z),
                        z,
                        ctx.axis,
                        mean,
                        inv_std,
                        gamma,
                        beta,
                        ctx.activation,
                        saved,
                        True,
                        True,
                    ).dresidual
            grads = _closed_form(dy, z, gamma, beta, residual, ctx.axis, ctx.eps, ctx.activation, slope, None)
            return *_match(grads, z, gamma, beta, need), None, None, None, None
        dz, sum_dy, sum_dy_zhat, dresidual = ctx.engine.backward(
            dy, z, ctx.axis, mean, inv_std, gamma, beta, ctx.activation, saved, True, need[3]
        )
        dgamma = _as(gamma, sum_dy_zhat) if need[1] else None
        dbeta = _as(beta, sum_dy) if need[2] else None
        return dz if need[0] else None, dgamma, dbeta, dresidual, None, None, None, None


# Function.apply without what it does for torch.func, which `observed` has sent elsewhere
_node: Callable[..., Tensor] = super(torch.autograd.Function, _Training).apply


class _Inference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        inv_std: Tensor,
        axis: int,
        activation: str | None,
    ) -> Tensor:
        ctx.engine, ctx.axis, ctx.activation = select(z), axis, activation
        ctx.save_for_backward(z, gamma, beta, mean, inv_std)
        return ctx.engine.normalize(z, axis, mean, inv_std, gamma, beta, None, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, gamma, beta, mean, inv_std = ctx.saved_tensors
        need = (*ctx.needs_input_grad[:3], False)
        if torch.is_grad_enabled() or observed(dy) or _functorch.is_legacy_batchedtensor(dy):
            constants = (mean, inv_std)
            grads = _closed_form(dy, z, gamma, beta, None, ctx.axis, 0.0, ctx.activation, None, constants)
            return *_match(grads, z, gamma, beta, need)[:3], None, None, None, None
        dz, sum_dy, sum_dy_zhat, _ = ctx.engine.backward(
            dy, z, ctx.axis, mean, inv_std, gamma, beta, ctx.activation, None, False, False
        )
        dgamma = _as(gamma, sum_dy_zhat) if need[1] else None
        dbeta = _as(beta, sum_dy) if need[2] else None
        return dz if need[0] else None, dgamma, dbeta, None, None, None, None


def _match(
    grads: tuple[Tensor, ...], z: Tensor, gamma: Tensor | None, beta: Tensor | None, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    dz, dgamma, dbeta, du = grads
    return (
        dz.to(z.dtype) if need[0] else None,
        dgamma.to(gamma.dtype) if need[1] and gamma is not None else None,
        dbeta.to(beta.dtype) if need[2] and beta is not None else None,
        du.to(z.dtype) if need[3] else None,
    )


def _closed_form(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
    slope: Tensor | None,
    constants: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward as differentiable torch operations, for derivatives of derivatives."""
    others = [a for a in range(z.dim()) if a != axis]
    shape = vector_shape(z.dim(), axis)
    wide = z.to(aten.compute_dtype(z))
    if constants is None:
        m, mean, m2 = aten.batch_mean_m2(wide, axis, None)
        inv_std = (m2 / m + eps).rsqrt()
    else:
        mean, inv_std = (v.to(wide.dtype) for v in constants)
    z_hat = (wide - mean.view(shape)) * inv_std.view(shape)
    if activation is None:
        du = dy.to(wide.dtype)
    elif slope is not None:
        du = dy.to(wide.dtype) * slope
    else:
        u = z_hat if gamma is None else z_hat * gamma.view(shape)
        u = u if beta is None else u + beta.view(shape)
        u = u if residual is None else u + residual
        du = dy.to(wide.dtype) * derivative(u, activation)
    dbeta, dgamma = du.sum(others), (du * z_hat).sum(others)
    inner = du
    if constants is None:
        inner = du - (dbeta / m).view(shape) - z_hat * (dgamma / m).view(shape)
    scale = inv_std if gamma is None else inv_std * gamma
    return inner * scale.view(shape), dgamma, dbeta, du


def derivative(u: Tensor, activation: str) -> Tensor:
    """Derivative of an activation at ``u``, itself differentiable."""
    match activation:
        case "relu":
            return (u > 0).to(u.dtype)
        case "relu6":
            return ((u > 0) & (u < 6)).to(u.dtype)
        case "leaky_relu":
            return torch.where(u > 0, 1.0, LEAKY_SLOPE).to(u.dtype)
        case "silu":
            s = torch.sigmoid(u)
            return s * (1 + u * (1 - s))
        case "hardswish":
            return torch.where(u <= -3, 0.0, torch.where(u >= 3, 1.0, u / 3 + 0.5))
        case "sigmoid":
            s = torch.sigmoid(u)
            return s * (1 - s)
        case "tanh":
            return 1 - torch.tanh(u).square()
    density = torch.exp(-0.5 * u * u) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return 0.5 * (1 + torch.erf(u * 0.7071067811865476)) + u * density


def normalize_batch(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: int,
    eps: float,
    activation: str | None,
    tracking: Tracking | Sink | None,
) -> Tensor:
    """Normalize with the batch's own statistics, which ``tracking`` is moved by or told.

    Parameters
    ----------
    z : Tensor
        Input, at least two values per channel.
    gamma, beta : Tensor, shape (C,), or None
        Scale and place.
    residual : Tensor or None
        Added before the activation, of the shape of ``z``.
    axis : int
        The channel axis, non-negative.
    eps : float
        Added to the variance.
    activation : str or None
        One of `batchnorm.kernels.contract.ACTIVATIONS`.
    tracking : Tracking, callable or None
        Running statistics to move; or what is called with (count, mean, variance).

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``z``.
    """
    if torch.compiler.is_compiling():
        y, count, mean, var = operators.training(z, gamma, beta, residual, axis, eps, activation)
        if tracking is not None:
            _record(tracking, count, mean, var)
        return y
    if observed(z) or (residual is not None and residual.is_neg()):
        return _composite_batch(z, gamma, beta, residual, None, None, axis, eps, activation, tracking)
    if _recorded(z, gamma, beta, residual):
        return _node(z, gamma, beta, residual, axis, eps, activation, tracking)
    return _run(z, gamma, beta, residual, axis, eps, activation, tracking)[1].y


def normalize_masked(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor,
    count: Tensor,
    axis: int,
    eps: float,
    activation: str | None,
    tracking: Tracking | Sink | None,
    fallback: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Normalize the values that ``mask`` keeps with their own statistics; 0 comes out of the others.

    Parameters
    ----------
    z, gamma, beta, residual, axis, eps, activation, tracking
        As for `normalize_batch`.
    mask : Tensor of bool
        Broadcasts against ``z``, of size 1 along the channel axis.
    count : Tensor, shape ()
        How many values of a channel it keeps.
    fallback : (mean, var) or None
        Statistics that serve, as constants, when fewer than two values are kept.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``z``.
    """
    # the engines never see what is masked: it may be NaN, and NaN times zero is NaN
    clean = torch.where(mask, z, 0)
    added = None if residual is None else torch.where(mask, residual, 0)
    y = _composite_batch(clean, gamma, beta, added, (mask, count), fallback, axis, eps, activation, tracking)
    return torch.where(mask, y, 0)


def _composite_batch(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    masked: tuple[Tensor, Tensor] | None,
    fallback: tuple[Tensor, Tensor] | None,
    axis: int,
    eps: float,
    activation: str | None,
    tracking: Tracking | Sink | None,
) -> Tensor:
    wide = z.to(aten.compute_dtype(z))
    mask, count = (None, None) if masked is None else masked
    m, mean, m2 = aten.batch_mean_m2(wide, axis, mask, count)
    var = m2 / m.clamp(min=1)
    if tracking is not None:
        dtype = aten.vector_dtype(z)
        told: int | Tensor = values_per_channel(z.shape, axis) if count is None else count
        if torch.compiler.is_compiling() and count is not None:
            told = operators.first_time(count)
        _record(tracking, told, mean.detach().to(dtype), var.detach().to(dtype))
    if fallback is not None:
        enough = m > 1
        mean = torch.where(enough, mean, fallback[0].to(mean.dtype))
        var = torch.where(enough, var, fallback[1].to(var.dtype))
    return _composite(wide, gamma, beta, residual, mean, (var + eps).rsqrt(), axis, activation).to(z.dtype)


def _composite(
    wide: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    axis: int,
    activation: str | None,
) -> Tensor:
    u, _ = aten.AtenEngine._pre_activation(wide, axis, mean, inv_std, gamma, beta, residual)
    return aten.activate(u, activation)


def normalize_population(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    axis: int,
    eps: float,
    activation: str | None,
    inplace: bool = False,
) -> Tensor:
    """Normalize with population statistics, which are constants.

    Parameters
    ----------
    z, gamma, beta, residual, axis, eps, activation
        As for `normalize_batch`; one value per channel is enough.
    mean, var : Tensor, shape (C,)
        Population statistics.
    inplace : bool, default False
        Write into ``z``; only where no gradient is asked for.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``z``.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        # torch's own operator: compilers fuse it, and exporters know its name
        swapped = z if axis == 1 else z.movedim(axis, 1)
        y = F.batch_norm(swapped, mean, var, gamma, beta, False, 0.0, eps)
        y = y if axis == 1 else y.movedim(1, axis)
        return aten.activate(y if residual is None else y + residual, activation)
    if observed(z) or (residual is not None and residual.is_neg()):
        wide = z.to(aten.compute_dtype(z))
        inv_std = (var.to(wide.dtype) + eps).rsqrt()
        return _composite(wide, gamma, beta, residual, mean, inv_std, axis, activation).to(z.dtype)
    if not _recorded(z, gamma, beta, residual):
        engine: Engine = select(z)
        out = z if inplace else None
        return engine.infer(z, axis, mean, var, eps, gamma, beta, residual, activation, out)
    dtype = aten.vector_dtype(z)
    inv_std = aten.inverse_deviation(var, eps, dtype)
    # a copy of the mean: the live buffer may move before the backward comes
    mean = mean.to(dtype, copy=True)
    if residual is None:
        return _Inference.apply(z, gamma, beta, mean, inv_std, axis, activation)
    return aten.activate(_Inference.apply(z, gamma, beta, mean, inv_std, axis, None) + residual, activation)
