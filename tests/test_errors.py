"""What bad input gets: one row a case; each a clear error, and nothing changed."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import errors
from batchnorm.functional import batch_norm

Z = torch.randn(4, 3, 5, 5)


def vectors(c=3):
    return torch.zeros(c), torch.ones(c)


def call(**changes):
    arguments = {
        "input": Z,
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "training": True,
        **changes,
    }
    return batch_norm(**arguments)


FUNCTION_CASES = {
    "no batch axis": (partial(call, input=torch.randn(3)), errors.ShapeError, "at least 2 axes"),
    "whole numbers": (partial(call, input=Z.long()), errors.DtypeError, "must be floating"),
    "complex numbers": (partial(call, input=Z + 0j), errors.DtypeError, "must be floating"),
    "short running mean": (
        partial(call, running_mean=torch.zeros(2)),
        errors.ShapeError,
        r"running_mean has shape",
    ),
    "short running var": (
        partial(call, running_var=torch.zeros(2)),
        errors.ShapeError,
        r"running_var has shape",
    ),
    "long weight": (partial(call, weight=torch.ones(4)), errors.ShapeError, r"weight has shape \(4,\)"),
    "bias of two axes": (partial(call, bias=torch.ones(3, 1)), errors.ShapeError, "bias has shape"),
    "weight on another device": (
        partial(call, weight=torch.ones(3, device="meta")),
        errors.DeviceError,
        "weight on meta",
    ),
    "only one running statistic": (partial(call, running_var=None), errors.ArgumentError, "go together"),
    "one value per channel": (
        partial(call, input=torch.randn(1, 3, 1, 1)),
        errors.TooFewValuesError,
        r"input of shape \(1, 3, 1, 1\) has 1",
    ),
    "inference without statistics": (
        partial(call, training=False, running_mean=None, running_var=None),
        errors.MissingStatisticsError,
        "are needed",
    ),
    "momentum above 1": (
        partial(call, momentum=1.5),
        errors.ArgumentError,
        "momentum must be between 0 and 1",
    ),
    "momentum below 0": (
        partial(call, momentum=-0.1),
        errors.ArgumentError,
        "momentum must be between 0 and 1",
    ),
    "momentum nan": (partial(call, momentum=float("nan")), errors.ArgumentError, "momentum must be"),
    "eps zero": (partial(call, eps=0.0), errors.ArgumentError, "eps must be positive"),
    "eps negative": (partial(call, eps=-1.0), errors.ArgumentError, "eps must be positive"),
    "unknown activation": (
        partial(call, activation="swish"),
        errors.ArgumentError,
        "unknown activation 'swish'",
    ),
    "residual of another shape": (
        partial(call, residual=torch.randn(4, 3, 5, 1)),
        errors.ShapeError,
        "residual has shape",
    ),
    "residual of another dtype": (
        partial(call, residual=Z.double()),
        errors.DtypeError,
        "residual is torch.float64",
    ),
    "residual on another device": (
        partial(call, residual=Z.to("meta")),
        errors.DeviceError,
        "residual on meta",
    ),
    "mask of whole numbers": (
        partial(call, mask=torch.ones(4, 5, 5)),
        errors.DtypeError,
        "mask must be boolean",
    ),
    "mask with a channel axis": (
        partial(call, mask=torch.ones(4, 3, 5, 5, dtype=torch.bool)),
        errors.ShapeError,
        "without its channel axis",
    ),
    "mask of another length": (
        partial(call, mask=torch.ones(4, 5, 6, dtype=torch.bool)),
        errors.ShapeError,
        "mask has shape",
    ),
    "everything masked": (
        partial(call, mask=torch.zeros(4, 5, 5, dtype=torch.bool)),
        errors.TooFewValuesError,
        "the mask keeps 0",
    ),
    "unknown masked_output": (
        partial(call, masked_output="nan"),
        errors.ArgumentError,
        "masked_output='nan'",
    ),
    "channel_dim is the batch": (partial(call, channel_dim=0), errors.ShapeError, "channel_dim=0"),
    "channel_dim beyond the axes": (partial(call, channel_dim=4), errors.ShapeError, "channel_dim=4"),
    "unknown single-value policy": (
        partial(call, on_single_value="skip"),
        errors.ArgumentError,
        "on_single_value='skip'",
    ),
    "running policy without statistics": (
        partial(
            call,
            input=torch.randn(1, 3, 1, 1),
            running_mean=None,
            running_var=None,
            on_single_value="running",
        ),
        errors.MissingStatisticsError,
        "are needed",
    ),
    "unknown non-finite policy": (
        partial(call, on_nonfinite="ignore"),
        errors.ArgumentError,
        "on_nonfinite='ignore'",
    ),
    "not finite, and to be told": (
        partial(call, input=Z.where(Z < 2, torch.nan), on_nonfinite="raise"),
        errors.NonFiniteError,
        "NaN or inf",
    ),
    "virtual batch of zero": (
        partial(call, virtual_batch_size=0),
        errors.ArgumentError,
        "virtual_batch_size",
    ),
    "virtual batch of a fraction": (
        partial(call, virtual_batch_size=2.0),
        errors.ArgumentError,
        "virtual_batch_size",
    ),
    "a part with one value per channel": (
        partial(call, input=torch.randn(4, 3), virtual_batch_size=1),
        errors.TooFewValuesError,
        "at least 2 values",
    ),
    "unknown correction": (
        partial(call, running_var_correction=2),
        errors.ArgumentError,
        "running_var_correction must be 1 or 0",
    ),
    "in place in training": (
        partial(call, inplace=True),
        errors.ArgumentError,
        "inplace=True is for inference",
    ),
    "in place under a gradient": (
        partial(call, training=False, inplace=True, weight=torch.ones(3, requires_grad=True)),
        errors.ArgumentError,
        "where a gradient is recorded",
    ),
}


@pytest.mark.parametrize("case", FUNCTION_CASES)
def test_bad_input_to_the_function_is_refused_and_moves_nothing(case):
    run, kind, message = FUNCTION_CASES[case]
    mean = run.keywords.get("running_mean", torch.full((3,), 0.5))
    var = run.keywords.get("running_var", torch.full((3,), 2.0))
    before = [None if t is None else t.clone() for t in (mean, var)]
    with pytest.raises(kind, match=message) as caught:
        run(running_mean=mean, running_var=var)
    assert caught.value.mend, "an error says how to mend it"
    assert caught.value.why, "an error says why it matters"
    for tensor, old in zip((mean, var), before, strict=True):
        assert old is None or torch.equal(tensor, old)


LAYER_CASES = {
    "2d data to the 1d layer": (batchnorm.BatchNorm1d, {}, Z, errors.ShapeError, "expected 2D or 3D input"),
    "1d data to the 2d layer": (batchnorm.BatchNorm2d, {}, Z[..., 0], errors.ShapeError, "expected 4D input"),
    "2d data to the 3d layer": (batchnorm.BatchNorm3d, {}, Z, errors.ShapeError, "expected 5D input"),
    "other number of channels": (
        batchnorm.BatchNorm2d,
        {"channel_dim": -1},
        Z,
        errors.ShapeError,
        "5 channels along axis 3",
    ),
    "one value per channel": (
        batchnorm.BatchNorm1d,
        {},
        torch.randn(1, 3),
        errors.TooFewValuesError,
        "Expected more than 1 value per channel",
    ),
    "eps zero": (batchnorm.BatchNorm2d, {"eps": 0.0}, Z, errors.ArgumentError, "eps must be positive"),
    "whole numbers": (batchnorm.BatchNorm2d, {}, Z.long(), errors.DtypeError, "must be floating"),
    "input on another device": (
        batchnorm.BatchNorm2d,
        {},
        Z.to("meta"),
        errors.DeviceError,
        "input is on meta",
    ),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_bad_input_to_a_layer_names_its_path_and_changes_nothing(case):
    cls, options, z, kind, message = LAYER_CASES[case]
    layer = cls(3, **options)
    model = nn.Sequential(nn.Identity(), nn.Sequential(layer))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(kind, match=message) as caught:
        model(z)
    assert caught.value.at == "1.0"
    assert "at: 1.0" in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert int(layer.num_batches_skipped) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 2.0}, "momentum"),
        ({"activation": "maxout"}, "activation"),
        ({"on_single_value": "zero"}, "on_single_value"),
        ({"on_nonfinite": "warn"}, "on_nonfinite"),
        ({"virtual_batch_size": -4}, "virtual_batch_size"),
        ({"running_var_correction": 0.5}, "running_var_correction"),
    ],
)
def test_a_layer_is_not_made_with_a_wrong_option(options, message):
    with pytest.raises(errors.ArgumentError, match=message):
        batchnorm.BatchNorm2d(3, **options)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ShapeError, ValueError),
        (errors.ShapeError, RuntimeError),
        (errors.TooFewValuesError, ValueError),
        (errors.ArgumentError, ValueError),
        (errors.DtypeError, TypeError),
    ],
)
def test_code_that_catches_torchs_errors_catches_ours(kind, builtin):
    assert issubclass(kind, builtin)
    assert issubclass(kind, errors.BatchNormError)


def test_an_error_says_what_why_mend_and_where_and_crosses_processes():
    error = errors.ShapeError("batch_norm: wrong.", why="because", mend="so", at="layer1.0")
    text = "batch_norm: wrong.\n  why: because\n  mend: so\n  at: layer1.0"
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text
