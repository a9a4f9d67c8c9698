"""The engine of the C++ core: CPU tensors of float32, float64, bfloat16 and float16.

Importing never fails: where the core was not built `engine` is None and `absence` says why.
`BATCHNORM_ISA` (baseline, avx2, avx512) overrides the choice of instruction set, `BATCHNORM_POOL` the bytes that
the pool of output buffers may keep idle (0: no pool).
"""

from __future__ import annotations

import importlib
import os
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten
from batchnorm.kernels.contract import ACTIVATIONS, PIECEWISE_LINEAR, Backward, Engine, Forward
from batchnorm.population import Tracking, commit

absence: str | None = None
_core: Any
try:
    # by name: it may not be there, and a type checker has no stub of it before it is built
    _core = importlib.import_module("batchnorm._core")
except ImportError as error:  # not built for this machine: the engine of torch operations serves
    _core, absence = None, f"not built: {error}"

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATION_CODES = {None: 0} | {name: code for code, name in enumerate(ACTIVATIONS, 1)}
_STATISTICS, _NORMALIZATION, _BOTH = 1, 2, 3
_REDUCTION, _INPUT_GRADIENT = 1, 2
_NO_TRACKING = (0, 0, 0, 0, 0, 0.0, 1, False)

_LARGE = 1 << 20
"""Bytes from which an output comes from the pool: below, torch's allocator has pages at hand."""

_pooled = True


class Plan(NamedTuple):
    """How a tensor of one shape, stride and dtype goes through the core."""

    head: tuple[int, ...]  # dtype, layout, n, c, s and two strides of z
    acc: torch.dtype
    code: int
    shape: torch.Size
    stride: tuple[int, ...]  # of every packed tensor beside z
    copy: bool  # z must be packed first
    large: bool
    mask_bytes: int
    values: int


_plans: dict[tuple[Any, ...], Plan] = {}


def _plan(z: Tensor, axis: int) -> Plan:
    key = (z.shape, z.stride(), axis, z.dtype)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _make_plan(z.shape, z.stride(), axis, z.dtype)
    return plan


def _collapsed(shape: tuple[int, ...], stride: tuple[int, ...], axes: range) -> tuple[int, int] | None:
    """Length and stride of several axes taken for one, or None where they are no single one."""
    length, step = 1, 1
    for a in reversed(axes):
        if shape[a] == 1:
            continue
        if length == 1:
            length, step = shape[a], stride[a]
        elif stride[a] == length * step:
            length *= shape[a]
        else:
            return None
    return length, step


