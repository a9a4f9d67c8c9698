"""Every study runs at its quick level, goes on where it was, and draws what reads without colours."""

import re
from dataclasses import replace

import pytest

from batchnorm_lab.data import load
from batchnorm_lab.studies import figures
from batchnorm_lab.studies.registry import STUDIES, get_study
from batchnorm_lab.studies.small_batches import workers

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    made = {}

    def run(name):
        if name not in made:
            study = get_study(name)
            config = study.config("quick")
            made[name] = study.run(config, data=data, path=folder / f"{name}.jsonl"), config, folder
        return made[name]

    return run


@pytest.mark.parametrize("name", STUDIES)
def test_records_lead_to_an_answer_with_a_verdict_for_every_claim(runs, name):
    records, _, _ = runs(name)
    study = get_study(name)
    answer = study.answer(records)
    assert {finding.claim for finding in answer.findings} - {""} == set(study.claims)
    for finding in answer.findings:
        # with two seeds nothing is decided
        assert finding.verdict == ("undecided" if finding.claims else "")
        assert finding.claims or not finding.claim
        assert finding.text in answer.sentence
    assert "Only 2 seeds" in answer.sentence


@pytest.mark.parametrize("level", ["default", "full"])
@pytest.mark.parametrize("name", STUDIES)
def test_no_mini_batch_of_a_longer_level_is_larger_than_the_data(data, name, level):
    images = len(data.with_validation()[0].train_images)
    study = get_study(name)
    for unit in study.units(study.config(level)):
        for setting in unit.settings:
            together = workers(setting["arm"]) if name == "small-batches" else 1
            assert together * setting.get("batch", 1) <= images


@pytest.mark.parametrize("name", STUDIES)
def test_a_second_run_measures_nothing(runs, data, name):
    records, config, folder = runs(name)

    def measure(unit, data, advance):
        raise AssertionError("it was measured already")

    again = replace(get_study(name), measure=measure).run(config, data=data, path=folder / f"{name}.jsonl")
    assert again == records


@pytest.mark.parametrize("name", STUDIES)
def test_answers_from_the_file_are_those_of_the_run(runs, name):
    records, _, folder = runs(name)
    from batchnorm_lab.studies.records import RecordFile

    read = RecordFile(folder / f"{name}.jsonl").all()
    assert get_study(name).answer(read) == get_study(name).answer(records)


@pytest.mark.parametrize("name", STUDIES)
def test_figures_have_units_and_read_in_black_and_white(runs, name, tmp_path):
    records, _, _ = runs(name)
    fig = get_study(name).plot(records)
    svg, png = figures.save(fig, tmp_path / name)
    assert svg.stat().st_size > 1000
    assert png.read_bytes()[:4] == b"\x89PNG"
    drawn = [axes for axes in fig.axes if axes.has_data()]
    assert drawn
    for axes in drawn:
        labelled = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        looks = [(str(line.get_linestyle()), str(line.get_marker())) for line in labelled]
        dashes = [line._dash_pattern for line in labelled]
        both = list(zip(looks, map(str, dashes), strict=True))
        assert len(set(both)) == len(both), f"two lines of {axes.get_title()!r} differ in colour alone"
        hatches = [bars[0].get_hatch() or "" for bars in axes.containers if hasattr(bars, "patches")]
        assert len(set(hatches)) == len(hatches), f"two bars of {axes.get_title()!r} differ in colour alone"
    # An axis is named by itself, by its row or column of panels, or by ticks that are words.
    for axes in drawn:
        place = axes.get_subplotspec()
        if place is None:  # a scale of grey beside the panels
            assert axes.get_ylabel() or axes.get_xlabel()
            continue
        row = [a for a in drawn if a.get_subplotspec() and a.get_subplotspec().rowspan == place.rowspan]
        column = [a for a in drawn if a.get_subplotspec() and a.get_subplotspec().colspan == place.colspan]
        ticks = [re.sub(r"\\\w+", "", tick.get_text()) for tick in axes.get_xticklabels()]
        words = any(letter.isalpha() for text in ticks for letter in text)
        assert any(other.get_ylabel() for other in row), f"no name beside {axes.get_title()!r}"
        assert words or any(other.get_xlabel() for other in column), f"no name under {axes.get_title()!r}"
