"""Tensors with canaries: memory around every tensor that a kernel sees, which it must neither use nor change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from batchnorm.kernels import triton as ours
from batchnorm.kernels.contract import Engine
from batchnorm.kernels.triton import plan as plans

PAD = 64


class Canaries:
    """Makes tensors inside larger memory, filled with what spoils any result, and looks at it afterwards."""

    def __init__(self) -> None:
        self._memories: list[tuple[Tensor, Tensor]] = []

    def room(self, size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        reach = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        memory = torch.full((reach + 2 * PAD,), self._poison(dtype), dtype=dtype)
        outside = torch.ones(memory.shape, dtype=torch.bool)
        outside.as_strided(size, stride, PAD).fill_(False)
        self._memories.append((memory, outside))
        return memory.as_strided(size, stride, PAD)

    def around(self, t: Tensor | None) -> Tensor | None:
        """Give a copy of a tensor with canaries around it; also in the gaps of one with strides."""
        if t is None:
            return None
        once = [1 if s == 0 else n for n, s in zip(t.shape, t.stride(), strict=True)]  # of an expanded one
        held = t.as_strided(once, t.stride(), t.storage_offset())
        return self.room(once, t.stride(), t.dtype).copy_(held).expand(t.shape)

    def check(self) -> None:
        for memory, outside in self._memories:
            part, poison = memory[outside], self._poison(memory.dtype)
            intact = part.isnan() if poison != poison else part == poison
            assert bool(intact.all()), "a kernel wrote outside its tensor"

    @staticmethod
    def _poison(dtype: torch.dtype) -> float | int:
        return float("nan") if dtype.is_floating_point else dtype is torch.bool or 0x65


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


class Guarded:
    """An engine whose every call sees tensors with canaries around them, and changes none but those it may."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.fuses_masks = engine.name, engine.fuses_masks

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._engine, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            copies: dict[int, tuple[Tensor, Tensor]] = {}  # one of each tensor: out may be z itself
            given, spec = tree_flatten((args, kwargs))
            # infinity less infinity is meant
            with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch, canaries(patch) as around:

                def guarded(leaf: Any) -> Any:
                    if not isinstance(leaf, Tensor):
                        return leaf
                    if id(leaf) not in copies:
                        copies[id(leaf)] = leaf, around.around(leaf)
                    return copies[id(leaf)][1]

                args, kwargs = tree_unflatten([guarded(leaf) for leaf in given], spec)
                result = method(*args, **kwargs)
            tracking = args[2] if name == "forward" else None
            written = {id(t) for t in (*(tracking or ())[:3], kwargs.get("out"))}
            for leaf, copy in copies.values():
                if id(copy) in written:
                    leaf.copy_(copy)
                else:
                    torch.testing.assert_close(copy, leaf, rtol=0, atol=0, equal_nan=True)
            back = {id(copy): leaf for leaf, copy in copies.values()}
            return tree_map(lambda leaf: back.get(id(leaf), leaf), result)

        return call


@contextmanager
def interpreted(**sizes: int) -> Iterator[Guarded]:
    """Give the Triton engine in triton's interpreter, guarded, with other sizes of what a program does.

    The interpreter cuts float32 to bfloat16; here it rounds to the nearest, as a GPU does.
    """
    pytest.importorskip("triton")
    if not ours.interpreted():
        pytest.skip("on a GPU `batchnorm bench --gpu` checks the kernels")
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            near = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(near.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
        for name, size in sizes.items():
            patch.setattr(plans, name, size)
        plans.plan.cache_clear()
        engine, reason = ours.load()
        assert engine is not None, reason
        yield Guarded(engine)
    plans.plan.cache_clear()
