"""Where a layer's channels are, on their way through transposes and reshapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import nn

from batchnorm.network.values.values import Call


@dataclass
class Axis:
    """The place of the channel axis of a value.

    Parameters
    ----------
    place : int
        Negative when counted from the last, as for a Linear whose number of axes is not known.
    rank : int or None
        Number of axes, where it is known.
    """

    place: int
    rank: int | None

    MOVES: ClassVar[frozenset[str]] = frozenset(
        [
            "transpose",
            "permute",
            "swapaxes",
            "view",
            "_unsafe_view",
            "reshape",
            "flatten",
            "contiguous",
            "clone",
            *("squeeze", "unsqueeze", "reshape_as", "view_as", "Flatten", "t"),
        ]
    )

    @classmethod
    def behind(cls, call: Call) -> Axis:
        """Where the channels of a layer's output are.

        Parameters
        ----------
        call : Call
            A call of a layer.

        Returns
        -------
        Axis
            1 for convolutions, the last for a Linear.
        """
        shape = call.output.shape
        if isinstance(call.module, nn.Linear):
            return cls(-1, len(shape) if shape is not None else None)
        axes = len(call.module.kernel_size)  # type: ignore[union-attr,arg-type]
        # an unbatched input has its channels in front
        return cls(-1 - axes, len(shape) if shape is not None else axes + 2)

    def is_same(self, channel_dim: int) -> bool | None:
        """Whether this is the channel axis of a norm.

        Parameters
        ----------
        channel_dim : int
            The norm's, negative when counted from the last.

        Returns
        -------
        bool or None
            None when the number of axes decides, and is not known.
        """
        if self.rank is not None:
            return self.place % self.rank == channel_dim % self.rank
        if (self.place < 0) == (channel_dim < 0):
            return self.place == channel_dim
        return None


def follow_axis(
    call: Call, axis: Axis | None, before: tuple[int, ...] | None, after: tuple[int, ...] | None
) -> Axis | None:
    """Where the channel axis is after a transpose or reshape.

    Parameters
    ----------
    call : Call
        Of one of ``Axis.MOVES``.
    axis : Axis or None
        Before it; None when lost.
    before, after : tuple of int, or None
        Shapes, known in a run.

    Returns
    -------
    Axis or None
        None when it can't be told, or the channels were mixed with another axis.
    """
    if axis is None or before is None or after is None:
        return None
    rank, place = len(before), axis.place % len(before)
    order = list(range(rank))
    if call.op in ("transpose", "swapaxes"):
        a, b = (int(d) % rank for d in call.args[1:3])
        order[a], order[b] = order[b], order[a]
    elif call.op == "permute":
        given = call.args[1] if isinstance(call.args[1], (tuple, list)) else call.args[1:]
        order = [int(d) % rank for d in given]
    elif call.op == "t":
        order = order[::-1]
    else:
        ahead = prod(before[:place])
        places = [p for p, size in enumerate(after) if size == before[place] and prod(after[:p]) == ahead]
        # where size-1 axes leave a choice the last is not more right than the first
        return Axis(places[0], len(after)) if len(places) == 1 else None
    return Axis(order.index(place), rank)
