"""What only the C++ engine promises: the same bits for any number of threads, and accuracy on every path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm.kernels import aten, cpu
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.kernels.contract import Moments, Norm
from batchnorm.kernels.select import select
from batchnorm.population import Tracking

pytestmark = pytest.mark.skipif(cpu.engine is None, reason=f"the C++ core is not there: {cpu.absence}")

# every path through the core: planes by channel and by team, in pieces and in runs; columns of short planes, rows,
# and rows side by side
SHAPES = [
    (2, 3, 70, 70),
    (3, 2, 300, 300),
    (40, 64, 8, 8),
    (300, 8, 3, 3),
    (17, 33, 7, 7),
    (65, 48, 12, 12),
    (2, 1, 257, 255),
]
ROWS = [(70000, 3), (4096, 65), (129, 1024), (1000, 513), (64, 128)]
# large enough that outputs go past the caches: whole vectors and not, runs whose last lot is no whole one, pieces
STREAMED = [
    (33, 171, 14, 14),
    (65, 333, 7, 7),
    (41, 29, 31, 29),
    (6, 20, 96, 96),
    (3, 7, 241, 251),
    (2600, 3, 17, 9),
    (1100, 1027),
    (300000, 5),
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    cpu._core.pretend_cache(0, 0)


def _everything(z: torch.Tensor, dy: torch.Tensor, residual: torch.Tensor | None) -> list[torch.Tensor]:
    c = z.shape[1]
    gamma, beta = torch.linspace(0.5, 1.5, c), torch.linspace(-1, 1, c)
    tracking = Tracking(torch.zeros(c), torch.ones(c), torch.tensor(0))
    norm = Norm(1, 1e-5, gamma, beta, residual, "relu")
    y, mean, var, inv_std, saved = cpu.engine.forward(z, norm, tracking)
    added = residual is not None
    after = norm._replace(residual=None, added=added)
    grads = cpu.engine.backward(dy, z, after, Moments(mean, inv_std), saved, True, added)
    found = [y, mean, var, inv_std, *grads, tracking.running_mean, tracking.running_var]
    return [t for t in found if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES + ROWS + STREAMED, ids=str)
def test_any_number_of_threads_and_any_caches_give_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, threads: None
) -> None:
    layouts = [torch.contiguous_format, torch.channels_last] if len(shape) == 4 else [torch.contiguous_format]
    for layout in layouts:
        z, dy, residual = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
        for extra in (None, residual):
            results = []
            for count, caches in (
                (1, (0, 0)),
                (2, (0, 0)),
                (3, (0, 0)),
                (1, (4096, 32768)),
                (3, (4096, 32768)),
            ):
                torch.set_num_threads(count)
                cpu._core.pretend_cache(*caches)
                results.append(_everything(z, dy, extra))
            for other in results[1:]:
                for have, want in zip(other, results[0], strict=True):
                    assert torch.equal(have, want)


def test_parts_of_the_core_give_the_bits_of_the_fused_call() -> None:
    z = torch.randn(9, 20, 30, 30)
    norm = Norm(1, 1e-5, activation="relu")
    y, mean, _, inv_std, _ = cpu.engine.forward(z, norm, None)
    assert torch.equal(cpu.engine.batch_statistics(z, 1).mean, mean)
    assert torch.equal(cpu.engine.normalize(z, norm, Moments(mean, inv_std))[0], y)


@pytest.mark.parametrize("kind", ["positions", "samples", "lengths"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, *ROWS, (3, 7, 241, 251), (33, 171, 14, 14), (1100, 1027)], ids=str
)
def test_a_masked_step_is_that_of_the_kept_values_alone(
    shape: tuple[int, ...], activation: str | None, kind: str, threads: None
) -> None:
    """Every path through the core, against the kept values brought together in rows; and 0 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    z, dy, residual = (torch.randn(shape, generator=generator) for _ in range(3))
    c, layouts = shape[1], (torch.contiguous_format, torch.channels_last)
    gamma, beta = torch.linspace(0.5, 1.5, c), torch.linspace(-1, 1, c)
    mask = torch.rand([shape[0], 1, *shape[2:]], generator=generator) < 0.5
    if kind == "samples":
        mask = mask.reshape(shape[0], -1)[:, :1].reshape([-1] + [1] * (len(shape) - 1))
    elif kind == "lengths" and len(shape) > 2:
        mask = torch.arange(mask[0].numel()).view(1, 1, *shape[2:]) < torch.randint(
            0, mask[0].numel() + 1, [shape[0], 1, 1, 1], generator=generator
        )
    keep = mask.expand(shape)
    for layout in layouts[: len(shape) // 2]:
        x, g, r = (
            torch.where(keep, t, torch.nan).contiguous(memory_format=layout) for t in (z, dy, residual)
        )
        norm = Norm(1, 1e-5, gamma, beta, r, activation)
        after = norm._replace(residual=None, added=True)

        def rows(t: torch.Tensor) -> torch.Tensor:
            return t.movedim(1, -1)[mask.expand(shape[0], 1, *shape[2:]).squeeze(1)].double()

        results = []
        for count, caches in ((1, (0, 0)), (3, (4096, 32768))):
            torch.set_num_threads(count)
            cpu._core.pretend_cache(*caches)
            told = cpu.engine.batch_statistics(x, 1, mask, torch.float64)
            moments = Moments(told.mean.float(), (told.var() + 1e-5).rsqrt().float())
            y, saved = cpu.engine.normalize(x, norm, moments, mask=mask, save=True)
            sums = cpu.engine.backward_reduce(g, x, after, moments, saved, mask=mask, dtype=torch.float64)
            dz, dr = cpu.engine.backward_input(g, x, after, moments, saved, sums, told.count, True, mask=mask)
            results.append([told.count, told.mean, told.m2, y, *sums, dz, dr])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
        kept = norm._replace(gamma=gamma.double(), beta=beta.double(), residual=rows(r))
        want = aten.engine.batch_statistics(rows(x), 1)
        assert torch.equal(told.count, want.count)
        # float32 sums of up to 8192 values about a center, in 64 lanes
        torch.testing.assert_close(told.mean, want.mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(told.m2, want.m2, rtol=2e-6, atol=0)
        wide = Moments(*(t.double() for t in moments))
        want_y, want_saved = aten.engine.normalize(rows(x), kept, wide, save=True)
        torch.testing.assert_close(rows(y), want_y, rtol=1e-5, atol=2e-6)
        # where rounding decides on which side of a kink a value lies, its channel is another one
        kink = (
            (rows(y) > 0) != (want_y > 0)
            if activation == "relu"
            else torch.zeros_like(want_y, dtype=torch.bool)
        )
        fine = ~kink.any(0)
        assert int((~fine).sum()) <= 3
        kept = kept._replace(residual=None, added=True)
        want_sums = aten.engine.backward_reduce(rows(g), rows(x), kept, wide, want_saved)
        for have, wanted in zip(sums, want_sums, strict=True):
            scale = float(told.count) ** 0.5
            torch.testing.assert_close(have[fine] / scale, wanted[fine] / scale, rtol=1e-5, atol=1e-5)
        want_dz, want_dr = aten.engine.backward_input(
            rows(g), rows(x), kept, wide, want_saved, want_sums, told.count, True
        )
        torch.testing.assert_close(rows(dz)[:, fine], want_dz[:, fine], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows(dr)[:, fine], want_dr[:, fine], rtol=1e-4, atol=1e-5)
        for t in (y, dz, dr):
            assert torch.equal(t[~keep], torch.zeros_like(t[~keep]))


@pytest.mark.parametrize("channels_last", [False, True])
def test_offset_data_is_no_worse_than_torch_in_its_best_layout(channels_last: bool) -> None:
    z = torch.randn(16, 8, 32, 32) + 1e6
    want = z.double() - z.double().mean((0, 2, 3), keepdim=True)
    want = want / (want.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    theirs = torch.nn.functional.batch_norm(z, None, None, training=True)
    if channels_last:
        z = z.contiguous(memory_format=torch.channels_last)
    ours = cpu.engine.forward(z, Norm(1, 1e-5), None).y
    assert float((ours.double() - want).abs().max()) <= float((theirs.double() - want).abs().max())


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", STREAMED, ids=str)
def test_outputs_past_the_caches_are_those_of_torch_operations(
    shape: tuple[int, ...], with_residual: bool, activation: str | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    z, dy, residual = (torch.randn(shape, generator=generator) for _ in range(3))
    c = shape[1]
    gamma, beta = torch.linspace(0.5, 1.5, c), torch.linspace(-1, 1, c)
    for layout in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
        place = [t.contiguous(memory_format=layout) for t in (z, dy, residual)]
        results = []
        for engine in (cpu.engine, aten.engine):
            wide = engine is aten.engine
            x, g, r = (t.double() if wide else t for t in place)
            norm = Norm(1, 1e-5, gamma, beta, r if with_residual else None, activation)
            y, mean, _, inv_std, saved = engine.forward(x, norm, None)
            after = norm._replace(residual=None, added=with_residual)
            grads = engine.backward(g, x, after, Moments(mean, inv_std), saved, True, with_residual)
            results.append([y, *grads])
        others = [a for a in range(len(shape)) if a != 1]
        du = [dy if g[4] is None else g[4] for g in results]
        # where rounding decides on which side of a kink a value lies, its channel's sums are others
        flipped = (du[0].double() - du[1]).abs() > 1e-4 * (1 + du[1].abs())
        if activation == "relu":
            flipped |= (results[0][0] > 0) != (results[1][0] > 0)
        kinked = flipped.sum(others) > 0
        assert int(kinked.sum()) <= 3
        for name, have, want in zip(("y", "dz", "sum_dy", "sum_dy_zhat", "dresidual"), *results, strict=True):
            if want is None:
                assert have is None
                continue
            kept = [
                t.double().movedim(1, 0)[~kinked] if t.dim() > 1 else t.double()[~kinked]
                for t in (have, want)
            ]
            # sums of m values of about 1 in float32 are off by some roundings of sqrt(m)
            scale = 1.0 if have.dim() > 1 else float(z.numel() / c) ** 0.5
            error = ((kept[0] - kept[1]).abs() / (scale * (1 + kept[1].abs()))).max()
            assert float(error) < (1e-4 if have.dim() > 1 else 1e-5), (name, float(error))


def test_one_far_value_does_not_spoil_the_variance() -> None:
    z = torch.randn(8, 2, 64, 64)
    z[0, :, 0, 0] = 1e6  # the first value: what a shift by it would cancel against
    for layout in (torch.contiguous_format, torch.channels_last):
        var = cpu.engine.forward(z.contiguous(memory_format=layout), Norm(1, 1e-5), None).var
        want = z.double().var((0, 2, 3), correction=0)
        np.testing.assert_allclose(var.double().numpy(), want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_right_to_a_few_units_in_the_last_place(activation: str) -> None:
    from batchnorm.kernels.activations import activate

    u = torch.cat(
        [torch.linspace(-20, 20, 40001), torch.tensor([0.0, 1e-8, -1e-8, 87.5, -87.5, 200.0, -200.0])]
    )
    z = u.view(-1, 1)
    moments = Moments(torch.zeros(1), torch.ones(1))
    y = cpu.engine.normalize(z, Norm(1, 1e-5, activation=activation), moments)[0].flatten()
    want = activate(u.double(), activation)
    spacing = torch.from_numpy(np.spacing(want.abs().clamp(min=1e-30).float().numpy())).double()
    error = (y.double() - want).abs()
    # in the tails, where sigmoid and gelu are about 0, the error is small beside the input instead
    assert bool((error <= torch.maximum(6 * spacing, 2e-7 * want.abs().clamp(max=1) + 1e-8)).all()), float(
        error.max()
    )


def test_a_lazily_negated_input_is_read_with_its_sign() -> None:
    z, residual = torch.randn(6, 3, 5), torch.randn(6, 3, 5)
    layer = batchnorm.BatchNorm1d(3, activation="relu")
    lazy, lazy_residual = torch._neg_view(-z), torch._neg_view(-residual)
    assert lazy.is_neg()
    torch.testing.assert_close(layer(lazy, lazy_residual), layer(z, residual))
    layer.eval()
    torch.testing.assert_close(layer(lazy, lazy_residual), layer(z, residual))
    found = select(lazy).batch_statistics(lazy, 1).mean
    torch.testing.assert_close(found, z.mean((0, 2)))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 2**20
    z = torch.empty(n // 1024, 1024, dtype=torch.bfloat16)
    z[: len(z) // 2] = 1.0
    z[len(z) // 2 :] = 3.0
    for view, axis in ((z, 1), (z.view(1, 4, -1), 1)):
        _, mean, m2 = cpu.engine.batch_statistics(view, axis)
        if axis == 1 and view.dim() == 2:
            assert torch.equal(mean, torch.full((1024,), 2.0))
            torch.testing.assert_close(m2, torch.full((1024,), float(len(z))))
        else:
            torch.testing.assert_close(mean, torch.tensor([1.0, 1.0, 3.0, 3.0]), atol=1e-3, rtol=1e-3)
    mean, one = torch.full((1024,), 2.0), torch.ones(1024)
    cpu.engine.normalize(z, Norm(1, 1e-5, activation="relu"), Moments(mean, one), out=z)
    assert float(z[0].float().sum()) == 0.0
    assert float(z[-1].float().sum()) == 1024.0
    assert float(z[len(z) // 2 - 1].float().sum()) == 0.0
    assert float(z[len(z) // 2].float().sum()) == 1024.0
