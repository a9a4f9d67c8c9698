"""What the kernels share: where a tile lies, the affine map, activations, bits, and a shift that no outlier spoils.

A tensor is seen as ``rows x columns``, packed, and a channel is ``(column // inner) % channels``::

    (N, C), channels_last, (N, L, C)   columns = C, inner = 1; narrow ones have `fold` rows side by side
    (N, C, *S), small planes           columns = C * S, inner = S
    (N, C, *S), large planes           the same, but a tile stays inside one plane: the channel is a scalar

Offsets inside a tile are int32, and the tile's own place is int64. ``ALIGN`` divides ``columns``, ``inner`` (where
tiles stay in a plane) and ``total``, and says so to the compiler, which then loads 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RELU, RELU6, LEAKY, SILU, HARDSWISH, SIGMOID, TANH, GELU = (tl.constexpr(code) for code in range(9))
LEAKY_SLOPE = tl.constexpr(0.01)

INTEGERS = [
    *(
        "rows",
        "columns",
        "inner",
        "channels",
        "total",
        "rows_a_program",
        "size",
        "parts_inner",
        "entries",
        "width",
    ),
    *("eps", "momentum", "correction", "values"),
]
"""Arguments whose values must not be compiled in: the same machine code serves all of them."""


@triton.jit
def hinted(value, ALIGN: tl.constexpr):
    """Give ``value``, a multiple of ALIGN, in a form in which the compiler sees that."""
    return value // ALIGN * ALIGN


@triton.jit
def affine(z, mean, scale, beta):
    """u without a residual; the one expression that the forward and the recomputed mask share."""
    return tl.fma(z - mean, scale, beta)


@triton.jit
def tanh(u):
    """The hyperbolic tangent, to an absolute 1e-7; NaN passes, infinity gives 1."""
    e = tl.exp(-2.0 * tl.abs(u))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(u < 0, -t, t)


@triton.jit
def activate(u, ACT: tl.constexpr):
    """y = activation(u). Comparisons are written so that NaN passes."""
    if ACT == RELU:
        u = tl.where(u <= 0, 0.0, u)
    elif ACT == RELU6:
        u = tl.where(u <= 0, 0.0, tl.where(u >= 6, 6.0, u))
    elif ACT == LEAKY:
        u = tl.where(u > 0, u, u * LEAKY_SLOPE)
    elif ACT == SILU:
        e = tl.exp(-tl.abs(u))
        u = u * (tl.where(u >= 0, 1.0, e) / (1.0 + e))
    elif ACT == HARDSWISH:
        gate = tl.where(u <= -3, 0.0, tl.where(u >= 3, 6.0, u + 3))
        u = u * gate / 6
    elif ACT == SIGMOID:
        e = tl.exp(-tl.abs(u))
        u = tl.where(u >= 0, 1.0, e) / (1.0 + e)
    elif ACT == TANH:
        u = tanh(u)
    elif ACT == GELU:
        u = 0.5 * u * (1 + tl.erf(u * 0.7071067811865476))
    return u


@triton.jit
def derivative(dy, u, ACT: tl.constexpr):
    """du = dy * activation'(u)."""
    if ACT == RELU:
        dy = tl.where(u <= 0, 0.0, dy)
    elif ACT == RELU6:
        dy = tl.where((u <= 0) | (u >= 6), 0.0, dy)
    elif ACT == LEAKY:
        dy = tl.where(u > 0, dy, dy * LEAKY_SLOPE)
    elif ACT == SILU:
        e = tl.exp(-tl.abs(u))
        s = tl.where(u >= 0, 1.0, e) / (1.0 + e)
        dy = dy * (s * (1 + u * (1 - s)))
    elif ACT == HARDSWISH:
        dy = dy * tl.where(u <= -3, 0.0, tl.where(u >= 3, 1.0, u / 3 + 0.5))
    elif ACT == SIGMOID:
        e = tl.exp(-tl.abs(u))
        # s (1 - s), without the difference that loses digits where s is near 1
        dy = dy * (e / ((1.0 + e) * (1.0 + e)))
    elif ACT == TANH:
        e = tl.exp(-2.0 * tl.abs(u))
        dy = dy * (4 * e / ((1.0 + e) * (1.0 + e)))
    elif ACT == GELU:
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        dy = dy * (0.5 * (1 + tl.erf(u * 0.7071067811865476)) + u * density)
    return dy


@triton.jit
def flat_side(u, ACT: tl.constexpr):
    """Whether u lies where a piecewise linear activation has the other derivative than 1; NaN as in torch."""
    if ACT == RELU6:
        flat = (u <= 0) | (u >= 6)
    elif ACT == LEAKY:
        flat = (u > 0) == 0
    else:
        flat = u <= 0
    return flat


@triton.jit
def store_bits(bits, at, flat, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile of truth values, eight neighbours to a byte."""
    packed = tl.reshape(flat.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    weights = (1 << tl.arange(0, 8))[None, None, :]
    tl.store(bits + at, tl.sum(packed * weights, axis=2).to(tl.uint8), mask=inside)


@triton.jit
def load_bits(bits, at, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `store_bits`."""
    packed = tl.load(bits + at, mask=inside, other=0).to(tl.int32)
    spread = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(spread, (ROWS, COLUMNS)) != 0


@triton.jit
def shift_of(z, channel, rows, columns, inner, here):
    """Give each channel a value near its mean: the median of three, so that one outlier can't be it.

    Deviations from it are exact where the values are close to each other and far from zero. Whoever asks for
    the same channel gets the same shift, so that partial means can be kept as deviations too.
    """
    start = channel.to(tl.int64) * inner
    middle = (rows // 2).to(tl.int64) * columns
    last = (rows - 1).to(tl.int64) * columns
    a = tl.load(z + start, mask=here, other=0).to(tl.float32)
    b = tl.load(z + start + middle + inner // 2, mask=here, other=0).to(tl.float32)
    c = tl.load(z + start + last + inner - 1, mask=here, other=0).to(tl.float32)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))
