"""Tensors in the form that the kernels take."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from batchnorm.kernels.triton.plan import Plan, kind_of, plan


def packed(z: Tensor, axis: int) -> tuple[Tensor, Plan]:
    """Give z packed, and how to go over it."""
    z = z.detach().resolve_neg()
    kind = kind_of(z, axis)
    if kind is None:
        # rid of its gaps, in the order that it has where kernels know that: y comes out so too
        dense = torch.empty_like(z)
        z = dense.copy_(z) if kind_of(dense, axis) else z.contiguous()
        kind = kind_of(z, axis)
    c, s = z.shape[axis], 1 if kind == "RC" else prod(z.shape[axis + 1 :])
    return z, plan(kind, z.numel() // (c * s), c, s, z.element_size())


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
