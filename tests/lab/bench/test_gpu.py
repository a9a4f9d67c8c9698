"""``batchnorm bench --gpu``: every line of it on a CPU, and rows that stand alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from batchnorm.errors import ArgumentError
from batchnorm.kernels import table
from batchnorm_lab.bench.gpu import budget, cases, peers, run
from batchnorm_lab.bench.gpu.cases import Case
from batchnorm_lab.bench.gpu.clock import Processor, read

QUIET = Console(quiet=True)


def _few(quick: bool, dry: bool) -> list[Case]:
    return [
        Case((2, 3, 4, 4), torch.float32, True, "bn_add_act", True),
        Case((6, 5), torch.bfloat16, False, "bn", False),
    ]


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_dry_run_measures_every_kind_of_row_and_writes_three_files(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    if not whole:
        monkeypatch.setattr(run, "cases", _few)
    result = run.run(tmp_path, quick=not whole, dry=True, console=QUIET)
    read = json.loads((tmp_path / "gpu.json").read_text())
    assert read == json.loads(json.dumps(result))
    assert not [row for row in read["rows"] if "failed" in row]
    steps = [row for row in read["rows"] if "step" in row]
    assert all(len(row["readings"]) == 4 and not row["missing"] for row in steps)
    layers = [row for row in read["rows"] if "case" in row]
    assert len(layers) == len(run.cases(not whole, True))
    for row in layers:
        assert {"eager", "compile", "torch", "copy"} <= set(row["readings"])
        assert "apex" in row["missing"]
        assert all(reading["warm"] > 0 and reading["launches"] > 0 for reading in row["readings"].values())
    assert "no figure here says anything of a GPU" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "measured.json").read_text())["rows"] == []


def test_a_row_that_runs_out_of_memory_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(case: Case, *rest: Any) -> dict[str, Any]:
        if case.form == "bn":
            raise torch.OutOfMemoryError("tried to allocate too much")
        return {"missing": {}, "readings": {}}

    monkeypatch.setattr(run, "cases", _few)
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "measure_step", lambda *rest, **how: {"missing": {}, "readings": {}})
    result = run.run(tmp_path, quick=True, dry=True, console=QUIET)
    assert ["failed" in row for row in result["rows"]] == [False, False, True]
    assert "out of memory" in (tmp_path / "gpu.md").read_text()


def test_what_would_not_end_in_time_is_not_begun_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Budget", lambda seconds: budget.Budget(0))
    result = run.run(tmp_path, quick=True, dry=True, console=QUIET)
    (step,) = result["rows"]
    assert not step["readings"]
    assert all(why == "not begun: it would not have ended in time" for why in step["missing"].values())
    assert result["not_begun_for_lack_of_time"] == len(cases.cases(True, True))
    assert "rows were not begun: the time was up" in (tmp_path / "gpu.md").read_text()


def test_a_budget_counts_on_the_longest_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    time = budget.Budget(10)
    for seconds in (6, 1):
        with time.part("compiled step"):
            now[0] += seconds
    assert not time.allows("compiled step")
    assert time.allows("layer")
    now[0] = 10
    assert not time.allows("layer")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\n...")]
)
def test_a_gpu_without_memory_is_said_to_have_none(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise error

    monkeypatch.setattr(run, "Gpu", full)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ArgumentError, match="no memory left to measure with"):
        run.run(tmp_path, quick=True, dry=False, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_behind_the_timing_costs_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Processor):
        def peak(self, call: Any) -> int:
            if call is big:
                raise torch.OutOfMemoryError("tried to allocate too much")
            return super().peak(call)

    def big() -> None: ...

    found = read(Small(), {"big": big, "small": lambda: torch.zeros(3)}, 1)
    assert found["big"] == "out of memory: tried to allocate too much"
    assert found["small"].launches > 0  # type: ignore[union-attr]


def test_a_device_that_is_lost_still_lets_every_row_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    assert "illegal memory access" in run._alone({"step": "one"}, lost)["failed"]


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "errors", lambda *rest: {"eager": 0.5, "torch": 0.0, "apex": "missing"})
    row = run.measure(_few(True, True)[0], Processor(), 1, True)
    assert set(row["readings"]) == {"torch", "copy"}
    assert "wrong" in row["missing"]["eager"]


def test_a_peer_that_fails_costs_its_own_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class FaultError(Exception):
        """As Dynamo's, which are no RuntimeError; and without a word."""

    make = peers.make

    def broken(name: str, *rest: Any) -> Any:
        if name == "compile":
            raise FaultError
        return make(name, *rest)

    monkeypatch.setattr(peers, "make", broken)
    row = run.measure(_few(True, True)[0], Processor(), 1, True)
    assert {"eager", "torch", "copy"} <= set(row["readings"])
    assert row["missing"]["compile"] == "FaultError: "


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no CUDA or ROCm device"):
        run.run(tmp_path, quick=True, dry=False, console=QUIET)


def test_a_selection_holds_what_was_measured_and_the_worse_of_two_rows_decides() -> None:
    case = _few(True, True)[0]
    about = {"architecture": "sm_90", "device": "a GPU", "date": "today"}

    def row(torch_time: float, triton_time: float) -> dict[str, Any]:
        readings = {
            name: {"warm": value, "cold": value, "host": 0.01}
            for name, value in (("torch", torch_time), ("triton", triton_time))
        }
        return {"case": case, "readings": readings}

    rows = run.selection([row(3.0, 2.0), {"step": "resnet50", "readings": {}}], about)
    assert [r["over_torch"] for r in rows] == [1.5]
    assert table.winners(rows) == {table.Key("sm_90", "float32", "RC", "bn_add_act", 8)}
    rows += run.selection([row(1.0, 1.0)], about)
    assert table.winners(rows) == frozenset()


def test_the_table_that_is_shipped_holds_what_was_measured_with_its_provenance() -> None:
    for row in table.measured():
        assert {*table.Key._fields, "over_torch", "device", "date"} <= set(row)


def test_cases_have_every_form_and_both_directions() -> None:
    found = cases.cases(False, False)
    assert {case.form for case in found} == set(cases.FORMS)
    assert {case.training for case in found} == {True, False}
    assert {case.dtype for case in found} == {torch.float32, torch.bfloat16, torch.float16}
