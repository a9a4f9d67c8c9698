"""The harness times everyone at the same thing, keeps what it measured, and sums it up honestly."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from batchnorm.errors import ArgumentError, DataError, VerificationError
from batchnorm_lab.bench import bar, markdown, measure, results, session, shapes
from batchnorm_lab.bench.contenders import CONTENDERS, Unsupported, make
from batchnorm_lab.bench.latency import small_cases, time_small
from batchnorm_lab.bench.measure import Outcome, Sample, time_case
from batchnorm_lab.bench.operands import make_operands
from batchnorm_lab.bench.shapes import Case
from batchnorm_lab.bench.worker import Order, serve

RESULTS = Path(__file__).parents[3] / "lab" / "results"
SMALL_CASES = [
    Case("awkward", (2, 3, 5, 7), layout, dtype, form, mode)
    for layout in ("nchw", "channels_last")
    for dtype in shapes.DTYPES
    for form in shapes.FORMS
    for mode in shapes.MODES
] + [
    Case("mlp", (6, 5), "rows", "float32", "relu", "training"),
    Case("seq", (2, 3, 5), "nlc", "float32", "add_relu", "training"),
]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.label)
def test_every_contender_computes_the_same(case):
    outcome = time_case(case, ["eager", "ours", "engine", "onednn"], rounds=1)
    assert {"eager", "ours", "engine"} <= {sample.contender for sample in outcome.samples}
    assert all((sample.times > 0).all() for sample in outcome.samples)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mode", shapes.MODES)
def test_jax_computes_the_same(layout, mode):
    pytest.importorskip("jax")
    case = Case("awkward", (4, 3, 5, 7), layout, "float32", "add_relu", mode)
    outcome = time_case(case, ["eager", "jax"], rounds=1)
    assert "jax" in {sample.contender for sample in outcome.samples}


@pytest.mark.slow
def test_compile_computes_the_same():
    case = Case("awkward", (4, 3, 5, 7), "nchw", "float32", "add_relu", "training")
    outcome = time_case(case, ["eager", "compile"], rounds=1)
    assert "compile" in {sample.contender for sample in outcome.samples}


def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch):
    case = Case("awkward", (8, 3, 5, 7), "nchw", "float32", "relu", "training")
    ours = make("ours", case, make_operands(case))
    wrong = make("ours", case, make_operands(case))
    monkeypatch.setattr(wrong, "activation", None)
    with pytest.raises(VerificationError, match="disagree"):
        measure.check_same(case, {"right": ours, "wrong": wrong})


def test_a_contender_says_what_it_cannot_do():
    case = Case("mlp", (6, 5), "rows", "float32", "plain", "training")
    with pytest.raises(Unsupported, match="MKLDNN"):
        make("onednn", case, make_operands(case))
    outcome = time_case(case, ["ours", "onednn"], rounds=1)
    assert "MKLDNN" in outcome.left_out["onednn"]


def test_layouts_of_operands_are_what_they_are_called():
    last = make_operands(Case("awkward", (2, 3, 5, 7), "channels_last", "bfloat16", "add_relu", "training"))
    assert last.z.is_contiguous(memory_format=torch.channels_last)
    assert last.residual is not None
    assert last.residual.is_contiguous(memory_format=torch.channels_last)
    assert last.z.dtype is torch.bfloat16
    assert last.weight.dtype is torch.float32


def test_a_backward_is_timed_only_in_training():
    training = time_case(Case("mlp", (6, 5), "rows", "float32", "plain", "training"), ["ours"], rounds=2)
    assert {s.direction for s in training.samples} == {"forward", "backward", "forward+backward"}
    inference = time_case(Case("mlp", (6, 5), "rows", "float32", "plain", "inference"), ["ours"], rounds=2)
    assert {(s.contender, s.direction) for s in inference.samples} == {
        ("ours", "forward"),
        ("floor", "forward"),
    }


def test_small_inputs_are_timed_as_function_and_as_module():
    assert {case.form for case in small_cases()} == {"functional", "module"}
    outcome = time_small(small_cases()[0], rounds=1)
    assert {(s.contender, s.direction) for s in outcome.samples} == {
        (who, what) for who in ("ours", "eager") for what in ("forward", "forward+backward")
    }


def outcome_of(case: Case, **milliseconds: float) -> Outcome:
    samples = [
        Sample(name, direction, np.full(5, value))
        for name, value in milliseconds.items()
        for direction in ("forward", "backward", "forward+backward")
    ]
    return Outcome(case, samples, {"jax": "not installed"})


def joined(*measured) -> pd.DataFrame:
    parts = [results.rows(outcome_of(case, **times), source) for case, source, times in measured]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def source():
    return dataclasses.replace(results.provenance(2), timestamp="2026-01-01T00:00:00+00:00")


def test_rows_come_back_from_the_csv_as_they_went(tmp_path, source):
    path = tmp_path / "deep" / "rows.csv"
    written = results.rows(outcome_of(SMALL_CASES[0], ours=1.0, eager=2.5, floor=0.5), source)
    results.append(path, written[:2])
    results.append(path, written[2:])
    found = results.read(path)
    pd.testing.assert_frame_equal(found, written, check_dtype=False)
    eager = found[found["contender"] == "eager"].iloc[0]
    figures = (eager["p50_ms"], eager["ratio_p50"], eager["rounds"], eager["torch"])
    assert figures == (2.5, 2.5, 5, torch.__version__)
    left_out = found[found["contender"] == "jax"].iloc[0]
    assert left_out["left_out"] == "not installed"
    assert math.isnan(left_out["p50_ms"])


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_what_was_measured_before_is_read_still(path):
    found = results.read(path)
    assert len(found) > 10
    assert found["p50_ms"].dtype == float
    timed = found[found["left_out"] == ""]
    assert (timed["p50_ms"] > 0).all()
    assert markdown.document(found).count("\n### ") >= 4


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a file of benchmark rows"):
        results.read(path)


def test_a_case_measured_again_replaces_the_first(source):
    again = dataclasses.replace(source, timestamp="2026-01-02T00:00:00+00:00")
    rows = joined((SMALL_CASES[0], source, {"ours": 1.0}), (SMALL_CASES[0], again, {"ours": 3.0}))
    last = results.latest(rows)
    assert set(last[last["contender"] == "ours"]["p50_ms"]) == {3.0}


def test_the_bar_takes_geometric_means_and_the_best_peer_of_each_case(source):
    one, two = (
        Case("resnet", (32, channels, 56, 56), "nchw", "float32", "relu", "training")
        for channels in (64, 256)
    )
    rows = joined(
        (one, source, {"ours": 1.0, "eager": 8.0, "compile": 4.0, "floor": 1.0}),
        (two, source, {"ours": 1.0, "eager": 2.0, "compile": 9.0, "floor": 0.5}),
    )
    met = {m.demand.title: m for m in bar.held_against(rows, 2)}
    forward = met["training forward BN+ReLU, f32 NCHW"]
    assert forward.shapes == 2
    assert forward.over_eager == pytest.approx(4.0)
    assert forward.over_best == pytest.approx(math.sqrt(4.0 * 2.0))
    assert forward.of_floor == pytest.approx(math.sqrt(2.0))
    assert "MISSED" in bar.cells(forward)[3]
    assert not bar.held_against(rows, 1)


def test_what_is_asked_is_met_at_the_very_figure():
    assert "hit" in bar.verdict(5.0, 5)
    assert "MISSED" in bar.verdict(4.99, 5)
    assert "hit" in bar.verdict(1.35, 1.35, at_most=True)
    assert "MISSED" in bar.verdict(1.36, 1.35, at_most=True)
    assert bar.verdict(float("nan"), 1) == "-"


def test_cases_in_which_eager_is_quicker_are_listed(source):
    rows = results.rows(outcome_of(SMALL_CASES[0], ours=2.0, eager=1.0), source)
    assert [one.ratio for one in bar.slower_than_eager(rows)] == [0.5] * 3
    assert "0.50" in markdown.document(rows)
    rows = results.rows(outcome_of(SMALL_CASES[0], ours=1.0, eager=2.0), source)
    assert not bar.slower_than_eager(rows)
    assert "None of 3 measurements" in markdown.document(rows)


def test_the_document_names_machine_versions_and_steps(source):
    case = Case("step", (8, 3, 224, 224), "nchw", "float32", "resnet50", "training")
    outcome = Outcome(
        case, [Sample(n, "step", np.array([t])) for n, t in (("ours", 10.0), ("eager", 11.0))], {}
    )
    text = markdown.document(results.rows(outcome, source))
    assert torch.__version__ in text
    assert "1.10 (>= 1.2: MISSED)" in text


def test_the_bar_speaks_of_both_networks_in_both_layouts():
    listed = shapes.bar_cases()
    assert len(listed) == 17 * 2 * 3
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    "wrong", [{"sets": "resnext"}, {"dtypes": "int8"}, {"contenders": "tvm"}, {"rounds": 0}]
)
def test_a_name_that_is_not_known_is_refused(tmp_path, wrong):
    with pytest.raises(ArgumentError):
        session.plan(path=tmp_path / "rows.csv", **wrong)


@pytest.mark.parametrize("text", ["two", "1,x"])
def test_threads_are_whole_numbers(text):
    with pytest.raises(ArgumentError, match="--threads"):
        session.budgets(text)


@pytest.mark.parametrize("threads", [0, 100_000])
def test_no_more_threads_than_processors(tmp_path, threads):
    order = session.plan(path=tmp_path / "rows.csv", sets="mlp", quick=True)
    with pytest.raises(ArgumentError, match="processors"):
        session.run(order, [threads])


def test_an_order_survives_the_way_to_another_process(tmp_path):
    order = session.plan(path=tmp_path / "rows.csv", sets="mlp,seq", contenders=",".join(CONTENDERS))
    assert Order.from_json(order.to_json()) == order


def test_a_resumed_run_passes_over_what_is_there(tmp_path, capsys):
    case = Case("mlp", (6, 5), "rows", "float32", "plain", "training")
    order = Order(str(tmp_path / "rows.csv"), 1, [case], ["ours"], 1, 1.0)
    before = torch.get_num_threads()
    try:
        serve(order)
        first = results.read(tmp_path / "rows.csv")
        serve(dataclasses.replace(order, resume=True))
        assert "0 of 0 cases" in capsys.readouterr().out
        assert len(results.read(tmp_path / "rows.csv")) == len(first)
        serve(dataclasses.replace(order, stop_after=-1.0))
        assert "0 of 1 cases" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)
