"""What a forward keeps for its backward is laid out by shape: hooks that pack it otherwise change no gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from batchnorm.functional import batch_norm
from batchnorm.kernels import cpu, select
from batchnorm.kernels.activations import ACTIVATIONS


def _same(x: Any) -> Any:
    return x


def _compress(x: Tensor) -> tuple[bytes, torch.Size, torch.dtype]:
    plain = x.detach().new_empty(x.numel()).copy_(x.detach().reshape(-1))
    return zlib.compress(plain.view(torch.uint8).numpy().tobytes(), 1), x.shape, x.dtype


def _expand(packed: tuple[bytes, torch.Size, torch.dtype]) -> Tensor:
    data, shape, dtype = packed
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    values = torch.from_numpy(np.frombuffer(bytearray(zlib.decompress(data)), np.uint8).copy())
    return values.view(dtype).view(shape)


def _last(x: Tensor) -> Tensor:
    """The same values, axis 1 innermost where there are more."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.contiguous()


def _reversed(x: Tensor) -> Tensor:
    """The same values, the axes in memory from the last to the first."""
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def _spread(x: Tensor) -> Tensor:
    """The same values, every second place in memory empty."""
    wide = x.new_empty([*x.shape, 2])
    wide[..., 0] = x
    return wide[..., 0]


HOOKS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: saved_tensors_hooks(lambda x: x.contiguous(), _same),
    "save_on_cpu": save_on_cpu,
    "flat": lambda: saved_tensors_hooks(
        lambda x: (x.flatten().clone(), x.shape), lambda packed: packed[0].view(packed[1])
    ),
    "compressed": lambda: saved_tensors_hooks(_compress, _expand),
    "channels_last": lambda: saved_tensors_hooks(_last, _same),
    "reversed": lambda: saved_tensors_hooks(_reversed, _same),
    "spread": lambda: saved_tensors_hooks(_spread, _same),
}

# (shape, channel_dim, strides): planes, short planes, rows, rows side by side, one channel
LAYOUTS: dict[str, tuple[tuple[int, ...], int, str]] = {
    "NC": ((20, 5), 1, "contiguous"),
    "NC_many": ((9000, 3), 1, "contiguous"),
    "NC_rows_apart": ((9000, 3), 1, "apart"),
    "NCL": ((3, 5, 40), 1, "contiguous"),
    "NCL_short": ((6, 5, 7), 1, "contiguous"),
    "NCL_short_apart": ((6, 5, 7), 1, "apart"),
    "NLC": ((3, 40, 5), -1, "contiguous"),
    "NLC_many": ((3, 900, 20), -1, "contiguous"),
    "NLC_middle": ((3, 4, 5, 6), 2, "contiguous"),
    "NCHW": ((3, 5, 6, 7), 1, "contiguous"),
    "NCHW_last": ((3, 5, 6, 7), 1, "channels_last"),
    "NCHW_last_many": ((64, 32, 6, 6), 1, "channels_last"),
    "NCHW_equal": ((64, 32, 4, 4), 1, "channels_last"),
    "N1HW": ((3, 1, 6, 7), 1, "contiguous"),
    "N1HW_apart": ((3, 1, 6, 7), 1, "apart"),
    "NC11": ((8, 5, 1, 1), 1, "channels_last"),
    "NCDHW": ((2, 3, 4, 5, 6), 1, "channels_last"),
}


def _input(shape: tuple[int, ...], strides: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape).to(dtype)
    if strides == "channels_last":
        return _last(x)
    return torch.cat([x, x], 1)[:, : shape[1]] if strides == "apart" else x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25)
@given(
    hooks=st.sampled_from(sorted(HOOKS)),
    activation=st.sampled_from([None, *ACTIVATIONS]),
    with_residual=st.booleans(),
    with_mask=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    engine=st.sampled_from(["aten", "torch"] + ["cpu"] * 2 * (cpu.engine is not None)),
)
def test_hooks_on_saved_tensors_change_no_gradient(
    layout: str,
    training: bool,
    hooks: str,
    activation: str | None,
    with_residual: bool,
    with_mask: bool,
    dtype: torch.dtype,
    engine: str,
) -> None:
    shape, channel_dim, strides = LAYOUTS[layout]
    torch.manual_seed(0)
    c = shape[channel_dim]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    z = _input(shape, strides, dtype).requires_grad_()
    residual = _input(shape, strides, dtype).requires_grad_() if with_residual else None
    gamma, beta = (torch.linspace(0.5, 1.5, c, dtype=acc).requires_grad_() for _ in range(2))
    mask = None
    if with_mask:
        mask = torch.rand([n for a, n in enumerate(shape) if a != channel_dim % len(shape)]) < 0.7
    dy = torch.randn(shape).to(dtype)
    inputs = [t for t in (z, gamma, beta, residual) if t is not None]

    def gradients() -> tuple[Tensor, ...]:
        y = batch_norm(
            z, torch.zeros(c, dtype=acc), torch.ones(c, dtype=acc), gamma, beta, training, residual=residual,
            activation=activation, mask=mask, channel_dim=channel_dim,
        )  # fmt: skip
        return torch.autograd.grad(y, inputs, dy)

    with select.use(engine):
        want = gradients()
        with HOOKS[hooks]():
            have = gradients()
    # the order of sums follows the layout: some roundings of sqrt(m) of the accumulator, one of the dtype
    loose = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=loose, atol=loose * 10 * float(1 + b.abs().max()) ** 0.5)
