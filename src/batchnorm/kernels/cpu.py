"""The engine of the C++ core: CPU tensors of float32, float64, bfloat16 and float16.

Importing never fails: where the core was not built `engine` is None and `absence` says why.
`BATCHNORM_ISA` (baseline, avx2, avx512, avx512bf16) overrides the choice of instruction set, `BATCHNORM_POOL`
the bytes that the pool of output buffers may keep idle (0: no pool).

The core looks at tensors and makes them by itself, through DLPack's table of functions. What it does not take as it
is, such as z with a stride inside its runs, or a float64 gamma beside a float32 z, it declines with None before
anything is written; it is then brought into plain form here, and offered once more.
"""

from __future__ import annotations

import importlib
import os
from math import inf
from typing import Any

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
    _core.use(Tensor.__dlpack_c_exchange_api__)
except ImportError as error:  # not built for this machine: the engine of torch operations serves
    _core, absence = None, f"not built: {error}"
except (AttributeError, RuntimeError, TypeError):
    _core, absence = None, f"torch {torch.__version__} has no table of DLPack functions; a newer one has"

MOST_AXES = 16
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_ACTIVATION_CODES = {None: 0} | {name: code for code, name in enumerate(ACTIVATIONS, 1)}
_REDUCTION, _INPUT_GRADIENT, _BOTH = 1, 2, 3
_OWN_COUNT = -1.0
_INVERSE = -1.0

_make = tuple.__new__
"""A named tuple from a tuple, without a look at its fields."""

_pooled = True


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if v is None or (v.dtype is dtype and v.is_contiguous()):
        return v
    return v.detach().to(dtype).contiguous()


def _plain(z: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """Give z in a form that the core takes, and the strides of what lies beside it."""
    z = z.detach().resolve_neg()
    strides = _core.packed_strides(z, axis)
    if strides is None:
        z = z.contiguous()
        strides = _core.packed_strides(z, axis)
    return z, strides


def _beside(t: Tensor | None, z: Tensor, strides: tuple[int, ...]) -> Tensor | None:
    """Give ``t`` with these strides and z's dtype."""
    if t is None:
        return None
    if t.dtype is z.dtype and not t.is_neg():
        same = zip(z.shape, t.stride(), strides, strict=True)
        if all(n == 1 or have == want for n, have, want in same):
            return t
    return torch.empty_strided(z.shape, strides, dtype=z.dtype).copy_(t.detach())


class CpuEngine:
    """`Engine` of the C++ core."""

    name = "cpu"

    def takes(
        self,
        z: Tensor,
        channel_dim: int,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        tracking: Tracking | None,
    ) -> bool:
        """Whether a training forward has nothing to find fault with, and nothing to convert."""
        mean, var = (None, None) if tracking is None else tracking[:2]
        return _core.takes(z, channel_dim, gamma, beta, residual, mean, var)

    def batch_statistics(
        self, z: Tensor, channel_dim: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean, and sum of squared deviations of each channel."""
        if mask is not None:
            return aten.engine.batch_statistics(z, channel_dim, mask)
        found = _core.statistics(z, channel_dim) or _core.statistics(_plain(z, channel_dim)[0], channel_dim)
        count, mean, m2 = found
        return torch.tensor(float(count), dtype=mean.dtype), mean, m2

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
        code = _ACTIVATION_CODES[activation]
        y = _core.normalize(z, channel_dim, mean, inv_std, _INVERSE, gamma, beta, residual, code, out)
        if y is not None:
            return y
        plain, strides = _plain(z, channel_dim)
        acc = aten.vector_dtype(z)
        y = _core.normalize(
            plain, channel_dim, _vector(mean, acc), _vector(inv_std, acc), _INVERSE, _vector(gamma, acc),
            _vector(beta, acc), _beside(residual, plain, strides), code, None,
        )  # fmt: skip
        return y if out is None else out.copy_(y)

    def infer(
        self,
        z: Tensor,
        channel_dim: int,
        mean: Tensor,
        var: Tensor,
        eps: float,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`normalize` with population statistics."""
        code = _ACTIVATION_CODES[activation]
        y = _core.normalize(z, channel_dim, mean, var, eps, gamma, beta, residual, code, out)
        if y is not None:
            return y
        inv_std = aten.inverse_deviation(var, eps, aten.vector_dtype(z))
        return self.normalize(z, channel_dim, mean, inv_std, gamma, beta, residual, activation, out)

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
        found = self._backward(
            _REDUCTION,
            dy,
            z,
            channel_dim,
            mean,
            inv_std,
            gamma,
            beta,
            activation,
            saved,
            None,
            None,
            inf,
            False,
        )
        return found[1], found[2]

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
        found = self._backward(
            _INPUT_GRADIENT, dy, z, channel_dim, mean, inv_std, gamma, beta, activation, saved,
            sum_dy, sum_dy_zhat, values, with_residual,
        )  # fmt: skip
        return found[0], found[3]

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
        code = _ACTIVATION_CODES[activation]
        found = _core.forward(z, channel_dim, gamma, beta, eps, residual, code, tracking)
        if found is not None:
            return _make(Forward, found)
        plain, strides = _plain(z, channel_dim)
        acc = aten.vector_dtype(z)
        residual = _beside(residual, plain, strides)
        found = _core.forward(
            plain, channel_dim, _vector(gamma, acc), _vector(beta, acc), eps, residual, code, None
        )
        result = Forward(*found)
        if tracking is not None:
            commit(tracking, z.numel() // z.shape[channel_dim], result.mean, result.var)
        return result

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
        code = _ACTIVATION_CODES[activation]
        count = _OWN_COUNT if training else inf
        found = _core.backward(
            _BOTH, dy, z, channel_dim, mean, inv_std, gamma, beta, code, saved, None, None, count, with_residual
        ) or self._backward(
            _BOTH, dy, z, channel_dim, mean, inv_std, gamma, beta, activation, saved,
            None, None, count, with_residual,
        )  # fmt: skip
        return _make(Backward, found)

    @staticmethod
    def _backward(
        parts: int,
        dy: Tensor,
        z: Tensor,
        axis: int,
        mean: Tensor,
        inv_std: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        activation: str | None,
        saved: Tensor | None,
        sum_dy: Tensor | None,
        sum_dy_zhat: Tensor | None,
        count: float,
        with_residual: bool,
    ) -> tuple[Any, ...]:
        code = _ACTIVATION_CODES[activation]
        found = _core.backward(
            parts,
            dy,
            z,
            axis,
            mean,
            inv_std,
            gamma,
            beta,
            code,
            saved,
            sum_dy,
            sum_dy_zhat,
            count,
            with_residual,
        )
        if found is not None:
            return found
        plain, strides = _plain(z, axis)
        acc = aten.vector_dtype(z)
        dy = _beside(dy, plain, strides)  # type: ignore[assignment]
        if activation not in PIECEWISE_LINEAR:
            saved = _beside(saved, plain, strides)
        mean, inv_std, gamma, beta, sum_dy, sum_dy_zhat = (  # type: ignore[assignment]
            _vector(v, acc) for v in (mean, inv_std, gamma, beta, sum_dy, sum_dy_zhat)
        )
        return _core.backward(
            parts,
            dy,
            plain,
            axis,
            mean,
            inv_std,
            gamma,
            beta,
            code,
            saved,
            sum_dy,
            sum_dy_zhat,
            count,
            with_residual,
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
        Bytes; 0 turns the pool off: an output's memory goes back to the system with it.
    """
    global _pooled
    _pooled = limit > 0
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
