"""Copying, saving, loading, moving and making layers, in every way that torch has."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import batchnorm

PAIRS = [
    (nn.BatchNorm1d, batchnorm.BatchNorm1d, (6, 3)),
    (nn.BatchNorm2d, batchnorm.BatchNorm2d, (4, 3, 2, 2)),
    (nn.BatchNorm3d, batchnorm.BatchNorm3d, (3, 3, 2, 2, 2)),
]
OPTIONS = {
    "activation": "relu",
    "on_single_value": "running",
    "on_nonfinite": "propagate",
    "virtual_batch_size": 4,
    "running_var_correction": 0,
    "momentum": None,
}


def trained(cls=batchnorm.BatchNorm1d, shape=(6, 3), **options):
    layer = cls(3, **options)
    nn.init.uniform_(layer.weight)
    for _ in range(2):
        layer(torch.randn(shape) + 2)
    return layer


def save_and_load(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load])
def test_a_copy_has_every_option_and_count_and_a_life_of_its_own(duplicate):
    layer = trained(**OPTIONS)
    with batchnorm.domain("fake"):
        layer(torch.randn(6, 3))
    batchnorm.freeze(layer, statistics=False, affine=True)
    again = duplicate(layer)
    assert repr(again) == repr(layer)
    for (name, a), b in zip(again.named_buffers(), layer.buffers(), strict=True):
        assert torch.equal(a, b), name
    for name in OPTIONS:
        assert getattr(again, name) == getattr(layer, name)
    assert again.frozen_affine
    assert not again.weight.requires_grad
    before = layer.running_mean.clone()
    again(torch.randn(6, 3) + 9)
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_dicts_go_both_ways_strictly(theirs, ours, shape, arguments):
    for source, target in ((theirs, ours), (ours, theirs)):
        first, second = source(3, **arguments), target(3, **arguments)
        first(torch.randn(shape) + 1)
        second.load_state_dict(first.state_dict(), strict=True)
        assert list(first.state_dict()) == list(second.state_dict())
        z = torch.randn(shape)
        torch.testing.assert_close(second.eval()(z), first.eval()(z))


@pytest.mark.parametrize(("theirs", "ours", "shape"), PAIRS)
def test_a_state_from_before_num_batches_tracked_loads_as_in_torch(theirs, ours, shape):
    old = theirs(3)
    old(torch.randn(shape))
    state = old.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    for layer in (ours(3), theirs(3)):
        layer.load_state_dict(state, strict=True)
        assert layer.num_batches_tracked == 0
        assert torch.equal(layer.running_mean, old.running_mean)
    del state._metadata
    ours(3).load_state_dict(state, strict=True)
    state = ours(3).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        ours(3).load_state_dict(state, strict=True)


def test_assign_and_mmap_loading(tmp_path):
    layer = trained()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    with torch.device("meta"):
        empty = batchnorm.BatchNorm1d(3)
    state = torch.load(tmp_path / "state.pt", mmap=True, weights_only=True)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty.running_mean, layer.running_mean)
    z = torch.randn(6, 3)
    assert torch.equal(empty.eval()(z), layer.eval()(z))
    empty.train()(z)
    assert empty.num_batches_tracked == 3
    assert empty.num_batches_skipped == 0


def test_a_meta_layer_has_shapes_and_becomes_real():
    with torch.device("meta"):
        layer = batchnorm.BatchNorm2d(3, activation="relu")
    y = layer(torch.empty(2, 3, 4, 4, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 4, 4)
    with pytest.raises(batchnorm.DeviceError):
        layer(torch.randn(2, 3, 4, 4))
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    z = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(z), batchnorm.BatchNorm2d(3, activation="relu")(z))
    assert layer.num_batches_skipped == 0


def test_to_empty_and_a_loaded_state_make_a_working_layer():
    source = trained(momentum=None)
    with torch.device("meta"):
        layer = batchnorm.BatchNorm1d(3, momentum=None)
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        buffer.fill_(12345)  # memory as it may come
    layer.load_state_dict(source.state_dict())
    z = torch.randn(6, 3)
    layer(z)
    source(z)
    torch.testing.assert_close(layer.running_mean, source.running_mean)


def test_skip_init_makes_a_layer_that_loads():
    layer = nn.utils.skip_init(batchnorm.BatchNorm1d, 3, activation="relu")
    source = trained(activation="relu")
    layer.load_state_dict(source.state_dict())
    z = torch.randn(6, 3)
    assert torch.equal(layer.eval()(z), source.eval()(z))


def test_the_constructor_makes_what_it_is_told_where_it_is_told():
    layer = batchnorm.BatchNorm1d(3, 1e-3, 0.2, True, True, "meta", torch.float64)
    assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer.weight.dtype == torch.float64


def test_share_memory_moves_every_tensor():
    layer = trained().share_memory()
    assert all(t.is_shared() for t in (*layer.parameters(), *layer.buffers()))
    layer(torch.randn(6, 3))


class Positive(nn.Module):
    def forward(self, w):
        return nn.functional.softplus(w)


def test_a_parametrized_gamma_is_the_gamma_that_is_used_and_learns():
    for cls in (nn.BatchNorm1d, batchnorm.BatchNorm1d):
        torch.manual_seed(0)
        layer = cls(3)
        parametrize.register_parametrization(layer, "weight", Positive())
        z = torch.randn(8, 3)
        y = layer(z)
        y.pow(3).sum().backward()
        gradient = layer.parametrizations.weight.original.grad
        if cls is nn.BatchNorm1d:
            wanted, wanted_gradient = y, gradient
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_shared_or_whose_weight_is_shared():
    one, other = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    other.weight = one.weight
    net = nn.Sequential(one, other, one)
    z = torch.randn(8, 3)
    net(z).pow(3).sum().backward()
    assert one.num_batches_tracked == 2
    assert len(list(net.parameters())) == 3
    assert torch.isfinite(one.weight.grad).all()
    assert copy.deepcopy(net)[0] is not net[0]
    twin = copy.deepcopy(net)
    assert twin[0] is twin[2]
    assert twin[0].weight is twin[1].weight


def test_torchs_tools_take_the_layer_for_what_it_is():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), batchnorm.BatchNorm2d(3))
    for _ in range(3):
        net(torch.randn(4, 3, 5, 5) + 1)
    net.eval()
    z = torch.randn(2, 3, 5, 5)
    fused = nn.utils.fuse_conv_bn_eval(net[0], net[1])
    torch.testing.assert_close(fused(z), net(z), rtol=1e-4, atol=1e-5)
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    averaged.update_parameters(net)
    averaged.update_parameters(net)
    torch.testing.assert_close(averaged(z), net(z))
    spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
    nn.Sequential(spectral, batchnorm.BatchNorm1d(3))(torch.randn(4, 3))


def test_a_replaced_buffer_is_the_one_that_is_used():
    layer = trained().eval()
    layer.running_mean = torch.full((3,), 5.0)
    y = layer(torch.full((2, 3), 5.0))
    torch.testing.assert_close(y, layer.bias.expand(2, 3))
