"""What a layer does with a single value per channel, and with NaN and inf."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm

NAN, INF = float("nan"), float("inf")


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_state(layer, before):
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def trained(**options):
    layer = batchnorm.BatchNorm1d(3, **options)
    layer(torch.randn(64, 3) * 2 + 4)
    return layer


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_a_single_value_is_refused_with_torchs_words_and_three_ways_out(shape):
    model = nn.Sequential(nn.Identity(), trained())
    before = state(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as caught:
        model(torch.randn(shape))
    assert isinstance(caught.value, batchnorm.TooFewValuesError)
    assert str(shape) in str(caught.value)
    assert caught.value.at == "1"
    for way in ("larger batch", "eval", 'on_single_value="running"'):
        assert way in caught.value.mend
    assert_state(model, before)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_running_normalizes_a_single_value_with_the_running_statistics(shape):
    layer = trained(on_single_value="running", activation="relu")
    before = state(layer)
    z = torch.randn(shape, requires_grad=True)
    y = layer(z)
    y.sum().backward()
    assert_state(layer, before)
    gradient = z.grad.clone()
    z.grad = None
    evaluated = layer.eval()(z)
    evaluated.sum().backward()
    assert torch.equal(y, evaluated)
    assert torch.equal(gradient, z.grad)


def test_running_without_statistics_says_what_is_missing():
    layer = batchnorm.BatchNorm1d(3, on_single_value="running", track_running_stats=False)
    with pytest.raises(batchnorm.MissingStatisticsError):
        layer(torch.randn(1, 3))


def test_two_values_are_enough_under_either_policy():
    z = torch.randn(2, 3)
    strict, lenient = trained(), trained(on_single_value="running")
    lenient.load_state_dict(strict.state_dict())
    assert torch.equal(strict(z), lenient(z))


@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_skip_leaves_only_the_bad_channel_alone_and_counts_it(bad):
    layer, clean = trained(), trained()
    clean.load_state_dict(layer.state_dict())
    z = torch.randn(8, 3)
    dirty = z.clone()
    dirty[2, 1] = bad
    before = state(layer)
    y = layer(dirty)
    clean(z)
    assert torch.isnan(y[:, 1]).any(), "the output shows it"
    assert torch.isfinite(y[:, [0, 2]]).all()
    for name in ("running_mean", "running_var"):
        ours = layer.get_buffer(name)
        assert torch.equal(ours[1], before[name][1])
        torch.testing.assert_close(ours[[0, 2]], clean.get_buffer(name)[[0, 2]])
    assert layer.num_batches_skipped == 1
    assert layer.num_batches_tracked == 2


def test_a_batch_without_nan_is_not_counted_as_skipped():
    layer = trained()
    assert layer.num_batches_skipped == 0


def test_values_whose_variance_overflows_are_skipped_too():
    layer = trained()
    before = state(layer)
    z = torch.randn(8, 3)
    z[:, 0] = torch.tensor([3e38, -3e38] * 4)
    layer(z)
    assert torch.equal(layer.running_var[0], before["running_var"][0])
    assert torch.isfinite(layer.running_var).all()


def test_propagate_does_as_torch():
    z = torch.randn(8, 3)
    z[2, 1] = NAN
    ours, theirs = trained(on_nonfinite="propagate"), nn.BatchNorm1d(3)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(z), theirs(z), equal_nan=True)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, equal_nan=True)
    assert torch.isnan(ours.running_mean[1])
    assert ours.num_batches_skipped == 0


@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_raise_names_the_channels_and_the_layer_and_moves_nothing(bad, ghost):
    model = nn.Sequential(nn.Identity(), trained(on_nonfinite="raise", virtual_batch_size=ghost))
    z = torch.randn(8, 3)
    z[7, 1] = bad  # in the last part: the first must not have been counted either
    before = state(model)
    with pytest.raises(batchnorm.NonFiniteError, match=r"1 of 3 channels \(first: \[1\]\)") as caught:
        model(z)
    assert caught.value.at == "1"
    assert_state(model, before)
    model(z.nan_to_num(posinf=0))
    assert model[1].num_batches_tracked > 1


def test_raise_looks_also_where_nothing_is_tracked():
    layer = batchnorm.BatchNorm1d(3, on_nonfinite="raise", track_running_stats=False)
    z = torch.randn(8, 3)
    layer(z)
    z[0, 0] = NAN
    with pytest.raises(batchnorm.NonFiniteError):
        layer(z)


def test_one_nan_batch_ruins_torchs_statistics_for_ever_and_not_ours():
    batches = torch.randn(20, 16, 3)
    batches[4, 0, 0] = NAN
    theirs, ours = nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    for batch in batches:
        theirs(batch)
        ours(batch)
    assert torch.isnan(theirs.running_mean[0])
    assert torch.isfinite(ours.running_mean).all()
    without = batchnorm.BatchNorm1d(3)
    for i, batch in enumerate(batches):
        if i != 4:
            without(batch)
    torch.testing.assert_close(ours.running_mean[0], without.running_mean[0])
    torch.testing.assert_close(ours.running_mean[1:], theirs.running_mean[1:])


def test_in_the_plain_average_a_skipped_batch_counts_as_one_equal_to_the_average_so_far():
    batches = torch.randn(5, 16, 2)
    batches[1, 0, 0] = NAN
    layer = batchnorm.BatchNorm1d(2, momentum=None)
    for batch in batches:
        layer(batch)
    means = batches.mean(1)
    torch.testing.assert_close(layer.running_mean[0], means[[0, 0, 2, 3, 4], 0].mean())
    torch.testing.assert_close(layer.running_mean[1], means[:, 1].mean())


def test_the_first_batch_may_be_the_bad_one():
    layer = batchnorm.BatchNorm1d(1, momentum=None)
    layer(torch.full((4, 1), NAN))
    assert layer.running_mean == 0
    assert layer.running_var == 1
    z = torch.randn(8, 1)
    layer(z)
    torch.testing.assert_close(layer.running_mean, z.mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_policies_hold_in_every_dtype(dtype):
    layer = batchnorm.BatchNorm1d(2, dtype=dtype)
    z = torch.randn(8, 2, dtype=dtype)
    z[0, 0] = INF
    layer(z)
    assert layer.num_batches_skipped == 1
    assert torch.equal(layer.running_mean[0], torch.zeros_like(layer.running_mean[0]))
    assert torch.isfinite(layer.running_mean).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_in_eval_a_nan_gradient_stays_where_it_came_from(layout):
    shape = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    z = torch.randn(2, 3, 4, 4).contiguous(memory_format=shape).requires_grad_()
    dy = torch.ones_like(z)
    dy[0, 1, 2, 3] = NAN
    batchnorm.BatchNorm2d(3).eval()(z).backward(dy)
    assert int(torch.isnan(z.grad).sum()) == 1


class Explodes(nn.Module):
    def forward(self, x):
        raise KeyError("behind the layer")


def test_an_error_inside_a_step_of_the_layer_leaves_it_as_it_was_whatever_the_error():
    layer = trained(activation="relu", virtual_batch_size=4)
    z = torch.randn(8, 3)
    before = state(layer)
    for arguments in (
        {"residual": torch.randn(8, 2)},
        {"residual": torch.randn(8, 3).double()},
        {"mask": torch.tensor([True] * 4 + [False] * 4)},  # the second part keeps nothing
        {"mask": torch.ones(8)},
        {"masked_output": "nan"},
    ):
        with pytest.raises(batchnorm.BatchNormError):
            layer(z, **arguments)
        assert_state(layer, before)


WRONG_OPTIONS = {
    "activation": ["swish", 3],
    "channel_dim": [0, 1.0, True, "last"],
    "momentum": [-0.1, 1.5, NAN, "0.1"],
    "on_nonfinite": ["ignore", None],
    "on_single_value": ["skip", True],
    "running_var_correction": [2, -1, None],
    "virtual_batch_size": [0, -4, 2.0, True],
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in WRONG_OPTIONS.items() for value in values],
    ids=str,
)
def test_a_wrong_option_is_refused_when_it_is_given_and_when_it_is_set(option, value):
    with pytest.raises(batchnorm.ArgumentError, match=option):
        batchnorm.BatchNorm1d(3, **{option: value})
    layer = batchnorm.BatchNorm1d(3)
    right = getattr(layer, option)
    with pytest.raises(batchnorm.ArgumentError, match=option) as caught:
        setattr(layer, option, value)
    assert caught.value.why
    assert caught.value.mend
    assert getattr(layer, option) == right


def test_a_step_of_a_model_that_fails_behind_the_layer_is_undone_by_accumulate_alone():
    layer = trained()
    model = nn.Sequential(layer, Explodes())
    before = state(layer)
    with pytest.raises(KeyError), batchnorm.accumulate(model):
        model(torch.randn(8, 3))
    assert_state(layer, before)
    # without it the layer's own step was complete when the error came, as in torch
    with pytest.raises(KeyError):
        model(torch.randn(8, 3))
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
