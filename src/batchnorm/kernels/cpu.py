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
import warnings
from math import inf
from typing import Any

import torch
from torch import Tensor

from batchnorm import skips
from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.contract import Backward, Engine, Forward, Moments, Norm, Statistics
from batchnorm.population import Tracking, commit

absence: str | None = None
_core: Any
try:
    # by name: it may not be there, and a type checker has no stub of it before it is built
    _core = importlib.import_module("batchnorm._core")
    if not hasattr(_core, "call_on_skip"):
        raise ImportError("the core that is there was built from other sources")
    _core.use(Tensor.__dlpack_c_exchange_api__)
    _core.call_on_skip(skips.count_one)
except ImportError as error:  # not built for this machine: the engine of torch operations serves
    _core, absence = None, f"not built: {error}"
    warnings.warn(
        "batchnorm was installed without its C++ core, so torch operations serve on the CPU: the same results, "
        "several times slower. A C++20 compiler was missing or failed when it was built. Mend: install g++ 12 or "
        "clang 14 (or later), then `pip install --force-reinstall --no-cache-dir batchnorm`.",
        stacklevel=2,
    )
except (AttributeError, RuntimeError, TypeError):
    _core, absence = None, f"torch {torch.__version__} has no table of DLPack functions; a newer one has"

MOST_AXES = 16
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_REDUCTION, _INPUT_GRADIENT, _BOTH = 1, 2, 3
# what the core understands by a negative number: z's own count; that the spread is 1 / sqrt(var + eps) already
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

    def takes(self, z: Tensor, norm: Norm, tracking: Tracking | None) -> bool:
        """Whether a training forward has nothing to find fault with, and nothing to convert."""
        mean, var = (None, None) if tracking is None else tracking[:2]
        return _core.takes(z, norm.axis, norm.gamma, norm.beta, norm.residual, mean, var)

    def batch_statistics(
        self, z: Tensor, axis: int, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        if mask is not None or dtype is torch.float64:
            return aten.engine.batch_statistics(z, axis, mask, dtype)
        count, mean, m2 = _core.statistics(z, axis) or _core.statistics(_plain(z, axis)[0], axis)
        return Statistics(aten.counted(count, z), mean, m2)

    def normalize(
        self,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        *,
        mask: Tensor | None = None,
        out: Tensor | None = None,
        save: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if mask is not None or (save and norm.needs_saved):
            return aten.engine.normalize(z, norm, moments, mask=mask, out=out, save=save)
        return self._normalize(z, norm, moments.mean, moments.inv_std, _INVERSE, out), None

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        return self._normalize(z, norm, mean, var, norm.eps, out)

    @staticmethod
    def _normalize(
        z: Tensor, norm: Norm, mean: Tensor, spread: Tensor, eps: float, out: Tensor | None
    ) -> Tensor:
        axis, _, gamma, beta, residual, activation, _ = norm
        code = CODES[activation]
        y = _core.normalize(z, axis, mean, spread, eps, gamma, beta, residual, code, out)
        if y is not None:
            return y
        plain, strides = _plain(z, axis)
        acc = aten.vector_dtype(z)
        y = _core.normalize(
            plain, axis, _vector(mean, acc), _vector(spread, acc), eps, _vector(gamma, acc),
            _vector(beta, acc), _beside(residual, plain, strides), code, None,
        )  # fmt: skip
        return y if out is None else out.copy_(y)

    def backward_reduce(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        *,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        if mask is not None or dtype is torch.float64 or (saved is not None and saved.dtype is torch.bool):
            return aten.engine.backward_reduce(dy, z, norm, moments, saved, mask=mask, dtype=dtype)
        found = self._backward(_REDUCTION, dy, z, norm, moments, saved, (None, None), inf, False)
        return found[1], found[2]

    def backward_input(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor, Tensor],
        count: Tensor,
        with_residual: bool,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if mask is not None or (saved is not None and saved.dtype is torch.bool):
            return aten.engine.backward_input(
                dy, z, norm, moments, saved, sums, count, with_residual, mask=mask
            )
        values = 1.0
        if count.dim():
            sums = (sums[0] / count, sums[1] / count)  # a count for each channel goes into the sums
        else:
            values = float(count)
        found = self._backward(_INPUT_GRADIENT, dy, z, norm, moments, saved, sums, values, with_residual)
        return found[0], found[3]

    def forward(self, z: Tensor, norm: Norm, tracking: Tracking | None) -> Forward:
        axis, eps, gamma, beta, residual, activation, _ = norm
        code = CODES[activation]
        found = _core.forward(z, axis, gamma, beta, eps, residual, code, tracking)
        if found is not None:
            return _make(Forward, found)
        plain, strides = _plain(z, axis)
        acc = aten.vector_dtype(z)
        residual = _beside(residual, plain, strides)
        found = _core.forward(plain, axis, _vector(gamma, acc), _vector(beta, acc), eps, residual, code, None)
        result = Forward(*found)
        if tracking is not None:
            commit(tracking, z.numel() // z.shape[axis], result.mean, result.var)
        return result

    def backward(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        training: bool,
        with_residual: bool,
    ) -> Backward:
        if saved is not None and saved.dtype is torch.bool:
            return aten.engine.backward(dy, z, norm, moments, saved, training, with_residual)
        count = _OWN_COUNT if training else inf
        return _make(
            Backward, self._backward(_BOTH, dy, z, norm, moments, saved, (None, None), count, with_residual)
        )

    @staticmethod
    def _backward(
        parts: int,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor | None, Tensor | None],
        count: float,
        with_residual: bool,
    ) -> tuple[Any, ...]:
        if saved is None:
            norm.check_saved(saved)
        axis, _, gamma, beta, _, activation, _ = norm
        code, (mean, inv_std) = CODES[activation], moments
        found = _core.backward(
            parts, dy, z, axis, mean, inv_std, gamma, beta, code, saved, *sums, count, with_residual
        )
        if found is not None:
            return found
        plain, strides = _plain(z, axis)
        acc = aten.vector_dtype(z)
        if norm.saves_residual:
            saved = _beside(saved, plain, strides)
        vectors = (_vector(v, acc) for v in (mean, inv_std, gamma, beta))
        sums_ = (_vector(v, acc) for v in sums)
        return _core.backward(
            parts,
            _beside(dy, plain, strides),
            plain,
            axis,
            *vectors,
            code,
            saved,
            *sums_,
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
