"""A user's script is type-checked against the package, as an installed one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

PACKAGE = Path(batchnorm.__file__).parent

SCRIPT = """
from typing import assert_type

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.functional import batch_norm

layer = batchnorm.BatchNorm2d(16, activation="relu", channel_dim=1)
output: Tensor = layer(torch.randn(2, 16, 4, 4))
network: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
assert_type(batchnorm.insert(network, torch.randn(2, 4)), nn.Module)
assert_type(batchnorm.calibrate(network, [torch.randn(8, 4)]), nn.Module)
assert_type(batchnorm.fold(network, torch.randn(2, 4)), nn.Module)
assert_type(batchnorm.accelerate(network), nn.Module)
assert_type(batchnorm.convert(network, "frozen"), nn.Module)
told = batchnorm.record(network)
assert_type(told, batchnorm.Record)
paths: list[str] = [row.path for row in told.left_alone]
with batchnorm.domain("night"):
    network(torch.randn(2, 4))
y = batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3))
assert_type(y, Tensor)
try:
    batchnorm.BatchNorm1d(0)
except batchnorm.ArgumentError as error:
    print(error.why, error.mend)
"""

MISTAKES = """
import batchnorm

batchnorm.BatchNorm2d("sixteen")
batchnorm.no_such_tool
batchnorm.record(None).no_such_column
"""


def check(tmp_path, text):
    script = tmp_path / "script.py"
    script.write_text(text)
    arguments = ["--strict", "--cache-dir", str(tmp_path / "cache"), "--python-executable", sys.executable]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.slow
def test_a_script_of_a_user_type_checks_strictly(tmp_path):
    assert "Success" in check(tmp_path, SCRIPT)


@pytest.mark.slow
def test_mistakes_of_a_script_are_found(tmp_path):
    found = check(tmp_path, MISTAKES)
    assert 'expected "int"' in found
    assert "no_such_tool" in found
    assert "no_such_column" in found
