"""torch's own test cases for batch norm, run against ours with torch's answer as the judge."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm.functional import batch_norm

with warnings.catch_warnings():
    # the case tables import much of torch, whose own deprecations are not ours
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

OURS = {
    nn.BatchNorm1d: batchnorm.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.BatchNorm3d,
}
MODULES = [info for info in module_db if info.module_cls in OURS]
OPERATORS = [info for info in op_db if info.name == "nn.functional.batch_norm"]
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-5)}


def close(actual, expected, dtype):
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def leaves(tensors):
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]


def gradients(y, inputs):
    """First and second derivatives of a scalar that weighs every output differently."""
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    first = torch.autograd.grad((y * weight).sum(), inputs, create_graph=True, allow_unused=True)
    total = sum((g.square().sum() for g in first if g is not None), torch.zeros((), dtype=y.dtype))
    second = (
        torch.autograd.grad(total, inputs, allow_unused=True) if total.requires_grad else [None] * len(inputs)
    )
    return [*first, *second]


def zero_if_none(gradient, like):
    return torch.zeros_like(like) if gradient is None else gradient


def test_the_tables_have_the_cases_we_mean_to_run():
    assert {info.module_cls for info in MODULES} == set(OURS)
    assert [info.variant_test_name for info in OPERATORS] == ["", "without_cudnn"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_inputs_give_torchs_outputs_gradients_and_buffers(info, training, dtype):
    cases = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(cases) >= 5
    for case in cases:
        made, given = case.constructor_input, case.forward_input
        theirs = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
        ours = OURS[info.module_cls](*made.args, **made.kwargs).to(dtype).train(training)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        if theirs.weight is not None:
            nn.init.uniform_(theirs.weight, 0.5, 2)
        ours.load_state_dict(theirs.state_dict())
        for _ in range(2):  # the second step starts from statistics that have moved
            expected = theirs(*given.args, **given.kwargs)
            actual = ours(*given.args, **given.kwargs)
            close(actual, expected, dtype)
            inputs = leaves(given.args)
            for a, e, like in zip(
                gradients(actual, [*inputs, *ours.parameters()]),
                gradients(expected, [*inputs, *theirs.parameters()]),
                [*inputs, *theirs.parameters()] * 2,
                strict=True,
            ):
                close(zero_if_none(a, like), zero_if_none(e, like), dtype)
        for name, buffer in theirs.named_buffers():
            close(ours.get_buffer(name), buffer, dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_module_error_inputs_give_torchs_errors(info, training):
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
    )
    assert cases
    for case in cases:
        made = case.module_error_input.constructor_input
        given = case.module_error_input.forward_input
        assert case.error_on is ModuleErrorEnum.FORWARD_ERROR
        layer = OURS[info.module_cls](*made.args, **made.kwargs).train(training)
        if made.kwargs.get("eps") == 0 and not training:
            # torch's list says error, torch's layer takes it: in inference no variance is a batch's own
            theirs = info.module_cls(*made.args, **made.kwargs).eval()
            close(layer(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs), torch.float32)
            continue
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*given.args, **given.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("info", OPERATORS, ids=lambda info: info.variant_test_name or "default")
def test_operator_samples_give_torchs_outputs_gradients_and_buffers(info, dtype):
    ran = refused = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        training, momentum = sample.kwargs.get("training", False), sample.kwargs.get("momentum", 0.1)
        mean, var, weight, bias = sample.args
        mine = [None if v is None else v.clone() for v in (mean, var)]
        if training and not 0 <= momentum <= 1:
            # torch takes a momentum of -1 and its average runs away: the one sample that is refused
            with pytest.raises(batchnorm.ArgumentError, match="momentum"):
                batch_norm(sample.input, *mine, weight, bias, **sample.kwargs)
            assert torch.equal(mine[0], mean)
            assert torch.equal(mine[1], var)
            refused += 1
            continue
        expected = F.batch_norm(sample.input, mean, var, weight, bias, **sample.kwargs)
        actual = batch_norm(sample.input, *mine, weight, bias, **sample.kwargs)
        close(actual, expected, dtype)
        inputs = leaves([sample.input, weight, bias])
        for a, e, like in zip(
            gradients(actual, inputs), gradients(expected, inputs), inputs * 2, strict=True
        ):
            close(zero_if_none(a, like), zero_if_none(e, like), dtype)
        for a, e in zip(mine, (mean, var), strict=True):
            if e is not None:
                close(a, e, dtype)
        ran += 1
    assert (ran, refused) == (11, 1)


WRONG = {
    "one value a channel": ((1, 3), {"training": True}),
    "no statistics in inference": ((4, 3), {"running_mean": None, "running_var": None}),
    "statistics of another length": ((4, 3), {"running_mean": torch.zeros(2)}),
    "a variance of another length": ((4, 3), {"running_var": torch.ones(2)}),
    "a weight of another length": ((4, 3), {"weight": torch.ones(2)}),
    "a bias of another length": ((4, 3), {"bias": torch.ones(2)}),
    "an input of one axis": ((4,), {"training": True}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_an_error_to_torch_is_one_here_and_is_caught_by_the_same_code(case):
    shape, changed = WRONG[case]
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), **changed}
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        F.batch_norm(torch.randn(shape), **arguments)
    with pytest.raises(theirs.type):
        batch_norm(torch.randn(shape), **arguments)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 1), {"training": True, "running_mean": 2, "running_var": 2}),
        ((1, 4, 1), {"training": True}),
        ((2, 3), {"training": False}),
        ((4, 3), {"training": True, "weight": 2}),
        ((4, 3), {"training": True, "bias": 4}),
        ((4, 3), {"training": False, "running_mean": 4, "running_var": 4}),
        ((3,), {"training": True}),
        ((4, 3), {"training": True, "eps": 0.0}),
        ((4, 3), {"training": True, "eps": -1.0}),
        ((4, 3), {"training": False, "eps": -1.0, "running_mean": 3, "running_var": 3}),
        ((4, 3), {"training": True, "momentum": None, "running_mean": 3, "running_var": 3}),
    ],
    ids=str,
)
def test_what_torchs_function_refuses_is_refused_with_an_error_its_callers_catch(shape, arguments):
    vectors = {
        name: torch.ones(arguments[name]) if name in arguments else None
        for name in ("running_mean", "running_var", "weight", "bias")
    }
    rest = {k: v for k, v in arguments.items() if k not in vectors}
    z = torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)) as theirs:
        F.batch_norm(z, **vectors, **rest)
    with pytest.raises(batchnorm.BatchNormError) as ours:
        batch_norm(z, **vectors, **rest)
    if theirs.type is not IndexError:
        assert isinstance(ours.value, theirs.type)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_an_input_without_values_goes_through_as_in_torch(shape, training):
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d"}[len(shape)]
    theirs, ours = getattr(nn, kind)(3).train(training), getattr(batchnorm, kind)(3).train(training)
    for layer in (theirs, ours):
        z = torch.empty(shape, requires_grad=True)
        y = layer(z)
        assert y.shape == z.shape
        y.sum().backward()
        assert z.grad.shape == z.shape
        assert torch.equal(layer.weight.grad, torch.zeros(3))
        assert torch.equal(layer.bias.grad, torch.zeros(3))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer), name


def test_an_empty_batch_has_no_weight_in_the_plain_average():
    z = torch.randn(64, 3) + 7
    theirs, ours = nn.BatchNorm1d(3, momentum=None), batchnorm.BatchNorm1d(3, momentum=None)
    for layer in (theirs, ours):
        layer(z[:0])
        layer(z)
        assert layer.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_mean, z.mean(0))
    torch.testing.assert_close(ours.running_var, z.var(0))
    # torch weighs the initial 0 as though it were the empty batch's mean
    torch.testing.assert_close(theirs.running_mean, z.mean(0) / 2)
