"""Do two networks give the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest difference between two lists of tensors, relative to the largest value of each tensor.

    Parameters
    ----------
    before, after : sequence of Tensor
        Answers in the same order.

    Returns
    -------
    float
        0 for equal ones; inf where numbers, shapes or the places of NaN and inf differ.
    """
    if len(before) != len(after):
        return float("inf")
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            return float("inf")
        if not old.numel():
            continue
        if not old.is_floating_point():
            # indices and masks may flip on a tie: the floating-point outputs beside them decide
            continue
        a, b = old.detach().double(), new.detach().double()
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        if bool(finite.any()):
            top = float(a[finite].abs().max())
            worst = max(worst, float((a[finite] - b[finite]).abs().max()) / max(top, 1e-6))
    return worst


def precision_of(tensors: Sequence[Tensor]) -> float:
    """Machine epsilon of the coarsest floating dtype among tensors.

    Parameters
    ----------
    tensors : sequence of Tensor
        Answers of a network.

    Returns
    -------
    float
        That of float32 when none is floating.
    """
    found = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
    return max(found, default=torch.finfo(torch.float32).eps)
