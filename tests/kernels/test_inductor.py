"""A compiled layer on a GPU moves no more bytes than torch.nn's and launches one kernel more at most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from inductor_counts import count
from torch import Tensor, nn

import batchnorm
from batchnorm.kernels import select

if not torch.__version__.startswith("2.13."):
    pytest.skip("what is counted is private to torch 2.13", allow_module_level=True)
pytestmark = pytest.mark.slow  # to compile one module takes some 5 s


@pytest.fixture(autouse=True)
def _by_torch() -> Iterator[None]:
    with select.use("torch"):
        yield


class Chain(nn.Module):
    """Layers in a row, with an activation and a residual between; torch.nn's or ours."""

    def __init__(self, ours: bool, activation: str | None, depth: int = 1, width: int = 64) -> None:
        super().__init__()
        self.ours, self.activation = ours, activation
        made = [
            batchnorm.BatchNorm2d(width, activation=activation) if ours else nn.BatchNorm2d(width)
            for _ in range(depth)
        ]
        self.norms = nn.ModuleList(made)

    def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        for norm in self.norms:
            if self.ours:
                z = norm(z, residual)
                continue
            z = norm(z)
            if residual is not None:
                z = z + residual
            if self.activation == "relu":
                z = torch.relu(z)
            elif self.activation == "silu":
                z = nn.functional.silu(z)
        return z


def _compare(
    activation: str | None, added: bool, dtype: torch.dtype, last: bool, depth: int = 1
) -> tuple[float, int]:
    """Passes over the tensor, and launches, that ours has more than torch.nn's."""
    order = torch.channels_last if last else torch.contiguous_format
    z = torch.empty(32, 64, 28, 28, dtype=dtype, device="meta").to(memory_format=order)
    inputs = [t.requires_grad_() for t in ((z, torch.empty_like(z)) if added else (z,))]
    stock, ours = (count(Chain(kind, activation, depth).to("meta"), *inputs) for kind in (False, True))
    return (ours.bytes - stock.bytes) / (z.numel() * z.element_size()), ours.launches - stock.launches


@pytest.mark.parametrize(
    ("activation", "added"),
    [
        ("relu", True),
        *(
            pytest.param(*form, marks=pytest.mark.slow)
            for form in ((None, False), ("relu", False), ("silu", True))
        ),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "last"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)],
    ids=str,
)
def test_a_compiled_layer_moves_what_torchs_does(
    activation: str | None, added: bool, dtype: torch.dtype, last: bool
) -> None:
    passes, launches = _compare(activation, added, dtype, last)
    assert passes <= 0.05
    assert launches <= 1


def test_layers_of_one_graph_ask_once_whether_they_are_run_again() -> None:
    passes, launches = _compare("relu", True, torch.bfloat16, True, depth=3)
    assert passes <= 0.05
    assert launches <= 1


def test_the_count_sees_a_tensor_that_is_read_once_more() -> None:
    class Twice(Chain):
        def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
            return super().forward(z, residual) * z.flip(0).flip(1)

    z = torch.empty(32, 64, 28, 28, device="meta", requires_grad=True)
    plain, twice = (count(kind(False, "relu").to("meta"), z) for kind in (Chain, Twice))
    assert twice.bytes - plain.bytes >= z.numel() * 4
