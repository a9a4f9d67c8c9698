"""An ensemble is what its networks would be one by one; torch is the judge."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.errors import DataError
from batchnorm_lab.data import ImageData
from batchnorm_lab.studies.ensemble import ConvEnsemble, MLPEnsemble
from batchnorm_lab.studies.sequences import SequenceEnsemble
from batchnorm_lab.studies.training import (
    EnsembleOptimizer,
    accuracy,
    batch_statistics,
    mean_loss,
    mini_batches,
    train,
)

SIZES = (4, 6, 5, 3)


def make_data(samples=40, classes=3, side=2):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % classes
    images = torch.rand(samples, 1, side, side, generator=generator) * 0.3
    images[torch.arange(samples), 0, labels // side, labels % side] += 0.7
    return ImageData("made", images, labels, images, labels, tuple("abcdefghij"[:classes]))


def torch_twin(networks, run, places):
    """The same network out of torch's own layers."""
    layers = []
    last = len(networks.weights) - 1
    if "inputs" in places:
        layers.append(nn.BatchNorm1d(networks.sizes[0]))
    for layer, (weight, bias) in enumerate(zip(networks.weights, networks.biases, strict=True)):
        # Adam would turn the rounding of a redundant bias's gradient into steps of full size.
        linear = nn.Linear(weight.shape[1], weight.shape[2], bias=bias.shape[1] > 0)
        linear.weight.data = weight[run].detach().T.clone()
        if bias.shape[1]:
            linear.bias.data = bias[run].detach().clone()
        layers.append(linear)
        if layer == last:
            layers += [nn.BatchNorm1d(weight.shape[2])] if "outputs" in places else []
            break
        layers += [nn.BatchNorm1d(weight.shape[2])] if "before" in places else []
        layers.append(nn.ReLU())
        layers += [nn.BatchNorm1d(weight.shape[2])] if "after" in places else []
    return nn.Sequential(*layers)


PLACES = [
    (),
    ("before",),
    ("after",),
    ("inputs",),
    ("before", "outputs"),
    ("inputs", "before", "after", "outputs"),
]


