"""Every command says what it does, does it, and tells an error without a traceback."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from batchnorm import info
from batchnorm.cli import app as command_line
from batchnorm.errors import DataError
from batchnorm_lab.bench import results

RUNNER = CliRunner()
APP = command_line.build()


def commands():
    return [command.name or command.callback.__name__ for command in APP.registered_commands]


def test_the_commands_are_there():
    assert {"demo", "info", "bench", "study"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_every_command_explains_itself(command):
    shown = RUNNER.invoke(APP, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage" in shown.output


def test_without_the_laboratory_its_commands_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(command_line.metadata, "entry_points", lambda group: ())
    alone = command_line.build()
    for command in ("demo", "bench", "study"):
        shown = RUNNER.invoke(alone, [command, "--quick", "all"])
        assert shown.exit_code == 2
        assert "pip install batchnorm-lab" in shown.output
    assert RUNNER.invoke(alone, ["info"]).exit_code == 0


def test_info_names_versions_engines_and_threads():
    shown = RUNNER.invoke(APP, ["info"])
    assert shown.exit_code == 0
    assert torch.__version__ in shown.output
    assert "engine" in shown.output
    assert "torch.get_num_threads()" in shown.output
    assert any("float32" in tensor for tensor, _ in info.engines())


def test_info_says_which_engine_is_forced(monkeypatch):
    from batchnorm.kernels import select

    with select.use("aten"):
        assert all("forced" in why for tensor, why in info.engines() if tensor.startswith("cpu"))


def test_bench_times_in_a_process_of_its_own_and_keeps_rows(tmp_path):
    path = tmp_path / "rows.csv"
    arguments = ["--set", "mlp", "--form", "plain", "--mode", "inference", "--dtype", "float32", "--quick"]
    limits = ["--contenders", "ours,eager", "--rounds", "1", "--threads", "1", "--stop-after", "0.001"]
    shown = RUNNER.invoke(APP, ["bench", *arguments, *limits, "--out", str(path)])
    assert shown.exit_code == 0, shown.output
    found = results.read(path)
    assert set(found["contender"]) == {"ours", "eager", "floor"}
    assert set(found["threads"]) == {1}
    again = RUNNER.invoke(APP, ["bench", "--report", "--threads", "1", "--out", str(path)])
    assert again.exit_code == 0
    assert "slower than" in again.output


def test_a_report_of_no_rows_is_an_error(tmp_path):
    shown = RUNNER.invoke(APP, ["bench", "--report", "--out", str(tmp_path / "none.csv")])
    assert isinstance(shown.exception, DataError)


def without(monkeypatch, package):
    real = builtins.__import__

    def guarded(name, *rest, **named):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *rest, **named)

    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("batchnorm_lab.demo"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", guarded)


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    without(monkeypatch, "jinja2")
    shown = RUNNER.invoke(APP, ["demo", "--out", str(tmp_path)])
    assert shown.exit_code == 2
    assert "pip install batchnorm-lab" in shown.output
    assert not list(tmp_path.iterdir())


def test_an_error_of_ours_is_told_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "study", "no-such-study"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "ArgumentError: no study is called 'no-such-study'" in done.stderr
    assert "mend:" in done.stderr
    assert "Traceback" not in done.stderr
