"""What the C++ engine does to its process: switches, fork, a missing core, and the pool of output memory."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from batchnorm.errors import ArgumentError
from batchnorm.kernels import cpu
from batchnorm.kernels.contract import Moments, Norm

pytestmark = pytest.mark.skipif(cpu.engine is None, reason=f"the C++ core is not there: {cpu.absence}")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = os.path.dirname(os.path.dirname(os.path.dirname(cpu.__file__)))
    # these are about what is chosen where nobody forces an engine
    ours = {name: value for name, value in os.environ.items() if name != "BATCHNORM_ENGINE"}
    env = ours | {"PYTHONPATH": source} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_a_forked_child_computes_instead_of_waiting_for_threads_it_does_not_have() -> None:
    done = _run(
        """
import os, warnings, torch
from batchnorm.kernels import aten, cpu
from batchnorm.kernels.contract import Norm
warnings.simplefilter("ignore")
torch.set_num_threads(2)
z = torch.randn(32, 64, 32, 32)
want = cpu.engine.forward(z, Norm(1, 1e-5, activation="relu"), None).y
child = os.fork()
if child == 0:
    y = cpu.engine.forward(z, Norm(1, 1e-5, activation="relu"), None).y
    # NumPy compares: torch itself would wait for its team
    same = (y.numpy() == want.numpy()).all()
    own = "after a fork" in cpu._core.runtime() and cpu._core.threads() == 2
    os._exit(0 if same and own and len(os.listdir("/proc/self/task")) >= 2 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
        OMP_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr


def test_switches_are_read_at_import() -> None:
    ask = (
        "from batchnorm.kernels import cpu; i = cpu.info();"
        "print(i['isa'], i['pool'] if i['pool'] == 'off' else i['pool']['limit'])"
    )
    least = cpu._core.available_isas().split()[0]
    assert _run(ask, BATCHNORM_ISA=least, BATCHNORM_POOL="0").stdout.split() == [least, "off"]
    assert _run(ask, BATCHNORM_POOL="3M").stdout.split()[1] == str(3 << 20)
    refused = _run(ask, BATCHNORM_ISA="mmx")
    assert refused.returncode != 0
    assert "BATCHNORM_ISA='mmx'" in refused.stderr


def test_a_torch_without_the_table_of_functions_is_served_by_its_own_operations() -> None:
    done = _run(
        """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import batchnorm
from batchnorm.kernels import cpu, select
z = torch.randn(8, 3)
assert cpu.engine is None and "no table" in cpu.absence and not cpu.info()["built"]
assert select.select(z).name == "aten" and "no table" in select.reason(z)
assert batchnorm.BatchNorm1d(3)(z).mean(0).abs().max() < 1e-6
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_package_without_the_core_works_and_says_so_once() -> None:
    done = _run(
        """
import sys
sys.modules["batchnorm._core"] = None  # as if it had not been built
import torch, batchnorm
from batchnorm.kernels import cpu
assert cpu.engine is None and "not built" in cpu.absence
assert batchnorm.BatchNorm1d(3)(torch.randn(8, 3)).mean(0).abs().max() < 1e-6
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("without its C++ core") == 1


def test_a_pool_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArgumentError, match="BATCHNORM_POOL"):
        cpu._pool_limit("lots")


@pytest.fixture
def small_pool() -> Iterator[None]:
    before = cpu._core.pool_statistics()["limit"]
    cpu._core.pool_trim()
    cpu.set_pool_limit(64 << 20)  # of all processes: others that run tests take their shares of it
    yield
    cpu.set_pool_limit(before)


def _output(megabytes: int) -> torch.Tensor:
    z = torch.randn(megabytes << 8, 1024)
    return cpu.engine.normalize(z, Norm(1, 1e-5), Moments(torch.zeros(1024), torch.ones(1024)))[0]


def test_the_pool_uses_memory_again_and_keeps_no_more_than_its_limit(small_pool: None) -> None:
    hits = cpu._core.pool_statistics()["hits"]
    first = _output(3)
    address = first.data_ptr()
    del first
    gc.collect()
    assert _output(3).data_ptr() == address
    assert cpu._core.pool_statistics()["hits"] > hits
    several = [_output(3) for _ in range(30)]
    assert cpu._core.pool_statistics()["used_bytes"] >= 90 << 20
    del several
    gc.collect()
    assert 0 < cpu._core.pool_statistics()["idle_bytes"] <= 64 << 20


def test_idle_memory_goes_back_though_no_call_comes(small_pool: None) -> None:
    cpu._core.pool_patience(0.05)
    try:
        _output(3)
        for _ in range(200):
            if not cpu._core.pool_statistics()["idle_bytes"]:
                break
            time.sleep(0.02)
        assert cpu._core.pool_statistics()["idle_bytes"] == 0
    finally:
        cpu._core.pool_patience(60.0)


def test_processes_that_keep_memory_share_the_limit() -> None:
    code = """
import sys, torch
from batchnorm.kernels import cpu
from batchnorm.kernels.contract import Norm
z = torch.randn(3 << 8, 1024)
def idle():
    for _ in range(12):
        y = [cpu.engine.infer(z, Norm(1, 1e-5), z[0], z[0]) for _ in range(12)]
        del y
    return cpu._core.pool_statistics()["idle_bytes"]
alone = idle()
print(alone, flush=True)
sys.stdin.readline()
print(idle(), flush=True)
sys.stdin.readline()
"""
    env = os.environ | {"BATCHNORM_POOL": "32M"}
    several = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        for _ in range(3)
    ]

    def answers() -> list[int]:
        return [int(one.stdout.readline()) for one in several if one.stdout]

    def go_on() -> None:
        for one in several:
            assert one.stdin
            one.stdin.write("\n")
            one.stdin.flush()

    try:
        answers()
        time.sleep(1.1)  # how often the others are counted
        go_on()
        assert 0 < sum(answers()) <= 32 << 20
    finally:
        for one in several:
            one.kill()
            one.communicate()


