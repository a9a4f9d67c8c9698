"""The engines that the contract is tried on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contract_cases import CORES, TRITON
from guarded import interpreted

from batchnorm.kernels import aten, cpu
from batchnorm.kernels import torch as own
from batchnorm.kernels.contract import Engine

# the interpreter takes minutes; test_triton.py has what is quick
_INTERPRETED = [pytest.param(name, marks=pytest.mark.slow) for name in TRITON]


@pytest.fixture(params=["aten", "torch", *CORES, *_INTERPRETED], scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param in ("aten", "torch"):
        yield {"aten": aten.engine, "torch": own.engine}[request.param]
        return
    if request.param in TRITON:
        with interpreted(**TRITON[request.param]) as guarded:
            yield guarded  # type: ignore[misc]
        return
    before = cpu._core.isa()
    _, isa, *small = request.param.split("-")
    cpu._core.select_isa(isa)
    if small:
        cpu._core.pretend_cache(2048, 8192)
    yield cpu.engine
    cpu._core.pretend_cache(0, 0)
    cpu._core.select_isa(before)