def _make_plan(shape: torch.Size, stride: tuple[int, ...], axis: int, dtype: torch.dtype) -> Plan:
    dim = len(shape)
    c = shape[axis]
    channel_step = stride[axis]
    before = _collapsed(shape, stride, range(axis))
    after = _collapsed(shape, stride, range(axis + 1, dim))
    others = [a for a in range(dim) if a != axis]
    rows = _collapsed(tuple(shape[a] for a in others), tuple(stride[a] for a in others), range(dim - 1))
    code = _DTYPE_CODES[dtype]
    values = shape.numel()
    copy = False
    order = list(range(dim))
    if values == 0:
        head = (code, 1, 0, c, 1, 0, 1)
    elif rows is not None and (channel_step == 1 or c == 1) and (rows[1] >= c or rows[0] == 1):
        # channels side by side; where there is one channel, its values may be
        order = [*others, axis]
        n, step = rows
        if c == 1 and step == 1:
            head = (code, 0, 1, 1, n, n, n)
            order = list(range(dim)) if _is_packed(shape, stride, range(dim)) else order
        else:
            head = (code, 1, n, c, 1, c if n == 1 else step, 1)
    elif before is not None and after is not None and (after[1] == 1 or after[0] == 1):
        n, s = before[0], after[0]
        if s == 1:
            # (N, C, 1): channels with a stride between them
            copy = channel_step != 1
            head = (code, 1, n, c, 1, c if copy else before[1], 1)
        else:
            sc = s if c == 1 else channel_step
            head = (code, 0, n, c, s, c * s if n == 1 else before[1], sc)
    else:
        copy = True
        s = values // (shape[:axis].numel() * c)
        head = (
            (code, 0, shape[:axis].numel(), c, s, c * s, s) if s > 1 else (code, 1, values // c, c, 1, c, 1)
        )
    packed = _packed_stride(shape, order)
    if stride == packed or _is_packed(shape, stride, order):
        packed = stride if not copy else packed
    return Plan(
        head,
        torch.float64 if dtype == torch.float64 else torch.float32,
        code,
        shape,
        packed,
        copy,
        _pooled and values * dtype.itemsize >= _LARGE,
        _core.mask_bytes(*head),
        values // c if c else 0,
    )


def _packed_stride(shape: torch.Size, order: list[int]) -> tuple[int, ...]:
    stride, step = [0] * len(shape), 1
    for a in reversed(order):
        stride[a] = step
        step *= max(shape[a], 1)
    return tuple(stride)


def _is_packed(shape: torch.Size, stride: tuple[int, ...], order: Any) -> bool:
    # axes of length 1 have no say
    expected = 1
    for a in reversed(list(order)):
        if shape[a] != 1:
            if stride[a] != expected:
                return False
            expected *= shape[a]
    return True


def _empty(plan: Plan, like: Tensor) -> Tensor:
    if plan.large:
        return torch.utils.dlpack.from_dlpack(_core.allocate(plan.code, plan.shape, plan.stride))
    return torch.empty_strided(plan.shape, plan.stride, dtype=like.dtype)


def _packed(t: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """Give ``t`` in the memory order of the plan's outputs."""
    if t.stride() == plan.stride and t.dtype is dtype:
        return t
    if t.dtype is dtype and all(
        have == want for n, have, want in zip(plan.shape, t.stride(), plan.stride, strict=True) if n != 1
    ):
        return t
    return torch.empty_strided(plan.shape, plan.stride, dtype=dtype).copy_(t)


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if v is None or (v.dtype is dtype and v.is_contiguous()):
        return v
    return v.detach().to(dtype).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class CpuEngine:
    """`Engine` of the C++ core."""

    name = "cpu"

    def batch_statistics(
        self, z: Tensor, channel_dim: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean, and sum of squared deviations of each channel."""
        if mask is not None:
            return aten.engine.batch_statistics(z, channel_dim, mask)
        plan = _plan(z, channel_dim)
        if plan.copy:
            z = z.contiguous()
        vectors = torch.zeros if plan.values == 0 else torch.empty
        mean, m2 = vectors((2, plan.head[3]), dtype=plan.acc).unbind()
        _core.forward(
            *plan.head, 0, _STATISTICS, z.data_ptr(), 0, 0, 0, 0, 0,
            mean.data_ptr(), 0, 0, m2.data_ptr(), 0.0, *_NO_TRACKING,
        )  # fmt: skip
        return torch.tensor(float(plan.values), dtype=plan.acc), mean, m2

    def normalize(
        self,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Give y; into ``out`` (which may be z) when it is given."""
        plan = _plan(z, channel_dim)
        acc = plan.acc
        if plan.copy:
            z = z.contiguous()
        y = (
            out
            if out is not None and out.stride() == plan.stride and out.dtype is z.dtype
            else _empty(plan, z)
        )
        if residual is not None:
            residual = _packed(residual, plan, z.dtype)
        gamma, beta = _vector(gamma, acc), _vector(beta, acc)
        mean, inv_std = _vector(mean, acc), _vector(inv_std, acc)  # type: ignore[assignment]
        _core.forward(
            *plan.head, _ACTIVATION_CODES[activation], _NORMALIZATION,
            z.data_ptr(), _address(residual), y.data_ptr(), 0, _address(gamma), _address(beta),
            mean.data_ptr(), 0, inv_std.data_ptr(), 0, 0.0, *_NO_TRACKING,
        )  # fmt: skip
        return y if out is None or out is y else out.copy_(y)

    def backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Give sum_dy and sum_dy_zhat."""
        plan = _plan(z, channel_dim)
        sums = torch.empty((2, plan.head[3]), dtype=plan.acc)
        sum_dy, sum_dy_zhat = sums.unbind()
        self._backward(
            plan,
            _REDUCTION,
            dy,
            z,
            mean,
            inv_std,
            gamma,
            beta,
            activation,
            saved,
            sum_dy,
            sum_dy_zhat,
            inf,
            None,
            None,
        )
        return sum_dy, sum_dy_zhat

    def backward_input(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        sum_dy: Tensor,
        sum_dy_zhat: Tensor,
        count: Tensor,
        with_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Give dz and du; an infinite ``count`` makes the statistics constants."""
        if count.dim():
            # a count for each channel goes into the sums
            sum_dy, sum_dy_zhat, values = sum_dy / count, sum_dy_zhat / count, 1.0
        else:
            values = float(count)
        plan = _plan(z, channel_dim)
        sum_dy, sum_dy_zhat = _vector(sum_dy, plan.acc), _vector(sum_dy_zhat, plan.acc)  # type: ignore[assignment]
        dz = _empty(plan, z)
        dresidual = _empty(plan, z) if with_residual and activation is not None else None
        dy = self._backward(
            plan, _INPUT_GRADIENT, dy, z, mean, inv_std, gamma, beta, activation, saved,
            sum_dy, sum_dy_zhat, values, dz, dresidual,
        )  # fmt: skip
        return dz, dy if with_residual and activation is None else dresidual

    def forward(
        self,
        z: Tensor,
        channel_dim: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str | None,
        tracking: Tracking | None,
    ) -> Forward:
        """Normalize with z's own statistics, and move the running statistics of ``tracking``."""
        plan = _plan(z, channel_dim)
        acc = plan.acc
        if plan.copy:
            z = z.contiguous()
        y = _empty(plan, z)
        c = plan.head[3]
        mean, var, inv_std = torch.empty(c, dtype=acc), torch.empty(c, dtype=acc), torch.empty(c, dtype=acc)
        gamma, beta = _vector(gamma, acc), _vector(beta, acc)
        saved, mask, addend = None, 0, 0
        if residual is not None:
            residual = _packed(residual, plan, z.dtype)
            addend = residual.data_ptr()
            if activation in PIECEWISE_LINEAR:
                saved = torch.empty(plan.mask_bytes, dtype=torch.uint8)
                mask = saved.data_ptr()
            elif activation is not None:
                saved = residual
        running: tuple[Any, ...] = _NO_TRACKING
        later = None
        if tracking is not None:
            if _tracks(tracking, acc):
                running = (
                    tracking.running_mean.data_ptr(),
                    tracking.running_var.data_ptr(),
                    _address(tracking.num_batches_tracked),
                    _address(tracking.num_batches_skipped),
                    _address(tracking.skipped_channels),
                    nan if tracking.momentum is None else tracking.momentum,
                    tracking.correction,
                    tracking.skip_nonfinite,
                )
            else:
                later = tracking
        _core.forward(
            *plan.head, _ACTIVATION_CODES[activation], _BOTH,
            z.data_ptr(), addend, y.data_ptr(), mask,
            0 if gamma is None else gamma.data_ptr(), 0 if beta is None else beta.data_ptr(),
            mean.data_ptr(), var.data_ptr(), inv_std.data_ptr(), 0, eps, *running,
        )  # fmt: skip
        if later is not None:
            commit(later, plan.values, mean, var)
        return Forward(y, mean, var, inv_std, saved)

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
    ) -> Backward:
        """Give every gradient; ``training=False`` takes the statistics for constants."""
        plan = _plan(z, channel_dim)
        dz = _empty(plan, z)
        dresidual = _empty(plan, z) if with_residual and activation is not None else None
        c, acc = plan.head[3], plan.acc
        sum_dy, sum_dy_zhat = torch.empty(c, dtype=acc), torch.empty(c, dtype=acc)
        dy = self._backward(
            plan, _REDUCTION | _INPUT_GRADIENT, dy, z, mean, inv_std, gamma, beta, activation, saved,
            sum_dy, sum_dy_zhat, float(plan.values) if training else inf, dz, dresidual,
        )  # fmt: skip
        return Backward(dz, sum_dy, sum_dy_zhat, dy if with_residual and activation is None else dresidual)

    @staticmethod
    def _backward(
        plan: Plan,
        parts: int,
        dy: Tensor,
        z: Tensor,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        sum_dy: Tensor,
        sum_dy_zhat: Tensor,
        count: float,
        dz: Tensor | None,
        dresidual: Tensor | None,
    ) -> Tensor:
        acc = plan.acc
        if plan.copy:
            z = z.contiguous()
        if dy.stride() != plan.stride or dy.dtype is not z.dtype:
            dy = _packed(dy, plan, z.dtype)
        if saved is not None and (activation is None or activation not in PIECEWISE_LINEAR):
            saved = None if activation is None else _packed(saved, plan, z.dtype)
        gamma, beta = _vector(gamma, acc), _vector(beta, acc)
        mean, inv_std = _vector(mean, acc), _vector(inv_std, acc)  # type: ignore[assignment]
        _core.backward(
            *plan.head, _ACTIVATION_CODES[activation], parts, dy.data_ptr(), z.data_ptr(),
            0 if saved is None else saved.data_ptr(),
            0 if dz is None else dz.data_ptr(), 0 if dresidual is None else dresidual.data_ptr(),
            0 if gamma is None else gamma.data_ptr(), 0 if beta is None else beta.data_ptr(),
            mean.data_ptr(), inv_std.data_ptr(), sum_dy.data_ptr(), sum_dy_zhat.data_ptr(), count,
        )  # fmt: skip
        return dy


def _tracks(tracking: Tracking, acc: torch.dtype) -> bool:
    """Whether the core can move these statistics itself."""
    mean, var, skipped = tracking.running_mean, tracking.running_var, tracking.skipped_channels
    return (
        mean.dtype is acc
        and var.dtype is acc
        and mean.is_contiguous()
        and var.is_contiguous()
        and mean.is_cpu
        and (skipped is None or skipped.is_contiguous())
    )


def _pool_limit(setting: str) -> int | None:
    """Bytes that ``BATCHNORM_POOL`` allows, or None for the default."""
    if not setting:
        return None
    units = {"K": 10, "M": 20, "G": 30}
    number, shift = (
        (setting[:-1], units[setting[-1].upper()]) if setting[-1].upper() in units else (setting, 0)
    )
    if not number.isdecimal():
        raise ArgumentError(
            f"BATCHNORM_POOL={setting!r} is no number of bytes.",
            why="it bounds what the pool of output buffers may keep idle.",
            mend="e.g. BATCHNORM_POOL=512M, or 0 for no pool, or unset it for a quarter of the memory.",
        )
    return int(number) << shift


def set_pool_limit(limit: int) -> None:
    """Bound the bytes that the pool of output buffers may keep idle.

    Parameters
    ----------
    limit : int
        Bytes; 0 turns the pool off: outputs come from torch's allocator, and idle buffers go back to the system.
    """
    global _pooled
    _pooled = limit > 0
    _plans.clear()
    if _core is not None:
        _core.pool_limit(limit)


def info() -> dict[str, object]:
    """Say what the core is and how it runs here.

    Returns
    -------
    dict
        ``built``, and where it is: ``isa``, ``available_isas``, ``compiler``, ``runtime``, ``threads``, ``pool``.
    """
    if _core is None:
        return {"built": False, "absence": absence}
    return {
        "built": True,
        "isa": _core.isa(),
        "available_isas": _core.available_isas().split(),
        "compiler": _core.compiler(),
        "runtime": _core.runtime(),
        "threads": _core.threads(),
        "pool": _core.pool_statistics() if _pooled else "off",
    }


engine: Engine | None = None
if _core is not None:
    _wanted = os.environ.get("BATCHNORM_ISA", "")
    if _wanted and _wanted not in _core.available_isas().split():
        raise ArgumentError(
            f"BATCHNORM_ISA={_wanted!r} is no instruction set that this machine runs.",
            mend=f"one of {', '.join(_core.available_isas().split())}, or unset it.",
        )
    _core.select_isa(_wanted)
    _limit = _pool_limit(os.environ.get("BATCHNORM_POOL", ""))
    if _limit is not None:
        set_pool_limit(_limit)
    engine = CpuEngine()
