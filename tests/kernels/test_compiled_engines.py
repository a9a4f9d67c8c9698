"""Every shipped configuration of the Triton kernels as machine code for sm_80 and sm_90, made without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
SHAPES = (
    "rows of 64", "rows of 24", "rows of 3, the last not full", "rows of 37", "7x7", "7x7, as many as are held",
    "14x14", "56x56", "64x64x64", "a small matrix", "as many rows as are held", "37 channels, held",
)  # fmt: skip


def _made(architectures: str, shapes: str, dtypes: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_ahead.py"), architectures, shapes, dtypes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _judge(rows: list[dict]) -> None:
    assert rows
    for row in rows:
        assert not row["atomics"], row
        assert row["stack"] <= 16, row
        if row["warps"] == 4:
            assert row["registers"] <= 128, row
        assert row["registers"] <= 255, row
        if row["aligned"] and not row["kernel"].startswith(("merge", "count")):
            # tiles are read, and written, sixteen bytes at a time
            assert row["wide_loads"] > 0, row
            assert row["wide_stores"] > 0 or row["kernel"] in ("statistics", "reduce"), row


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.timeout(600)
def test_every_configuration_compiles_within_its_bounds(shape: str) -> None:
    _judge(_made("80,90", shape, "float32,bfloat16,float16"))


def test_one_shape_compiles_within_its_bounds() -> None:
    _judge(_made("90", "rows of 24", "bfloat16"))
