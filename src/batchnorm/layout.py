"""Where the channel axis is, and how many values a channel has.

Two layouts have names, because two loops over memory serve them all::

    N x C x S   (N, C, *S) contiguous: a channel is N runs of S neighbours

        n0 [c0: s s s s][c1: s s s s] n1 [c0: s s s s][c1: s s s s]

    R x C       (N, C), channels_last, (N, L, C): a row holds every channel once

        r0 [c0 c1 c2] r1 [c0 c1 c2] r2 [c0 c1 c2]
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

from batchnorm.errors import ShapeError


class Layout(NamedTuple):
    """How a tensor's values lie in memory, seen by channel.

    Parameters
    ----------
    kind : {"NCS", "RC", "strided"}
        ``n`` blocks of ``c`` runs of ``s`` neighbours; ``n`` rows of ``c`` neighbours (``s == 1``); or
        neither, so that it must be copied first.
    n, c, s : int
        Blocks or rows, channels, and neighbours of one channel.
    """

    kind: Literal["NCS", "RC", "strided"]
    n: int
    c: int
    s: int


def channel_axis(ndim: int, channel_dim: int) -> int:
    """Give the channel axis as a non-negative index.

    Parameters
    ----------
    ndim : int
        Number of axes of the tensor, at least 2.
    channel_dim : int
        The axis that holds the channels, counted from the end when negative.

    Returns
    -------
    int
        The axis, ``0 <= axis < ndim``.

    Raises
    ------
    ShapeError
        Fewer than 2 axes, or no such axis.
    """
    if ndim < 2:
        raise ShapeError(
            f"batch_norm: input needs at least 2 axes (batch and channel), and has {ndim}.",
            why="mean and variance are taken over every axis but the channel's.",
            mend="add the batch axis, e.g. input.unsqueeze(0).",
        )
    axis = channel_dim + ndim if channel_dim < 0 else channel_dim
    if not 0 < axis < ndim:
        raise ShapeError(
            f"batch_norm: channel_dim={channel_dim} is no channel axis of an input with {ndim} axes.",
            why="axis 0 is the batch; the channel is one of the others.",
            mend=f"give channel_dim between 1 and {ndim - 1}, or -1 for the last.",
        )
    return axis


def values_per_channel(shape: Sequence[int], axis: int) -> int:
    """Count m, the values of one channel over batch and space.

    Parameters
    ----------
    shape : sequence of int
        Shape of the tensor.
    axis : int
        The channel axis, non-negative.

    Returns
    -------
    int
        The product of every other axis.
    """
    m = 1
    for a, length in enumerate(shape):
        if a != axis:
            m *= length
    return m


def vector_shape(ndim: int, axis: int) -> list[int]:
    """Give the shape in which a vector of length C broadcasts along the channel axis.

    Parameters
    ----------
    ndim : int
        Number of axes of the tensor.
    axis : int
        The channel axis, non-negative.

    Returns
    -------
    list of int
        Ones, and -1 at the channel axis.
    """
    shape = [1] * ndim
    shape[axis] = -1
    return shape


def classify(shape: Sequence[int], stride: Sequence[int], axis: int) -> Layout:
    """Tell which of the two memory layouts a tensor has.

    Parameters
    ----------
    shape, stride : sequence of int
        Shape and strides (in elements) of the tensor.
    axis : int
        The channel axis, non-negative.

    Returns
    -------
    Layout
        ``"RC"`` is preferred where both fit.
    """
    c = shape[axis]
    before, after = prod(shape[:axis]), prod(shape[axis + 1 :])

    def packed(order: Sequence[int]) -> bool:
        # axes of length 1 have no say; an empty tensor is packed in every order
        expected = 1
        for a in reversed(order):
            if shape[a] != 1:
                if stride[a] != expected:
                    return False
                expected *= shape[a]
        return True

    others = [a for a in range(len(shape)) if a != axis]
    if before * after * c == 0 or packed([*others, axis]):
        return Layout("RC", before * after, c, 1)
    if packed(list(range(len(shape)))):
        return Layout("NCS", before, c, after)
    return Layout("strided", before, c, after)