def test_a_fork_leaves_nothing_idle_and_no_thread_behind(small_pool: None) -> None:
    done = _run(
        """
import os, threading, torch
from batchnorm.kernels import cpu
from batchnorm.kernels.contract import Norm
z = torch.randn(3 << 8, 1024)
cpu.engine.infer(z, Norm(1, 1e-5), z[0], z[0])
assert cpu._core.pool_statistics()["idle_bytes"] > 0
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
child = os.fork()
if child == 0:
    cpu.engine.infer(z, Norm(1, 1e-5), z[0], z[0])
    os._exit(0 if tasks() == 2 else 3)  # its own, that gives back what lies idle
assert tasks() == before - 1 and cpu._core.pool_statistics()["idle_bytes"] == 0
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
""",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr


def test_a_pooled_output_is_an_ordinary_tensor(small_pool: None) -> None:
    y = _output(2)
    copy = y.clone()
    view = y[5:9]
    assert torch.equal(pickle.loads(pickle.dumps(y)), copy)
    del y
    gc.collect()
    _output(2).fill_(7)  # memory that a view still holds is not given to anyone else
    assert torch.equal(view, copy[5:9])
    shared = _output(2)
    expected = shared.clone()
    shared.share_memory_()
    assert torch.equal(shared, expected)
    assert shared.is_shared()
    shared.resize_(10, 10)
    leaf = _output(2).requires_grad_()
    (leaf * 2).sum().backward()
    assert leaf.grad is not None


def test_without_a_pool_outputs_come_from_torch() -> None:
    before = cpu._core.pool_statistics()["limit"]
    try:
        cpu.set_pool_limit(0)
        used = cpu._core.pool_statistics()["used_bytes"]
        y = _output(3)
        assert cpu._core.pool_statistics()["used_bytes"] == used
        assert cpu._core.pool_statistics()["idle_bytes"] == 0
        assert y.shape == (768, 1024)
    finally:
        cpu.set_pool_limit(before)
