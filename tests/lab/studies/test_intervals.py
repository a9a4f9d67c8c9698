"""Intervals are Student's, hold the truth as often as they say, and lead to the right verdict."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm_lab.studies.intervals import (
    Interval,
    mean_interval,
    median_interval,
    paired_difference,
    ratio_interval,
    verdict,
)


@pytest.mark.parametrize(
    ("freedom", "table"),  # two-sided 95 %, from printed tables
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (7, 2.365),
        (9, 2.262),
        (19, 2.093),
        (30, 2.042),
    ],
)
def test_the_half_width_is_the_quantile_of_printed_tables_times_the_standard_error(freedom, table):
    numbers = [float(value) for value in range(freedom + 1)]
    interval = mean_interval(numbers)
    error = statistics.stdev(numbers) / (freedom + 1) ** 0.5
    assert (interval.high - interval.low) / 2 / error == pytest.approx(table, abs=5e-4)


def test_the_interval_holds_the_true_mean_in_95_of_100_experiments():
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    held = sum(interval.low <= 7 <= interval.high for interval in map(mean_interval, draws.tolist()))
    assert 0.935 <= held / 2000 <= 0.965


def test_a_single_seed_has_no_interval_and_decides_nothing():
    interval = mean_interval([5.0])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert verdict(interval, above=0.0) == "undecided"
    assert "no interval" in interval.text()


def test_pairs_take_out_what_seeds_have_in_common():
    base = [10.0, 50.0, 90.0]
    found = paired_difference([b + 1 for b in base], base, resolution=0.1)
    assert found.estimate == 1.0
    assert found.high - found.low < 0.5, "of the 40 between seeds nothing is left"


def test_equal_values_have_the_width_of_the_step_in_which_they_were_measured_and_else_no_interval():
    assert mean_interval([4.0] * 5).low == -math.inf
    found = mean_interval([4.0] * 5, resolution=0.5)
    # the standard deviation of what is even within a step is step / sqrt(12); t for 4 degrees of freedom
    assert found.high - 4.0 == pytest.approx(2.776 * 0.5 / 12**0.5 / 5**0.5, rel=1e-3)


def test_an_interval_goes_no_further_than_the_values_can():
    found = mean_interval([99.0, 100.0, 100.0, 98.0, 100.0], within=(0, 100))
    assert found.high == 100
    assert found.low < 99.4 < found.high
    assert found.together(20).high == 100


@pytest.mark.parametrize("count", [2, 6])
def test_intervals_hold_together_as_often_as_they_say(count):
    draws = torch.randn(500, count, 5, generator=torch.Generator().manual_seed(1)).tolist()
    together = ([mean_interval(one).together(count) for one in study] for study in draws)
    held = sum(all(one.low <= 0 <= one.high for one in study) for study in together) / 500
    # independent findings: (1 - 0.05 / count) ** count, which Bonferroni bounds from below by 0.95
    expected = (1 - 0.05 / count) ** count
    assert held == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 500) ** 0.5)


def test_ratios_and_ranks_widen_as_well():
    ratio = ratio_interval([2.0, 3.0, 2.5, 2.2, 2.8], [1.0] * 5)
    assert ratio.together(10).low < ratio.low < ratio.estimate < ratio.high < ratio.together(10).high
    nine = median_interval(range(9), range(9))
    assert nine.together(12) == nine, "2 ** -8 is less than 0.05 / 12"
    assert nine.together(13).low == -math.inf


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=8), st.floats(0.1, 10))
def test_a_constant_ratio_is_found_exactly(seeds, factor):
    interval = ratio_interval([factor * s for s in seeds], seeds, resolution=1e-6)
    assert interval.estimate == pytest.approx(factor)
    assert interval.low == pytest.approx(factor, rel=1e-4)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_the_estimate_lies_in_its_interval(seeds):
    interval = mean_interval(seeds)
    assert interval.low <= interval.estimate <= interval.high


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.1, 2.0, "borne out"),
        (-2.0, -0.1, "not borne out"),
        (-0.1, 0.1, "undecided"),
        (-1.0, 0.0, "not borne out"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, says):
    interval = Interval((low + high) / 2, low, high, 5)
    assert verdict(interval, above=0.0) == says
    mirrored = Interval(-(low + high) / 2, -high, -low, 5)
    assert verdict(mirrored, below=0.0) == says


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (-0.2, 0.3, "equivalent"),
        (-0.6, 0.1, "undecided"),
        (-0.3, -0.1, "equivalent"),
        (-0.9, -0.6, "not borne out"),
        (0.1, 0.3, "borne out"),
    ],
)
def test_what_lies_within_the_margin_is_equivalent_unless_it_is_borne_out(low, high, says):
    assert verdict(Interval((low + high) / 2, low, high, 5), above=0.0, margin=0.5) == says
    assert verdict(Interval(-(low + high) / 2, -high, -low, 5), below=0.0, margin=0.5) == says


def test_fewer_than_five_seeds_decide_nothing():
    assert verdict(Interval(1.0, 0.9, 1.1, 4), above=0.0) == "undecided"


@pytest.mark.parametrize("claim", [{}, {"above": 0.0, "below": 1.0}])
def test_a_claim_has_one_direction(claim):
    with pytest.raises(ValueError, match="above or below"):
        verdict(Interval(0.0, 0.0, 0.0, 5), **claim)


def test_the_interval_by_ranks_holds_the_median_of_a_skewed_distribution():
    draws = torch.rand(4000, 6, generator=torch.Generator().manual_seed(0)).log().neg().tolist()
    held = sum(found.low <= math.log(2) <= found.high for found in (median_interval(d, d) for d in draws))
    # 1 - 2 ** -5 = 0.969; four standard errors of 4000 draws
    assert held / 4000 == pytest.approx(1 - 2**-5, abs=4 * (0.969 * 0.031 / 4000) ** 0.5)


def test_five_seeds_have_no_interval_by_ranks():
    found = median_interval([1.0] * 5, [2.0] * 5)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.estimate == 1.5
