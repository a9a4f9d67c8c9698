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
    rank: int

    MOVES: ClassVar[frozenset[str]] = frozenset(
        "transpose permute view _unsafe_view clone squeeze unsqueeze t Flatten".split()
    )

    @classmethod
    def behind(cls, call: Call) -> Axis:
        """Where the channels of a layer's output are.

        Parameters
        ----------
        call : Call
            Of a Linear or a convolution.

        Returns
        -------
        Axis
            The last axis of a Linear's output, the one before those of space of a convolution's.
        """
        # an unbatched input has its channels in front
        axes = 0 if isinstance(call.module, nn.Linear) else len(call.module.kernel_size)  # type: ignore[union-attr,arg-type]
        return cls(-1 - axes, len(call.output.shape))

    def is_same(self, channel_dim: int) -> bool:
        """Whether this is the channel axis of a norm.

        Parameters
        ----------
        channel_dim : int
            That of the norm.

        Returns
        -------
        bool
            True where both count to the same axis.
        """
        return self.place % self.rank == channel_dim % self.rank

    def moved(self, call: Call, before: tuple[int, ...], after: tuple[int, ...]) -> Axis | None:
        """Where the channel axis is after a transpose or reshape.

        Parameters
        ----------
        call : Call
            One of ``MOVES``.
        before, after : tuple of int
            Shapes of its input and output.

        Returns
        -------
        Axis or None
            None where it is lost.
        """
        rank, place = len(before), self.place % len(before)
        order = list(range(rank))
        if call.op == "transpose":
            a, b = (int(d) % rank for d in call.args[1:3])
            order[a], order[b] = order[b], order[a]
        elif call.op == "permute":
            order = [int(d) % rank for d in call.args[1]]
        elif call.op == "t":
            order = order[::-1]
        else:
            ahead = prod(before[:place])
            places = [p for p, size in enumerate(after) if size == before[place] and prod(after[:p]) == ahead]
            # where size-1 axes leave a choice the last is not more right than the first
            return Axis(places[0], len(after)) if len(places) == 1 else None
        return Axis(order.index(place), rank)
