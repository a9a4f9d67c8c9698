"""What the programs of a sweep found, merged for each channel: in fixed order, in float64, in a launch of its own.

A launch of its own, because whatever lets the last program of a sweep do it (semaphores, cooperative grids) misfires
when a graph is replayed or when programs outnumber processors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton.expressions import INTEGERS, shift_of


@triton.jit
def entry(e, channel, inner, channels, width, PARTS: tl.constexpr):
    """Where entry ``e`` of a channel lies: (split, part), the parts of a channel ``inner`` neighbours at a time."""
    split, part = e // PARTS, e % PARTS
    column = (part // inner) * channels * inner + channel * inner + part % inner
    return split.to(tl.int64) * width + column


@triton.jit
def move(running, value, weight, moves, at, here):
    """running = (1 - weight) running + weight value, where the batch is finite."""
    old = tl.load(running + at, mask=here, other=0)
    new = (old.to(tl.float64) * (1.0 - weight) + value * weight).to(old.dtype)
    tl.store(running + at, tl.where(moves, new, old), mask=here)


@triton.jit
def settle(
    center, m2, values, eps, correction, momentum, tracked, running_mean, running_var, mean, var, inv_std, at, here,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Write a channel's statistics, and move the running ones past the guard. All in float64."""
    variance = m2 / values
    mean32, var32 = center.to(tl.float32), variance.to(tl.float32)
    tl.store(mean + at, mean32, mask=here)
    tl.store(var + at, var32, mask=here)
    tl.store(inv_std + at, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), mask=here)
    if running_mean is not None:
        moves = here
        if GUARD:
            # infinity and NaN differ from 0 when taken from themselves
            moves = here & ((mean32 - mean32) == 0) & ((var32 - var32) == 0)
        if tracked is not None:  # the plain average of this many batches
            weight = 1.0 / tl.maximum(tl.load(tracked), 1).to(tl.float64)
            # mean 0 and variance 1 are what no batch has moved yet: the first is taken on whole
            begun = (tl.load(running_mean + at, mask=here, other=0) != 0) | (
                tl.load(running_var + at, mask=here, other=0) != 1
            )
            weight = tl.where(begun, weight, 1.0)
        else:
            weight = momentum
        move(running_mean, mean32.to(tl.float64), weight, moves, at, here)
        move(running_var, var32.to(tl.float64) * correction, weight, moves, at, here)


@triton.jit(do_not_specialize=INTEGERS)
def merge_statistics(
    z, partial, mean, var, inv_std, running_mean, running_var, tracked, eps, momentum, correction,
    rows, columns, inner, channels, parts_inner, entries, width, size, values,
    PARTS: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, GUARD: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Mean and variance of every channel from its partial ones, about the common shift.

    With RAW, ``mean`` and ``var`` take mean and sum of squared deviations, float64 where they are. With
    ``tracked`` the running statistics are a plain average; ``correction`` is m / (m - 1), or 1.
    """
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    here = channel < channels
    lane = tl.arange(0, BE)
    weighted = tl.zeros((BC, BE), tl.float64)
    for e in range(0, entries, BE):
        mask = here[:, None] & ((e + lane) < entries)[None, :]
        at = entry((e + lane)[None, :], channel[:, None], parts_inner, channels, width, PARTS)
        n = tl.load(partial + at, mask=mask, other=0).to(tl.float64)
        weighted += n * tl.load(partial + size + at, mask=mask, other=0).to(tl.float64)
    center = tl.sum(weighted, axis=1) / values
    spread = tl.zeros((BC, BE), tl.float64)
    for e in range(0, entries, BE):
        mask = here[:, None] & ((e + lane) < entries)[None, :]
        at = entry((e + lane)[None, :], channel[:, None], parts_inner, channels, width, PARTS)
        n = tl.load(partial + at, mask=mask, other=0).to(tl.float64)
        off = tl.load(partial + size + at, mask=mask, other=0).to(tl.float64) - center[:, None]
        m2 = tl.load(partial + 2 * size + at, mask=mask, other=0).to(tl.float64)
        spread += tl.where(mask, m2 + n * off * off, 0.0)
    m2 = tl.sum(spread, axis=1)
    center += shift_of(z, channel, rows, columns, inner, here).to(tl.float64)
    if RAW:
        tl.store(mean + channel, center.to(mean.dtype.element_ty), mask=here)
        tl.store(var + channel, m2.to(var.dtype.element_ty), mask=here)
    else:
        settle(
            center, m2, values, eps, correction, momentum, tracked, running_mean, running_var, mean, var, inv_std,
            channel, here, GUARD,
        )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def merge_sums(
    partial, sum_dy, sum_dy_zhat, channels, parts_inner, entries, width, size,
    PARTS: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The two sums of the backward of every channel."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    here = channel < channels
    lane = tl.arange(0, BE)
    a = tl.zeros((BC, BE), tl.float64)
    b = tl.zeros((BC, BE), tl.float64)
    for e in range(0, entries, BE):
        mask = here[:, None] & ((e + lane) < entries)[None, :]
        at = entry((e + lane)[None, :], channel[:, None], parts_inner, channels, width, PARTS)
        a += tl.load(partial + at, mask=mask, other=0).to(tl.float64)
        b += tl.load(partial + size + at, mask=mask, other=0).to(tl.float64)
    tl.store(sum_dy + channel, tl.sum(a, axis=1).to(sum_dy.dtype.element_ty), mask=here)
    tl.store(sum_dy_zhat + channel, tl.sum(b, axis=1).to(sum_dy_zhat.dtype.element_ty), mask=here)
