"""What the contract of engines is tried on, and how near an answer must be.

Tolerances. With unit round-off u of the accumulator (2^-24, or 2^-53), the statistics carry a few u, the centered
value one more, the affine map two, an activation up to four: 16 u relative to the size of the terms, for values of
order one. An output in half precision is rounded once more: half a unit of its own. Sums over m values of a gradient
carry at most m u in the worst case and about sqrt(m) u here; they are compared relative to the sum of magnitudes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import cpu, triton
from batchnorm.kernels.activations import ACTIVATIONS, PIECEWISE_LINEAR
from batchnorm.kernels.contract import Engine, Norm
from batchnorm.population import Tracking

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ISAS = () if cpu.engine is None else tuple(cpu.info()["available_isas"])
ROUNDING = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# with caches that nothing fits, small tensors go the ways of large ones: past the caches, by team, in pieces
CORES = [f"cpu-{isa}{caches}" for isa in ISAS for caches in ("", "-small_caches")]

EPS = 1e-3
"""Large enough that a channel of two nearly equal values does not amplify rounding without bound."""


TRITON = {
    "triton": {},
    # nothing is held on the chip, and small tensors are cut into strips and splits as large ones are
    "triton-swept": {"HELD": 0, "TILE": 1024, "FEWEST_ROWS": 4, "PROGRAMS": 16},
    "triton-planes": {"HELD": 0, "TILE": 512, "FEWEST_ROWS": 1, "PROGRAMS": 32, "LARGE_PLANE": 2},
}
"""Ways through `batchnorm.kernels.triton.plan`: what a program does at once."""


def _knows(engine: Engine, case: Case) -> None:
    assume(engine.name != "triton" or case.z.dtype in triton.DTYPES)


def _rounds_once(engine: Engine, case: Case) -> None:
    _knows(engine, case)
    # in half precision torch rounds after the normalization, after the addition and after the activation
    half = case.z.dtype in (torch.bfloat16, torch.float16)
    assume(engine.name != "torch" or not half or (case.activation is None and case.residual is None))


def _backward_norm(norm: Norm) -> Norm:
    """What a backward is given: whether there was a residual, and not the residual."""
    return norm._replace(residual=None, added=norm.residual is not None)


class Case(NamedTuple):
    z: Tensor
    dy: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    axis: int
    activation: str | None
    acc: torch.dtype

    @property
    def norm(self) -> Norm:
        return Norm(self.axis, EPS, self.gamma, self.beta, self.residual, self.activation)


def _arrange(shape: tuple[int, ...], order: str, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
    if order == "channels_last" and len(shape) > 2:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if order == "strided":
        wide = torch.zeros([2 * n for n in shape], dtype=dtype)
        view = wide[tuple(slice(0, 2 * n, 2) for n in shape)]
        return view.copy_(values)
    if order == "batch_strided":
        return torch.cat([values, values], dim=1)[:, : shape[1]]
    return values


@st.composite
def cases(draw: st.DrawFn, rows: int = 1) -> Case:
    kind = draw(st.sampled_from(["NC", "NCL", "NLC", "NCHW", "NCDHW"]))
    n, c = draw(st.integers(rows, 9)), draw(st.integers(1, 40))
    side = draw(st.integers(1, 9))
    shape, axis = {
        "NC": ((n * side, c), 1),
        "NCL": ((n, c, side), 1),
        "NLC": ((n, side, c), 2),
        "NCHW": ((n, c, side, draw(st.integers(1, 9))), 1),
        "NCDHW": ((n, c, side, 2, 3), 1),
    }[kind]
    dtype = draw(st.sampled_from(DTYPES))
    activation = draw(st.sampled_from([None, *ACTIVATIONS]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    order = (
        draw(st.sampled_from(["contiguous", "channels_last", "strided", "batch_strided"]))
        if axis == 1
        else "contiguous"
    )
    z = _arrange(shape, order, generator, dtype) * draw(st.sampled_from([1.0, 3.0]))
    dy = _arrange(shape, draw(st.sampled_from(["contiguous", order])), generator, dtype)
    residual = (
        _arrange(shape, draw(st.sampled_from(["contiguous", order])), generator, dtype)
        if draw(st.booleans())
        else None
    )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    gamma = beta = None
    if draw(st.booleans()):
        gamma = (torch.rand(c, generator=generator, dtype=acc) + 0.5) * draw(st.sampled_from([1.0, -1.0]))
        beta = torch.randn(c, generator=generator, dtype=acc)
    return Case(z, dy, residual, gamma, beta, axis, activation, acc)


def _np(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy()


def _pre_activation(case: Case, eps: float) -> np.ndarray:
    u, *_ = reference.forward_training(
        _np(case.z), _np(case.gamma), _np(case.beta), eps, channel_dim=case.axis, residual=_np(case.residual)
    )
    return u


def _off_the_kinks(case: Case, eps: float) -> None:
    # where rounding decides the side of a kink, both sides are right
    if case.activation in (*PIECEWISE_LINEAR, "hardswish"):
        u = _pre_activation(case, eps)
        near = min(np.abs(u - kink).min() for kink in (0.0, 6.0, 3.0, -3.0))
        assume(near > 1e-5)


def _close(have: Tensor, want: np.ndarray, dtype: torch.dtype, acc: torch.dtype, scale: float = 1.0) -> None:
    tolerance = 16 * ROUNDING[acc] * scale + (ROUNDING[dtype] if dtype != acc else 0.0)
    error = np.abs(have.double().numpy() - want) / (1 + np.abs(want))
    # half precision also loses what lies below its smallest normal number
    assert error.max(initial=0) <= tolerance + (2**-24 if dtype == torch.float16 else 0), error.max()


def _tracking(c: int, acc: torch.dtype, momentum: float | None, correction: int, skip: bool) -> Tracking:
    generator = torch.Generator().manual_seed(3)
    return Tracking(
        torch.randn(c, generator=generator).to(acc),
        torch.rand(c, generator=generator).to(acc),
        torch.tensor(4),
        momentum,
        correction,
        skip,
    )
