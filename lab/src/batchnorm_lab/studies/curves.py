"""What is taken from accuracies over a training, and the runs at the learning rate that is best for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchnorm_lab.studies.records import best, select

__all__ = ["Curve", "at_best_rate", "final", "over_training"]

Curve = Callable[..., float]
"""Of a result and the name of a part, as `final` and `over_training` are."""


def final(result: dict[str, Any], part: str = "accuracy") -> float:
    """Return the accuracy at the end, in %: the mean of the last five looks, which is steadier than one.

    Parameters
    ----------
    result : dict
        Of a run.
    part : {"accuracy", "validation"}, default "accuracy"
        Of test or of validation images.

    Returns
    -------
    float
        0 to 100.

    Examples
    --------
    >>> from batchnorm_lab.studies.curves import final
    >>> final({"accuracy": [0.1, 0.9, 0.9, 0.9, 0.9, 0.9]})
    90.0
    """
    last = result[part][-5:]
    return 100 * sum(last) / len(last)


def over_training(result: dict[str, Any], part: str = "accuracy") -> float:
    """Return the mean accuracy over the whole training, in %: high for what learns fast and well.

    Parameters
    ----------
    result : dict
        Of a run.
    part : {"accuracy", "validation"}, default "accuracy"
        Of test or of validation images.

    Returns
    -------
    float
        0 to 100.

    Examples
    --------
    >>> from batchnorm_lab.studies.curves import over_training
    >>> over_training({"accuracy": [0.1, 0.5, 0.7]})
    60.0
    """
    later = result[part][1:]
    return 100 * sum(later) / len(later)


def at_best_rate(records: list[dict[str, Any]], measured: Curve, **where: Any) -> list[dict[str, Any]]:
    """Return an arm's runs at the rate that is best for what is measured, on validation images.

    Parameters
    ----------
    records : list of dict
        Of one study.
    measured : callable
        `final` or `over_training`.
    **where
        The arm, as for `select`.

    Returns
    -------
    list of dict
        One a seed, in their order.
    """
    rate = best(records, "rate", lambda result: measured(result, "validation"), **where)
    return select(records, **where, rate=rate)
