"""Where the channel axis is, and how many values a channel has.

Two layouts have names, because two loops over memory serve them all::

    N x C x S   (N, C, *S) contiguous: a channel is N runs of S neighbours

        n0 [c0: s s s s][c1: s s s s] n1 [c0: s s s s][c1: s s s s]

    R x C       (N, C), channels_last, (N, L, C): a row holds every channel once

        r0 [c0 c1 c2] r1 [c0 c1 c2] r2 [c0 c1 c2]
"""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.errors import ShapeError


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
