"""Statistics blended with those of a few test inputs, and given back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import reference


def trained(cls=batchnorm.BatchNorm1d, c=3):
    layer = cls(c, dtype=torch.float64)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval()


def statistics(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


@given(n=st.integers(1, 40), prior=st.sampled_from([0.0, 0.5, 1.0, 16.0, 1e6]), seed=st.integers(0, 9))
def test_the_blend_is_the_mixture_of_the_two_distributions(n, prior, seed):
    torch.manual_seed(seed)
    layer = trained()
    source = statistics(layer)
    z = torch.randn(n, 3, 4, dtype=torch.float64) * 2 + 3
    batchnorm.adapt(layer, z, prior=prior)
    flat = z.transpose(0, 1).reshape(3, -1).numpy()
    mean, var = (v.numpy() for v in source)
    expected = reference.blend(prior, (1, mean, var), (n, flat.mean(1), flat.var(1)))
    np.testing.assert_allclose(layer.running_mean.numpy(), expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), expected[1], rtol=1e-9, atol=1e-12)
    by_hand = (prior * mean + n * flat.mean(1)) / (prior + n)
    np.testing.assert_allclose(layer.running_mean.numpy(), by_hand, rtol=1e-9, atol=1e-12)


def test_the_mixture_is_that_of_the_samples_put_together():
    layer, z = trained(c=1), torch.randn(8, 1, dtype=torch.float64) + 6
    training = torch.randn(24, 1, dtype=torch.float64)
    layer.running_mean.copy_(training.mean(0))
    layer.running_var.copy_(training.var(0, correction=0))
    batchnorm.adapt(layer, z, prior=24)
    everything = torch.cat([training, z])
    torch.testing.assert_close(layer.running_mean, everything.mean(0))
    torch.testing.assert_close(layer.running_var, everything.var(0, correction=0))


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, batchnorm.BatchNorm1d])
def test_the_source_comes_back_at_the_end_of_the_block_and_after_an_exception(cls):
    layer = trained(cls)
    before = copy.deepcopy(layer.state_dict())
    z = torch.randn(8, 3, dtype=torch.float64) + 5
    with batchnorm.adapt(layer, z):
        assert not torch.equal(layer.running_mean, before["running_mean"])
    with pytest.raises(KeyError), batchnorm.adapt(layer, z):
        raise KeyError
    kept = batchnorm.adapt(layer, z)
    kept.restore()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_priors_at_both_ends():
    layer = trained()
    source = statistics(layer)
    z = torch.randn(8, 3, dtype=torch.float64)
    with batchnorm.adapt(layer, z, prior=float("inf")):
        torch.testing.assert_close(statistics(layer), source)
    with batchnorm.adapt(layer, z, prior=0):
        torch.testing.assert_close(layer.running_mean, z.mean(0))
        torch.testing.assert_close(layer.running_var, z.var(0, correction=0))


def test_each_layer_sees_what_the_adapted_layers_before_it_put_out():
    net = nn.Sequential(trained(), nn.ReLU(), trained())
    z = torch.randn(16, 3, dtype=torch.float64) + 4
    with batchnorm.adapt(net, z, prior=0):
        y = net(z)
        torch.testing.assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_modes_gradients_frozen_layers_and_counts_stay_as_they_were():
    net = nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3), nn.Dropout(0.5))
    batchnorm.freeze(net)
    net[2].eval()
    net.train()
    net[2].eval()
    modes = [m.training for m in net.modules()]
    z = torch.randn(8, 3)
    with batchnorm.adapt(net, z):
        assert [m.training for m in net.modules()] == modes
        assert not torch.equal(net[1].running_mean, torch.zeros(3)), "freezing is about training"
    assert net[1].num_batches_tracked == 0
    assert all(p.grad is None for p in net.parameters())
    assert net[1].frozen_statistics
    assert not net[1]._forward_pre_hooks


def test_adapting_helps_a_classifier_on_shifted_inputs():
    # the digits that come with scikit-learn; the shift is another camera's gain and offset
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 32), batchnorm.BatchNorm1d(32, activation="relu"), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:1200]), labels[:1200]).backward()
        optimizer.step()
    batchnorm.calibrate(net, [x[:1200]], progress=False)
    net.eval()
    shifted, wanted = x[1200:] * 0.4 + 0.6, labels[1200:]

    def accuracy():
        with torch.no_grad():
            return float((net(shifted).argmax(1) == wanted).float().mean())

    before = accuracy()
    with batchnorm.adapt(net, shifted[:64], prior=16):
        during = accuracy()
    assert during > before + 0.1
    assert accuracy() == before


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: (z, 1), lambda z: [z], lambda z: {"input": z}])
def test_batches_of_every_structure(wrap):
    layer = trained()
    with batchnorm.adapt(layer, wrap(torch.ones(4, 3, dtype=torch.float64)), prior=0):
        torch.testing.assert_close(layer.running_mean, torch.ones(3, dtype=torch.float64))


def test_masked_values_and_nan_do_not_enter():
    layer = trained()
    source = statistics(layer)
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) > 0.4
    dirty = torch.where(mask.unsqueeze(1), z, float("nan"))
    with batchnorm.adapt(layer, dirty, prior=0, forward=lambda m, z: m(z, mask=mask)):
        torch.testing.assert_close(layer.running_mean, z.movedim(1, -1)[mask].mean(0))
    z[0, 1, 0] = float("inf")
    with batchnorm.adapt(layer, z):
        assert torch.equal(layer.running_mean[1], source[0][1]), (
            "a channel that is not finite keeps its source"
        )


def test_bad_input_changes_nothing():
    net = nn.Sequential(trained(), nn.Linear(3, 2, dtype=torch.float64))
    before = copy.deepcopy(net.state_dict())
    good = torch.randn(4, 3, dtype=torch.float64)

    def broken(model, batch):
        model(batch)
        raise KeyError

    for batch, arguments, kind in (
        (good, {"prior": -1}, batchnorm.ArgumentError),
        (good, {"prior": float("nan")}, batchnorm.ArgumentError),
        (good[:0], {}, batchnorm.ShapeError),
        ("text", {}, batchnorm.ArgumentError),
        (good, {"forward": lambda model, batch: None}, batchnorm.ShapeError),
        (good, {"forward": broken}, KeyError),
        (torch.randn(4, 5, dtype=torch.float64), {}, batchnorm.ShapeError),
    ):
        with pytest.raises(kind):
            batchnorm.adapt(net, batch, **arguments)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert not net[0]._forward_pre_hooks
    with pytest.raises(batchnorm.ArgumentError, match="no batch norm"):
        batchnorm.adapt(nn.Linear(3, 3), good)


def test_inside_a_domain_its_statistics_are_adapted_and_no_others():
    layer = batchnorm.BatchNorm1d(2)
    with batchnorm.domain("night"):
        layer(torch.randn(64, 2) + 3)
    layer.eval()
    own, night = layer.running_mean.clone(), layer.domains["night"].running_mean.clone()
    with batchnorm.domain("night"), batchnorm.adapt(layer, torch.full((16, 2), 9.0), prior=16):
        torch.testing.assert_close(layer.domains["night"].running_mean, (night + 9) / 2)
        assert torch.equal(layer.running_mean, own)
    assert torch.equal(layer.domains["night"].running_mean, night)
