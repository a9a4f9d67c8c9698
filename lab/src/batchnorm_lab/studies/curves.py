"""What is taken from the accuracies of a run over its training: the end, and the whole way."""

from __future__ import annotations

from typing import Any

__all__ = ["final", "over_training"]


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
