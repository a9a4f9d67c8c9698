"""Tensors with canaries: memory around every tensor that a kernel sees, which it must neither use nor change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

PAD = 64


class Canaries:
    """Makes tensors inside larger memory, filled with what spoils any result, and looks at it afterwards."""

    def __init__(self) -> None:
        self._memories: list[Tensor] = []

    def room(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        memory = torch.full((reach + 2 * PAD,), self._poison(dtype), dtype=dtype)
        self._memories.append(memory)
        return memory.as_strided(size, stride, PAD)

    def around(self, t: Tensor | None) -> Tensor | None:
        """Give a copy of a tensor with canaries around it; also in the gaps of one with strides."""
        return None if t is None else self.room(t.shape, t.stride(), t.dtype).copy_(t)

    def check(self) -> None:
        for memory in self._memories:
            for part in (memory[:PAD], memory[-PAD:]):
                poison = self._poison(memory.dtype)
                intact = part.isnan() if poison != poison else part == poison
                assert bool(intact.all()), "a kernel wrote outside its tensor"

    @staticmethod
    def _poison(dtype: torch.dtype) -> float | int:
        return float("nan") if dtype.is_floating_point else 0xA5


@contextmanager
def canaries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Canaries]:
    """Give every tensor that is allocated in the block canaries, and check them at its end."""
    made = Canaries()

    def empty(*size: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return made.room(shape, plain(shape, device="meta").stride(), dtype)

    def empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return made.room(t.shape, like(t, device="meta").stride(), dtype or t.dtype)

    plain, like = torch.empty, torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr("batchnorm.kernels.triton.engine.torch.empty", empty)
        patch.setattr("batchnorm.kernels.triton.engine.torch.empty_like", empty_like)
        yield made
    made.check()
