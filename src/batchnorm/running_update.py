"""How what a batch told about itself reaches the running statistics: once, and all of it or nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily

from batchnorm.compiling import compiling
from batchnorm.operators import check_finite, recomputing
from batchnorm.population import Tracking, commit, count_empty
from batchnorm.transforms import examples, outside, transforming

Told = tuple[int | Tensor, Tensor, Tensor]
"""Count, mean and variance (divisor m) of one batch."""

Sink = Callable[[int | Tensor, Tensor, Tensor], None]
"""Takes what is told: what moves statistics if no engine does."""


def tell(
    tracking: Tracking | Sink | None,
    told: list[Told],
    refuse: bool = False,
    pooled: bool = False,
    unbiased: bool = False,
) -> None:
    """Move running statistics by several batches, in order; or, on an error, by none of them.

    Parameters
    ----------
    tracking : Tracking, callable or None
        What is moved, or what takes each batch.
    told : list of (count, mean, var)
        The batches.
    refuse : bool, default False
        Raise `NonFiniteError` where a batch is not finite.
    pooled : bool, default False
        Whether a batch may turn out to have no value on any rank; it is then counted as an empty one.
    unbiased : bool, default False
        Whether the variances have divisor m - 1; only for a Tracking.
    """
    if compiling():
        _hand_over(tracking, check_finite(told) if refuse else told, pooled, unbiased)
        return
    mode = _get_current_dispatch_mode()
    if mode is not None and type(mode).__module__ == "torch.utils.checkpoint":
        # a selective checkpoint counts operations, and the re-run will have none of these
        with _pop_mode_temporarily():
            tell(tracking, told, refuse, pooled, unbiased)
        return
    if not told or not transforming(told[0][1]):
        _hand_over(tracking, check_finite(told) if refuse else told, pooled, unbiased)
        return
    with outside():
        every = list(examples(tracking, told))
        if refuse:
            for _, parts in every:
                check_finite(parts)
        for buffers, parts in every:
            _hand_over(buffers, parts, pooled, unbiased)


def _hand_over(tracking: Tracking | Sink | None, told: list[Told], pooled: bool, unbiased: bool) -> None:
    for part in told:
        if isinstance(tracking, Tracking):
            commit(tracking, *part, unbiased=unbiased)
            if pooled:
                count_empty(tracking, torch.as_tensor(part[0] == 0))
        elif tracking is not None:
            tracking(*part)


def counting(tracking: Tracking | Sink | None) -> Tracking | Sink | None:
    """Give what this forward is to move: nothing, where it re-runs a forward whose batch was counted.

    Parameters
    ----------
    tracking : Tracking, callable or None
        What a first forward would move.

    Returns
    -------
    Tracking, callable or None
        The same, or None. In a compiled graph always the same: there `batchnorm.operators` asks the
        question when the graph runs.
    """
    return None if tracking is not None and not compiling() and recomputing() else tracking
