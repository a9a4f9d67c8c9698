"""An accelerated network gives the plain one's outputs, gradients and statistics, and changes nothing else of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, TRAPS, Branching, assert_same, image, prepared
from torch import nn

import batchnorm
from batchnorm import accelerate, record, restore

pytestmark = [
    # what Dynamo itself warns of: a random number it cannot follow, and a tensor that crosses a break
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


def together(model):
    """Norms that are called with something behind them."""
    return [row.path for row in record(model).of("called") if row.detail]


def twins(make):
    model = prepared(make)
    return accelerate(copy.deepcopy(model)), model


def called(make=NETWORKS["functional"][0], training=False):
    """Accelerated and plain, after a call that compiled."""
    model, plain = twins(make)
    x = image()
    for network in (model, plain):
        network.train(training)(x)
    return model, plain, x


@pytest.mark.parametrize("name", NETWORKS)
def test_same_answers_and_as_many_calls_together_as_there_should_be(name):
    make, in_training, norms = NETWORKS[name]
    model, plain = twins(make)
    model(image())
    plain(image())
    assert len(together(model)) == in_training
    assert len(record(model).of("called")) == norms
    assert_same(model, plain)


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_give_the_same_answers(trap):
    assert_same(*twins(lambda: trap(3)))


def test_layers_types_buffers_and_state_stay():
    model = prepared(NETWORKS["basic"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules() if n}
    keys, tensors = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    accelerate(model)
    weight = model[0].bn1.weight.detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules() if n} == before
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert not torch.equal(model[0].bn1.weight, weight)


def test_restore_takes_off_what_accelerate_put_on():
    model = prepared(NETWORKS["nested"][0])
    before = {n: (type(m), dict(vars(m))) for n, m in model.named_modules()}
    restore(accelerate(model))
    assert {n: (type(m), dict(vars(m))) for n, m in model.named_modules()} == before
    assert len(record(model)) == 0


def test_twice_is_once():
    model = accelerate(accelerate(prepared(NETWORKS["functional"][0])))
    assert len(record(model).of("accelerated")) == 1
    assert vars(restore(model)).get("_compiled_call_impl") is None


def test_ours_stay_ours_and_move_by_our_rules():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm, self.last = batchnorm.BatchNorm2d(3), batchnorm.BatchNorm2d(3, activation="silu")

        def forward(self, x):
            return self.last(torch.relu(self.norm(self.conv(x)) + x))

    model, plain = twins(Mixed)
    assert_same(model, plain)
    assert together(model) == ["norm"]
    x = image()
    x[0, 0, 0, 0] = torch.nan
    for network in (model, plain):
        network.train()(x)
    assert bool(model.norm.running_mean.isfinite().all())
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchs_layers_move_by_torchs_rules():
    model, plain = twins(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    x = image()
    x[0, 0, 0, 0] = torch.nan
    for network in (model, plain):
        network(x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not bool(model[1].running_mean.isfinite().any())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(image()[:1, :, :1, :1])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_every_momentum_counts_and_averages_as_torch(momentum):
    model, plain = twins(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=momentum), nn.ReLU())
    )
    for seed in range(4):
        for network in (model, plain):
            network(image(seed))
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    def make():
        return NETWORKS["basic"][0]().to(dtype)

    torch.manual_seed(0)
    plain = make()
    model = accelerate(copy.deepcopy(plain))
    x = image().to(dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x), **tolerance)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_another_dtype_behind_a_norm_is_no_sum_of_ours():
    class Wider(Branching):
        def forward(self, x):
            return self.act(self.norm(self.conv(x)) + x.double())

    torch.manual_seed(0)
    plain = Wider(3)
    model = accelerate(copy.deepcopy(plain))
    x = image().float()
    assert model(x).dtype == plain(x).dtype == torch.float64
    assert together(model) == []


def test_the_residual_of_a_smooth_activation_may_be_overwritten_afterwards():
    class Overwrites(Branching):
        def forward(self, x):
            z = self.conv(x)
            shortcut = x * 1
            y = F.silu(self.norm(z) + shortcut)
            shortcut.mul_(2)
            return y + shortcut

    assert_same(*twins(lambda: Overwrites(3)))


def test_an_input_overwritten_between_norm_and_sum():
    class Between(Branching):
        gradients = False

        def forward(self, x):
            z = self.conv(x)
            y = self.norm(z)
            z.zero_()
            return self.act(y + x)

    assert_same(*twins(lambda: Between(3)))


def test_statistics_read_between_norm_and_sum():
    class Between(Branching):
        def forward(self, x):
            y = self.norm(self.conv(x))
            penalty = self.norm.running_mean.sum()
            return self.act(y + x) + penalty

    assert_same(*twins(lambda: Between(3)))


def test_views_of_the_output_see_what_is_written_in_place():
    class Views(Branching):
        gradients = False

        def forward(self, x):
            y = self.norm(self.conv(x))
            flat = y.flatten(1)
            y.relu_()
            return flat * 2

    assert_same(*twins(lambda: Views(3)))


def test_methods_in_place_are_followed():
    class InPlace(Branching):
        def forward(self, x):
            y = self.norm(self.conv(x))
            y.add_(x)
            return y.relu_()

    model, plain = twins(lambda: InPlace(3))
    assert_same(model, plain)
    assert together(model) == ["norm"]


def test_no_call_reaches_over_a_change_of_mode():
    class Modes(Branching):
        def forward(self, x):
            with torch.no_grad():
                y = self.norm(self.conv(x))
            z = self.act(y) * self.conv.weight.sum()
            with torch.autocast("cpu", torch.bfloat16):
                w = self.norm(self.conv(x).to(x.dtype))
            return z + self.act(w)

    model, plain = twins(lambda: Modes(3))
    for network in (model, plain):
        network(image())
    assert together(model) == []
    assert_same(model, plain)
