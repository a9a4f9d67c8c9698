"""The engine of the C++ core: CPU tensors of float32, float64, bfloat16 and float16.

Importing never fails: where the core was not built `engine` is None and `absence` says why.
`BATCHNORM_ISA` (baseline, avx2, avx512, avx512bf16) overrides the choice of instruction set, `BATCHNORM_POOL`
the bytes that the pool of output buffers may keep idle (0: no pool).

The core looks at tensors and makes them by itself, through DLPack's table of functions. What it does not take as it
is, such as z with a stride inside its runs, it declines with None before anything is written; it is then brought into
plain form here, and offered once more.
"""

from __future__ import annotations

import importlib
import os
import warnings
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from batchnorm import skips
from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.contract import Backward, Engine, Forward, Moments, Norm, Statistics
from batchnorm.population import Tracking, commit

# csrc/bindings.cpp has the same number: it rises whenever what crosses the boundary changes
_INTERFACE = 3

absence: str | None = None
_core: Any
try:
    # by name: it may not be there, and a type checker has no stub of it before it is built
    _core = importlib.import_module("batchnorm._core")
    if getattr(_core, "interface", 0) != _INTERFACE:
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


def _declined(*_: Any) -> None:
    """What a core that is not there makes of everything."""


takes = watch = train_at_once = infer_at_once = backward_at_once = _declined
"""Whole calls, where nothing stands in their way (csrc/at_once.cpp); elsewhere None, and nothing done."""
if _core is not None:
    takes, watch, backward_at_once = _core.takes, _core.watch, _core.backward_at_once
    train_at_once, infer_at_once = _core.train_at_once, _core.infer_at_once

_Maybe = TypeVar("_Maybe", Tensor, "Tensor | None")

MOST_AXES = 16
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def serves(z: Tensor) -> bool:
    """Whether the core can serve a tensor of the CPU."""
    return z.dtype in DTYPES and z.dim() <= MOST_AXES and not z.is_neg()


_REDUCTION, _INPUT_GRADIENT, _BOTH = 1, 2, 3
_make = tuple.__new__
"""A named tuple from a tuple, without a look at its fields."""

_pooled = True


def _plain(z: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """Give z in a form that the core takes, and the strides of what lies beside it."""
    z = z.detach().resolve_neg()
    strides = _core.packed_strides(z, axis)
    if strides is None:
        z = z.contiguous()
        strides = _core.packed_strides(z, axis)
    return z, strides


def _beside(t: _Maybe, z: Tensor, strides: tuple[int, ...]) -> _Maybe:
    """Give ``t`` with these strides and z's dtype."""
    if t is None:
        return None
    if t.dtype is z.dtype and not t.is_neg():
        same = zip(z.shape, t.stride(), strides, strict=True)
        if all(n == 1 or have == want for n, have, want in same):
            return t
    return torch.empty_strided(z.shape, strides, dtype=z.dtype).copy_(t.detach())


def _plain_norm(norm: Norm, z: Tensor, strides: tuple[int, ...]) -> Norm:
    """Give a norm whose tensors the core takes beside this z."""
    gamma, beta = (None if v is None else v.detach().resolve_neg() for v in (norm.gamma, norm.beta))
    return norm._replace(gamma=gamma, beta=beta, residual=_beside(norm.residual, z, strides))


class CpuEngine:
    """`Engine` of the C++ core."""

    name = "cpu"
    fuses_masks = True

    def batch_statistics(
        self, z: Tensor, axis: int, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        exact = dtype is torch.float64
        if not z.shape[
            axis
        ]:  # positions are counted where no channel is too: other ranks have their slice of them
            return aten.engine.batch_statistics(z, axis, mask, dtype)
        found = _core.statistics(z, axis, mask, exact)
        count, mean, m2 = found or _core.statistics(_plain(z, axis)[0], axis, mask, exact)
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
        return self._normalize(z, norm, *moments, False, mask, out, save)

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        return self._normalize(z, norm, mean, var, True, None, out, False)[0]

    @staticmethod
    def _normalize(
        z: Tensor,
        norm: Norm,
        mean: Tensor,
        spread: Tensor,
        is_var: bool,
        mask: Tensor | None,
        out: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        code = CODES[norm.activation]
        found = _core.normalize(z, norm, code, mean, spread, is_var, mask, out, save)
        if found is not None:
            return found
        plain, strides = _plain(z, norm.axis)
        norm = _plain_norm(norm, plain, strides)
        mean, spread = mean.resolve_neg(), spread.resolve_neg()
        y, saved = _core.normalize(plain, norm, code, mean, spread, is_var, mask, None, save)
        return y if out is None else out.copy_(y), saved

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
        exact = dtype is torch.float64
        found = self._backward(
            _REDUCTION, dy, z, norm, moments, saved, (None, None), None, False, mask, exact
        )
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
        values = 1.0
        if count.dim():
            sums = (sums[0] / count, sums[1] / count)  # a count for each channel goes into the sums
        else:
            values = float(count)
        found = self._backward(
            _INPUT_GRADIENT, dy, z, norm, moments, saved, sums, values, with_residual, mask, False
        )
        return found[0], found[3]

    def forward(
        self, z: Tensor, norm: Norm, tracking: Tracking | None, mask: Tensor | None = None
    ) -> Forward | None:
        code = CODES[norm.activation]
        found = _core.forward(z, norm, code, tracking, mask)
        if found is not None:
            return _make(Forward, found)
        plain, strides = _plain(z, norm.axis)
        found = _core.forward(plain, _plain_norm(norm, plain, strides), code, None, mask)
        if found is None:
            return None
        result = _make(Forward, found)
        if tracking is not None:
            each = z.shape[norm.axis]
            m = (z.numel() if mask is None else int(mask.expand_as(z).sum())) // each
            commit(tracking, m, result.mean, result.var)
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
        mask: Tensor | None = None,
    ) -> Backward:
        count = None if training else inf
        found = self._backward(
            _BOTH, dy, z, norm, moments, saved, (None, None), count, with_residual, mask, False
        )
        return _make(Backward, found)

    @staticmethod
    def _backward(
        parts: int,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor | None, Tensor | None],
        count: float | None,
        with_residual: bool,
        mask: Tensor | None,
        exact: bool,
    ) -> tuple[Any, ...]:
        if saved is None and z.numel():  # of no value there is nothing to save
            norm.check_saved(saved)
        code = CODES[norm.activation]
        rest = (*moments, saved, *sums, count, with_residual, mask, exact)
        found = _core.backward(parts, dy, z, norm, code, *rest)
        if found is not None:
            return found
        if saved is not None and not norm.saves_residual:
            # sides lie as the z did that they were made of: their number of axes tells how
            z = (
                z.movedim(norm.axis, -1).contiguous().movedim(-1, norm.axis)
                if saved.dim() == 2
                else z.contiguous()
            )
            saved = saved.contiguous()
        plain, strides = _plain(z, norm.axis)
        if norm.saves_residual:
            saved = _beside(saved, plain, strides)
        norm = _plain_norm(norm, plain, strides)
        given = [v if v is None else v.detach().resolve_neg() for v in (*moments, *sums)]
        dy = _beside(dy, plain, strides)
        found = _core.backward(
            parts, dy, plain, norm, code, *given[:2], saved, *given[2:], count, with_residual, mask, exact
        )
        if found is None:
            raise ArgumentError(
                "backward: what the forward saved does not belong to this input.",
                why="it holds a bit for each element, and has other sizes.",
                mend="give the input, and what was saved with it, as they were; hooks on saved tensors may change "
                "their strides and their place, not their shape and values.",
            )
        return found


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
