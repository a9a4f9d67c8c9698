"""Answers follow the records: where the truth of made-up records is known, so is the verdict."""

import math

import pytest
import torch
from made_up_records import SEEDS, jitter, record, verdicts

from batchnorm_lab.studies import registry
from batchnorm_lab.studies.deep_networks import RESIDUAL
from batchnorm_lab.studies.faster_learning import FACTORS, arm, best_factor, speedup
from batchnorm_lab.studies.gamma_and_beta import ARMS
from batchnorm_lab.studies.hyperparameter_robustness import AXES, KINDS, USUAL, grid, widest_range, working
from batchnorm_lab.studies.where_to_normalize import distance_to_gaussian


def curve(fast_steps, seed, length=60):
    """Accuracy that rises to 0.98 in a number of looks."""
    steps = fast_steps + seed % 2
    return [min(0.98, 0.1 + 0.88 * k / steps) for k in range(length)]


def learning_records(plain, normed, seeds=9):
    return [
        record(
            {
                "accuracy": curve(normed if normalized else plain, seed),
                "validation": curve((normed if normalized else plain) + (factor == 100), seed),
                "milliseconds": 1.5 if normalized else 1.0,
            },
            model=model,
            normalized=normalized,
            factor=factor,
            seed=seed,
            every=10,
            steps=590,
        )
        for model in ("mlp", "cnn")
        for normalized in (False, True)
        for factor in FACTORS
        for seed in range(seeds)
    ]


def only(records, **setting):
    return [each for each in records if all(each["setting"][k] == v for k, v in setting.items())]


@pytest.mark.parametrize(("plain", "normed", "says"), [(40, 10, "borne out"), (10, 40, "not borne out")])
def test_faster_learning_follows_the_steps(plain, normed, says):
    assert set(verdicts("faster-learning", learning_records(plain, normed))) == {says}


def test_fewer_than_six_seeds_decide_nothing_by_ranks():
    assert set(verdicts("faster-learning", learning_records(40, 10, seeds=5))) == {"undecided"}


def test_a_run_that_never_gets_there_bounds_the_ratio_and_is_said():
    records = learning_records(40, 10)
    for each in only(records, model="mlp", normalized=False, factor=1):
        if each["setting"]["seed"] < 5:
            each["result"]["accuracy"] = [0.2] * 60
    base = arm(records, "mlp", False, 1)
    ratio = speedup(base, arm(records, "mlp", True, 1), 0.95)
    assert ratio.high == float("inf")
    assert ratio.low > 1, "590 steps were not enough: a bound, and no step count"
    said = registry.get_study("faster-learning").answer(records).sentence
    assert "more than 590 steps (5 of 9 runs did not arrive) without" in said
    never = arm(learning_records(40, 10), "mlp", True, 1)
    for each in never:
        each["result"]["accuracy"] = [0.2] * 60
    assert speedup(arm(records, "cnn", False, 1), never, 0.95).low == 0, "it may take for ever"


def test_an_interval_of_equal_step_counts_is_as_wide_as_the_looks():
    runs = learning_records(20, 20)
    for each in runs:
        each["result"]["accuracy"] = curve(20, 0)
    ratio = speedup(arm(runs, "mlp", False, 1), arm(runs, "mlp", True, 1), 0.95)
    assert ratio.low < 1 < ratio.high


def test_rates_are_chosen_on_the_validation_part_and_not_on_the_test_part():
    records = learning_records(40, 10)
    for each in only(records, model="mlp", normalized=True):
        factor = each["setting"]["factor"]
        # on the test part 30x is the fastest, on the validation part 5x
        each["result"]["accuracy"] = curve(4 if factor == 30 else 20, each["setting"]["seed"])
        each["result"]["validation"] = curve(4 if factor == 5 else 20, each["setting"]["seed"])
    assert best_factor(records, "mlp", True, 0.95) == 5


def test_the_time_of_a_step_stands_beside_the_steps():
    said = registry.get_study("faster-learning").answer(learning_records(40, 10)).sentence
    assert "a step costs 1.50 times as much with it" in said


@pytest.mark.parametrize(("plain", "says"), [(9.0, "borne out"), (1.0, "not borne out"), (3.0, "undecided")])
def test_input_distribution_follows_the_travel(plain, says):
    records = [
        record(
            {
                "travel": (3.0 if normalized else plain)
                * (1 + jitter(seed, 0.02 * (1 if normalized else -1))),
                "width": 1,
            },
            normalized=normalized,
            seed=seed,
        )
        for normalized in (False, True)
        for seed in SEEDS
    ]
    assert set(verdicts("input-distribution", records)) == {says}


