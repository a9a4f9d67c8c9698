"""What stands for a value while a forward is followed with symbols."""

from __future__ import annotations

import dis
import operator
import sys
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import fx, nn


class Proxy(fx.Proxy):
    """A proxy that looks up how many values are unpacked from it once for each place in the code."""

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = _unpacked(frame.f_code, frame.f_lasti)
        return iter([operator.getitem(self, i) for i in range(count)]) if count else self.tracer.iter(self)


@cache
def _unpacked(code: types.CodeType, place: int) -> int:
    step = next((step for step in dis.get_instructions(code) if step.offset == place), None)
    return int(step.argval) if step is not None and step.opname == "UNPACK_SEQUENCE" else 0


class TensorProxy(Proxy):
    """A proxy that stands for a tensor."""


class ParameterProxy(Proxy):
    """A parameter or buffer read by name; its shape, dtype and device are known."""

    _KNOWN = frozenset(["shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad"])
    _KNOWN_METHODS = frozenset(
        ["size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_contiguous"]
    )

    def __init__(self, tracer: fx.Tracer, node: fx.Node, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__["tensor"] = tensor

    def __getattr__(self, name: str) -> Any:
        if name in self._KNOWN or name in self._KNOWN_METHODS:
            return getattr(self.__dict__["tensor"], name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.__dict__["tensor"])


def claim(value: Any) -> type | None:
    """The type that a symbol stands for; None for everything else."""
    kind = type(value)
    if issubclass(kind, ParameterProxy):
        return nn.Parameter if isinstance(value.__dict__["tensor"], nn.Parameter) else torch.Tensor
    return torch.Tensor if issubclass(kind, TensorProxy) else None
