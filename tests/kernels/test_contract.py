"""One contract over every engine and instruction set: agreement with the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract_cases import (
    EPS,
    TRITON,
    Case,
    _backward_norm,
    _close,
    _knows,
    _np,
    _off_the_kinks,
    _rounds_once,
    _tracking,
    cases,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import reference
from batchnorm.errors import ArgumentError
from batchnorm.kernels.activations import PIECEWISE_LINEAR
from batchnorm.kernels.contract import Engine, Moments, Norm
from batchnorm.population import commit

ACCURACY = "torch's statistics lose digits, and range, where the mean or the values are extreme"
EXEMPT = {
    ("torch", "test_a_large_mean_costs_no_more_than_rounding_of_the_mean"): ACCURACY,
    ("torch", "test_a_constant_input_gives_beta"): ACCURACY,
    ("torch", "test_extreme_magnitudes_stay_in_range"): ACCURACY,
    **{
        (name, "test_extreme_magnitudes_stay_in_range"): "squares are taken in float32, and leave its range"
        for name in TRITON
    },
}
"""What an engine does not promise, by name and with the reason; docs/gpu.md says the same."""


@pytest.fixture(autouse=True)
def _exempt(request: pytest.FixtureRequest) -> None:
    params = getattr(request.node, "callspec", None)
    reason = EXEMPT.get((params and params.params.get("engine"), request.node.originalname))
    if reason is not None:
        pytest.skip(reason)


@settings(max_examples=60)
@given(case=cases(rows=2))
def test_forward_and_backward_agree_with_reference(engine: Engine, case: Case) -> None:
    _off_the_kinks(case, EPS)
    _rounds_once(engine, case)
    z, axis, acc, dtype = case.z, case.axis, case.acc, case.z.dtype
    y, mean, var, inv_std, saved = engine.forward(z, case.norm, None)
    moments, after = Moments(mean, inv_std), _backward_norm(case.norm)
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

    grads = engine.backward(case.dy, z, after, moments, saved, True, case.residual is not None)
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
    _rounds_once(engine, case)
    z, axis, acc = case.z, case.axis, case.acc
    c = z.shape[axis]
    mean, var = torch.linspace(-1, 1, c, dtype=acc), torch.linspace(0.5, 2, c, dtype=acc)
    moments = Moments(mean, (var + 1e-5).rsqrt())
    want = reference.forward_inference(
        _np(z), _np(mean), _np(var), _np(case.gamma), _np(case.beta), 1e-5, channel_dim=axis,
        activation=case.activation, residual=_np(case.residual),
    )  # fmt: skip
    target = z.clone() if in_place else None
    source = z if target is None else target
    y, _ = engine.normalize(source, case.norm, moments, out=target)
    if in_place:
        assert y is target
    _close(y, want, z.dtype, acc, 8)
    if case.residual is None:
        u = reference.forward_inference(
            _np(z), _np(mean), _np(var), _np(case.gamma), _np(case.beta), 1e-5, channel_dim=axis
        )
        if case.activation in (*PIECEWISE_LINEAR, "hardswish"):
            assume(min(np.abs(u - kink).min() for kink in (0.0, 6.0, 3.0, -3.0)) > 1e-5)
        grads = engine.backward(case.dy, z, case.norm, moments, None, False, False)
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
    _rounds_once(engine, case)
    z, axis = case.z, case.axis
    y, mean, var, inv_std, saved = engine.forward(z, case.norm, None)
    moments, after = Moments(mean, inv_std), _backward_norm(case.norm)
    count, part_mean, part_m2 = engine.batch_statistics(z, axis)
    assert count.shape == ()
    assert int(count) == z.numel() // z.shape[axis]
    torch.testing.assert_close(part_mean, mean)
    torch.testing.assert_close(part_m2 / count.to(part_m2.dtype), var)
    part_y, part_saved = engine.normalize(z, case.norm, moments, save=True)
    torch.testing.assert_close(part_y, y)
    assert (part_saved is None) == (saved is None) == (not case.norm.needs_saved)
    fused = engine.backward(case.dy, z, after, moments, saved, True, case.residual is not None)
    sums = engine.backward_reduce(case.dy, z, after, moments, part_saved)
    torch.testing.assert_close(sums[0], fused.sum_dy)
    torch.testing.assert_close(sums[1], fused.sum_dy_zhat)
    dz, dresidual = engine.backward_input(
        case.dy, z, after, moments, part_saved, sums, count, case.residual is not None
    )
    loose = (
        {"rtol": 1e-2, "atol": 1e-2}
        if z.dtype in (torch.bfloat16, torch.float16)
        else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(dz, fused.dz, **loose)
    torch.testing.assert_close(dresidual, fused.dresidual)


@settings(max_examples=30)
@given(case=cases(rows=2))
def test_a_backward_without_what_the_forward_saved_is_refused_where_it_is_needed(
    engine: Engine, case: Case
) -> None:
    _knows(engine, case)
    after, moments = (
        _backward_norm(case.norm),
        Moments(*(torch.ones(case.z.shape[case.axis], dtype=case.acc),) * 2),
    )
    one = torch.ones_like(moments.mean)
    calls = (
        lambda: engine.backward_reduce(case.dy, case.z, after, moments, None),
        lambda: engine.backward_input(
            case.dy, case.z, after, moments, None, (one, one), torch.tensor(2.0), False
        ),
        lambda: engine.backward(case.dy, case.z, after, moments, None, True, False),
    )
    for call in calls:
        if case.norm.needs_saved:
            with pytest.raises(ArgumentError, match="what the forward saved"):
                call()
        else:
            call()


@settings(max_examples=60)
@given(
    case=cases(rows=1),
    fill=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_masked_value_never_matters_and_0_comes_out_of_it(
    engine: Engine, case: Case, fill: float, seed: int, data: st.DataObject
) -> None:
    _rounds_once(engine, case)
    z, axis, norm = case.z, case.axis, case.norm
    c = z.shape[axis]
    spread = [1 if a == axis else n for a, n in enumerate(z.shape)]
    kind = data.draw(st.sampled_from(["positions", "samples", "one", "lengths"]))
    generator = torch.Generator().manual_seed(seed)
    if kind == "samples":
        mask = torch.rand([spread[0]] + [1] * (z.dim() - 1), generator=generator) < fill
    elif kind == "one":
        mask = torch.zeros(spread, dtype=torch.bool)
        if mask.numel():
            mask.view(-1)[seed % mask.numel()] = True
    elif kind == "lengths":
        order = torch.arange(mask_size := int(np.prod(spread))).view(spread)
        mask = order % max(1, mask_size // spread[0]) < fill * (mask_size // spread[0])
    else:
        mask = torch.rand(spread, generator=generator) < fill
    keep = mask.expand(spread).expand(z.shape)
    whole = mask.expand(spread)
    m = int(whole.sum())

    def rows(t: Tensor) -> Tensor:
        """The kept values, channels last."""
        return t.movedim(axis, -1)[whole.squeeze(axis)]

    def poison(t: Tensor | None) -> Tensor | None:
        bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30], dtype=torch.float64)
        spoiled = bad[torch.arange(z.numel()) % 4].view(z.shape).to(z.dtype)
        return None if t is None else torch.empty_like(t).copy_(torch.where(keep, t, spoiled))

    z_, residual_, dy_ = map(poison, (z, case.residual, case.dy))
    statistics = engine.batch_statistics(z_, axis, mask)
    assert int(statistics.count) == m
    if m == 0:
        assert torch.equal(statistics.mean, torch.zeros(c, dtype=case.acc))
        assert torch.equal(statistics.m2, torch.zeros(c, dtype=case.acc))
    else:
        kept = _np(rows(z))
        scale = float(1 + np.abs(kept).max()) ** 2
        _close(statistics.mean, kept.mean(0), case.acc, case.acc, 4 * scale)
        _close(statistics.m2 / m, kept.var(0), case.acc, case.acc, 8 * scale)
    # any moments will do: pooled ones are not this tensor's own
    moments = Moments(
        torch.linspace(-0.5, 0.5, c, dtype=case.acc), torch.linspace(0.5, 1.5, c, dtype=case.acc)
    )
    y, saved = engine.normalize(z_, norm._replace(residual=residual_), moments, mask=mask, save=True)
    assert y.dtype == z.dtype
    assert torch.equal(y[~keep], torch.zeros_like(y[~keep]))
    plain, plain_saved = engine.normalize(z, norm, moments, save=True)
    torch.testing.assert_close(y[keep], plain[keep])
    after = _backward_norm(norm)
    sums = engine.backward_reduce(dy_, z_, after, moments, saved, mask=mask)
    # the same with plain tensors: a gradient of 0 adds nothing to a sum
    clean = torch.where(keep, case.dy, 0)
    want = engine.backward_reduce(clean, z, after, moments, plain_saved)
    loose = {"rtol": 1e-4, "atol": 1e-3} if case.acc == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for have, wanted in zip(sums, want, strict=True):
        torch.testing.assert_close(have, wanted, **loose)
    count = torch.tensor(float(m) if m > 1 else float("inf"), dtype=torch.float64)
    added = case.residual is not None
    dz, dresidual = engine.backward_input(dy_, z_, after, moments, saved, want, count, added, mask=mask)
    want_dz, want_dresidual = engine.backward_input(clean, z, after, moments, plain_saved, want, count, added)
    torch.testing.assert_close(dz[keep], want_dz[keep])
    assert torch.equal(dz[~keep], torch.zeros_like(dz[~keep]))
    if added:
        assert dresidual is not None
        torch.testing.assert_close(dresidual[keep], want_dresidual[keep])
        assert torch.equal(dresidual[~keep], torch.zeros_like(dresidual[~keep]))
    else:
        assert dresidual is None


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
    _knows(engine, case)
    z, axis = case.z.clone(), case.axis
    if poison is not None:
        z.select(axis, 0)[...] = torch.where(torch.rand(z.select(axis, 0).shape) < 0.5, poison, 1.0).to(
            z.dtype
        )
    c = z.shape[axis]
    own, plain = (_tracking(c, case.acc, momentum, correction, skip) for _ in range(2))
    _, mean, var, _, _ = engine.forward(z, case.norm._replace(residual=None), own)
    commit(plain, z.numel() // c, mean, var)
    for have, want in zip(own[:2], plain[:2], strict=True):
        # what is propagated ruins a statistic: whether as infinity or NaN is the arithmetic's affair
        ruined = [torch.where(t.isfinite(), t, torch.nan) for t in (have, want)]
        torch.testing.assert_close(*ruined, equal_nan=True)
    assert own[2:] == plain[2:]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (3, 2, 0)])
def test_an_empty_batch_has_no_statistics_and_empty_gradients(engine: Engine, shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    c = shape[1]
    one = torch.ones(c)
    count, mean, m2 = engine.batch_statistics(z, 1)
    assert int(count) == 0
    assert mean.shape == m2.shape == (c,)
    norm, moments = Norm(1, EPS, one, one, None, "relu"), Moments(one, one)
    assert engine.normalize(z, norm, moments)[0].shape == shape
    grads = engine.backward(z, z, norm, moments, None, False, False)
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
    y, _, var, _, _ = engine.forward(z, Norm(1, 1e-5), None)
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
    y, mean, var, _, _ = engine.forward(z, Norm(1, 1e-5, torch.ones(5), beta), None)
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
    y, _, _, inv_std, _ = engine.forward(big, Norm(1, 0.0), None)
    np.testing.assert_allclose(y.double().numpy(), want, atol=2e-6, rtol=2e-6)
    dy = torch.randn(8, 6, 9, 9)
    mean = big.double().mean((0, 2, 3)).float()
    dz = engine.backward(dy, big, Norm(1, 0.0), Moments(mean, inv_std), None, True, False).dz
    want_dz = reference.backward_training(_np(dy), _np(z), eps=0.0)[0]
    np.testing.assert_allclose(dz.double().numpy() * size, want_dz, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu", "tanh", None])
def test_nan_and_infinity_pass_through(engine: Engine, activation: str | None) -> None:
    z = torch.randn(3, 2, 20)
    z[1, 0, 3] = float("nan")
    z[2, 0, 5] = float("inf")
    norm = Norm(1, 1e-5, activation=activation)
    y, _ = engine.normalize(z, norm, Moments(torch.zeros(2), torch.ones(2)))
    assert torch.equal(y.isnan(), z.isnan())
    assert bool(y[:, 1].isfinite().all())
    y, mean, *_ = engine.forward(z, norm, None)
    assert not bool(mean[0].isfinite())
    assert bool(y[:, 0].isnan().any())
    assert bool(y[:, 1].isfinite().all())
