"""Values from Keras' and flax' layouts give the outputs those libraries define."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentError, DataError, ShapeError
from batchnorm.network.foreign import load_flax, load_keras
from batchnorm.network.record import record

RNG = np.random.default_rng(0)


def keras_arrays(channels):
    return {
        "gamma": RNG.normal(size=channels),
        "beta": RNG.normal(size=channels),
        "moving_mean": RNG.normal(size=channels),
        "moving_variance": RNG.random(channels) + 0.1,
    }


def keras_inference(x, a, epsilon=1e-3):
    """Formula of the Keras documentation, BatchNormalization, "during inference"."""
    return a["gamma"] * (x - a["moving_mean"]) / np.sqrt(a["moving_variance"] + epsilon) + a["beta"]


def keras_update(moving, batch, momentum=0.99):
    """Formula of the Keras documentation, BatchNormalization, "during training"."""
    return moving * momentum + batch * (1 - momentum)


def test_a_keras_layer_gives_keras_outputs_and_moves_as_keras_does():
    arrays = keras_arrays(5)
    x = RNG.normal(size=(8, 5))
    layer = load_keras(nn.BatchNorm1d(5, dtype=torch.float64), arrays)
    np.testing.assert_allclose(
        layer.eval()(torch.from_numpy(x)).detach(), keras_inference(x, arrays), rtol=1e-12, atol=1e-12
    )
    layer.train()(torch.from_numpy(x))
    np.testing.assert_allclose(
        layer.running_mean, keras_update(arrays["moving_mean"], x.mean(0)), rtol=1e-12, atol=1e-12
    )
    assert "divisor m - 1" in record(layer).rows[0].detail


def test_absent_gamma_and_beta_are_one_and_zero():
    arrays = keras_arrays(3)
    del arrays["gamma"], arrays["beta"]
    layer = nn.BatchNorm1d(3)
    nn.init.normal_(layer.weight)
    load_keras(layer, arrays)
    assert torch.equal(layer.weight, torch.ones(3))
    assert torch.equal(layer.bias, torch.zeros(3))
    load_keras(nn.BatchNorm1d(3, affine=False), arrays)


def network():
    return nn.ModuleDict(
        {"stem": nn.BatchNorm2d(2), "head": nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))}
    )


def test_a_network_by_names_nested_flat_or_in_order():
    stem, head = keras_arrays(2), keras_arrays(3)
    names = {"bn1": "stem", "top/bn2": "head.1"}
    nested = {
        "bn1": stem,
        "top": {"bn2": head, "conv": {"kernel": np.ones(3)}},
        "conv": {"kernel": 1, "bias": 2},
    }
    flat = {f"bn1/{k}:0": v for k, v in stem.items()} | {f"top/bn2/{k}:0": v for k, v in head.items()}
    for weights, how in ((nested, names), (flat, names), (nested, "order")):
        model = load_keras(network(), weights, names=how)
        torch.testing.assert_close(
            model["head"][1].running_var.numpy(), head["moving_variance"].astype(np.float32)
        )
        torch.testing.assert_close(model["stem"].weight.detach().numpy(), stem["gamma"].astype(np.float32))
        assert model["stem"].eps == 1e-3


def test_flax_variables():
    affine = {"scale": RNG.normal(size=3), "bias": RNG.normal(size=3)}
    stats = {"mean": RNG.normal(size=3), "var": RNG.random(3)}
    variables = {
        "params": {"head": {"1": affine, "0": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}},
        "batch_stats": {"head": {"1": stats}},
    }
    model = load_flax(network(), variables, momentum=0.9)
    layer = model["head"][1]
    x = torch.randn(2, 3, 4, 4)
    got = layer.eval()(x).detach().numpy()
    shape = (1, 3, 1, 1)
    expected = (x.numpy() - stats["mean"].reshape(shape)) / np.sqrt(stats["var"].reshape(shape) + 1e-5)
    expected = expected * affine["scale"].reshape(shape) + affine["bias"].reshape(shape)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert layer.momentum == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({"gamma": np.ones(4)}, {}, ShapeError),
        ({"moving_variance": -np.ones(3)}, {}, DataError),
        ({"moving_variance": np.full(3, np.nan)}, {}, DataError),
        ({"moving_mean": None}, {}, DataError),
        ({"moving_variance": None}, {}, DataError),
        ({}, {"momentum": 1.5}, ArgumentError),
        ({}, {"epsilon": 0.0}, ArgumentError),
        ({}, {"names": {"": "nowhere"}}, ArgumentError),
    ],
)
def test_bad_values_change_nothing(change, options, error):
    arrays = {k: v for k, v in {**keras_arrays(3), **change}.items() if v is not None}
    layer = nn.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error):
        load_keras(layer, arrays, **options)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert (layer.eps, layer.momentum) == (1e-5, 0.1)


def test_affine_values_need_a_place():
    with pytest.raises(ArgumentError, match="affine"):
        load_keras(nn.BatchNorm1d(3, affine=False), keras_arrays(3))


def test_flax_without_statistics():
    with pytest.raises(DataError, match="batch_stats"):
        load_flax(nn.BatchNorm1d(3), {"params": {}})


def test_counts_that_differ_are_no_order():
    with pytest.raises(ArgumentError, match="2 in the model"):
        load_keras(network(), {"only": keras_arrays(2)}, names="order")