def grid_records(works_plain, works_normed):
    rates = (-2.0, -1.0, 0.0, 1.0)
    values = {
        "scale": (-1.0, 0.0),
        "batch": (8, 60),
        "decay": (0.0, 0.1),
        "width": (10, 50),
        "momentum": (0.5, 0.9),
    }
    grids = [(kind, "scale") for kind in KINDS] + [("momentum", axis) for axis in AXES]

    def result(normalized, rate):
        works = rate in (works_normed if normalized else works_plain)
        # on validation images another setting is the best, and by little
        return {"accuracy": 0.95 if works else 0.5, "validation": (0.9 if works else 0.4) + 0.001 * rate}

    return [
        record(
            result(normalized, rate),
            optimizer=kind,
            axis=axis,
            **{**USUAL, axis: value},
            normalized=normalized,
            rate_exponent=rate,
            seed=seed,
        )
        for kind, axis in grids
        for normalized in (False, True)
        for rate in rates
        for value in values[axis]
        for seed in SEEDS
    ]


def test_robustness_counts_the_settings_that_work():
    records = grid_records({-1.0}, {-2.0, -1.0, 0.0})
    works = working(grid(records, "sgd", "scale"), "scale", seed=0)
    assert (len(works[True]), len(works[False])) == (6, 2)
    found = verdicts("hyperparameter-robustness", records)
    assert set(found) == {"borne out"}
    said = str(registry.get_study("hyperparameter-robustness").answer(records))
    assert "SGD: more learning rates work, at the usual initial scale: borne out, 75.0 [" in said
    assert "with batch norm against 25.0 [" in said
    assert "the largest is 1 with batch norm and 0.1 without" in said
    fewer = registry.get_study("hyperparameter-robustness").answer(grid_records({-1.0, 0.0}, {0.0})).findings
    assert {f.verdict for f in fewer if "more" in f.statement} == {"not borne out"}


def test_a_setting_works_by_the_test_accuracy_of_what_is_best_on_validation_images():
    records = grid_records({-1.0}, {0.0})
    for each in only(records, rate_exponent=1.0, normalized=False):
        # better than all on test images, and no search would know
        each["result"]["accuracy"] = 0.99
    works = working(grid(records, "sgd", "scale"), "scale", seed=0)
    assert (0.0, 0.0) in works[True]


def test_the_widest_range_has_no_gap():
    rates = [-2.0, -1.0, 0.0, 1.0, 2.0]
    works = {(0.0, -2.0), (0.0, -1.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, 2.0)}
    assert widest_range(works, rates, 0.0) == 1.0
    assert widest_range(works, rates, 1.0) == 2.0
    assert widest_range(set(), rates, 0.0) == 0.0


@pytest.mark.parametrize(("normed", "says"), [(0.9, "borne out"), (0.2, "not borne out")])
def test_deep_networks_follow_the_accuracy_at_the_rate_chosen_on_validation_images(normed, says):
    def result(normalized, rate, seed):
        level = (normed if normalized else 0.5) + jitter(seed, arm=normalized)
        return {
            # on test images another rate would be the better one
            "validation": level - (0.1 if rate != 0.1 else 0),
            "accuracy": level if rate == 0.1 else 1.0,
            "gradient": [3.0 if normalized else 1e-9, 1.0, 1.0],
        }

    arms = [(activation, arm, None) for activation in ("sigmoid", "tanh", "relu") for arm in (False, True)]
    arms += [("relu", *arm) for arm in RESIDUAL]
    records = [
        record(
            result(normalized, rate, seed),
            activation=activation,
            normalized=normalized,
            shortcut=shortcut,
            depth=depth,
            rate=rate,
            seed=seed,
        )
        for activation, normalized, shortcut in arms
        for depth in (2, 30, 60)
        for rate in (0.01, 0.1, 1.0)
        for seed in SEEDS
    ]
    assert set(verdicts("deep-networks", records)) == {says}
    said = str(registry.get_study("deep-networks").answer(records))
    assert "3 times that of the last hidden layer with batch norm, and 1e-09 times without" in said
    assert "theory says 1.21" in said


def test_where_to_normalize_judges_each_claim_by_its_own_arms():
    level = {"nothing": 0.1, "inputs only": 0.3, "a (after)": 0.6, "z (before)": 0.5, "z and outputs": 0.4}

    def result(act, arm, batch, seed):
        # with small mini-batches the outputs are better normalized
        reached = level[arm] + jitter(seed, arm=arm) + (0.3 if batch == 4 and arm == "z and outputs" else 0)
        curve = [0.1] + [reached] * 9
        far = {"z": 0.1 + jitter(seed, arm=act), "a": 0.5}
        return {"accuracy": curve, "validation": curve, "from gaussian": far}

    records = [
        record(
            result(act, arm, batch, seed), activation=act, arm=arm, batch=batch, rate=0.1, seed=seed, every=1
        )
        for act in ("sigmoid", "relu")
        for batch in (4, 60)
        for arm in level
        for seed in SEEDS
    ]
    assert set(verdicts("where-to-normalize", records, "M1")) == {"borne out"}
    found = registry.get_study("where-to-normalize").answer(records).findings
    assert {f.verdict for f in found if f.claim == "M2" and "target" in f.statement} == {"not borne out"}
    assert {f.verdict for f in found if f.claim == "M2" and "reason" in f.statement} == {"borne out"}
    assert {f.verdict for f in found if f.claim == "M6" and "mini-batches" not in f.statement} == {
        "borne out"
    }
    assert {f.verdict for f in found if f.claim == "M6" and "mini-batches of 4" in f.statement} == {
        "not borne out"
    }


