"""What a newcomer starts with torchrun, in an empty folder: the page's own lines, the demonstration, the counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from pages import DOCS, python_of

pytestmark = pytest.mark.slow


def torchrun(folder, *arguments, ranks=2):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_blocks_of_the_page_run_under_torchrun(ranks, tmp_path):
    code = [block.code for block in python_of(DOCS / "distributed.md") if not block.skip]
    assert len(code) >= 4
    (tmp_path / "train.py").write_text("\n".join(code))
    done = torchrun(tmp_path, "train.py", ranks=ranks)
    assert "Error" not in done.stderr
    # the first block prints a layer's running mean on every rank
    means = re.findall(r"^rank \d: (.*)$", done.stdout, re.MULTILINE)
    assert len(means) == ranks
    assert len(set(means)) == 1


def test_the_demonstration_ends_with_both_accuracies_and_the_messages_of_a_step(tmp_path):
    figure = tmp_path / "figure.svg"
    done = torchrun(tmp_path, "-m", "batchnorm_lab.demo.distributed", "--steps", 80, "--figure", figure)
    alone, pooled = re.findall(r"test accuracy (\S+)   messages a step (\d+)", done.stdout)
    assert alone[1] == "0"
    assert pooled[1] == "4"
    assert float(pooled[0]) > float(alone[0])
    assert figure.stat().st_size > 1000


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_of_resnet_50_sends_what_the_page_says(ranks, tmp_path):
    done = torchrun(tmp_path, "-m", "batchnorm_lab.bench.messages", ranks=ranks)
    assert "53 layers, 26560 channels" in done.stdout
    bytes_a_step = 2 * (2 * 26560 + 53 * 8) * 8
    for step in (2, 3):
        assert (
            f"step {step}: 53 messages forward, 53 backward, {bytes_a_step} bytes sent a rank" in done.stdout
        )
