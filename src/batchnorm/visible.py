"""Batch normalization in torch's own operations, for whoever reads the graph they are written down in.

A tracer or an exporter makes a graph that is kept and read elsewhere: by tools that look for torch's batch norm
and know no operator of ours. There, torch's operator normalizes and moves the running statistics, by its own
rule; what stands beside it (another channel axis, a residual, an activation) are torch's operations too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from batchnorm.errors import ArgumentError
from batchnorm.kernels.activations import activate
from batchnorm.kernels.aten import kept, vector_dtype
from batchnorm.kernels.contract import Norm
from batchnorm.population import Tracking

_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def infer(
    z: Tensor, norm: Norm, mean: Tensor, var: Tensor, mask: Tensor | None, momentum: float | None = None
) -> Tensor:
    """Normalize with population statistics."""
    _name_as_torchs(norm)
    dtype = vector_dtype(z)
    mean, var = _as(mean, dtype), _as(var, dtype)
    # inference has no use for it, but a tool may turn the graph to training
    momentum = momentum or 0.0
    norm = norm._replace(residual=kept(mask, norm.residual))
    return kept(mask, _normalize(kept(mask, z), norm, mean, var, False, momentum))


def train(z: Tensor, norm: Norm, tracking: Tracking | None) -> Tensor:
    """Normalize with the batch's own statistics, and move running ones; what is not finite enters them."""
    _name_as_torchs(norm)
    if tracking is None:
        return _normalize(z, norm, None, None, True, 0.0)
    if not tracking.correction:
        raise ArgumentError(
            "batch_norm: running_var_correction=0 cannot be traced or exported in training.",
            why="torch's operator moves running_var with divisor m - 1, and so would the graph.",
            mend="trace or export in eval mode; or with running_var_correction=1.",
        )
    mean, var, batches, momentum, *_ = tracking
    if batches is not None:
        batches.add_(1)
    dtype = vector_dtype(z)
    if momentum is not None and mean.dtype is var.dtype is dtype:
        return _normalize(z, norm, mean, var, True, momentum)
    # copies of what they were: where a tool turns the graph to inference, it takes them for the statistics
    weight: float | Tensor = 1.0
    if momentum is None and batches is not None:
        momentum, weight = 1.0, 1 / batches.to(mean.dtype)
    aside = mean.to(dtype, copy=True), var.to(dtype, copy=True)
    y = _normalize(z, norm, *aside, True, 1.0 if momentum is None else momentum)
    for running, moved in zip((mean, var), aside, strict=True):
        running.copy_(running + (_as(moved, running.dtype) - running) * weight)
    return y


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    # a graph would hold a cast that does nothing
    return t if t.dtype == dtype else t.to(dtype)


def _normalize(
    z: Tensor, norm: Norm, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float
) -> Tensor:
    # in one dtype: half precision is widened before and rounded once at the end, as the engines do
    axis, eps, gamma, beta, residual, activation, _ = norm
    dtype = vector_dtype(z)
    gamma, beta = (None if v is None else _as(v, dtype) for v in (gamma, beta))
    u = _as(z, dtype) if axis == 1 else _as(z, dtype).movedim(axis, 1)
    if training and torch._C._get_tracing_state() is not None:
        # F.batch_norm looks at the size again, which this tracer complains of
        enabled = torch.backends.cudnn.enabled
        u = torch.batch_norm(u, gamma, beta, mean, var, True, momentum, eps, enabled)
    else:
        u = F.batch_norm(u, mean, var, gamma, beta, training, momentum, eps)
    u = u if axis == 1 else u.movedim(1, axis)
    return _as(activate(u if residual is None else u + residual, activation), z.dtype)


def _name_as_torchs(norm: Norm) -> None:
    """Let an exporter's note of the layer at work name torch's class, which tools look for by its name.

    Quantizers of PT2E find a convolution and the batch norm behind it by what is written beside each operation.
    """
    if torch.compiler.is_dynamo_compiling():
        return  # it follows this Python, and writes its own notes
    modules: dict | None = getattr(getattr(get_proxy_mode(), "tracer", None), "module_stack", None)
    if modules and norm.axis == 1 and norm.residual is None:
        last = next(reversed(modules))
        path, kind = modules[last]
        torchs = [c for c in _TORCH if isinstance(kind, type) and issubclass(kind, c)]
        if torchs:
            modules[last] = (path, torchs[0])


def record(
    z: torch.fx.Proxy,
    running: tuple[Tensor | None, Tensor | None],
    norm: Norm,
    training: bool,
    momentum: float,
) -> torch.fx.Proxy:
    """Put torch's batch norm into the graph that a symbolic tracer makes."""
    axis, eps, gamma, beta, residual, activation, _ = norm
    u = z if axis == 1 else z.movedim(axis, 1)
    u = F.batch_norm(u, *running, gamma, beta, training, momentum, eps)  # type: ignore[arg-type, assignment]
    u = u if axis == 1 else u.movedim(1, axis)
    return activate(u if residual is None else u + residual, activation)  # type: ignore