def test_what_is_gaussian_is_at_no_distance_from_it_and_what_its_nonlinearity_makes_of_it_is():
    z = torch.randn(2, 4000, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    near, cut = (distance_to_gaussian(units) for units in (z, z.relu()))
    assert max(near) < 0.05
    assert min(cut) > 0.1
    dead, diverged = distance_to_gaussian(torch.zeros(1, 9, 2)), distance_to_gaussian(z / 0)
    assert all(math.isnan(far) for far in dead + diverged), "no unit that varies has a distance"


@pytest.mark.parametrize(("noisy", "says"), [(0.8, "borne out"), (0.1, "not borne out")])
def test_noise_after_batch_norm_is_compared_with_no_batch_norm(noisy, says):
    level = {"plain": 0.4, "batch norm": 0.9, "noisy": noisy}
    moved = {"plain": 0.2, "batch norm": 0.1, "noisy": 2.0}

    def result(arm, seed):
        curve = [0.1] + [level[arm] + jitter(seed, arm=arm)] * 9
        far = moved[arm] * (1 + jitter(seed, 0.01, arm))
        return {"accuracy": curve, "validation": curve, "moved": far, "relative": far}

    records = [record(result(arm, seed), arm=arm, rate=0.1, seed=seed) for arm in level for seed in SEEDS]
    assert verdicts("noisy-batch-norm", records, "M3") == ["borne out"]
    assert verdicts("noisy-batch-norm", records, "M12") == [says, "borne out"]


@pytest.mark.parametrize(("learned", "says"), [(0.9, "borne out"), (0.5, "not borne out")])
def test_gamma_and_beta_follow_the_accuracies_at_the_rate_chosen_on_validation_images(learned, says):
    def result(arm, rate, seed):
        level = {"both learned": learned, "both fixed": 0.7}.get(arm, 0.6) + jitter(seed, arm=arm)
        # on the test images the other rate would be the better one
        test, chosen = (level, 0.8) if rate == 0.3 else (1.0, 0.2)
        return {"accuracy": [test] * 6, "validation": [chosen] * 6, "moved": {"gamma": 0.25, "beta": 0.5}}

    records = [
        record(result(arm, rate, seed), activation=activation, arm=arm, rate=rate, seed=seed)
        for activation in ("sigmoid", "relu")
        for arm in ARMS
        for rate in (0.1, 0.3, 1.0)
        for seed in SEEDS
    ]
    assert set(verdicts("gamma-and-beta", records)) == {says}
    said = registry.get_study("gamma-and-beta").answer(records).sentence
    assert "learned gammas end 0.25 away from 1 and betas 0.50 away from 0" in said
    assert "0 of 8 lie at an edge" in said


def bias_records(difference):
    return [
        record(
            {
                "bias": {"loss": difference, "output": difference},
                "control": {"loss": 1e-6, "output": 1e-6},
                "bias_gradient": difference,
                "parameters": {"with b": 110, "without b": 100},
                "milliseconds": {"with b": 1.1 + jitter(seed), "without b": 1.0},
            },
            dtype=dtype,
            seed=seed,
            steps=300,
        )
        for dtype in ("float64", "float32")
        for seed in SEEDS
    ]


def test_a_bias_that_matters_is_not_redundant():
    assert set(verdicts("bias-is-redundant", bias_records(0.0))) == {"borne out"}
    *identities, time_saved = verdicts("bias-is-redundant", bias_records(0.5))
    assert set(identities) == {"not borne out"}
    assert time_saved == "borne out"
    assert "10 of 110 parameters" in str(registry.get_study("bias-is-redundant").answer(bias_records(0.0)))


@pytest.mark.parametrize(("error", "says"), [(1e-16, "borne out"), (0.2, "not borne out")])
def test_identity_recovery_follows_the_error(error, says):
    records = [
        record(
            {
                "exact": {"float64": error * (1 + jitter(seed)), "float32": error * (1 + jitter(seed))},
                "descent": [1.0, error * (1 + jitter(seed))],
                "mini_batch": {"64": 0.15 + jitter(seed)},
            },
            seed=seed,
            descent=1,
        )
        for seed in SEEDS
    ]
    assert verdicts("identity-recovery", records) == [says, says, says, ""]
