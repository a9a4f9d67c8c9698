"""What the numbers M1 to M14 stand for, in one sentence each; docs/mission.md has them in full."""

from __future__ import annotations

__all__ = ["STATEMENTS", "explain"]

STATEMENTS: dict[str, str] = {
    "M1": "Not only the input of the network but what lies in its middle is normalized.",
    "M2": "The target is z, before the nonlinearity; not a, after it.",
    "M3": "Over a mini-batch the mean is subtracted and the result divided by the standard deviation.",
    "M4": "gamma and beta then scale and shift; they are learned parameters, not hyperparameters.",
    "M5": "Where the network needs no normalization it can undo it.",
    "M6": "Every hidden layer is normalized; the output layer is not.",
    "M7": "The bias before it has no effect and is left out.",
    "M8": "Each mini-batch is normalized with its own mean and variance.",
    "M9": "What was trained with batch normalization must also be used with it.",
    "M10": "At test time there are too few samples for a mean and a variance of their own.",
    "M11": "So the statistics of the mini-batches of training are collected and used.",
    "M12": "Learning gets faster.",
    "M13": "Many more combinations of hyperparameters work.",
    "M14": "Deep networks train well.",
}


def explain(numbers: set[str]) -> list[tuple[str, str]]:
    """Give the sentences of some numbers, in their order.

    Parameters
    ----------
    numbers : set of str
        Such as ``{"M12", "M3"}``.

    Returns
    -------
    list of (str, str)
        Number and sentence; numbers that are none are passed over.

    Examples
    --------
    >>> from batchnorm_lab.mission import explain
    >>> explain({"M14", "M12"})
    [('M12', 'Learning gets faster.'), ('M14', 'Deep networks train well.')]
    """
    return [(number, sentence) for number, sentence in STATEMENTS.items() if number in numbers]
