"""Values from Keras' and flax' layouts give the outputs those libraries define."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.errors import ArgumentError, DataError, ShapeError
from batchnorm.network.layers.keras_and_flax import load_flax, load_keras
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


def listed(arrays):
    return [arrays[name] for name in ("gamma", "beta", "moving_mean", "moving_variance")]


def test_what_get_weights_lists_is_read_as_keras_lists_it():
    arrays = keras_arrays(3)
    by_name, by_list = load_keras(nn.BatchNorm1d(3), arrays), load_keras(nn.BatchNorm1d(3), listed(arrays))
    assert str(by_name.state_dict()) == str(by_list.state_dict())
    # a list for every layer of a network, those of other layers among them
    of_layers = {
        "stem": listed(keras_arrays(2)),
        "conv": [np.ones((1, 1, 2, 3)), np.ones(3)],
        "dense": [np.ones((3, 3))],
        "pool": [],
        "head_bn": listed(keras_arrays(3)),
    }
    net = load_keras(network(), of_layers, names={"stem": "stem", "head_bn": "head.1"})
    np.testing.assert_allclose(net["head"][1].running_var, of_layers["head_bn"][3], rtol=1e-6)
    np.testing.assert_allclose(net["stem"].weight.detach(), of_layers["stem"][0], rtol=1e-6)


def test_a_list_that_leaves_open_what_it_holds_is_refused():
    arrays = keras_arrays(3)
    alone = load_keras(nn.BatchNorm1d(3), listed(arrays)[2:])
    np.testing.assert_allclose(alone.running_mean, arrays["moving_mean"], rtol=1e-6)
    for model, weights, kind in (
        (nn.BatchNorm1d(3), listed(arrays)[1:], DataError),
        (nn.BatchNorm1d(3), [], DataError),
        (network(), listed(arrays), ArgumentError),
        (network(), {"stem": listed(arrays)[2:]}, DataError),
        (network(), None, ArgumentError),
        (network(), np.ones(3), ArgumentError),
    ):
        with pytest.raises(kind) as caught:
            load_keras(model, weights)
        assert caught.value.mend
    with pytest.raises(ArgumentError, match="no dictionary"):
        load_flax(network(), [1])


def flax_variables(means):
    return {
        "params": {name: {"scale": np.ones(len(m)), "bias": np.zeros(len(m))} for name, m in means.items()},
        "batch_stats": {name: {"mean": m, "var": np.ones(len(m))} for name, m in means.items()},
    }


def test_numbers_in_names_are_ordered_as_numbers():
    # as JAX sorts them: BatchNorm_10 before BatchNorm_2
    names = sorted(f"BatchNorm_{i}" for i in range(12))
    variables = flax_variables({name: np.full(4, float(name.split("_")[1])) for name in names})
    net = load_flax(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(12))), variables, names="order")
    assert [int(layer.running_mean[0]) for layer in net] == list(range(12))
    # as Keras names them: the first has no number
    names = sorted(["bn", *(f"bn_{i}" for i in range(1, 12))])
    weights = {name: {**keras_arrays(4), "moving_mean": np.full(4, float(i))} for i, name in enumerate(names)}
    net = load_keras(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(12))), weights, names="order")
    assert [names[int(layer.running_mean[0])] for layer in net] == ["bn", *(f"bn_{i}" for i in range(1, 12))]


def test_blocks_are_ordered_as_numbers_too():
    stats = {
        f"Block_{i}": {
            f"BatchNorm_{j}": {"mean": np.full(2, 10.0 * i + j), "var": np.ones(2)} for j in (0, 1)
        }
        for i in sorted(range(11), key=str)
    }
    net = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(22)))
    load_flax(net, {"batch_stats": stats}, names="order")
    assert [int(layer.running_mean[0]) for layer in net] == [10 * i + j for i in range(11) for j in (0, 1)]


@pytest.mark.parametrize(
    "means",
    [
        # sorted by JAX: which of the two was made first is not in it
        {"Block_0": np.zeros(4), "bn_init": np.zeros(4)},
        # listed against their numbers
        {"BatchNorm_1": np.zeros(4), "BatchNorm_0": np.zeros(4)},
    ],
)
def test_an_order_that_cannot_be_known_is_refused(means):
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    with pytest.raises(ArgumentError, match="order"):
        load_flax(net, flax_variables(means), names="order")
    assert net[0].eps == 1e-5


def test_numbers_of_channels_tell_where_names_do_not():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    load_flax(net, flax_variables({"Block_0": np.full(4, 7.0), "bn_init": np.full(3, 5.0)}), names="order")
    assert net[0].running_mean.tolist() == [5.0] * 3
    with pytest.raises(ArgumentError, match="in order, layer 0"):
        load_flax(
            net, flax_variables({"BatchNorm_0": np.zeros(4), "BatchNorm_1": np.zeros(3)}), names="order"
        )


def test_names_that_are_no_names_are_refused():
    for names in ("ordre", ["stem"], {"stem": "stem", "haed": "head.1"}):
        with pytest.raises(ArgumentError, match="names"):
            load_keras(network(), {"stem": keras_arrays(2)}, names=names)
