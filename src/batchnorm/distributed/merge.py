"""What every rank makes of everybody's numbers: the same operations on the same bytes, so the same bits.

Rows are merged in pairs of neighbours, and the results again in pairs, until one is left. Only elementwise
operations take part, in an order that the number of ranks alone decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.population import merge


def merge_statistics(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the statistics of several sets of values into those of all of them, exactly.

    Parameters
    ----------
    count : Tensor, shape (P,) or (P, C)
        Values a channel in each set; 0 is allowed.
    mean, m2 : Tensor, shape (P, C)
        Mean, and sum of squared deviations from it, of each set; float64.

    Returns
    -------
    count : Tensor, shape () or (C,)
        Values in all.
    mean, m2 : Tensor, shape (C,)
        Of all values.
    """
    sets = (count.unsqueeze(1) if count.dim() == 1 else count, mean, m2)
    while sets[0].shape[0] > 1:
        paired = sets[0].shape[0] // 2 * 2
        left, right, rest = (
            [s[i:end:2] for s in sets] for i, end in ((0, paired), (1, paired), (paired, None))
        )
        both = merge(*left, *right)
        sets = tuple(
            torch.cat(pair) if rest[0].shape[0] else pair[0] for pair in zip(both, rest, strict=True)
        )  # type: ignore[assignment]
    total = sets[0][0]
    return total[0] if count.dim() == 1 else total, sets[1][0], sets[2][0]


def add_up(rows: Tensor) -> Tensor:
    """Add rows up in an order that the number of rows alone decides.

    Parameters
    ----------
    rows : Tensor, shape (P, K)
        What each rank gave.

    Returns
    -------
    Tensor, shape (K,)
        Their sum.
    """
    while rows.shape[0] > 1:
        paired = rows.shape[0] // 2 * 2
        both = rows[0:paired:2] + rows[1:paired:2]
        rows = torch.cat((both, rows[paired:])) if paired < rows.shape[0] else both
    return rows[0]
