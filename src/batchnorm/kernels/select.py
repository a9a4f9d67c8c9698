"""Which engine serves a tensor, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.compiling import compiling
from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten, cpu, table, triton
from batchnorm.kernels import torch as own
from batchnorm.kernels.contract import Engine, Norm

ENGINES = ("aten", "cpu", "torch", "triton")
"""Engines by name."""


def _named(name: str) -> Engine:
    """Give an engine by name, or say why it is not there."""
    if name not in ENGINES:
        raise ArgumentError(
            f"BATCHNORM_ENGINE={name!r} names no engine.",
            mend=f"one of {', '.join(ENGINES)}, or unset it.",
        )
    found: Engine | None = {"aten": aten.engine, "cpu": cpu.engine, "torch": own.engine}.get(name)
    absence = str(cpu.absence)
    if name == "triton":
        found, absence = triton.load()
    if found is None:
        raise ArgumentError(
            f"the engine {name!r} was asked for by name and is not there.",
            why=absence,
            mend="install what is missing, or unset BATCHNORM_ENGINE.",
        )
    return found


forced: Engine | None = None
"""The engine that was asked for by name."""
if os.environ.get("BATCHNORM_ENGINE"):
    forced = _named(os.environ["BATCHNORM_ENGINE"])


def _refusal(engine: Engine, z: Tensor) -> str:
    """Say why an engine cannot serve a tensor; empty where it can."""
    if engine.name == "triton":
        return triton.refusal(z)
    if engine.name != "cpu":
        return ""
    if not z.is_cpu:
        return f"the C++ core serves the CPU, not {z.device.type!r}"
    if z.dtype not in cpu.DTYPES:
        return f"the C++ core does not know {z.dtype}"
    if z.dim() > cpu.MOST_AXES:
        return f"the C++ core takes tensors of up to {cpu.MOST_AXES} axes"
    return "the values in memory have the other sign" if z.is_neg() else ""


def _measured(z: Tensor, norm: Norm | None) -> bool:
    """Whether a measurement says that our Triton kernels win here."""
    if not table.WINNERS or norm is None or not z.is_cuda or not z.numel() or triton.refusal(z):
        return False
    return table.key_of(z, norm) in table.WINNERS


def select(z: Tensor, norm: Norm | None = None) -> Engine:
    """Give the fastest engine that is right for a tensor.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.
    norm : Norm, optional
        What is to be done with it, where a measurement may decide.

    Returns
    -------
    Engine
        The one forced, where it can serve. Else the C++ core for CPU tensors of a dtype it knows; on every other
        device torch's own batch norm, or our Triton kernels where they were measured to win.
    """
    if forced is not None and not _refusal(forced, z):
        return forced
    if z.is_cpu and cpu.engine is not None and cpu.serves(z):
        return cpu.engine
    if not z.is_cpu and not z.is_meta:
        return own.engine if not _measured(z, norm) else _named("triton")
    return aten.engine


def by_torch(z: Tensor, norm: Norm | None = None) -> bool:
    """Whether torch's own batch norm serves a tensor, as operations that torch differentiates and compilers see.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.
    norm : Norm, optional
        As for `select`.

    Returns
    -------
    bool
        ``select(z, norm)`` is the engine `torch`. In a compiled graph the answer is the device's, or that of who
        forced `torch`: there the operations must be seen, and the compiler fuses them.
    """
    if compiling():
        return forced is own.engine or not (z.is_cpu or z.is_meta)
    return select(z, norm) is own.engine


def reason(z: Tensor) -> str:
    """Say why `select` chooses as it does for a tensor.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.

    Returns
    -------
    str
        One sentence.
    """
    chosen = select(z).name
    if forced is not None:
        refusal = _refusal(forced, z)
        if not refusal:
            return f"{chosen}: forced"
        return f"{chosen}: {forced.name} is forced, and cannot serve ({refusal})"
    if not z.is_cpu and not z.is_meta:
        return f"torch: torch's own batch norm, with our guard around it; {_of_triton(z)}"
    if cpu.engine is None:
        return f"aten: the C++ core is not there ({cpu.absence})"
    refusal = _refusal(cpu.engine, z)
    return f"aten: {refusal}" if refusal else "cpu: the C++ core"


def _of_triton(z: Tensor) -> str:
    refusal = triton.refusal(z)
    if refusal:
        return f"triton: {refusal}"
    dtype = str(z.dtype).removeprefix("torch.")
    here = table.architecture(z.device.index or 0)
    wins = [key for key in table.WINNERS if key.architecture == here and key.dtype == dtype]
    if not table.measured():
        return "triton: no measurement says that it wins anywhere"
    return f"triton where it was measured to win on {here}: {len(wins)} kinds of call"


@contextmanager
def use(name: str) -> Iterator[Engine]:
    """Force one engine inside a ``with`` block; for tests and benchmarks.

    Parameters
    ----------
    name : str
        One of `ENGINES`.

    Yields
    ------
    Engine
        The engine in force.

    Raises
    ------
    ArgumentError
        No such engine, or it was not built.
    """
    global forced
    chosen = _named(name)
    before, forced = forced, chosen
    try:
        yield chosen
    finally:
        forced = before


def devices() -> list[torch.device]:
    """Give the devices that this process could run on.

    Returns
    -------
    list of torch.device
        The CPU, then an accelerator where torch has one.
    """
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    return found if accelerator is None else [*found, accelerator]
