"""Pooling under the libraries that people train with: two CPU processes end with the same bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIBRARIES = {"lightning": [], "accelerate": TORCHRUN, "ray": []}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_two_processes_end_with_the_same_statistics(library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    script = str(HERE / f"with_{library}.py")
    done = subprocess.run(
        [sys.executable, *LIBRARIES[library], script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (literal_eval((tmp_path / str(rank)).read_text()) for rank in (0, 1))
    assert first == second
    assert not torch.allclose(torch.tensor(first[0]), torch.zeros(4))


@pytest.mark.slow
def test_lightning_takes_the_plugin_and_refuses_it_beside_its_own_flag():
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from batchnorm.lightning import PooledBatchNorm

    plugin = PooledBatchNorm()
    settings = {"accelerator": "cpu", "devices": 1, "strategy": "ddp", "logger": False}
    trainer = Trainer(**settings, plugins=[plugin])
    assert trainer.strategy._layer_sync is plugin
    with pytest.raises(MisconfigurationException, match="sync_batchnorm"):
        Trainer(**settings, plugins=[plugin], sync_batchnorm=True)
