"""The four sweeps over a tensor: statistics, normalize, reduce, input gradient.

A program has a strip of columns and a range of rows. Both are fixed by the shape alone, so that sums are taken in
the same order on every device and in every run, and what several programs found of a channel is merged by
`batchnorm.kernels.triton.merges` in fixed order: no atomics. Sweeps that follow another over the same tensor go
backward, to begin with what is still in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton.expressions import (
    INTEGERS,
    NONE,
    activate,
    affine,
    derivative,
    flat_side,
    hinted,
    load_bits,
    shift_of,
    store_bits,
)


@triton.jit
def place(
    p0,
    columns,
    inner,
    channels,
    ALIGN: tl.constexpr,
    BK: tl.constexpr,
    CT: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Where strip ``p0`` begins and ends, and the channels of its columns."""
    columns = hinted(columns, ALIGN)
    lane = tl.arange(0, BK)
    if PLANES:
        inner = hinted(inner, ALIGN)
        strips = tl.cdiv(inner, BK * CT)
        channel = p0 // strips
        start = channel.to(tl.int64) * inner + (p0 % strips).to(tl.int64) * (BK * CT)
        limit = channel.to(tl.int64) * inner + inner
        here = channel >= 0  # always
    else:
        start = p0.to(tl.int64) * BK
        limit = columns.to(tl.int64)
        column = start + lane
        channel = ((column // inner) % channels).to(tl.int32)
        here = column < columns
    return start, limit, channel, here, columns


@triton.jit
def lanes_inside(
    left, row, rows_end, rows, start, tail, BR: tl.constexpr, BK: tl.constexpr, RAGGED: tl.constexpr
):
    """Which lanes of a tile hold values: ``left`` columns remain, and rows up to ``rows_end``."""
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    inside = ((row + lane_row) < rows_end)[:, None] & (lane < left)[None, :]
    if RAGGED:  # the last of the folded rows holds ``tail`` columns
        inside = inside & (((row + lane_row) < rows - 1)[:, None] | (lane < tail - start)[None, :])
    return inside


@triton.jit(do_not_specialize=INTEGERS)
def statistics(
    z, partial, tracked, rows, columns, inner, channels, total, rows_a_program, size,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PLANES: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of every strip; the means as distances from the shift.

    ``partial`` is (3, splits, strips or columns), ``size`` its last two axes. ``tracked`` counts the batch.
    """
    p0, split = tl.program_id(0), tl.program_id(1)
    if tracked is not None:
        if (p0 == 0) & (split == 0):
            tl.store(tracked, tl.load(tracked) + 1)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, CT, PLANES)
    shift = by_lane(shift_of(z, channel, rows, columns, inner, here), PLANES)
    first = split * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    tail = hinted(total, ALIGN) - (rows - 1).to(tl.int64) * wide
    mean = tl.zeros((BR, BK), tl.float32)
    m2 = tl.zeros((BR, BK), tl.float32)
    turns = tl.cdiv(last - first, BR)
    # lanes drop out only at the end (the last strip of a plane, the last rows), so one count serves all
    for i in range(CT * turns):
        strip, row = turn(i, turns, first, BR, CT)
        at = start + strip * BK + row.to(tl.int64) * wide
        inside = lanes_inside(limit - start - strip * BK, row, last, rows, start, tail, BR, BK, RAGGED)
        x = (
            tl.load(z + at + within, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32)
            - shift
        )
        delta = tl.where(inside, x - mean, 0.0)
        mean += delta * (1.0 / (i + 1))
        m2 += tl.where(inside, delta * (x - mean), 0.0)
    strips_of = tl.minimum(tl.maximum(tl.cdiv(limit - start - lane, BK), 0), CT)
    ends = tl.zeros((BK,), tl.int64) + last
    if RAGGED:
        ends = tl.minimum(ends, tl.where(start + lane < tail, rows, rows - 1))
    rows_of = tl.maximum(tl.cdiv(ends[None, :] - first - lane_row[:, None], BR), 0)
    n = (strips_of[None, :] * rows_of).to(tl.float32)
    width = size // tl.num_programs(1)
    # the sum of squares in float64, once a program: beside one far value the others would lose their last digits
    if PLANES:
        held = tl.sum(n)
        center = tl.sum(n * mean) / held
        off = mean - center
        spread = tl.sum((m2 + n * off * off).to(tl.float64)).to(tl.float32)
        out = partial + split * width + p0
        tl.store(out, held)
        tl.store(out + size, center)
        tl.store(out + 2 * size, spread)
    else:
        held = tl.sum(n, axis=0)
        center = tl.sum(n * mean, axis=0) / tl.maximum(held, 1.0)
        off = mean - center[None, :]
        spread = tl.sum((m2 + n * off * off).to(tl.float64), axis=0).to(tl.float32)
        out = partial + split.to(tl.int64) * width + start + lane
        tl.store(out, held, mask=here)
        tl.store(out + size, center, mask=here)
        tl.store(out + 2 * size, spread, mask=here)


@triton.jit
def turn(i, turns, first, BR: tl.constexpr, CT: tl.constexpr):
    """The strip and the row of a program's tile ``i``: every row of a strip before the next strip."""
    if CT == 1:
        return 0, first + i * BR
    return i // turns, first + (i % turns) * BR


@triton.jit
def by_lane(v, PLANES: tl.constexpr):
    """What each channel has, for every column of a tile."""
    if PLANES:
        spread = v
    else:
        spread = v[None, :]
    return spread


@triton.jit
def channel_values(vector, channel, here, missing, PLANES: tl.constexpr):
    """A vector of length C by lane."""
    if vector is None:
        v = missing
    else:
        v = by_lane(tl.load(vector + channel, mask=here, other=0).to(tl.float32), PLANES)
    return v


@triton.jit
def inverse(spread, channel, here, eps, VARIANCE: tl.constexpr, PLANES: tl.constexpr):
    """1 / deviation, from itself or from a variance."""
    v = channel_values(spread, channel, here, 1.0, PLANES)
    if VARIANCE:
        v = 1.0 / tl.sqrt_rn(v + eps)
    return v


@triton.jit
def bits_at(
    start,
    i,
    row,
    inner,
    columns,
    p0,
    BR: tl.constexpr,
    BK: tl.constexpr,
    CT: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Where the bits of a tile lie: every row, or plane, begins a byte of its own."""
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK // 8)
    if PLANES:
        strips = tl.cdiv(inner, BK * CT)
        line = tl.cdiv(inner, 8).to(tl.int64)
        first = (p0 // strips) * line + ((p0 % strips) * CT + i).to(tl.int64) * (BK // 8)
        wide = (columns // inner) * line
        end = (p0 // strips + 1) * line
    else:
        first = start // 8
        wide = tl.cdiv(columns, 8).to(tl.int64)
        end = wide
    inside = (first + lane < end)[None, :]
    return first + (row + lane_row.to(tl.int64))[:, None] * wide + lane[None, :], inside


@triton.jit
def count_skipped(skips, var, channels):
    """Raise ``skips`` by one if a variance is not finite; one program does this for all channels."""
    found = tl.zeros((1024,), tl.int32)
    for c in range(0, channels, 1024):
        lane = c + tl.arange(0, 1024)
        v = tl.load(var + lane, mask=lane < channels, other=0)
        found = found | ((v - v) != 0).to(tl.int32)
    tl.store(skips, tl.load(skips) + tl.max(found, axis=0))


@triton.jit(do_not_specialize=INTEGERS)
def count_skips(skips, var, channels):
    """`count_skipped` as a launch of its own."""
    count_skipped(skips, var, channels)


@triton.jit(do_not_specialize=INTEGERS)
def normalize(
    z, residual, gamma, beta, mean, spread, y, bits, skips, var, eps,
    rows, columns, inner, channels, total, rows_a_program,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PLANES: tl.constexpr,
    RAGGED: tl.constexpr, VARIANCE: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """y; and one bit an element where ``bits`` is given. ``spread`` is 1 / deviation, or a variance."""
    p0 = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    if skips is not None:
        if (p0 == 0) & (split == 0):
            count_skipped(skips, var, channels)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, CT, PLANES)
    center = channel_values(mean, channel, here, 0.0, PLANES)
    scale = inverse(spread, channel, here, eps, VARIANCE, PLANES) * channel_values(
        gamma, channel, here, 1.0, PLANES
    )
    offset = channel_values(beta, channel, here, 0.0, PLANES)
    first = split * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    tail = hinted(total, ALIGN) - (rows - 1).to(tl.int64) * wide
    turns = tl.cdiv(last - first, BR)
    for back in range(CT * turns):
        i = CT * turns - 1 - back
        strip, row = turn(i, turns, first, BR, CT)
        at = start + strip * BK + row.to(tl.int64) * wide
        inside = lanes_inside(limit - start - strip * BK, row, last, rows, start, tail, BR, BK, RAGGED)
        x = tl.load(z + at + within, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
        u = affine(x, center, scale, offset)
        if residual is not None:
            u += tl.load(residual + at + within, mask=inside, other=0, eviction_policy="evict_first").to(
                tl.float32
            )
        if bits is not None:
            where, whole = bits_at(start, strip, row, inner, columns, p0, BR, BK, CT, PLANES)
            valid = ((row + lane_row) < last)[:, None] & whole
            store_bits(bits, where, flat_side(u, ACT), valid, BR, BK)
        tl.store(y + at + within, activate(u, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def pre_gradient(
    dy, z, residual, bits, at, within, inside, where, valid, center, scale, offset,
    BR: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """du and z of a tile."""
    x = tl.load(z + at + within, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    du = tl.load(dy + at + within, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    if bits is not None:
        flat = load_bits(bits, where, valid, BR, BK)
        du = derivative(du, tl.where(flat, -1.0, 1.0), ACT)
    elif ACT != NONE:
        u = affine(x, center, scale, offset)
        if residual is not None:
            u += tl.load(residual + at + within, mask=inside, other=0).to(tl.float32)
        du = derivative(du, u, ACT)
    return du, x


@triton.jit(do_not_specialize=INTEGERS)
def reduce(
    dy, z, residual, bits, gamma, beta, mean, inv_std, partial, rows, columns, inner, channels, total,
    rows_a_program, size,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PLANES: tl.constexpr,
    RAGGED: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Sums of du and of du z_hat of every strip, into ``partial`` (2, splits, strips or columns)."""
    p0, split = tl.program_id(0), tl.program_id(1)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, CT, PLANES)
    center = channel_values(mean, channel, here, 0.0, PLANES)
    inv = channel_values(inv_std, channel, here, 1.0, PLANES)
    scale = inv * channel_values(gamma, channel, here, 1.0, PLANES)
    offset = channel_values(beta, channel, here, 0.0, PLANES)
    first = split * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    tail = hinted(total, ALIGN) - (rows - 1).to(tl.int64) * wide
    sum_du = tl.zeros((BR, BK), tl.float32)
    sum_duz = tl.zeros((BR, BK), tl.float32)
    turns = tl.cdiv(last - first, BR)
    for i in range(CT * turns):
        strip, row = turn(i, turns, first, BR, CT)
        at = start + strip * BK + row.to(tl.int64) * wide
        inside = lanes_inside(limit - start - strip * BK, row, last, rows, start, tail, BR, BK, RAGGED)
        where, whole = bits_at(start, strip, row, inner, columns, p0, BR, BK, CT, PLANES)
        valid = ((row + lane_row) < last)[:, None] & whole
        du, x = pre_gradient(
            dy, z, residual, bits, at, within, inside, where, valid, center, scale, offset, BR, BK, ACT
        )
        du = tl.where(inside, du, 0.0)
        sum_du += du
        sum_duz += tl.where(inside, du * ((x - center) * inv), 0.0)
    width = size // tl.num_programs(1)
    if PLANES:
        out = partial + split * width + p0
        tl.store(out, tl.sum(sum_du))
        tl.store(out + size, tl.sum(sum_duz))
    else:
        out = partial + split.to(tl.int64) * width + start + lane
        tl.store(out, tl.sum(sum_du, axis=0), mask=here)
        tl.store(out + size, tl.sum(sum_duz, axis=0), mask=here)


@triton.jit(do_not_specialize=INTEGERS)
def apply(
    dy, z, residual, bits, gamma, beta, mean, inv_std, sum_dy, sum_dy_zhat, count, values, dz, dresidual,
    rows, columns, inner, channels, total, rows_a_program,
    ALIGN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, CT: tl.constexpr, PLANES: tl.constexpr,
    RAGGED: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """dz, and du where ``dresidual`` is given. Without ``sum_dy`` the statistics are constants.

    A channel has ``values``; or ``count``, in memory, where it is known on the device alone.
    """
    p0 = tl.num_programs(0) - 1 - tl.program_id(0)
    split = tl.num_programs(1) - 1 - tl.program_id(1)
    start, limit, channel, here, wide = place(p0, columns, inner, channels, ALIGN, BK, CT, PLANES)
    center = channel_values(mean, channel, here, 0.0, PLANES)
    inv = channel_values(inv_std, channel, here, 1.0, PLANES)
    scale = inv * channel_values(gamma, channel, here, 1.0, PLANES)
    offset = channel_values(beta, channel, here, 0.0, PLANES)
    share = 0.0
    if sum_dy is not None:
        if count is not None:
            share = 1.0 / tl.load(count).to(tl.float32)
        else:
            share = 1.0 / values
    mean_du = channel_values(sum_dy, channel, here, 0.0, PLANES) * share
    mean_duz = channel_values(sum_dy_zhat, channel, here, 0.0, PLANES) * share
    first = split * rows_a_program
    last = tl.minimum(first + rows_a_program, rows)
    lane_row, lane = tl.arange(0, BR), tl.arange(0, BK)
    within = lane_row[:, None] * wide + lane[None, :]
    tail = hinted(total, ALIGN) - (rows - 1).to(tl.int64) * wide
    turns = tl.cdiv(last - first, BR)
    for back in range(CT * turns):
        i = CT * turns - 1 - back
        strip, row = turn(i, turns, first, BR, CT)
        at = start + strip * BK + row.to(tl.int64) * wide
        inside = lanes_inside(limit - start - strip * BK, row, last, rows, start, tail, BR, BK, RAGGED)
        where, whole = bits_at(start, strip, row, inner, columns, p0, BR, BK, CT, PLANES)
        valid = ((row + lane_row) < last)[:, None] & whole
        du, x = pre_gradient(
            dy, z, residual, bits, at, within, inside, where, valid, center, scale, offset, BR, BK, ACT
        )
        if dresidual is not None:
            tl.store(dresidual + at + within, du.to(dresidual.dtype.element_ty), mask=inside)
        through = mean_du + (x - center) * inv * mean_duz
        tl.store(dz + at + within, ((du - through) * scale).to(dz.dtype.element_ty), mask=inside)
