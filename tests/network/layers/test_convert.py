"""Conversions keep the object, the hooks and the optimizer, and the way back gives what was there (P26)."""

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError
from batchnorm.network.layers.convert import convert
from batchnorm.network.layers.frozen import FrozenBatchNorm
from batchnorm.network.record import record


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    shared = norm(4)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 5, 1), norm(5)
    )
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return model.eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("first", ["batchnorm", "torch", "sync", "frozen"])
@pytest.mark.parametrize("second", ["batchnorm", "torch", "sync", "frozen"])
def test_there_and_back_is_lossless(first, second):
    model = convert(network(), first)
    seen = []
    handle = model[1].register_forward_hook(lambda *_: seen.append(1))
    model[1].mark = "mine"
    out = model(X)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    parameters = dict(model.named_parameters())
    identities = [id(m) for m in model.modules()]

    convert(model, second)
    torch.testing.assert_close(model(X), out)
    assert [id(m) for m in model.modules()] == identities
    convert(model, first)

    assert [type(m) for m in model.modules()] == kinds
    assert model[1] is model[4]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert dict(model.named_parameters()) == parameters
    assert all(p is parameters[k] for k, p in model.named_parameters())
    torch.testing.assert_close(model(X), out)
    assert model[1].mark == "mine"
    assert len(seen) == 6  # two calls of the shared layer, three times
    handle.remove()
    model(X)
    assert len(seen) == 6


def test_the_optimizer_made_before_still_trains():
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "batchnorm")
    before = model[6].weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[6].weight, before)


class Lookalike(nn.Module):
    """Written as detection libraries write it, with an eps of its own."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("weight", torch.rand(n) + 0.5)
        self.register_buffer("bias", torch.randn(n))
        self.register_buffer("running_mean", torch.randn(n))
        self.register_buffer("running_var", torch.rand(n) + 0.5)

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-3).rsqrt()
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class Impostor(Lookalike):
    def forward(self, x):
        return 2 * super().forward(x)


def test_lookalikes_thaw_and_freeze_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Lookalike(4))
    out, keys = model(X), list(model.state_dict())
    convert(model, "torch")
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].eps == 1e-3
    torch.testing.assert_close(model.eval()(X), out)
    assert model[1].weight.requires_grad
    convert(model, "frozen")
    assert type(model[1]) is Lookalike
    assert sorted(model.state_dict()) == sorted(keys)
    torch.testing.assert_close(model(X), out)


def test_an_impostor_is_left_alone():
    model = nn.Sequential(Impostor(3))
    convert(model, "batchnorm")
    assert type(model[0]) is Impostor
    assert "something else" in record(model).reason("0")


def test_frozen_layers_load_checkpoints_of_batch_norm():
    source = network()[6]
    layer = FrozenBatchNorm(5)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(layer.train()(x), source(x))


@pytest.mark.parametrize(
    ("make", "x", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), torch.randn(5, 3), nn.BatchNorm1d),
        (
            lambda: nn.Sequential(nn.Conv3d(3, 4, 1), nn.SyncBatchNorm(4)),
            torch.randn(2, 3, 2, 2, 2),
            nn.BatchNorm3d,
        ),
        (lambda: nn.Sequential(nn.SyncBatchNorm(3)), torch.randn(2, 3, 2, 2), None),
    ],
)
def test_synchronized_layers_of_others_become_plain(make, x, expected):
    model = make().eval()
    out = model(x)
    convert(model, "torch")
    if expected is None:
        assert type(model[-1]) is nn.SyncBatchNorm
        assert "example" in record(model).reason("0")
        convert(model, "torch", example=x)
        expected = nn.BatchNorm2d
    assert type(model[-1]) is expected
    assert not hasattr(model[-1], "process_group")
    torch.testing.assert_close(model(x), out)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize(
    ("to", "judge"),
    [
        ("group", lambda m: nn.GroupNorm(2, m.num_channels)),
        ("layer", lambda m: nn.GroupNorm(1, m.num_channels)),
        ("instance", lambda m: nn.InstanceNorm2d(m.num_features, affine=True)),
    ],
)
def test_norms_for_small_batches(norm, to, judge):
    model = nn.Sequential(norm(6))
    weight = model[0].weight
    nn.init.normal_(weight)
    convert(model, to, groups=2)
    expected = judge(model[0])
    expected.load_state_dict(model[0].state_dict())
    assert type(model[0]) is type(expected)
    assert repr(model[0]) == repr(expected)
    assert model[0].weight is weight
    assert vars(model[0]).keys() == vars(expected).keys()
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(model.train()(x), expected(x))
    assert "batch" in record(model).rows[0].detail


def test_groups_divide_the_channels():
    sizes = {64: 32, 48: 24, 37: 1, 6: 3, 1: 1}
    for channels, groups in sizes.items():
        model = convert(nn.Sequential(nn.BatchNorm2d(channels)), "group")
        assert model[0].num_groups == groups


@pytest.mark.parametrize(
    ("layer", "to", "why"),
    [
        (lambda: batchnorm.BatchNorm2d(3, activation="relu"), "torch", "activation"),
        (lambda: batchnorm.BatchNorm1d(3, channel_dim=-1), "sync", "channel_dim"),
        (lambda: batchnorm.BatchNorm2d(3, running_var_correction=0), "torch", "running_var_correction"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), "frozen", "no statistics"),
        (lambda: nn.LazyBatchNorm2d(), "batchnorm", "lazy"),
    ],
)
def test_what_cannot_be_said_is_left_alone_with_the_reason(layer, to, why):
    model = nn.Sequential(layer())
    before, state = type(model[0]), set(vars(model[0]))
    convert(model, to)
    assert type(model[0]) is before
    assert set(vars(model[0])) == state
    assert why in record(model).reason("0")


def test_an_activation_survives_freezing():
    model = nn.Sequential(batchnorm.BatchNorm2d(3, activation="relu")).eval()
    x = torch.randn(2, 3, 4, 4)
    out = model(x)
    convert(model, "frozen")
    torch.testing.assert_close(model(x), out)
    convert(model, "batchnorm")
    assert model[0].activation == "relu"


@pytest.mark.parametrize(("to", "options"), [("nothing", {}), ("group", {"groups": 0})])
def test_bad_arguments(to, options):
    model = network()
    with pytest.raises(ArgumentError):
        convert(model, to, **options)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_failing_example_changes_nothing():
    model = network()
    with pytest.raises(RuntimeError, match="channels"):
        convert(model, "sync", example=torch.randn(2, 9, 8, 8))
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[1]._forward_pre_hooks


def test_a_single_layer_is_a_model_too():
    layer = convert(nn.BatchNorm1d(3), "batchnorm")
    assert type(layer) is batchnorm.BatchNorm1d
