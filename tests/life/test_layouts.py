"""Tensors whose values do not lie in strides: served where they can be, refused with the way out where not."""

from __future__ import annotations

import copy

import pytest
import torch

import batchnorm


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tensors_of_onednn_are_served(training):
    ours = batchnorm.BatchNorm2d(4, activation="relu").train(training)
    plain = copy.deepcopy(ours)
    z = torch.randn(8, 4, 5, 5, requires_grad=True)
    y = ours(z.to_mkldnn())
    assert y.is_mkldnn
    expected = plain(z)
    torch.testing.assert_close(y.to_dense(), expected)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    dy = torch.randn_like(expected)
    (theirs,) = torch.autograd.grad(expected, z, dy)
    (mine,) = torch.autograd.grad(y.to_dense(), z, dy)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_sparse_input_is_refused_with_the_way_out(training):
    layer = batchnorm.BatchNorm1d(3).train(training)
    with pytest.raises(batchnorm.errors.LayoutError, match="sparse") as caught:
        layer(torch.eye(3).to_sparse())
    assert "to_dense" in str(caught.value)
    assert layer.num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "layer", [batchnorm.BatchNorm1d(3), batchnorm.BatchNorm2d(3)], ids=["fits", "does not"]
)
def test_a_nested_input_is_refused_with_the_way_out(layer):
    nested = torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(3, 2)])
    with pytest.raises(batchnorm.errors.LayoutError, match="to_padded_tensor"):
        layer(nested)
