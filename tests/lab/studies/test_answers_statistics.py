"""Answers about statistics: at test time, of small mini-batches, of shifted inputs, and the traps."""

import pytest
from made_up_records import SEEDS, jitter, record, verdicts

from batchnorm_lab.studies import registry
from batchnorm_lab.studies.shifted_inputs import CHOSEN_AT, NO_ADAPTATION, SEVERITIES, SHIFTS


def statistics_records(population, batch_1):
    result = {"population": population, "batch 1": batch_1, "batch 4": batch_1, "without": batch_1}
    result |= {"samples 2": 0.1, "samples 64": population, "samples 1000": population}
    return [
        record(
            {
                phase: {name: value + jitter(seed, arm=estimator + name) for name, value in result.items()}
                for phase in ("early", "late")
            },
            estimator=estimator,
            seed=seed,
        )
        for estimator in ("moving, 0.9", "moving, 0.1", "moving, 0.01", "plain average", "pooled")
        for seed in SEEDS
    ]


@pytest.mark.parametrize(("single", "says"), [(0.1, "borne out"), (0.99, "not borne out")])
def test_test_time_statistics_follow_the_accuracies(single, says):
    records = statistics_records(0.95, single)
    assert verdicts("test-time-statistics", records, "M9") == [says]
    assert verdicts("test-time-statistics", records, "M10") == [says, says]
    assert "Pooled over 64 training samples" in str(
        registry.get_study("test-time-statistics").answer(records)
    )


@pytest.mark.parametrize(("small", "says"), [(0.6, "borne out"), (0.99, "not borne out")])
def test_small_batches_follow_the_accuracies(small, says):
    def result(arm, size, seed):
        reached = (small if size == 2 and arm in ("batch", "ghost") else 0.9) + jitter(seed, arm=arm * size)
        losses = {"train loss": 0.1, "test loss": 0.1 + 0.002 * size + jitter(seed, arm="x" * size)}
        return {"accuracy": reached, "validation": reached, "precise": 0.9 + jitter(seed)} | losses

    records = [
        record(result(arm, size, seed), arm=arm, batch=size, rate=0.1, seed=seed)
        for arm in ("batch", "group", "ghost", "pooled")
        for size in (2, 16, 64)
        for seed in SEEDS
    ]
    assert verdicts("small-batches", records) == [says, says, says, "equivalent", says, "borne out"]


@pytest.mark.parametrize(("adapted", "says"), [(20.0, "borne out"), (70.0, "not borne out")])
def test_shifted_inputs_follow_the_errors(adapted, says):
    answer = registry.get_study("shifted-inputs").answer(shifted_records(adapted))
    of_shifts = [
        f.verdict for f in answer.findings if "shifted inputs" in f.statement or "it does so" in f.statement
    ]
    assert len(of_shifts) == 5
    assert set(of_shifts) == {says}


def shifted_records(adapted, clean=1.0, one_class=60.0):
    def errors(severities, better, seed):
        names = [f"{shift} {severity}" for shift in SHIFTS for severity in severities]
        found = {f"{name} {NO_ADAPTATION}": 50.0 + seed for name in names}
        found |= {f"clean {NO_ADAPTATION}": 1.0 + 0.1 * seed, f"one class {NO_ADAPTATION}": 1.0 + 0.1 * seed}
        for size in (16, 64):
            for prior in (0, 4, 16):
                here = adapted - (prior == better)
                found |= {f"{name} {size} {prior}": here + seed for name in names}
                found |= {
                    f"clean {size} {prior}": clean + 0.1 * seed,
                    f"one class {size} {prior}": one_class + seed,
                }
        return {name: error + jitter(seed, 0.01, name) for name, error in found.items()}

    return [
        record(
            # on validation images a prior of 4 is the best, on test images one of 16
            {"error": errors(SEVERITIES, 16, seed), "validation": errors((CHOSEN_AT,), 4, seed)},
            seed=seed,
            batches=[16, 64],
            priors=[0.0, 4.0, 16.0],
        )
        for seed in SEEDS
    ]


def test_priors_are_chosen_on_validation_images():
    said = registry.get_study("shifted-inputs").answer(shifted_records(30)).sentence
    assert "with prior 4, against" in said
    assert "One prior for every size of mini-batch: 4, inside the grid." in said


def test_what_adapting_does_to_images_that_have_not_shifted():
    def found(**errors):
        answer = registry.get_study("shifted-inputs").answer(shifted_records(30, **errors))
        return [f.verdict for f in answer.findings if "clean" in f.statement or "one class" in f.statement]

    assert found() == ["borne out"] * 3
    assert found(clean=3.0, one_class=-5.0) == ["not borne out"] * 3


@pytest.mark.parametrize(("trapped", "says"), [(0.5, "borne out"), (0.99, "not borne out")])
def test_traps_cost_what_the_records_say(trapped, says):
    records = [
        record(
            {
                "accuracy": (0.9 if way == "right" else trapped) + jitter(seed, arm=way),
                "second task": 0.9 + jitter(seed, arm=way),
            },
            trap=trap,
            way=way,
            seed=seed,
        )
        for trap in ("momentum", "variance", "fine-tuning", "padding")
        for way in ("right", "trap")
        for seed in SEEDS
    ]
    assert set(verdicts("convention-traps", records)) == {says}
