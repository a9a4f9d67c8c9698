"""The engine of our own GPU kernels, in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import aten
from batchnorm.kernels.activations import CODES
from batchnorm.kernels.contract import Backward, Forward, Moments, Norm, Statistics
from batchnorm.kernels.triton import merges, sweeps, whole
from batchnorm.kernels.triton.launch import launch
from batchnorm.kernels.triton.operands import beside, packed, vector
from batchnorm.kernels.triton.plan import Plan
from batchnorm.population import Tracking, commit
from batchnorm.skips import counter

_CHANNELS, _ENTRIES = 8, 64


def _shape_of(p: Plan) -> tuple[int, ...]:
    return p.rows, p.columns, p.inner, p.channels, p.total, p.rows_a_program


def _constants(p: Plan) -> dict[str, Any]:
    return {
        "ALIGN": p.align,
        "BR": p.block_rows,
        "BK": p.block_columns,
        "CT": p.strips,
        "PLANES": p.planes,
        "RAGGED": p.ragged,
    }


def _held(p: Plan) -> dict[str, Any]:
    return {"ALIGN": p.align, "BR": p.block_rows, "BK": p.block_columns, "PLANES": p.planes}


def _merging(p: Plan) -> tuple[tuple[int], dict[str, Any]]:
    return (-(-p.channels // _CHANNELS),), {"PARTS": p.parts, "BC": _CHANNELS, "BE": _ENTRIES}


def _sweep(kernel: Any, z: Tensor, p: Plan, arguments: tuple, **constants: Any) -> None:
    """Launch a kernel that goes over z in tiles."""
    launch(kernel, (p.programs, p.splits), z.device, arguments, {**_constants(p), **constants}, p.warps)


def _hold(kernel: Any, z: Tensor, p: Plan, arguments: tuple, **constants: Any) -> None:
    """Launch a kernel whose programs hold all values of their channels."""
    launch(kernel, (p.programs,), z.device, arguments, {**_held(p), **constants}, p.warps)


def _merge(kernel: Any, z: Tensor, p: Plan, arguments: tuple, **constants: Any) -> None:
    """Launch a kernel that merges what the programs of a sweep found."""
    grid, fixed = _merging(p)
    launch(kernel, grid, z.device, arguments, {**fixed, **constants}, 4)


class TritonEngine:
    """`Engine` of Triton kernels: float32, bfloat16 and float16 on a GPU, accumulated in float32."""

    name = "triton"
    fuses_masks = False

    def batch_statistics(
        self, z: Tensor, axis: int, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Statistics:
        """Count, mean, and sum of squared deviations of each channel."""
        if mask is not None or not z.numel():
            return aten.engine.batch_statistics(z, axis, mask, dtype)
        z, p = packed(z, axis)
        dtype = torch.float32 if dtype is None else dtype
        mean, m2 = torch.empty((2, p.channels), dtype=dtype, device=z.device)
        self._statistics(z, p, (mean, m2, None), 0.0, None, raw=True)
        return Statistics(aten.counted(p.total // p.channels, z), mean, m2)

    def _statistics(
        self,
        z: Tensor,
        p: Plan,
        vectors: tuple[Tensor, Tensor, Tensor | None],
        eps: float,
        tracking: Tracking | None,
        raw: bool = False,
    ) -> None:
        partial = torch.empty(3 * p.splits * p.width, dtype=torch.float32, device=z.device)
        size, values = p.splits * p.width, p.total // p.channels
        tracked = None if tracking is None else tracking.num_batches_tracked
        _sweep(sweeps.statistics, z, p, (z, partial, tracked, *_shape_of(p), size))
        running_mean, running_var, momentum, correction, average, guard = _moving(tracking, values)
        arguments = (
            z, partial, *vectors, running_mean, running_var, average, eps, momentum, correction, p.rows, p.columns,
            p.inner, p.channels, p.parts_inner, p.splits * p.parts, p.width, size, float(values),
        )  # fmt: skip
        _merge(merges.merge_statistics, z, p, arguments, GUARD=guard, RAW=raw)

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
        """Give y, into ``out`` (which may be z) when it is given, and what the backward needs."""
        if mask is not None or not z.numel():
            return aten.engine.normalize(z, norm, moments, mask=mask, out=out, save=save)
        return self._normalize(z, norm, moments.mean, moments.inv_std, False, out, save)

    def infer(self, z: Tensor, norm: Norm, mean: Tensor, var: Tensor, out: Tensor | None = None) -> Tensor:
        """`normalize` with population statistics, of any floating dtype."""
        if not z.numel():
            return aten.engine.infer(z, norm, mean, var, out)
        return self._normalize(z, norm, mean, var, True, out, False)[0]

    def _normalize(
        self,
        z: Tensor,
        norm: Norm,
        mean: Tensor,
        spread: Tensor,
        variance: bool,
        out: Tensor | None,
        save: bool,
        skips: Tensor | None = None,
        var: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        plain, p = packed(z, norm.axis)
        # into the very tensor where it lies as z does, else by way of a fresh one
        direct = out is not None and _same_memory(out, plain)
        y = out if direct else torch.empty_like(plain)
        residual = beside(norm.residual, plain)
        saved, bits = _saving(norm, residual, plain, p) if save else (None, None)
        arguments = (
            plain, residual, vector(norm.gamma), vector(norm.beta), vector(mean), vector(spread), y, bits, skips,
            var, norm.eps, *_shape_of(p),
        )  # fmt: skip
        _sweep(sweeps.normalize, z, p, arguments, VARIANCE=variance, ACT=CODES[norm.activation])
        if out is not None and not direct:
            return out.copy_(y), saved  # type: ignore[arg-type]
        return y, saved  # type: ignore[return-value]

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
        """Give sum_dy and sum_dy_zhat."""
        if mask is not None or not z.numel():
            return aten.engine.backward_reduce(dy, z, norm, moments, saved, mask=mask, dtype=dtype)
        plain, p, residual, bits = _saved(z, norm, saved)
        size = p.splits * p.width
        partial = torch.empty(2 * size, dtype=torch.float32, device=z.device)
        arguments: tuple[Any, ...] = (
            beside(dy, plain), plain, residual, bits, vector(norm.gamma), vector(norm.beta), *map(vector, moments),
            partial, *_shape_of(p), size,
        )  # fmt: skip
        _sweep(sweeps.reduce, z, p, arguments, ACT=CODES[norm.activation])
        sums = torch.empty((2, p.channels), dtype=dtype or torch.float32, device=z.device)
        arguments = (partial, sums[0], sums[1], p.channels, p.parts_inner, p.splits * p.parts, p.width, size)
        _merge(merges.merge_sums, z, p, arguments)
        return sums[0], sums[1]

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
        """Give dz and du; an infinite ``count`` makes the statistics constants."""
        if mask is not None or not z.numel():
            return aten.engine.backward_input(
                dy, z, norm, moments, saved, sums, count, with_residual, mask=mask
            )
        if count.dim():
            # a count for each channel goes into the sums
            sums, count = (sums[0] / count, sums[1] / count), torch.ones_like(count[0])
        return self._apply(dy, z, norm, moments, saved, sums, count, with_residual)

    def _apply(
        self,
        dy: Tensor,
        z: Tensor,
        norm: Norm,
        moments: Moments,
        saved: Tensor | None,
        sums: tuple[Tensor | None, Tensor | None],
        count: Tensor | None,
        with_residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        plain, p, residual, bits = _saved(z, norm, saved)
        dz = torch.empty_like(plain)
        dresidual = torch.empty_like(plain) if with_residual else None
        arguments = (
            beside(dy, plain), plain, residual, bits, vector(norm.gamma), vector(norm.beta), *map(vector, moments),
            *map(vector, sums), count, float(p.total // p.channels), dz, dresidual, *_shape_of(p),
        )  # fmt: skip
        _sweep(sweeps.apply, z, p, arguments, ACT=CODES[norm.activation])
        return dz, dresidual

    def forward(
        self, z: Tensor, norm: Norm, tracking: Tracking | None, mask: Tensor | None = None
    ) -> Forward:
        """Normalize with z's own statistics, and move the running statistics of ``tracking``."""
        plain, p = packed(z, norm.axis)
        inside = tracking if _movable(tracking) else None
        mean, var, inv_std = torch.empty((3, p.channels), dtype=torch.float32, device=z.device)
        skips = None
        if inside is not None and inside.skip_nonfinite:
            skips = counter(inside.running_mean)
        if p.whole:
            result = self._forward_whole(plain, p, norm, (mean, var, inv_std), inside)
            if skips is not None:
                launch(sweeps.count_skips, (1,), z.device, (skips, var, p.channels), {}, 4)
        else:
            self._statistics(plain, p, (mean, var, inv_std), norm.eps, inside)
            y, saved = self._normalize(plain, norm, mean, inv_std, False, None, True, skips, var)
            result = Forward(y, mean, var, inv_std, saved)
        if tracking is not None and inside is None:
            commit(tracking, p.total // p.channels, mean, var)
        return result

    def _forward_whole(
        self,
        z: Tensor,
        p: Plan,
        norm: Norm,
        vectors: tuple[Tensor, Tensor, Tensor],
        tracking: Tracking | None,
    ) -> Forward:
        y = torch.empty_like(z)
        residual = beside(norm.residual, z)
        saved, bits = _saving(norm, residual, z, p)
        values = p.total // p.channels
        running_mean, running_var, momentum, correction, average, guard = _moving(tracking, values)
        bump = None if tracking is None else tracking.num_batches_tracked
        if average is not None:
            # every program reads the count of batches: it must be raised before
            average.add_(1)
            bump = None
        arguments = (
            z, residual, vector(norm.gamma), vector(norm.beta), y, bits, *vectors, running_mean, running_var,
            average, bump, norm.eps, momentum, correction, p.rows, p.columns, p.inner, p.channels, float(values),
        )  # fmt: skip
        _hold(whole.forward, z, p, arguments, GUARD=guard, ACT=CODES[norm.activation])
        return Forward(y, *vectors, saved)

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
        """Give every gradient; ``training=False`` takes the statistics for constants."""
        if not z.numel():
            return aten.engine.backward(dy, z, norm, moments, saved, training, with_residual)
        plain, p, residual, bits = _saved(z, norm, saved)
        if not p.whole:
            pair = self.backward_reduce(dy, plain, norm, moments, saved)
            given = pair if training else (None, None)
            dz, dresidual = self._apply(dy, plain, norm, moments, saved, given, None, with_residual)
            return Backward(dz, *pair, dresidual)
        dz = torch.empty_like(plain)
        dresidual = torch.empty_like(plain) if with_residual else None
        sums = torch.empty((2, p.channels), dtype=torch.float32, device=z.device)
        arguments = (
            beside(dy, plain), plain, residual, bits, vector(norm.gamma), vector(norm.beta), *map(vector, moments),
            dz, dresidual, sums[0], sums[1], p.rows, p.columns, p.inner, p.channels, float(p.total // p.channels),
        )  # fmt: skip
        _hold(whole.backward, z, p, arguments, TRAINING=training, ACT=CODES[norm.activation])
        return Backward(dz, sums[0], sums[1], dresidual)


def _same_memory(out: Tensor, z: Tensor) -> bool:
    if out.dtype is not z.dtype or out.is_neg():
        return False
    return all(n == 1 or a == b for n, a, b in zip(z.shape, out.stride(), z.stride(), strict=True))


def _saving(norm: Norm, residual: Tensor | None, z: Tensor, p: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Give what to save, and the bits that the kernel is to write."""
    if not norm.needs_saved:
        return None, None
    if norm.saves_residual:
        return residual, None
    bits = torch.empty(p.shape_of_bits, dtype=torch.uint8, device=z.device)
    return bits, bits


def _saved(z: Tensor, norm: Norm, saved: Tensor | None) -> tuple[Tensor, Plan, Tensor | None, Tensor | None]:
    """Give z packed and how to go over it, and what was saved: as the residual, or as bits.

    Bits lie in the order of the z that they were made with. What is saved may come back with other strides, so
    their shape says which order that was, and z is brought into it.
    """
    norm.check_saved(saved)
    plain, p = packed(z, norm.axis)
    if not norm.needs_saved:
        return plain, p, None, None
    if norm.saves_residual:
        return plain, p, beside(saved, plain), None
    if saved.shape != p.shape_of_bits:  # type: ignore[union-attr]
        by_rows = saved.dim() == 2  # type: ignore[union-attr]
        plain = z.movedim(norm.axis, -1).contiguous().movedim(-1, norm.axis) if by_rows else z.contiguous()
        plain, p = packed(plain, norm.axis)
    return plain, p, None, saved.contiguous()  # type: ignore[union-attr]


def _movable(tracking: Tracking | None) -> bool:
    """Whether the kernels can move these buffers themselves."""
    if tracking is None:
        return False
    vectors = (tracking.running_mean, tracking.running_var)
    counted = tracking.num_batches_tracked
    return all(v.dtype is torch.float32 and v.is_contiguous() for v in vectors) and (
        counted is not None or tracking.momentum is not None
    )


def _moving(tracking: Tracking | None, values: int) -> tuple[Any, ...]:
    """Buffers, momentum, correction, the count of a plain average, and whether non-finite batches are skipped."""
    if tracking is None:
        return None, None, 0.0, 1.0, None, False
    average = tracking.num_batches_tracked if tracking.momentum is None else None
    correction = values / (values - 1) if tracking.correction and values > 1 else 1.0
    return (
        tracking.running_mean, tracking.running_var, tracking.momentum or 0.0, correction, average,
        tracking.skip_nonfinite,
    )  # fmt: skip


engine = TritonEngine()
