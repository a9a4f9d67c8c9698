"""Forward and backward in one launch, where a program holds every value of its channels on the chip.

A tile is all rows of a few channels, or one channel's planes. z is read once. Statistics are taken in two steps
from what is held, about the shift, and need no merge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton.expressions import INTEGERS, activate, affine, flat_side, shift_of, store_bits
from batchnorm.kernels.triton.merges import settle
from batchnorm.kernels.triton.sweeps import bits_at, by_lane, channel_values, place, pre_gradient


@triton.jit
def over(tile, PLANES: tl.constexpr):
    """Sum over a channel's values: a scalar, or a row."""
    if PLANES:
        total = tl.sum(tile)
    else:
        total = tl.sum(tile, axis=0)
    return total


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    z, residual, gamma, beta, y, bits, mean, var, inv_std, running_mean, running_var, tracked, bump,
    eps, momentum, correction, rows, columns, inner, channels, values,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PLANES: tl.constexpr, GUARD: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Statistics, running statistics and y. ``bump`` is the count of batches where this launch is to raise it."""
    p0 = tl.program_id(0)
    if bump is not None:
        if p0 == 0:
            tl.store(bump, tl.load(bump) + 1)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, 1, PLANES)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    inside = (lane_row < rows)[:, None] & (lane < limit - start)[None, :]
    x = tl.load(z + start + within, mask=inside, other=0).to(tl.float32)
    shift = shift_of(z, channel, rows, columns, inner, here)
    off = tl.where(inside, x - by_lane(shift, PLANES), 0.0)
    drift = over(off, PLANES) / values
    off = tl.where(inside, off - by_lane(drift, PLANES), 0.0)
    # the mean of what is left is the rounding of the first mean
    rest = over(off, PLANES) / values
    # in float64, for one far value among many would cost the sum of the others their last digits
    m2 = over((off * off).to(tl.float64), PLANES) - (rest * rest * values).to(tl.float64)
    center = shift.to(tl.float64) + drift.to(tl.float64) + rest.to(tl.float64)
    settle(
        center, m2, values, eps, correction, momentum, tracked, running_mean, running_var, mean, var, inv_std,
        channel, here, GUARD,
    )  # fmt: skip
    center32 = by_lane(center.to(tl.float32), PLANES)
    scale = by_lane((1.0 / tl.sqrt(m2 / values + eps)).to(tl.float32), PLANES)
    scale *= channel_values(gamma, channel, here, 1.0, PLANES)
    u = affine(x, center32, scale, channel_values(beta, channel, here, 0.0, PLANES))
    if residual is not None:
        u += tl.load(residual + start + within, mask=inside, other=0).to(tl.float32)
    if bits is not None:
        where, whole = bits_at(start, 0, 0, inner, columns, p0, BR, BK, 1, PLANES)
        store_bits(bits, where, flat_side(u, ACT), (lane_row < rows)[:, None] & whole, BR, BK)
    tl.store(y + start + within, activate(u, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def backward(
    dy, z, residual, bits, gamma, beta, mean, inv_std, dz, dresidual, sum_dy, sum_dy_zhat,
    rows, columns, inner, channels, values,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PLANES: tl.constexpr, TRAINING: tl.constexpr,
    ACT: tl.constexpr,
):  # fmt: skip
    """Every gradient, from one read of dy and z."""
    p0 = tl.program_id(0)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, 1, PLANES)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    inside = (lane_row < rows)[:, None] & (lane < limit - start)[None, :]
    center = channel_values(mean, channel, here, 0.0, PLANES)
    inv = channel_values(inv_std, channel, here, 1.0, PLANES)
    scale = inv * channel_values(gamma, channel, here, 1.0, PLANES)
    offset = channel_values(beta, channel, here, 0.0, PLANES)
    where, whole = bits_at(start, 0, 0, inner, columns, p0, BR, BK, 1, PLANES)
    valid = (lane_row < rows)[:, None] & whole
    du, x = pre_gradient(
        dy, z, residual, bits, start, within, inside, where, valid, center, scale, offset, BR, BK, ACT
    )
    if dresidual is not None:
        tl.store(dresidual + start + within, du.to(dresidual.dtype.element_ty), mask=inside)
    du = tl.where(inside, du, 0.0)
    z_hat = tl.where(inside, (x - center) * inv, 0.0)
    total = over(du, PLANES)
    total_zhat = over(du * z_hat, PLANES)
    tl.store(sum_dy + channel, total, mask=here)
    tl.store(sum_dy_zhat + channel, total_zhat, mask=here)
    if TRAINING:
        du = du - by_lane(total / values, PLANES) - z_hat * by_lane(total_zhat / values, PLANES)
    tl.store(dz + start + within, (du * scale).to(dz.dtype.element_ty), mask=inside)
