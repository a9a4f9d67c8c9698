"""Tensors in the form that the kernels take."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from batchnorm.kernels.triton.plan import Plan, plan
from batchnorm.layout import classify


@lru_cache(maxsize=4096)
def _planned(shape: torch.Size, stride: tuple[int, ...], axis: int, itemsize: int) -> Plan | None:
    layout = classify(shape, stride, axis)
    if layout.kind == "strided":
        return None
    return plan(layout.kind, layout.n, layout.c, layout.s, itemsize)


def packed(z: Tensor, axis: int) -> tuple[Tensor, Plan]:
    """Give z packed, and how to go over it."""
    z = z.detach().resolve_neg()
    found = _planned(z.shape, z.stride(), axis, z.element_size())
    if found is None:
        z = z.contiguous()
        found = _planned(z.shape, z.stride(), axis, z.element_size())
    return z, found  # type: ignore[return-value]


def beside(t: Tensor | None, z: Tensor) -> Tensor | None:
    """Give ``t`` in the memory order and dtype of packed ``z``."""
    if t is None:
        return None
    t = t.detach()
    if t.dtype is z.dtype and not t.is_neg():
        same = zip(z.shape, t.stride(), z.stride(), strict=True)
        if all(n == 1 or have == want for n, have, want in same):
            return t
    return torch.empty_like(z).copy_(t)


def vector(v: Tensor | None) -> Tensor | None:
    """Give a vector without gaps, of any floating dtype: the kernels convert."""
    return None if v is None else v.detach().contiguous()
