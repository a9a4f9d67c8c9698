"""How the programs of a launch share a tensor: from its shape, layout and dtype alone.

Neither the number of processors nor anything measured enters, so that the same tensor gives the same bits on every
device. No triton here: a plan can be looked at where there is none.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from torch import Tensor

TILE = 2048
"""Elements a program has in registers at once: 16 a thread at 4 warps."""

HELD = 8192
"""Elements that the one-launch form holds: 32 KB in float32."""

PROGRAMS = 1024
"""Programs that a sweep is cut into, where it is long enough: several for each processor of any GPU."""

FEWEST_ROWS = 64
LARGE_PLANE = 512
MOST_COLUMNS = 2**24
MOST_ROWS_WHOLE = 512

REACH = 2**31
"""Elements from the first of a tile to its last that int32 can count."""


class Plan(NamedTuple):
    """One way to go over a tensor; see `batchnorm.kernels.triton.expressions` for the view.

    Parameters
    ----------
    rows, columns, inner, channels : int
        The view. ``rows * columns`` may exceed ``total`` where rows were folded.
    total : int
        Elements.
    planes : bool
        Tiles stay inside one plane.
    block_rows, block_columns, strips : int
        A tile, and how many of them a program has side by side.
    splits, rows_a_program : int
        The rows, shared among programs.
    align : int
        Divides columns, inner where tiles stay in a plane, and total where the last row is not full.
    ragged : bool
        The last of the folded rows is not full.
    whole : bool
        A program can hold all values of its channels.
    warps : int
        Warps of 32 threads a program.
    """

    rows: int
    columns: int
    inner: int
    channels: int
    total: int
    planes: bool
    block_rows: int
    block_columns: int
    strips: int
    splits: int
    rows_a_program: int
    align: int
    ragged: bool
    whole: bool
    warps: int

    @property
    def programs(self) -> int:
        """Programs side by side: strips of columns, times channels where tiles stay in a plane."""
        if self.planes:
            return self.channels * _up(self.inner, self.block_columns * self.strips)
        return _up(self.columns, self.block_columns)

    @property
    def width(self) -> int:
        """Partial results of one split."""
        return self.programs if self.planes else self.columns

    @property
    def parts(self) -> int:
        """Partial results of one split and one channel."""
        return self.width // self.channels

    @property
    def parts_inner(self) -> int:
        """How many of them are neighbours."""
        return self.parts if self.planes else self.inner

    @property
    def shape_of_bits(self) -> tuple[int, ...]:
        """Shape of the bytes that hold one bit an element, every row or plane beginning a byte of its own.

        The number of axes tells the order in which z lay: 2 for rows of channels, 3 and 4 for planes.
        """
        if self.planes:
            return self.rows, self.channels, 1, _up(self.inner, 8)
        row = (self.rows, _up(self.columns, 8))
        return row if self.inner == 1 else (*row, 1)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _even(length: int, sizes: tuple[int, ...]) -> int:
    """The tile that leaves the fewest lanes idle; the largest of equals."""
    return min(sizes, key=lambda size: (_up(length, size) * size, -size))


def kind_of(z: Tensor, axis: int) -> str | None:
    """Tell which of the two layouts of `batchnorm.layout` a tensor has in memory.

    Parameters
    ----------
    z : Tensor
        Not empty.
    axis : int
        The channel axis, non-negative.

    Returns
    -------
    {"RC", "NCS"} or None
        Rows of channels, where both fit; None where it must be copied first.
    """
    if z.movedim(axis, -1).is_contiguous():
        return "RC"
    return "NCS" if z.is_contiguous() else None


@lru_cache(maxsize=4096)
def plan(kind: str, n: int, c: int, s: int, itemsize: int) -> Plan:
    """Plan for a packed tensor.

    Parameters
    ----------
    kind : {"RC", "NCS"}
        As `kind_of` gives it.
    n, c, s : int
        Rows or blocks, channels, neighbours of one channel; none of them 0.
    itemsize : int
        Bytes of an element.

    Returns
    -------
    Plan
        The same for the same arguments.
    """
    vector = 16 // itemsize
    total = n * c * s
    if kind == "RC":
        block = 16
        whole = n <= MOST_ROWS_WHOLE and _power(n) * block <= HELD and _power(n) * c < REACH
        if whole:
            return _whole(n, c, 1, c, total, False, max(_power(n), 2), block, vector)
        fold = 1
        if c % vector or c < 64:
            step = vector // gcd(c, vector)
            fold = max(step, _up(64, c) // step * step)
        return _rows(_up(n, fold), fold * c, 1, c, total, bool(n % fold), vector)
    held = HELD if s % vector == 0 else HELD // 2  # loads one by one need an address in registers for each
    if s >= 16 and _power(n) * _power(s) <= held and _power(n) * c * s < REACH:
        return _whole(n, c * s, s, c, total, True, _power(n), max(_power(s), 16), vector)
    if s >= LARGE_PLANE or (n < 16 and s >= 64) or c * s > MOST_COLUMNS:
        return _planes(n, c, s, total, vector)
    return _rows(n, c * s, s, c, total, False, vector)


def _reached(br: int, columns: int) -> int:
    """As many of the rows of a tile as int32 can reach from the first of them."""
    while br > 1 and br * columns >= REACH:
        br //= 2
    return br


def _warps(elements: int) -> int:
    return next((w for most, w in ((256, 1), (512, 2), (2048, 4), (4096, 8)) if elements <= most), 16)


def _whole(
    rows: int, columns: int, inner: int, c: int, total: int, planes: bool, br: int, bk: int, vector: int
) -> Plan:
    align = gcd(inner if planes else c, vector)
    warps = _warps(br * bk if align == vector else 2 * br * bk)
    return Plan(rows, columns, inner, c, total, planes, br, bk, 1, 1, rows, align, False, True, warps)


def _rows(rows: int, columns: int, inner: int, c: int, total: int, ragged: bool, vector: int) -> Plan:
    align = gcd(columns, vector)
    if ragged:
        align = gcd(align, total)
    # loads one by one need an address in registers for each
    tile = TILE if align == vector else TILE // 2
    bk = max(16, _even(columns, (64, 128))) if columns > 16 else 16
    while bk < 1024 and _power(rows) * bk < tile and bk < columns:
        bk *= 2
    br = _reached(max(1, min(tile // bk, _power(rows))), columns)
    tiles = _up(rows, br)
    # what a program finds of a column costs as much memory as six of its values, or three
    wanted = max(1, min(tiles, PROGRAMS // _up(columns, bk), rows // FEWEST_ROWS))
    each = _up(tiles, wanted)
    return Plan(
        rows, columns, inner, c, total, False, br, bk, 1, _up(tiles, each), each * br, align, ragged, False,
        _warps(br * bk),
    )  # fmt: skip


def _planes(n: int, c: int, s: int, total: int, vector: int) -> Plan:
    align = gcd(s, vector)
    tile = TILE if align == vector else TILE // 2
    bk = (
        _even(s, tuple(size for size in (512, 1024, 2048) if size <= tile)) if s > 256 else max(16, _power(s))
    )
    strips = 1
    if n < 8:
        # few rows: a program goes along the plane instead, as far as there are programs enough
        strips = max(1, min(_up(8, n), c * _up(s, bk) // PROGRAMS))
    br = 1 if strips > 1 else _reached(max(1, min(tile // bk, _power(n))), c * s)
    tiles = _up(n, br)
    wanted = max(1, min(tiles, PROGRAMS // (c * _up(s, bk * strips))))
    each = _up(tiles, wanted)
    return Plan(
        n, c * s, s, c, total, True, br, bk, strips, _up(tiles, each), each * br, align, False, False,
        _warps(br * bk),
    )  # fmt: skip
