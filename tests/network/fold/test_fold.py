"""Folding: the same answers with fewer layers, or a refusal with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding import CONVS, NORMS, TRANSPOSED, SharedNorm, check
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import ShapeError
from batchnorm.network.fold.fold import fold
from batchnorm.network.fold.remains import FoldedNorm
from batchnorm.network.record import record


@given(
    axes=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    affine=st.booleans(),
    padding=st.integers(0, 1),
)
def test_every_convolution_takes_the_norm_behind_it(
    axes: int, transposed: bool, groups: int, bias: bool, kernel: int, stride: int, affine: bool, padding: int
) -> None:
    kind = (TRANSPOSED if transposed else CONVS)[axes]
    layer = kind(4, 8, kernel, stride=stride, groups=groups, bias=bias, padding=min(padding, kernel - 1))
    net = nn.Sequential(layer, NORMS[axes](8, eps=1e-3, affine=affine), nn.ReLU()).double()
    check(net, torch.randn(2, 4, *[5] * axes, dtype=torch.double), left=[], example=False, tol=1e-12)


@given(
    axes=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    kernel=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    padding=st.sampled_from([0, 1, "valid", "same"]),
)
def test_a_norm_in_front_goes_into_the_layer_behind_it_where_nothing_is_padded_with_zeros(
    axes: int, groups: int, bias: bool, kernel: int, mode: str, padding: int | str
) -> None:
    if axes == 3 and mode == "reflect":
        mode = "circular"
    if kernel == 1 and padding == 1:
        padding = 0
    layer = CONVS[axes](4, 8, kernel, groups=groups, bias=bias, padding=padding, padding_mode=mode)
    net = nn.Sequential(NORMS[axes](4), layer).double()
    exact = mode != "zeros" or padding in (0, "valid") or kernel == 1
    x = torch.randn(2, 4, *[5] * axes, dtype=torch.double)
    folded = check(net, x, left=[] if exact else ["0"], example=False, tol=1e-12)
    if not exact:
        assert "pads with zeros" in record(folded).reason("0")


def test_a_norm_in_front_of_a_transposed_convolution_stays() -> None:
    folded = check(
        nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)), torch.randn(1, 4, 5, 5), left=["0"]
    )
    assert "another number of taps" in record(folded).reason("0")
    check(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 1)), torch.randn(1, 4, 5, 5), left=[])


def test_chains_of_norms_go_into_one_layer_or_one_norm() -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    )
    check(chain, torch.randn(2, 3, 6, 6), left=[])
    check(
        nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        torch.randn(2, 3, 6, 6),
        left=[],
    )
    padded = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    folded = check(padded, torch.randn(2, 3, 6, 6), left=["0"])
    assert "into 0" in next(row.detail for row in record(folded) if row.path == "1")


# -- Linear layers and the channel axis ------------------------------------------------------------------
def test_a_linear_layer_takes_the_norm_of_two_axes() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2), nn.BatchNorm1d(2)
    )
    folded = check(net, torch.randn(5, 4), left=[])
    assert isinstance(folded[1], nn.Identity)


def test_a_norm_over_the_sequence_axis_is_not_folded_into_the_features() -> None:
    # the sizes agree, so nothing but the place of the channel axis tells
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    folded = check(net, torch.randn(3, 6, 4), left=["1"], example=True)
    assert "channel axis is 1" in record(folded).reason("1")
    alone = fold(net)
    assert isinstance(alone[1], FoldedNorm)
    with pytest.raises(ShapeError, match="folded into a Linear"):
        alone(torch.randn(3, 6, 4))
    torch.testing.assert_close(alone(torch.randn(3, 4)).shape, torch.Size([3, 6]))


def test_our_norm_over_the_last_axis_goes_into_the_linear_layer_for_every_number_of_axes() -> None:
    net = nn.Sequential(nn.Linear(4, 6), batchnorm.BatchNorm1d(6, channel_dim=-1))
    folded = check(net, torch.randn(3, 5, 4), left=[])
    torch.testing.assert_close(folded(torch.ones(2, 4)), net(torch.ones(2, 4)))
    wrong = nn.Sequential(nn.Conv1d(4, 6, 1), batchnorm.BatchNorm1d(6, channel_dim=-1))
    check(wrong, torch.randn(3, 4, 6), left=["1"])


class Flattened(nn.Module):
    """As LeViT does it: samples and sequence in one axis for the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc(x)
        return self.bn(z.flatten(0, 1)).reshape_as(z)


class Turned(Flattened):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("kind", [Flattened, Turned])
def test_channels_are_followed_through_reshapes_and_transposes(kind: type[nn.Module]) -> None:
    net = kind()
    x = torch.randn(3, 6, 4)  # the sequence is as long as there are channels
    folded = check(net, x, left=[], example=True)
    torch.testing.assert_close(folded(x[:, :5]), net.eval()(x[:, :5]))


def test_channels_lost_in_a_reshape_are_not_folded() -> None:
    class Mixed(Flattened):
        def forward(self, x: Tensor) -> Tensor:
            z = self.fc(x)
            return self.bn(z.reshape(-1, 6, 3))

    check(Mixed(), torch.randn(3, 3, 4), left=["bn"])


# -- shared and used twice ---------------------------------------------------------------------------------
class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv(self.bn1(self.conv(x))))


class SharedPair(TwoNorms):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(F.relu(self.bn1(self.conv(x))))) + self.bn2.weight.sum() * 0


class UsedTwice(SharedNorm):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.bn(z) + torch.sigmoid(z)


class Returned(SharedNorm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.a(x)
        return self.bn(z), z


class Functional(SharedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + F.conv2d(x, self.a.weight)


class InPlace(SharedNorm):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z.relu_()
        return self.bn(z)


class Branch(SharedNorm):
    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if z.sum() > -1e9:
            return self.bn(z)
        return z


@pytest.mark.parametrize(
    "kind", [SharedNorm, UsedTwice, Returned, Functional, InPlace, Branch], ids=lambda k: k.__name__
)
def test_what_others_use_as_well_is_left_alone(kind: type[nn.Module]) -> None:
    check(kind(), torch.randn(2, 3, 4, 4), left=["bn"])


def test_a_layer_shared_by_two_norms_is_left_alone() -> None:
    folded = check(TwoNorms(), torch.randn(2, 3, 4, 4), left=["bn1", "bn2"])
    assert "used" in record(folded).reason("bn1")


def test_a_layer_and_norm_that_are_always_called_together_are_folded_once() -> None:
    check(SharedPair(), torch.randn(2, 3, 4, 4), left=["bn2"])


def test_tied_weights_are_left_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[2].weight = net[0].weight
    folded = check(net, torch.randn(2, 3, 4, 4), left=["1", "3"])
    assert "shared with 2" in record(folded).reason("1")


def test_a_block_registered_twice_stays_one_block() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    folded = check(nn.Sequential(block, nn.ReLU(), block), torch.randn(2, 3, 4, 4), left=[])
    assert folded[0] is folded[2]
