"""What comes along with the package: torch, NumPy, and what a layer needs."""

from __future__ import annotations

import subprocess
import sys

import batchnorm

EXTRAS = ("rich", "typer", "scipy", "pandas", "sklearn", "matplotlib", "jinja2", "batchnorm_lab")
HIDE = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {EXTRAS} else find(name, *rest)
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_what_a_layer_needs_and_no_more():
    script = """
import sys, torch
before = set(sys.modules)
import batchnorm
print(*set(sys.modules) - before)
"""
    # an editable install's own finder brings some of Python's library
    brought = [name for name in run(script).split() if name.partition(".")[0] not in sys.stdlib_module_names]
    assert "batchnorm.modules" in brought
    assert not [name for name in brought if not name.startswith("batchnorm")]
    late = (
        "batchnorm.network",
        "batchnorm.reference",
        "batchnorm.pooling.",
        "batchnorm.distributed.conversation",
    )
    assert not [name for name in brought if name.startswith(late)]
    # what an import costs is the modules that it runs: 29 ms over torch were measured with 39
    assert len(brought) <= 40, sorted(brought)


def test_layers_and_tools_work_with_torch_and_numpy_alone():
    script = """
import torch, batchnorm
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
images = torch.randn(16, 1, 8, 8)
net = batchnorm.insert(net, images)
batchnorm.accelerate(net)
net(images).sum().backward()
batchnorm.calibrate(net, images.split(8))
print(batchnorm.record(batchnorm.fold(net, images)))
"""
    assert "folded" in run(HIDE + script)


def test_the_command_line_without_its_extra_says_how_to_get_it():
    script = HIDE + "from batchnorm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'batchnorm[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_public_name_is_there_and_listed():
    for name in batchnorm.__all__:
        assert getattr(batchnorm, name) is not None
        assert name in dir(batchnorm)
    assert set(batchnorm._TOOLS) <= set(batchnorm.__all__)
