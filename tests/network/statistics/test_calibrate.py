"""Population statistics from mini-batches (M11, P5), and everything that must not change meanwhile."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError, DataError
from batchnorm.network.record import record
from batchnorm.network.statistics.calibrate import calibrate


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
    )


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    mean=st.sampled_from([0.0, -7.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_pooled_is_exact_for_the_whole_data_whatever_the_split(sizes, mean, seed):
    x = torch.randn(sum(sizes) + 1, 5, generator=torch.Generator().manual_seed(seed)) * 0.1 + mean
    layer = calibrate(nn.BatchNorm1d(5), list(x.split([*sizes, 1])), progress=False)
    exact = x.double()
    torch.testing.assert_close(layer.running_mean, exact.mean(0).float(), rtol=2e-7, atol=1e-9)
    torch.testing.assert_close(layer.running_var, exact.var(0).float(), rtol=2e-6, atol=1e-9)
    assert layer.num_batches_tracked == len(sizes) + 1


def test_spread_between_batches_and_their_sizes_are_counted():
    # the case of PAINS.md: 64 values around 0 and 4 around 10, which update_bn weighs alike
    generator = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(64, 1, generator=generator), torch.randn(4, 1, generator=generator) + 10])
    layer = calibrate(nn.BatchNorm1d(1), [(x[:64], None), (x[64:], None)])
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    average = calibrate(nn.BatchNorm1d(1), [x[:64], x[64:]], estimator="average")
    torch.testing.assert_close(average.running_mean, x.mean(0))
    expected = (64 * x[:64].var(0) + 4 * x[64:].var(0)) / 68
    torch.testing.assert_close(average.running_var, expected)
    assert average.running_var < 0.3 * layer.running_var


def test_moving_weighs_batches_in_the_order_seen_and_forgets_what_stood_there():
    batches = [torch.randn(6, 3) * k + k for k in range(1, 5)]
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(1e6)
    calibrate(layer, batches, estimator="moving", momentum=0.3)
    weights = torch.tensor([0.3 * 0.7 ** (3 - k) for k in range(4)])
    weights /= weights.sum()
    torch.testing.assert_close(
        layer.running_mean, sum(w * b.mean(0) for w, b in zip(weights, batches, strict=True))
    )
    torch.testing.assert_close(
        layer.running_var, sum(w * b.var(0) for w, b in zip(weights, batches, strict=True))
    )


def test_deeper_layers_see_what_training_mode_puts_out():
    model, x = small_net(), torch.randn(6, 2, 9, 9) * 3 + 5
    expected = copy.deepcopy(model).train()
    expected[3].eval()
    for norm in (expected[1], expected[5]):
        norm.momentum = 1.0
    with torch.no_grad():
        expected(x)
    calibrate(model, x)
    for i in (1, 5):
        torch.testing.assert_close(model[i].running_mean, expected[i].running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[i].running_var, expected[i].running_var, rtol=1e-5, atol=1e-5)


def test_agrees_with_update_bn_of_torch_on_even_batches():
    model = small_net()
    batches = list(torch.randn(12, 2, 9, 9).split(4))
    theirs = copy.deepcopy(model)
    theirs[3].p = 0.0  # update_bn leaves dropout running
    torch.optim.swa_utils.update_bn(batches, theirs)
    ours = calibrate(model, batches, estimator="average")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], msg=name)


class Needy(nn.Module):
    """Wants keyword arguments, calls one norm twice and another never."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x, scale=1.0):
        return self.twice(x), self.twice(scale * x)


@pytest.mark.parametrize(
    "shape_of", [lambda x: {"x": x, "scale": 3.0}, lambda x: ({"x": x, "scale": 3.0}, 0)]
)
def test_mappings_are_keyword_arguments_and_every_call_counts(shape_of):
    model, x = Needy(), torch.randn(8, 2)
    never = state(model.never)
    calibrate(model, (shape_of(part) for part in x.split(3)))
    seen = torch.cat([x, 3 * x])
    torch.testing.assert_close(model.twice.running_mean, seen.mean(0))
    torch.testing.assert_close(model.twice.running_var, seen.var(0))
    assert_same_state(model.never, never)
    assert "never called" in record(model).reason("never")
    assert "16 values in 6 calls" in record(model).of("calibrated")[0].detail


def test_forward_reads_any_structure():
    model, x = nn.BatchNorm1d(2), torch.randn(8, 2)
    calibrate(model, [{"deep": [x]}], forward=lambda m, batch: m(batch["deep"][0]))
    torch.testing.assert_close(model.running_mean, x.mean(0))


