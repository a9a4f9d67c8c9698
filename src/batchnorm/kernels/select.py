"""Which engine serves a tensor, and why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from batchnorm.errors import ArgumentError
from batchnorm.kernels import aten, cpu
from batchnorm.kernels import torch as own
from batchnorm.kernels.contract import Engine

ENGINES: dict[str, Engine | None] = {"cpu": cpu.engine, "aten": aten.engine, "torch": own.engine}
"""Engines by name; None where one was not built."""


def _forced(name: str) -> Engine | None:
    if name == "":
        return None
    if name not in ENGINES:
        raise ArgumentError(
            f"BATCHNORM_ENGINE={name!r} names no engine.",
            mend=f"one of {', '.join(sorted(ENGINES))}, or unset it.",
        )
    return ENGINES[name]


_override: Engine | None = _forced(os.environ.get("BATCHNORM_ENGINE", ""))


def select(z: Tensor) -> Engine:
    """Give the fastest engine that is right for a tensor.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.

    Returns
    -------
    Engine
        The C++ core for CPU tensors of a dtype it knows, else torch operations.
    """
    if _override is not None:
        return _override
    if by_torch(z):
        return own.engine
    if (
        cpu.engine is not None
        and z.is_cpu
        and z.dtype in cpu.DTYPES
        and z.dim() <= cpu.MOST_AXES
        and not z.is_neg()
    ):
        return cpu.engine
    return aten.engine


def by_torch(z: Tensor) -> bool:
    """Whether torch's own batch norm serves a tensor, as operations that torch differentiates and compilers see.

    Parameters
    ----------
    z : Tensor
        The input of batch normalization.

    Returns
    -------
    bool
        ``select(z)`` is the engine `torch`, asked in a way that a compiler can follow.
    """
    return not (z.is_cpu or z.is_meta) if _override is None else _override is own.engine


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
    if _override is not None:
        return f"{_override.name}: forced"
    if z.device.type != "cpu":
        return "torch: torch's own batch norm, with our guard around it"
    if cpu.engine is None:
        return f"aten: the C++ core is not there ({cpu.absence})"
    if z.dtype not in cpu.DTYPES:
        return f"aten: the C++ core does not know {z.dtype}"
    if z.dim() > cpu.MOST_AXES:
        return f"aten: the C++ core takes tensors of up to {cpu.MOST_AXES} axes"
    if z.is_neg():
        return "aten: the values in memory have the other sign"
    return "cpu: the C++ core"


@contextmanager
def use(name: str) -> Iterator[Engine]:
    """Force one engine inside a ``with`` block; for tests and benchmarks.

    Parameters
    ----------
    name : str
        ``"cpu"`` or ``"aten"``.

    Yields
    ------
    Engine
        The engine in force.

    Raises
    ------
    ArgumentError
        No such engine, or it was not built.
    """
    global _override
    chosen = _forced(name)
    if chosen is None:
        raise ArgumentError(f"use: the engine {name!r} is not there.", why=str(cpu.absence))
    before, _override = _override, chosen
    try:
        yield chosen
    finally:
        _override = before


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
