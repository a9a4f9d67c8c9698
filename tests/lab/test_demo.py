"""The demonstration runs as a whole, and what it says is what was measured."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from batchnorm_lab.data import load_digits
from batchnorm_lab.demo import one_sample, report, run
from batchnorm_lab.demo.costs import count
from batchnorm_lab.demo.learning import Curve, learn
from batchnorm_lab.demo.measure import measure
from batchnorm_lab.demo.network import plain_network


@pytest.fixture(scope="module")
def digits():
    return load_digits().standardized()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What a short run printed, where it wrote its report, and what it measured."""
    measured = []

    def keep(*arguments, **named):
        measured.append(measure(*arguments, **named))
        return measured[0]

    console = Console(file=io.StringIO(), width=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", keep)
        path = run.run(tmp_path_factory.mktemp("demo"), steps=30, console=console)
    return console.file.getvalue(), path, measured[0]


@pytest.fixture
def told(whole_run):
    return whole_run[:2]


@pytest.fixture
def story(whole_run):
    return whole_run[2]


def test_what_insert_did_is_told_as_a_table(told, story):
    assert str(story.insertion.record) in told[0]


def test_the_report_stands_alone(told):
    text, path = told
    page = path.read_text()
    assert str(path) in text.replace("\n", "")
    assert page.count("<svg") == 5
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # links inside the figures are to themselves
    assert "{{" not in page


def test_the_report_in_korean_tells_the_same(told, story, tmp_path):
    _, english = told
    page = report.write(story, tmp_path, 1.0, language="ko").read_text(encoding="utf-8")
    assert '<html lang="ko">' in page
    assert page.count("<svg") == 5
    assert "{{" not in page
    # every label of a figure is translated, but for numbers, names of layers and symbols
    labels = set(re.findall(r">([^<>]+)</text>", page))
    assert {"테스트 정확도", "층", "학습률 0.05 (1배)", "정규화함"} <= labels
    assert not {label for label in labels if re.search(r"[A-Za-z]{4}", label)} - {
        "conv1",
        "conv2",
        "conv3",
        "hidden",
    }
    # and every number of the English report is in it
    prose = [
        re.sub(r"<svg.*?</svg>|<style.*?</style>", "", text, flags=re.DOTALL)
        for text in (english.read_text(), page)
    ]
    tables = [re.findall(r"<td>([\d.,]+(?: %)?)</td>", text) for text in prose]
    assert tables[0] == tables[1]
    assert len(tables[0]) > 15


def test_figures_have_words_for_those_who_do_not_see_them(told):
    _, path = told
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{40,}"', path.read_text())) == 5


def test_every_section_is_told(told):
    text, _ = told
    for part in ("1. normalized", "2. trained", "3. one sample at a time", "4. folded", "learning rate"):
        assert part in text


def test_every_hidden_layer_is_normalized_and_the_output_layer_is_not(story):
    """M2, M3, M6: what goes into each nonlinearity has mean 0 and variance 1."""
    assert story.insertion.record.counts() == {"inserted": 4, "left alone": 1}
    for mean, std in story.insertion.spreads["normalized"].values():
        assert mean < 1e-5
        assert std == pytest.approx(1, abs=0.05)
    assert story.insertion.jump < 1e-4 * story.insertion.largest_answer  # M5


def test_the_normalized_network_learns_faster(story):
    """M12, M13: at every learning rate of the demonstration, after the same few steps."""
    final = {(curve.name, curve.factor): curve.final for curve in story.curves}
    for factor in (1, 5, 30):
        assert final["normalized", factor] > final["plain", factor] + 0.1


def test_one_sample_needs_population_statistics(story):
    """M10, M11: alone, every sample gets the same answer; with population statistics, the right one."""
    assert story.one_sample.different_answers_batch == 1
    assert story.one_sample.accuracy_batch < 0.2
    assert story.one_sample.accuracy_population > 0.9
    assert "TooFewValuesError" in story.one_sample.refusal


def test_a_sample_and_its_copy_have_the_statistics_of_the_sample(digits):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5, momentum=None))
    with torch.no_grad():
        layer[2].bias.copy_(torch.arange(5.0))
    answers = one_sample.with_batch_statistics(layer, digits.test_images[:3], 1)
    torch.testing.assert_close(answers, torch.arange(5.0).expand(3, 5), atol=1e-4, rtol=0)
    assert layer[2].num_batches_tracked == 0


def test_the_folded_network_answers_the_same_for_less(story):
    folded = story.folded
    assert folded.difference < 1e-4
    assert folded.same_answers == len(folded.logits) == 600
    assert folded.after.numbers < folded.before.numbers
    assert folded.after.operations < folded.before.operations
    assert folded.after.norm == 0
    assert folded.after.layers == 5


def test_costs_are_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    costs = count(model, torch.zeros(1, 1, 4, 4), calls=1)
    # 8 values of 9 products and 9 sums, as torch counts; 8 values scaled and shifted; 3 of 8 products and sums
    assert costs.linear == 8 * 18 + 3 * 16
    assert costs.norm == 8 * 2
    assert costs.numbers == 18 + 4 + 4 + 24 + 3
    assert costs.layers == 3


def test_a_run_can_be_repeated_to_the_last_bit(digits):
    first, second = (
        learn(plain_network(3), digits, Curve("plain", 1, 0.1), steps=12, seed=5).accuracies for _ in range(2)
    )
    assert first == second


def test_steps_to_target_is_the_first_time():
    curve = Curve("plain", 1, 0.1, steps=[1, 2, 3], accuracies=[0.5, 0.96, 0.94])
    assert curve.steps_to_target == 2
    assert Curve("plain", 1, 0.1, steps=[1], accuracies=[0.9]).steps_to_target is None
