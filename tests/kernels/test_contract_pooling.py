"""What the engines give to be merged over ranks: statistics and sums in float64, masked or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract_cases import EPS, ROUNDING, Case, _knows, _np, cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchnorm import reference
from batchnorm.kernels.contract import Engine, Moments, Norm


@settings(max_examples=30)
@given(case=cases(rows=2), offset=st.sampled_from([0.0, 1e4]))
def test_statistics_and_sums_in_float64_are_not_rounded(engine: Engine, case: Case, offset: float) -> None:
    """What pooling needs: at a mean of 1e4 deviations, float32 would be off by 4e-4 of one."""
    _knows(engine, case)
    z = (case.z.double() + offset).to(case.z.dtype)
    count, mean, m2 = engine.batch_statistics(z, case.axis, dtype=torch.float64)
    assert count.dtype == mean.dtype == m2.dtype == torch.float64
    _, _, want_mean, want_var = reference.forward_training(_np(z), eps=EPS, channel_dim=case.axis)
    m = z.numel() // z.shape[case.axis]
    # sums about a center in the accumulator carry about sqrt(m) of its roundings, those in float64 m of theirs
    bound = 4 * m**0.5 * ROUNDING[case.acc] * np.sqrt(want_var) + m * 2**-53 * np.abs(want_mean)
    assert (np.abs(mean.numpy() - want_mean) <= bound).all()
    np.testing.assert_allclose(
        m2.numpy() / m, want_var, rtol=8 * m**0.5 * ROUNDING[case.acc], atol=(m * 2**-53 * offset) ** 2
    )
    sums = engine.backward_reduce(
        case.dy, case.z, Norm(case.axis, EPS), Moments(mean, mean.abs() + 1), None, dtype=torch.float64
    )
    assert sums[0].dtype == sums[1].dtype == torch.float64


@settings(max_examples=60, deadline=None)
@given(
    case=cases(rows=4),
    mean=st.sampled_from([0.0, 1e4, -3e5]),
    std=st.sampled_from([1.0, 1e-5]),
    fill=st.sampled_from([None, 0.1, 0.6, 1.0]),
    whole_rows=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_ranks_merge_is_summed_in_float64_masked_or_not(
    engine: Engine, case: Case, mean: float, std: float, fill: float | None, whole_rows: bool, seed: int
) -> None:
    """Sums of float32 are off by 1e-6 and more of the variance here."""
    _knows(engine, case)
    assume(engine.name != "triton" or fill is not None)  # its own sums have their own test
    assume(case.z.dtype in (torch.float32, torch.bfloat16, torch.float16))
    z = (case.z.double() * std + mean).to(case.z.dtype)
    assume(bool(torch.isfinite(z).all()))
    mask = None
    if fill is not None:
        shape = [1 if a == case.axis or (a and whole_rows) else n for a, n in enumerate(z.shape)]
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < fill
        z = torch.where(mask, z, float("nan"))
    keep = torch.ones_like(z, dtype=torch.bool) if mask is None else mask.expand_as(z)
    count, found_mean, found_m2 = engine.batch_statistics(z, case.axis, mask, torch.float64)
    m = int(keep.sum()) // z.shape[case.axis]
    assert int(count) == m
    rows = z.double().movedim(case.axis, 0)[keep.movedim(case.axis, 0)].view(z.shape[case.axis], m)
    if not m:
        assert not found_mean.any()
        assert not found_m2.any()
        return
    want_mean, want_m2 = rows.mean(1), (rows - rows.mean(1, keepdim=True)).square().sum(1)
    # about a center among the data no sum is larger than m times the range; each addition rounds once in float64
    reach, u = rows.max(1).values - rows.min(1).values, m * 2.0**-52
    assert ((found_mean - want_mean).abs() <= u * (reach + rows.abs().amax(1))).all()
    off = u * rows.abs().amax(1)  # of the mean of the two-sweep engines, whose m2 has its square besides
    assert ((found_m2 - want_m2).abs() <= 4 * u * m * reach.square() + 2 * m * off.square()).all()


@pytest.mark.parametrize("masked", [False, True])
def test_positions_are_counted_where_a_slice_has_no_channels(engine: Engine, masked: bool) -> None:
    mask = torch.arange(20).view(4, 1, 5) % 4 > 0
    count, mean, m2 = engine.batch_statistics(
        torch.zeros(4, 0, 5), 1, mask if masked else None, torch.float64
    )
    assert int(count) == (15 if masked else 20)
    assert mean.shape == m2.shape == (0,)
