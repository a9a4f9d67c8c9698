"""Offsets beyond 2^31 elements, in triton's interpreter: on tensors of which little is ever touched.

Of every launch the programs at the ends of the grid run. The tensors are zeros that the system hands out when they
are touched, so that 4 GB of addresses cost a few MB.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm.kernels import triton
from batchnorm.kernels.contract import Moments, Norm
from batchnorm.kernels.triton import plan as plans

if not pytest.importorskip("triton").__version__.startswith("3.9."):
    pytest.skip("how single programs are run is private to triton 3.9", allow_module_level=True)
if not triton.interpreted():
    pytest.skip("on a GPU `batchnorm bench --gpu` checks the kernels", allow_module_level=True)

from triton.runtime import interpreter

from batchnorm.kernels.triton import engine as module
from batchnorm.kernels.triton.operands import packed

engine = module.engine

# of each, the last strip of the last row holds at least as many values as are looked at
SHAPES = {
    "rows": (2**25 + 5, 64),
    "narrow rows, the last not full": (2**30 + 7, 3),
    "rows so wide that few of them are in reach": (17, 2**27 + 24),
    "small planes": (2**31 // (64 * 49) + 3, 64, 49),
    "large planes": (9, 8, 2048 * 14_600 + 24),
    "few large planes": (2, 5, 8192 * 26_300 + 24),
}
ENDS = 16


def _sparse(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that take no memory before they are touched, with values at both ends."""
    size = torch.empty((), dtype=dtype).element_size()
    held = np.zeros(int(np.prod(shape)) * size, np.uint8)
    flat = torch.from_numpy(held).view(dtype)
    for part in (flat[:4096], flat[-4096:]):
        part.copy_(torch.rand(len(part)) + 0.5)
    return flat.view(shape)


class Ends:
    """Runs, of every launch, the programs at the ends of the grid, and keeps the arguments."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, Any]] = {}

    def launch(
        self, kernel: Any, grid: tuple[int, ...], device: Any, arguments: tuple, constants: dict, warps: int
    ) -> None:
        self.seen[kernel.fn.__name__] = dict(zip(kernel.arg_names, arguments, strict=False))
        if kernel.fn.__module__.endswith("merges"):
            return  # of what most programs never found
        function = kernel.rewrite()
        patches = interpreter._patch_lang(function)
        try:
            given = inspect.getcallargs(function, *arguments, **constants)
            given = {
                name: value if name in constants else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*grid, 1)
            for x in range(grid[0]) if grid[0] <= 8 else (0, grid[0] - 1):
                for y in {0, grid[1] - 1}:
                    interpreter.interpreter_builder.set_grid_idx(x, y, 0)
                    function(**given)
        finally:
            patches.restore()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    fake = Ends()
    monkeypatch.setattr(module, "launch", fake.launch)
    # small programs: each is one of very many
    monkeypatch.setattr(plans, "PROGRAMS", 2**15)
    plans.plan.cache_clear()
    yield fake
    plans.plan.cache_clear()


def _at_the_ends(t: Tensor | None, z: Tensor, channel: np.ndarray | None = None) -> np.ndarray:
    """The first and the last values of a tensor; or, by ``channel``, of a vector what belongs to them."""
    assert t is not None
    flat = t.reshape(-1)
    if channel is not None:
        return flat[torch.from_numpy(channel)].double().numpy()
    return torch.cat([flat[:ENDS], flat[-ENDS:]]).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_what_lies_beyond_two_to_the_31_is_found(name: str, ends: Ends) -> None:
    shape = SHAPES[name]
    z = _sparse(*shape)
    assert z.numel() > 2**31
    c = shape[1]
    gamma, beta, mean, inv_std = (_sparse(c, dtype=torch.float32) for _ in range(4))
    norm = Norm(1, 1e-5, gamma, beta, z, "relu")
    y, bits = engine.normalize(z, norm, Moments(mean, inv_std), save=True)
    after = norm._replace(residual=None, added=True)
    engine.backward_reduce(z, z, after, Moments(mean, inv_std), bits)
    zero = _sparse(c, dtype=torch.float32)
    dz, dresidual = engine.backward_input(
        z, z, after, Moments(mean, inv_std), bits, (zero, zero), torch.tensor(4.0), True
    )
    engine.batch_statistics(z, 1)

    inner = int(np.prod(shape[2:], dtype=int))
    index = np.concatenate([np.arange(ENDS), np.arange(z.numel() - ENDS, z.numel())])
    channel = index // inner % c
    x = _at_the_ends(z, z)
    g, b, m, i, s = (_at_the_ends(v, z, channel) for v in (gamma, beta, mean, inv_std, zero))
    z_hat = (x - m) * i
    u = z_hat * g + b + x
    du = np.where(u > 0, x, 0)
    near = {"rtol": 2**-7, "atol": 2**-7}
    np.testing.assert_allclose(_at_the_ends(y, z), np.maximum(u, 0), **near)
    np.testing.assert_allclose(_at_the_ends(dresidual, z), du, **near)
    np.testing.assert_allclose(_at_the_ends(dz, z), (du - s / 4 - z_hat * s / 4) * i * g, **near)
    _check_partial(z, ends, (gamma, beta, mean, inv_std))


def _check_partial(z: Tensor, ends: Ends, moments: tuple[Tensor, ...]) -> None:
    """What the last program found: count and sum of squares of its values, and the sums of the backward."""
    _, p = packed(z, 1)
    if p.ragged:
        return  # the last strip of the last row holds nothing
    view = z.view(p.rows, p.columns)
    if p.planes:
        strips = p.programs // p.channels
        start = (p.channels - 1) * p.inner + (strips - 1) * p.block_columns * p.strips
        columns, entry = slice(start, p.columns), slice(p.width - 1, p.width)
    else:
        columns = entry = slice((p.programs - 1) * p.block_columns, p.columns)
    x = view[(p.splits - 1) * p.rows_a_program :, columns].double().numpy()
    axis = None if p.planes else 0

    def found(kernel: str, parts: int) -> np.ndarray:
        return ends.seen[kernel]["partial"].view(parts, p.splits, p.width)[:, -1, entry].double().numpy()

    n, _, m2 = found("statistics", 3)
    assert (n == (x.size if p.planes else len(x))).all()
    np.testing.assert_allclose(m2, ((x - x.mean(axis)) ** 2).sum(axis), rtol=1e-5, atol=1e-6)
    channel = torch.arange(columns.start, columns.stop) // p.inner % p.channels
    gamma, beta, mean, inv_std = (v[channel].double().numpy() for v in moments)
    z_hat = (x - mean) * inv_std
    du = np.where(z_hat * gamma + beta + x > 0, x, 0)
    sum_du, sum_duz = found("reduce", 2)
    np.testing.assert_allclose(sum_du, du.sum(axis), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sum_duz, (du * z_hat).sum(axis), rtol=1e-4, atol=1e-4)
