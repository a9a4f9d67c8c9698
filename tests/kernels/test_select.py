"""Which engine serves, and what is said where the one asked for cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import batchnorm
from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten, cpu, select, triton
from batchnorm.kernels import torch as own


def _raises(error: Exception) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(select, "forced", None)
    remembered = triton.load, triton._fault
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("No module named 'triton'"), "triton is not installed"),
        (
            RuntimeError("libdevice is missing"),
            "triton is installed and cannot be used (RuntimeError: libdevice",
        ),
    ],
)
def test_triton_that_is_missing_or_broken_cannot_be_forced_and_the_error_says_why(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "importlib", SimpleNamespace(import_module=_raises(error)))
    with pytest.raises(ArgumentError) as caught, select.use("triton"):
        pass
    assert said in str(caught.value)
    with FakeTensorMode():
        z = torch.empty(2, 3, device="cuda")
    assert select.select(z) is own.engine
    assert said in select.reason(z)


class Broken:
    """An engine whose compiler does not work."""

    name = "triton"
    infer = staticmethod(_raises(RuntimeError("no C compiler was found")))


def test_kernels_that_do_not_compile_are_found_before_a_training_step_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "load", lambda: (Broken(), ""))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    z = torch.randn(4, 3)
    with select.use("triton"):
        assert select.select(z).name != "triton"
        assert "is forced, and cannot serve (triton is installed and cannot be used" in select.reason(z)
        assert "no C compiler was found" in select.reason(z)
        batchnorm.BatchNorm1d(3)(z)


def test_a_reason_that_may_pass_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Broken):
        infer = staticmethod(_raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")))

    engines: list = [Full(), SimpleNamespace(infer=lambda *rest: None)]
    monkeypatch.setattr(triton, "load", lambda: (engines[0], ""))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    z = torch.randn(4, 3)
    assert "CUDA out of memory" in triton.refusal(z)
    engines.pop(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "while a graph is captured" in triton.refusal(z)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert triton.refusal(z) == ""


@pytest.mark.parametrize("device", ["xpu", "privateuseone"])
def test_a_device_that_we_know_nothing_of_is_served_by_torch(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "privateuseone":  # that which a plug-in of torch would bring
        here = SimpleNamespace(is_initialized=lambda: False, current_device=lambda: 0)
        monkeypatch.setattr(torch, device, here, raising=False)
    with FakeTensorMode():
        z = torch.empty(2, 3, device=device)
    assert select.select(z) is own.engine
    assert select.reason(z).startswith("torch: ")
    assert repr(z.device.type) in select.reason(z)


def test_a_tensor_without_values_goes_by_composed_operations() -> None:
    z = torch.empty(2, 3, device="meta")
    assert select.select(z) is aten.engine
    assert select.reason(z) == "aten: the C++ core serves the CPU, not 'meta'"
    assert batchnorm.BatchNorm1d(3).to("meta")(z).shape == z.shape


@pytest.mark.skipif(cpu.engine is None, reason="the C++ core is not there")
def test_where_a_forced_engine_cannot_serve_the_one_that_would_serve_otherwise_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = torch.randn(4, 3)
    with select.use("triton"):
        assert select.select(z) is cpu.engine
        assert select.reason(z).startswith("cpu: triton is forced, and cannot serve (its kernels run on CUDA")
        assert select.select(z.to(torch.float8_e4m3fn)) is aten.engine
        torch.testing.assert_close(batchnorm.BatchNorm1d(3)(z), torch.nn.BatchNorm1d(3)(z))


@pytest.mark.parametrize("name", select.ENGINES)
def test_a_forced_engine_that_cannot_serve_gives_way_with_a_reason(name: str) -> None:
    z = torch.empty(2, 3, dtype=torch.float64, device="meta")
    if name == "triton":
        pytest.importorskip("triton")
    with select.use(name):
        chosen, why = select.select(z).name, select.reason(z)
    if name in ("aten", "torch"):
        assert (chosen, why) == (name, f"{name}: forced")
    else:
        assert chosen == "aten"
        assert f"{name} is forced, and cannot serve (" in why


def test_a_name_that_is_no_engine_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="one of aten, cpu, torch, triton"), select.use("cuda"):
        pass
