"""What stands where a norm was."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import ShapeError


class FoldedAway(nn.Identity):
    """What stands where a norm was: nothing is done, and the name stays.

    Not of ``torch.nn``, so ``torch.fx`` takes it for no step, and a layer and an activation around it are
    neighbours to whoever fuses them. It is pickled as ``torch.nn.Identity``: a folded network that is saved
    whole loads where this package is not installed.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedAway:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return nn.Identity, (), self.__dict__


class FoldedNorm(nn.Identity):
    """What stands for a folded norm of a Linear layer when the number of axes of its data was not known.

    The fold is right for (N, C) data, where the features are the norm's channels. On (N, L, C) data the norm
    would have taken L for the channels, so such data is refused here.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Hand on the input.

        Parameters
        ----------
        input : Tensor, shape (N, C)
            Output of the folded layer.

        Returns
        -------
        Tensor
            ``input``.

        Raises
        ------
        ShapeError
            ``input`` has another number of axes.
        """
        if isinstance(input, Tensor) and input.dim() != 2:  # no tensor: a tracer looks on
            raise ShapeError(
                f"fold: a norm was folded into a Linear layer for (N, C) data, and this is {tuple(input.shape)}.",
                why="on more axes the norm's channels are not the layer's features.",
                mend="fold(model, example=...) with data of this kind says what can be folded.",
            )
        return input