@pytest.mark.parametrize("broken", ["forward", "loader", "structure", "empty", "estimator", "momentum"])
def test_an_exception_leaves_everything_as_it_was(broken):
    model = small_net().train()
    model[4].eval()
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before, modes = state(model), [m.training for m in model.modules()]
    x = torch.randn(2, 2, 9, 9)

    def loader():
        yield x
        raise ZeroDivisionError

    data, expected, options = {
        "forward": ([x, torch.randn(2, 3, 9, 9)], RuntimeError, {}),
        "loader": (loader(), ZeroDivisionError, {}),
        "structure": ([x, "no batch"], ArgumentError, {}),
        "empty": ([], DataError, {}),
        "estimator": ([x], ArgumentError, {"estimator": "median"}),
        "momentum": ([x], ArgumentError, {"estimator": "moving", "momentum": 0.0}),
    }[broken]
    with pytest.raises(expected):
        calibrate(model, data, **options)
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert len(model[1]._forward_hooks) == 1
    assert model[1].running_mean is model[1]._buffers["running_mean"]


def test_buffers_keep_their_identity_and_modes_return():
    model = small_net().train()
    buffer = model[1].running_mean
    calibrate(model, [torch.randn(3, 2, 9, 9)])
    assert model[1].running_mean is buffer
    assert all(m.training for m in model.modules())
    assert not model[1].running_mean.requires_grad


def test_a_layer_in_eval_inside_a_training_module_is_frozen():
    model = small_net().train()
    model[1].eval()
    frozen = state(model[1])
    calibrate(model, torch.randn(3, 2, 9, 9))
    assert_same_state(model[1], frozen)
    assert not model[1].training
    assert "frozen" in record(model).reason("1")
    assert [row.path for row in record(model).of("calibrated")] == ["5"]
    # in a model that is all in eval mode nothing says so
    calibrate(model.eval(), torch.randn(3, 2, 9, 9))
    assert not torch.equal(model[1].running_mean, frozen["running_mean"])


def test_single_samples_count():
    x = torch.randn(7, 3)
    layer = calibrate(nn.BatchNorm1d(3), list(x.split(1)))
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    alone = nn.BatchNorm1d(3)
    calibrate(alone, [x[:1]])
    assert torch.equal(alone.running_var, torch.ones(3))
    assert "too few" in record(alone).reason("")


def test_a_non_finite_channel_of_a_batch_does_not_count():
    x = torch.randn(9, 2)
    bad = torch.randn(4, 2)
    bad[1, 0] = float("nan")
    layer = calibrate(nn.BatchNorm1d(2), [x, bad])
    torch.testing.assert_close(layer.running_mean[0], x[:, 0].mean())
    torch.testing.assert_close(layer.running_mean[1], torch.cat([x, bad])[:, 1].mean())
    assert "1 non-finite" in record(layer).rows[0].detail


def test_sync_layers_and_layers_without_statistics():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(8, 3)
    calibrate(model, x)
    torch.testing.assert_close(model[0].running_var, x.var(0))
    assert "no running statistics" in record(model).reason("1")


def test_empty_batches_and_half_precision():
    x = torch.randn(32, 3).half()
    layer = calibrate(nn.BatchNorm1d(3).half(), [x, x[:0]])
    torch.testing.assert_close(layer.running_var, x.double().var(0).half(), rtol=1e-3, atol=0)


def test_large_inputs_are_read_in_slices(monkeypatch):
    module = importlib.import_module("batchnorm.network.statistics.meter")

    monkeypatch.setattr(module, "_CHUNK", 50)
    x = torch.randn(11, 3, 5) + 100
    layer = calibrate(nn.BatchNorm1d(3), x)
    torch.testing.assert_close(layer.running_var, x.double().var((0, 2)).float())


def test_inside_a_domain_it_is_the_domain_that_is_measured():
    model = nn.Sequential(batchnorm.BatchNorm1d(3))
    x = torch.randn(8, 3) + 4
    with pytest.raises(DataError), batchnorm.domain("other"):
        calibrate(model, [])
    assert "domains" not in model[0]._modules
    with batchnorm.domain("other"):
        calibrate(model, x)
    torch.testing.assert_close(model[0].domains["other"].running_mean, x.mean(0))
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_ours_with_a_mask_frozen_or_channels_last():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.frozen = batchnorm.BatchNorm1d(3, channel_dim=-1), batchnorm.BatchNorm1d(3)

        def forward(self, x, mask):
            return self.norm(x, mask=mask), self.frozen(x[:, 0])

    model = Masked()
    batchnorm.freeze(model.frozen)
    x, mask = torch.randn(4, 5, 3), torch.rand(4, 5) < 0.6
    x[~mask] = float("nan")
    x[:, 0] = 1.0
    mask[:, 0] = True
    calibrate(model.train(), [{"x": x[:3], "mask": mask[:3]}, {"x": x[3:], "mask": mask[3:]}])
    torch.testing.assert_close(model.norm.running_mean, x[mask].mean(0))
    torch.testing.assert_close(model.norm.running_var, x[mask].var(0))
    assert torch.equal(model.frozen.running_mean, torch.zeros(3))
    assert record(model).reason("frozen") == "frozen"