@pytest.mark.parametrize("places", PLACES, ids="+".join)
@pytest.mark.parametrize("training", [True, False])
def test_every_network_is_its_twin_in_torch(places, training):
    networks = MLPEnsemble(SIZES, [3, 8], activation="relu", places=places).train(training)
    x = torch.randn(2, 12, 4)
    ours = networks(x)
    for run in range(2):
        twin = torch_twin(networks, run, places).train(training)
        torch.testing.assert_close(ours[run], twin(x[run]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
def test_training_is_torchs_training(kind):
    data = make_data()
    rates = [0.05, 0.2]
    networks = MLPEnsemble(SIZES, [1, 2], activation="relu", places={"before"})
    twins = [torch_twin(networks, run, {"before"}) for run in range(2)]
    train(networks, EnsembleOptimizer(networks, rates, kind), data, steps=12, batch=10)
    source = mini_batches(40, 10, [1, 2])
    make = {
        "sgd": lambda p, lr: torch.optim.SGD(p, lr),
        "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        "adam": lambda p, lr: torch.optim.Adam(p, lr),
    }[kind]
    optimizers = [make(twin.parameters(), rate) for twin, rate in zip(twins, rates, strict=True)]
    for _ in range(12):
        index = next(source)
        for run, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(
                twin(data.train_images[index[run]].flatten(1)), data.train_labels[index[run]]
            ).backward()
            optimizer.step()
    networks.eval()
    ours = networks(networks.images(data.test_images))
    for run, twin in enumerate(twins):
        twin.eval()
        expected = twin(data.test_images.flatten(1))
        torch.testing.assert_close(ours[run], expected, atol=5e-3 if kind == "adam" else 1e-3, rtol=1e-2)


def test_a_network_is_the_same_in_any_company():
    data = make_data()

    def trained(seeds):
        networks = MLPEnsemble(SIZES, seeds, places={"before"})
        train(networks, EnsembleOptimizer(networks, [0.1] * len(seeds)), data, steps=8, batch=10)
        return networks.eval()(networks.images(data.test_images)).detach()

    torch.testing.assert_close(trained([5])[0], trained([2, 5, 9])[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("places", [(), ("before",)], ids=["plain", "batch norm"])
def test_a_network_that_overflows_does_not_touch_the_others(places):
    data = make_data()
    networks = MLPEnsemble(SIZES, [0, 1], activation="relu", places=places, weight_scale=[1.0, 1e38])
    alone = MLPEnsemble(SIZES, [0], activation="relu", places=places)
    for each, rates in ((networks, [0.1, 1e30]), (alone, [0.1])):
        train(each, EnsembleOptimizer(each, rates), data, steps=6, batch=10)
        each.eval()
    first, second = networks(networks.images(data.test_images))
    torch.testing.assert_close(first, alone(alone.images(data.test_images))[0], atol=1e-4, rtol=1e-3)
    assert not second.isfinite().all()
    assert accuracy(networks, data.test_images, data.test_labels)[1] < 0.5
    assert mean_loss(networks, data.test_images, data.test_labels)[1] == torch.inf


def test_arms_of_a_seed_begin_with_the_same_weights():
    plain, normed = (MLPEnsemble(SIZES, [4, 5], places=places) for places in ((), ("before",)))
    for one, other in zip(plain.weights, normed.weights, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(plain.weights[0][0], plain.weights[0][1])


def test_initial_weights_have_the_stated_scale():
    networks = MLPEnsemble((400, 300, 10), [0, 1], gain=2**0.5, weight_scale=[1.0, 10.0])
    stds = networks.weights[0].detach().std(dim=(1, 2))
    torch.testing.assert_close(stds, torch.tensor([1.0, 10.0]) * (2 / 400) ** 0.5, rtol=0.02, atol=0)


def test_biases_before_a_batch_norm_are_left_out():
    networks = MLPEnsemble(SIZES, [0], places={"before"})
    assert [bias.numel() for bias in networks.biases] == [0, 0, 3]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_convolutional_network_is_its_twin_in_torch(normalized):
    networks = ConvEnsemble((2, 8, 8), (3, 5), 4, [1, 6], normalized=normalized)
    x = torch.rand(2, 7, 2, 8, 8)
    ours = networks(networks.images(x))
    for run in range(2):
        a = x[run]
        for layer, out in enumerate((3, 5)):
            weight = networks.weights[layer][run * out : (run + 1) * out]
            a = F.conv2d(a, weight, stride=layer + 1, padding=1)
            a = torch.relu(nn.BatchNorm2d(out)(a) if normalized else a)
        expected = a.mean((2, 3)) @ networks.head[run]
        torch.testing.assert_close(ours[run], expected, atol=1e-4, rtol=1e-3)


def test_every_image_is_seen_once_an_epoch_in_an_order_of_the_seed():
    source = mini_batches(10, 5, [0, 1, 0])
    epoch = torch.cat([next(source), next(source)], dim=1)
    assert torch.equal(epoch.sort(dim=1).values, torch.arange(10).expand(3, -1))
    assert torch.equal(epoch[0], epoch[2])
    assert not torch.equal(epoch[0], epoch[1])
    second = torch.cat([next(source), next(source)], dim=1)
    assert not torch.equal(epoch[0], second[0])


def test_a_mini_batch_larger_than_the_data_is_refused():
    with pytest.raises(DataError, match="mini-batch of 11"):
        next(mini_batches(10, 11, [0]))


def test_accuracy_counts_right_answers_chunk_by_chunk():
    data = make_data(samples=10)
    networks = MLPEnsemble((4, 3), [0])
    with torch.no_grad():
        networks.weights[0].copy_(torch.eye(4)[:, :3].unsqueeze(0))
    expected = (data.test_images.flatten(1)[:, :3].argmax(1) == data.test_labels).float().mean()
    assert accuracy(networks, data.test_images, data.test_labels)[0] == pytest.approx(float(expected))
    first_nine = (data.test_images.flatten(1)[:9, :3].argmax(1) == data.test_labels[:9]).float().mean()
    assert accuracy(networks, data.test_images, data.test_labels, chunk=3)[0] == pytest.approx(
        float(first_nine)
    )


@pytest.mark.parametrize("masked", [True, False])
def test_padding_reaches_the_outputs_only_through_the_statistics(masked):
    networks = SequenceEnsemble(8, 8, 6, 4, [0, 1], masked=masked)
    x = networks.images(torch.rand(12, 1, 8, 8))
    short, long = networks(x, padding=0), networks(x, padding=9)
    assert torch.allclose(short, long, atol=1e-5) == masked
    networks.eval()
    torch.testing.assert_close(networks(x, padding=0), networks(x, padding=9), atol=1e-5, rtol=1e-4)


def test_looking_with_batch_statistics_leaves_the_moving_averages_and_the_mode():
    networks = MLPEnsemble(SIZES, [0], places={"before"}, momentum=None).train()
    x = torch.randn(1, 12, 4)
    networks(x)
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    networks.eval()
    with pytest.raises(RuntimeError), batch_statistics(networks):
        networks(torch.randn(1, 12, 7))  # of the wrong width, in the second product
    assert not networks.training
    assert networks.norms["before0"].momentum is None
    for name, value in networks.state_dict().items():
        assert torch.equal(value, before[name]), name
    with batch_statistics(networks):
        by_batch = networks(100 * x)
    assert not torch.allclose(by_batch, networks(100 * x), atol=1e-3)
