"""Confidence intervals over seeds, and what follows from them about a claim.

Every interval that is shown is for 95 %. Means of runs use Student's t over seeds; a comparison of two
settings is first taken within each seed (same initial weights, same order of the data) and the t interval is
over these differences, or over the logarithms of the ratios. Verdicts are taken from wider intervals, which
hold together (:meth:`Interval.together`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from scipy import stats

__all__ = ["Interval", "mean_interval", "median_interval", "paired_difference", "ratio_interval", "verdict"]

CONFIDENCE = 0.95
SEEDS_NEEDED = 5
"""With fewer there is no verdict."""
BORNE_OUT, NOT_BORNE_OUT, EQUIVALENT, UNDECIDED = "borne out", "not borne out", "equivalent", "undecided"
VERDICTS = (BORNE_OUT, NOT_BORNE_OUT, EQUIVALENT, UNDECIDED)
UNBOUNDED = (-math.inf, math.inf)

Bounds = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval, over ``seeds`` independent seeds.

    With a single seed, or where all seeds gave the same value and nothing says how finely it was measured, there
    is no interval: ``low`` is minus infinity and ``high`` infinity.

    ``bounds`` gives the limits for any confidence, where these can be had.
    """

    estimate: float
    low: float
    high: float
    seeds: int
    bounds: Bounds | None = field(default=None, compare=False, repr=False)

    def together(self, count: int) -> Interval:
        """Return the interval that holds with 95 % together with those of ``count - 1`` other findings.

        Each of ``count`` intervals leaves out ``count`` times less (Bonferroni), so whatever their dependence,
        all of them hold the truth in at least 95 of 100 studies.

        Parameters
        ----------
        count : int
            Findings that are judged together, this one included.

        Returns
        -------
        Interval
            As wide or wider.

        Examples
        --------
        >>> from batchnorm_lab.studies.intervals import mean_interval
        >>> one = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
        >>> round(one.low, 2), round(one.together(10).low, 2)
        (1.04, -0.96)
        """
        if self.bounds is None:
            return self
        low, high = self.bounds(1 - (1 - CONFIDENCE) / count)
        return replace(self, low=low, high=high)

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


def mean_interval(
    values: Iterable[float], *, resolution: float = 0.0, within: tuple[float, float] = UNBOUNDED
) -> Interval:
    """Return the mean of one value a seed with its t interval.

    A value that was measured in steps (an accuracy over 600 images has steps of 1/6 point) is uncertain by a part
    of a step. Its variance, ``resolution ** 2 / 12``, is added to that of the seeds, so that seeds which fall on
    the same step have an interval of some width.

    Parameters
    ----------
    values : iterable of float
        One a seed, at least one.
    resolution : float, default 0.0
        The step in which the values were measured, in their unit.
    within : (float, float), default (-inf, inf)
        What the values can be; the interval goes no further.

    Returns
    -------
    Interval
        Infinite if there is a single seed, a value is not finite, or the values are equal and have no resolution.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import mean_interval
    >>> mean_interval([4.0, 4.0]).low
    -inf
    >>> mean_interval([99.0, 100.0, 100.0], within=(0, 100)).high
    100
    """
    numbers = [float(value) for value in values]
    count, mean = len(numbers), statistics.fmean(numbers)
    if count < 2 or not math.isfinite(mean):
        return Interval(mean, *UNBOUNDED, count)
    error = math.sqrt((statistics.variance(numbers) + resolution**2 / 12) / count)
    if error == 0:
        return Interval(mean, *UNBOUNDED, count)

    def bounds(confidence: float) -> tuple[float, float]:
        # a two-sided quantile: half of what is left out lies on either side
        half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
        return max(within[0], mean - half), min(within[1], mean + half)

    return Interval(mean, *bounds(CONFIDENCE), count, bounds)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resolution: float = 0.0
) -> Interval:
    """Return the mean of ``first - second`` within each seed, with its t interval.

    Parameters
    ----------
    first, second : sequence of float
        One value a seed, in the same order of seeds.
    resolution : float, default 0.0
        The step in which each of the values was measured.

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
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return mean_interval(differences, resolution=2**0.5 * resolution)


def ratio_interval(first: Sequence[float], second: Sequence[float], *, resolution: float = 0.0) -> Interval:
    """Return the geometric mean of ``first / second`` within each seed, with its interval.

    Parameters
    ----------
    first, second : sequence of float
        Positive values, one a seed, in the same order of seeds.
    resolution : float, default 0.0
        The step in which the logarithm of each value is known.

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
    ratios = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    logs = mean_interval(ratios, resolution=2**0.5 * resolution)

    def back(low: float, high: float) -> tuple[float, float]:
        return math.exp(low) if math.isfinite(low) else -math.inf, math.exp(high) if high < 700 else math.inf

    widened = logs.bounds
    bounds = None if widened is None else lambda confidence: back(*widened(confidence))
    return Interval(math.exp(logs.estimate), *back(logs.low, logs.high), logs.seeds, bounds)


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

    def bounds(confidence: float) -> tuple[float, float]:
        # a hair of room: 1 - 0.95 is not 0.05 in binary
        enough = 2.0 ** (1 - seeds) <= (1 - confidence) * (1 + 1e-9)
        return (min(lows), max(highs)) if enough else UNBOUNDED

    return Interval(statistics.median(middles), *bounds(CONFIDENCE), seeds, bounds)


def verdict(
    interval: Interval, *, above: float | None = None, below: float | None = None, margin: float | None = None
) -> str:
    """Say what an interval means for the claim that the true value is above (or below) a threshold.

    Parameters
    ----------
    interval : Interval
        Of what was measured.
    above, below : float or None
        The claim; exactly one of the two is given.
    margin : float or None, default None
        Values this close to the threshold are as good as equal to it; None is not to say so of any.

    Returns
    -------
    {"borne out", "not borne out", "equivalent", "undecided"}
        Borne out if the whole interval agrees, equivalent if it lies within the margin on both sides of the
        threshold, not borne out if the whole interval disagrees. Undecided otherwise, and with fewer than 5
        seeds.

    Raises
    ------
    ValueError
        Both thresholds are given, or none.

    Examples
    --------
    >>> from batchnorm_lab.studies.intervals import mean_interval, verdict
    >>> verdict(mean_interval([1.0, 1.1, 0.9, 1.0, 1.0]), above=0)
    'borne out'
    >>> verdict(mean_interval([0.1, -0.1, 0.1, -0.1, 0.0]), above=0, margin=0.5)
    'equivalent'
    >>> verdict(mean_interval([1.0, -1.1, 0.9, 1.0, 1.0]), above=0)
    'undecided'
    """
    if above is not None and below is not None:
        raise ValueError("a claim says above or below, not both")
    if above is not None:
        threshold, agrees, disagrees = above, interval.low > above, interval.high <= above
    elif below is not None:
        threshold, agrees, disagrees = below, interval.high < below, interval.low >= below
    else:
        raise ValueError("a claim says above or below, not neither")
    if interval.seeds < SEEDS_NEEDED:
        return UNDECIDED
    if agrees:
        return BORNE_OUT
    if margin is not None and threshold - margin < interval.low and interval.high < threshold + margin:
        return EQUIVALENT
    return NOT_BORNE_OUT if disagrees else UNDECIDED
