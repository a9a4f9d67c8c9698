"""A study goes on where it was stopped, and a result depends on its setting and nothing else."""

from dataclasses import dataclass, replace

import pytest
import torch

from batchnorm.errors import ArgumentError, BatchNormError
from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.contract import Answer, Finding, Study, Unit, make_answer
from batchnorm_lab.studies.intervals import mean_interval
from batchnorm_lab.studies.registry import STUDIES, choose, get_study


@dataclass(frozen=True)
class Config:
    seeds: int = 3
    size: int = 1


def make_data(shift=0.0):
    images = torch.arange(8, dtype=torch.float32).view(2, 1, 2, 2) / 8 + shift
    return ImageData("made", images, torch.tensor([0, 1]), images, torch.tensor([0, 1]), ("a", "b"))


@pytest.fixture
def counted():
    """A study that counts how often each setting is measured, and stops where it is told to."""
    seen: list[tuple[str, int]] = []
    stop_at: list[str] = []

    def units(config):
        return [
            Unit([{"arm": arm, "seed": seed, "size": config.size} for seed in range(config.seeds)])
            for arm in ("a", "b")
        ]

    def measure(unit, data, advance):
        if unit[0]["arm"] in stop_at:
            raise KeyboardInterrupt
        advance(0.5)
        seen.extend((setting["arm"], setting["seed"]) for setting in unit)
        return [{"value": setting["seed"] + setting["size"]} for setting in unit]

    study = Study(
        name="counted",
        title="t",
        question="q",
        claim="c",
        formula="$x$",
        claims=(),
        configs={"quick": Config(seeds=1), "default": Config()},
        units=units,
        measure=measure,
        plot=lambda records: None,
        answer=lambda records: Answer("", (), 0),
    )
    return study, seen, stop_at


def test_what_is_recorded_is_not_run_again(counted, tmp_path):
    study, seen, _ = counted
    first = study.run(data=make_data(), path=tmp_path / "r.jsonl")
    assert len(seen) == 6
    again = study.run(data=make_data(), path=tmp_path / "r.jsonl")
    assert len(seen) == 6
    assert again == first


def test_a_stopped_study_goes_on_where_it_was(counted, tmp_path):
    study, seen, stop_at = counted
    stop_at.append("b")
    with pytest.raises(KeyboardInterrupt):
        study.run(data=make_data(), path=tmp_path / "r.jsonl")
    assert seen == [("a", 0), ("a", 1), ("a", 2)]
    stop_at.clear()
    records = study.run(data=make_data(), path=tmp_path / "r.jsonl")
    assert seen[3:] == [("b", 0), ("b", 1), ("b", 2)]
    assert [record["result"]["value"] for record in records] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("change", ["setting", "data", "revision"])
def test_whatever_decides_a_result_makes_it_another_run(counted, tmp_path, change):
    study, seen, _ = counted
    study.run(data=make_data(), path=tmp_path / "r.jsonl")
    other = replace(study, revision=2) if change == "revision" else study
    config = Config(size=2) if change == "setting" else None
    data = make_data(shift=0.25) if change == "data" else make_data()
    other.run(config, data=data, path=tmp_path / "r.jsonl")
    assert len(seen) == 12


def test_a_smaller_configuration_finds_its_runs_among_those_of_a_larger(counted, tmp_path):
    study, seen, _ = counted
    study.run(data=make_data(), path=tmp_path / "r.jsonl")
    records = study.run(Config(seeds=2), data=make_data(), path=tmp_path / "r.jsonl")
    assert len(seen) == 6
    assert [record["setting"]["seed"] for record in records] == [0, 1, 0, 1]


def test_records_say_how_they_came_about(counted):
    study, _, _ = counted
    record = study.run(data=make_data())[0]
    assert record["versions"]["torch"] == torch.__version__
    assert record["setting"] == {"arm": "a", "seed": 0, "size": 1}
    assert record["data"]["sample"].startswith("2+2:")
    assert record["wall_seconds"] >= 0


def test_progress_rises_to_one(counted, tmp_path):
    study, _, _ = counted
    shares = []
    study.run(data=make_data(), progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_result_missing_is_an_error(counted):
    study, _, _ = counted
    with pytest.raises(BatchNormError, match="1 results for 3 settings"):
        replace(study, measure=lambda unit, data, advance: [{}]).run(data=make_data())


def test_an_unknown_level_and_an_unknown_study_are_named(counted):
    study, _, _ = counted
    with pytest.raises(ArgumentError, match="enormous"):
        study.config("enormous")
    with pytest.raises(ArgumentError, match="faster-learning"):
        get_study("no-such-study")
    with pytest.raises(ArgumentError, match="no study was named"):
        choose([])


def test_all_stands_for_every_study_once():
    assert [study.name for study in choose(["all", "small-batches"])] == list(STUDIES)


def test_an_answer_says_its_verdicts_and_how_many_seeds_it_is_over():
    five = Finding("M12", "A", mean_interval([1.0, 1.1, 1.0, 0.9, 1.0]), "one", above=0.0)
    two = Finding("M12", "B", mean_interval([1.0, 1.1]), "two", above=0.0)
    assert (
        str(make_answer([five]))
        == "M12: borne out in 1 of 1. A: borne out, one. (95 % intervals over 5 seeds.)"
    )
    quick = make_answer([five, two], ["Remark."])
    assert quick.seeds == 2
    assert "M12: borne out in 1, undecided in 1 of 2." in quick.sentence
    assert "Remark. (Only 2 seeds: a first look, not an answer" in quick.sentence


def test_the_more_is_asked_the_more_an_answer_needs():
    clear = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    claimed = Finding("M12", "A", clear, "three", above=0.0)
    informs = Finding("", "B", clear, "three")
    assert clear.low > 0
    assert {f.verdict for f in make_answer([claimed]).findings} == {"borne out"}
    many = make_answer([claimed] * 20 + [informs])
    assert {f.verdict for f in many.findings} == {"undecided", ""}
    assert many.findings[0].interval == clear, "what is shown is the interval of the finding alone"
    assert "The 20 verdicts hold together with 95 % (Bonferroni)." in many.sentence


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_three_levels_and_the_default_has_five_seeds(name):
    study = get_study(name)
    assert study.name == name
    assert set(study.configs) == {"quick", "default", "full"}
    assert study.config("quick").seeds < 5 <= study.config("default").seeds <= study.config("full").seeds
    assert study.claims


@pytest.mark.parametrize("name", STUDIES)
def test_no_two_runs_of_a_configuration_are_the_same(name):
    study = get_study(name)
    settings = [setting for unit in study.units(study.config("default")) for setting in unit.settings]
    assert len({study.key(setting, {}) for setting in settings}) == len(settings)
