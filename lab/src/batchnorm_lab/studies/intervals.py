"""Confidence intervals over seeds, and what follows from them about a claim.

Every interval is for 95 %. Means of runs use Student's t over seeds; a comparison of two settings is
first taken within each seed (same initial weights, same order of the data) and the t interval is over
these differences, or over the logarithms of the ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

__all__ = ["Interval", "mean_interval", "median_interval", "paired_difference", "ratio_interval", "verdict"]

CONFIDENCE = 0.95
BORNE_OUT, NOT_BORNE_OUT, UNDECIDED = "borne out", "not borne out", "undecided"


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval, over ``seeds`` independent seeds.

    With a single seed there is no interval: ``low`` is minus infinity and ``high`` infinity.
    """

    estimate: float
    low: float
    high: float
    seeds: int

    def text(self, digits: int = 1, unit: str = "", signed: bool = False) -> str:
        """Return ``estimate [low, high] unit``; a single seed is said to have no interval.

        Parameters
        ----------
        digits : int, default 1
            Digits after the point.
        unit : str, default ""
            Put after the numbers, with the space it needs.
        signed : bool, default False
            Write a plus before positive numbers.

        Returns
        -------
        str
            For people.

        Examples
        --------
        >>> from batchnorm_lab.studies.intervals import mean_interval
        >>> mean_interval([1.0, 2.0, 3.0]).text(1, " points")
        '2.0 [-0.5, 4.5] points'
        """
        sign = "+" if signed else ""
        middle = f"{self.estimate:{sign}.{digits}f}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{middle}{unit} (no interval: {self.seeds} seed{'s' if self.seeds != 1 else ''})"
        return f"{middle} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]{unit}"


def mean_interval(values: Iterable[float]) -> Interval:
    """Return the mean of one value a seed with its t interval.

    Parameters
    ----------
    values : iterable of float
        One a seed, at least one.

    Returns
    -------
    Interval
        Infinite if there is a single seed or a value is not finite.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import mean_interval
    >>> mean_interval([4.0, 4.0]).low
    4.0
    """
    numbers = [float(value) for value in values]
    count, mean = len(numbers), statistics.fmean(numbers)
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, count)
    # a two-sided quantile: half of what is left out lies on either side
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(numbers)
    return Interval(mean, mean - float(half), mean + float(half), count)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the mean of ``first - second`` within each seed, with its t interval.

    Parameters
    ----------
    first, second : sequence of float
        One value a seed, in the same order of seeds.

    Returns
    -------
    Interval
        In the unit of the values.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import paired_difference
    >>> paired_difference([3.0, 4.0], [1.0, 2.0]).estimate
    2.0
    """
    return mean_interval(a - b for a, b in zip(first, second, strict=True))


def ratio_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the geometric mean of ``first / second`` within each seed, with its interval.

    Parameters
    ----------
    first, second : sequence of float
        Positive values, one a seed, in the same order of seeds.

    Returns
    -------
    Interval
        A t interval of the logarithm, brought back: not symmetric.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import ratio_interval
    >>> round(ratio_interval([2.0, 8.0], [1.0, 1.0]).estimate, 6)
    4.0
    """
    logs = mean_interval(math.log(a / b) for a, b in zip(first, second, strict=True))
    high = math.exp(logs.high) if logs.high < 700 else math.inf
    low = math.exp(logs.low) if math.isfinite(logs.low) else -math.inf
    return Interval(math.exp(logs.estimate), low, high, logs.seeds)


def median_interval(lows: Sequence[float], highs: Sequence[float]) -> Interval:
    """Return the median of values that are known within bounds, with its interval by ranks.

    The interval goes from the smallest value to the largest. It holds the true median unless all seeds fall
    on one side of it, which happens with probability ``2 ** (1 - seeds)`` whatever the distribution: 3 % for
    6 seeds, 0.4 % for 9. So it needs no assumption, holds for values that are only bounded (a run that did
    not arrive), and is as wide as the steps in which the values were measured.

    Parameters
    ----------
    lows, highs : sequence of float
        Bounds of each seed's value; ``-inf`` and ``inf`` are allowed.

    Returns
    -------
    Interval
        The estimate is the median of the middles, or of the finite bounds where one is infinite; infinite
        bounds with fewer than 6 seeds, which are too few for 95 %.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import median_interval
    >>> median_interval([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, float("inf")])
    Interval(estimate=3.5, low=1, high=inf, seeds=6)
    """
    middles = [
        (low + high) / 2
        if math.isfinite(low) and math.isfinite(high)
        else low
        if math.isfinite(low)
        else high
        for low, high in zip(lows, highs, strict=True)
    ]
    seeds = len(middles)
    estimate = statistics.median(middles)
    if 2.0 ** (1 - seeds) > 1 - CONFIDENCE:
        return Interval(estimate, -math.inf, math.inf, seeds)
    return Interval(estimate, min(lows), max(highs), seeds)


def verdict(interval: Interval, *, above: float | None = None, below: float | None = None) -> str:
    """Say what an interval means for the claim that the true value is above (or below) a threshold.

    Parameters
    ----------
    interval : Interval
        Of what was measured.
    above, below : float or None
        The claim; exactly one of the two is given.

    Returns
    -------
    {"borne out", "not borne out", "undecided"}
        Borne out if the whole interval agrees, not borne out if the whole interval disagrees.

    Raises
    ------
    ValueError
        Both thresholds are given, or none.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import mean_interval, verdict
    >>> verdict(mean_interval([1.0, 1.1, 0.9]), above=0)
    'borne out'
    >>> verdict(mean_interval([1.0, -1.1, 0.9]), above=0)
    'undecided'
    """
    if above is not None and below is not None:
        raise ValueError("a claim says above or below, not both")
    if above is not None:
        agrees, disagrees = interval.low > above, interval.high <= above
    elif below is not None:
        agrees, disagrees = interval.high < below, interval.low >= below
    else:
        raise ValueError("a claim says above or below, not neither")
    return BORNE_OUT if agrees else NOT_BORNE_OUT if disagrees else UNDECIDED
