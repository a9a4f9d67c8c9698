"""One contract over every engine and instruction set: agreement with the float64 reference.

Tolerances. With unit round-off u of the accumulator (2^-24, or 2^-53), the statistics carry a few u, the centered
value one more, the affine map two, an activation up to four: 16 u relative to the size of the terms, for values of
order one. An output in half precision is rounded once more: half a unit of its own. Sums over m values of a gradient
carry at most m u in the worst case and about sqrt(m) u here; they are compared relative to the sum of magnitudes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import reference
from batchnorm.kernels import aten, cpu
from batchnorm.kernels.contract import ACTIVATIONS, PIECEWISE_LINEAR, Engine
from batchnorm.population import Tracking, commit

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ISAS = () if cpu.engine is None else tuple(cpu.info()["available_isas"])
ROUNDING = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-8, torch.float16: 2**-11}


# with caches that nothing fits, small tensors go the ways of large ones: past the caches, by team, in pieces
CORES = [f"cpu-{isa}{caches}" for isa in ISAS for caches in ("", "-small_caches")]


@pytest.fixture(params=["aten", *CORES], scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "aten":
        yield aten.engine
        return
    before = cpu._core.isa()
    _, isa, *small = request.param.split("-")
    cpu._core.select_isa(isa)
    if small:
        cpu._core.pretend_cache(2048, 8192)
    yield cpu.engine
    cpu._core.pretend_cache(0, 0)
    cpu._core.select_isa(before)


class Case(NamedTuple):
    z: Tensor
    dy: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    axis: int
    activation: str | None
    acc: torch.dtype


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


EPS = 1e-3
"""Large enough that a channel of two nearly equal values does not amplify rounding without bound."""


@settings(max_examples=60)
@given(case=cases(rows=2))
def test_forward_and_backward_agree_with_reference(engine: Engine, case: Case) -> None:
    _off_the_kinks(case, EPS)
    z, axis, acc, dtype = case.z, case.axis, case.acc, case.z.dtype
    y, mean, var, inv_std, saved = engine.forward(
        z, axis, case.gamma, case.beta, EPS, case.residual, case.activation, None
    )
    want, _, want_mean, want_var = reference.forward_training(
        _np(z), _np(case.gamma), _np(case.beta), EPS, channel_dim=axis, activation=case.activation,
        residual=_np(case.residual),
    )  # fmt: skip
    assert y.dtype == dtype
    assert y.shape == z.shape
    assert mean.dtype == var.dtype == inv_std.dtype == acc
    amplification = float(1 + np.abs(want_mean).max() / np.sqrt(want_var + EPS).min())
    _close(mean, want_mean, acc, acc)
    _close(var, want_var, acc, acc, 4)
    _close(y, want, dtype, acc, 4 * amplification)

    grads = engine.backward(
        case.dy,
        z,
        axis,
        mean,
        inv_std,
        case.gamma,
        case.beta,
        case.activation,
        saved,
        True,
        case.residual is not None,
    )
    dz, dgamma, dbeta, dresidual = reference.backward_training(
        _np(case.dy), _np(z), _np(case.gamma), _np(case.beta), EPS, channel_dim=axis, activation=case.activation,
        residual=_np(case.residual),
    )  # fmt: skip
    m = z.numel() // z.shape[axis]
    size = float(max(1.0, inv_std.max()))
    _close(grads.sum_dy / m, dbeta / m, acc, acc, 4 * amplification)
    _close(grads.sum_dy_zhat / m, dgamma / m, acc, acc, 16 * amplification)
    _close(grads.dz, dz, dtype, acc, 64 * size * amplification)
    assert grads.dz.dtype == dtype
    assert grads.dz.shape == z.shape
    if case.residual is None:
        assert grads.dresidual is None
    else:
        assert grads.dresidual is not None
        _close(grads.dresidual, dresidual, dtype, acc, 16 * amplification)


@settings(max_examples=40)
@given(case=cases(), in_place=st.booleans())
def test_inference_agrees_with_reference(engine: Engine, case: Case, in_place: bool) -> None:
    z, axis, acc = case.z, case.axis, case.acc
    c = z.shape[axis]
    mean, var = torch.linspace(-1, 1, c, dtype=acc), torch.linspace(0.5, 2, c, dtype=acc)
    inv_std = (var + 1e-5).rsqrt()
    want = reference.forward_inference(
        _np(z), _np(mean), _np(var), _np(case.gamma), _np(case.beta), 1e-5, channel_dim=axis,
        activation=case.activation, residual=_np(case.residual),
    )  # fmt: skip
    target = z.clone() if in_place else None
    source = z if target is None else target
    y = engine.normalize(
        source, axis, mean, inv_std, case.gamma, case.beta, case.residual, case.activation, out=target
    )
    if in_place:
        assert y is target
    _close(y, want, z.dtype, acc, 8)
    if case.residual is None:
        u = reference.forward_inference(
            _np(z), _np(mean), _np(var), _np(case.gamma), _np(case.beta), 1e-5, channel_dim=axis
        )
        if case.activation in (*PIECEWISE_LINEAR, "hardswish"):
            assume(min(np.abs(u - kink).min() for kink in (0.0, 6.0, 3.0, -3.0)) > 1e-5)
        grads = engine.backward(
            case.dy, z, axis, mean, inv_std, case.gamma, case.beta, case.activation, None, False, False
        )
        dz, dgamma, dbeta, _ = reference.backward_inference(
            _np(case.dy), _np(z), _np(mean), _np(var), _np(case.gamma), _np(case.beta), 1e-5, channel_dim=axis,
            activation=case.activation,
        )  # fmt: skip
        m = z.numel() // c
        _close(grads.dz, dz, z.dtype, acc, 16)
        _close(grads.sum_dy / m, dbeta / m, acc, acc, 16)
        _close(grads.sum_dy_zhat / m, dgamma / m, acc, acc, 16)


@settings(max_examples=40)
@given(case=cases(rows=2))
def test_the_parts_make_the_whole(engine: Engine, case: Case) -> None:
    """Statistics, normalization and the two halves of the backward give what the fused calls give."""
    _off_the_kinks(case, EPS)
    z, axis = case.z, case.axis
    y, mean, var, inv_std, saved = engine.forward(
        z, axis, case.gamma, case.beta, EPS, case.residual, case.activation, None
    )
    count, part_mean, part_m2 = engine.batch_statistics(z, axis, None)
    assert count.shape == ()
    assert int(count) == z.numel() // z.shape[axis]
    torch.testing.assert_close(part_mean, mean)
    torch.testing.assert_close(part_m2 / count, var)
    torch.testing.assert_close(
        engine.normalize(z, axis, mean, inv_std, case.gamma, case.beta, case.residual, case.activation), y
    )
    fused = engine.backward(
        case.dy,
        z,
        axis,
        mean,
        inv_std,
        case.gamma,
        case.beta,
        case.activation,
        saved,
        True,
        case.residual is not None,
    )
    sums = engine.backward_reduce(
        case.dy, z, axis, mean, inv_std, case.gamma, case.beta, case.activation, saved
    )
    torch.testing.assert_close(sums[0], fused.sum_dy)
    torch.testing.assert_close(sums[1], fused.sum_dy_zhat)
    dz, dresidual = engine.backward_input(
        case.dy, z, axis, mean, inv_std, case.gamma, case.beta, case.activation, saved, *sums, count,
        case.residual is not None,
    )  # fmt: skip
    loose = (
        {"rtol": 1e-2, "atol": 1e-2}
        if z.dtype in (torch.bfloat16, torch.float16)
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(dz, fused.dz, **loose)
    torch.testing.assert_close(dresidual, fused.dresidual)


def _tracking(c: int, acc: torch.dtype, momentum: float | None, correction: int, skip: bool) -> Tracking:
    generator = torch.Generator().manual_seed(3)
    return Tracking(
        torch.randn(c, generator=generator).to(acc),
        torch.rand(c, generator=generator).to(acc),
        torch.tensor(4),
        torch.tensor(1),
        torch.arange(c) % 3,
        momentum,
        correction,
        skip,
    )


@settings(max_examples=25)
@given(
    case=cases(rows=2),
    momentum=st.sampled_from([0.1, 0.0, 1.0, None]),
    correction=st.sampled_from([0, 1]),
    skip=st.booleans(),
    poison=st.sampled_from([None, float("nan"), float("inf"), 1e30]),
)
def test_running_statistics_move_as_population_says(
    engine: Engine, case: Case, momentum: float | None, correction: int, skip: bool, poison: float | None
) -> None:
    z, axis = case.z.clone(), case.axis
    if poison is not None:
        z.select(axis, 0)[...] = torch.where(torch.rand(z.select(axis, 0).shape) < 0.5, poison, 1.0).to(
            z.dtype
        )
    c = z.shape[axis]
    own, plain = (_tracking(c, case.acc, momentum, correction, skip) for _ in range(2))
    _, mean, var, _, _ = engine.forward(z, axis, case.gamma, case.beta, EPS, None, case.activation, own)
    commit(plain, z.numel() // c, mean, var)
    for have, want in zip(own[:5], plain[:5], strict=True):
        torch.testing.assert_close(have, want, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (3, 2, 0)])
def test_an_empty_batch_has_no_statistics_and_empty_gradients(engine: Engine, shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    c = shape[1]
    one = torch.ones(c)
    count, mean, m2 = engine.batch_statistics(z, 1, None)
    assert int(count) == 0
    assert mean.shape == m2.shape == (c,)
    assert engine.normalize(z, 1, one, one, one, one, None, "relu").shape == shape
    grads = engine.backward(z, z, 1, one, one, one, one, "relu", None, False, False)
    assert grads.dz.shape == shape
    torch.testing.assert_close(grads.sum_dy, torch.zeros(c))


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "NC"])
@pytest.mark.parametrize("offset", [1e3, 1e6, -1e6])
def test_a_large_mean_costs_no_more_than_rounding_of_the_mean(
    engine: Engine, layout: str, offset: float
) -> None:
    z = torch.randn(16, 8, 12, 12) + offset
    if layout == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    elif layout == "NC":
        z = z.transpose(0, 1).reshape(8, -1).t().contiguous()
    y, _, var, _, _ = engine.forward(z, 1, None, None, 1e-5, None, None, None)
    want, _, _, want_var = reference.forward_training(_np(z), eps=1e-5)
    # float32 holds the mean to offset * 2^-24, and the output is off by that over the deviation of about 1
    assert np.abs(y.double().numpy() - want).max() <= abs(offset) * 2**-24 * 1.2 + 1e-5
    np.testing.assert_allclose(var.double().numpy(), want_var, rtol=1e-5)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "NC"])
def test_a_constant_input_gives_beta(engine: Engine, layout: str) -> None:
    z = torch.full((4, 5, 40, 40), 1e8)
    z = {"NCHW": z, "channels_last": z.contiguous(memory_format=torch.channels_last), "NC": z.reshape(-1, 5)}[
        layout
    ]
    beta = torch.linspace(-1, 1, 5)
    y, mean, var, _, _ = engine.forward(z, 1, torch.ones(5), beta, 1e-5, None, None, None)
    assert torch.equal(mean, torch.full((5,), 1e8))
    assert torch.equal(var, torch.zeros(5))
    assert torch.equal(y.movedim(1, -1).reshape(-1, 5), beta.expand(y.numel() // 5, 5))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [1e30, 1e-30, 1e-18])
def test_extreme_magnitudes_stay_in_range(engine: Engine, size: float, channels_last: bool) -> None:
    z = torch.randn(8, 6, 9, 9)
    want, _, _, _ = reference.forward_training(_np(z), eps=0.0)
    big = (z.double() * size).float()
    if channels_last:
        big = big.contiguous(memory_format=torch.channels_last)
    y, _, _, inv_std, _ = engine.forward(big, 1, None, None, 0.0, None, None, None)
    np.testing.assert_allclose(y.double().numpy(), want, atol=2e-6, rtol=2e-6)
    dy = torch.randn(8, 6, 9, 9)
    mean = big.double().mean((0, 2, 3)).float()
    dz = engine.backward(dy, big, 1, mean, inv_std, None, None, None, None, True, False).dz
    want_dz = reference.backward_training(_np(dy), _np(z), eps=0.0)[0]
    np.testing.assert_allclose(dz.double().numpy() * size, want_dz, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", "tanh", None])
def test_nan_and_infinity_pass_through(engine: Engine, activation: str | None) -> None:
    z = torch.randn(3, 2, 20)
    z[1, 0, 3] = float("nan")
    z[2, 0, 5] = float("inf")
    y = engine.normalize(z, 1, torch.zeros(2), torch.ones(2), None, None, None, activation)
    assert torch.equal(y.isnan(), z.isnan())
    assert bool(y[:, 1].isfinite().all())
    y, mean, *_ = engine.forward(z, 1, None, None, 1e-5, None, activation, None)
    assert not bool(mean[0].isfinite())
    assert bool(y[:, 0].isnan().any())
    assert bool(y[:, 1].isfinite().all())
