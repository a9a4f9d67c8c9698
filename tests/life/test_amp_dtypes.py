"""Half precision: as input, under autocast, and in models that are cast; statistics stay float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.functional import batch_norm

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_computes_in_half_and_keeps_statistics_in_float32(half):
    net = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2))
    plain = copy.deepcopy(net)
    z = torch.randn(64, 3)
    seen = []
    net[1].register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", half):
        loss = net(z).float().square().mean()
    loss.backward()
    plain(z).square().mean().backward()
    assert seen == [(half, half)]
    for name, tensor in net[1].state_dict().items():
        assert tensor.dtype == (torch.long if "batches" in name else torch.float32)
    torch.testing.assert_close(net[1].running_mean, plain[1].running_mean, rtol=0.02, atol=0.02)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("way", ["half()", "to()", "constructor"])
def test_parameters_follow_the_module_statistics_stay_wide_and_the_output_follows_the_input(
    half, training, way
):
    made = batchnorm.BatchNorm1d(3, dtype=half if way == "constructor" else None)
    layer = nn.Sequential(made).train(training)
    nn.init.uniform_(made.weight)
    made.running_mean.uniform_()
    mean = made.running_mean.clone()
    if way == "half()":
        layer = layer.bfloat16() if half is torch.bfloat16 else layer.half()
    elif way == "to()":
        layer = layer.to(half)
    assert made.weight.dtype == made.bias.dtype == half
    assert made.running_mean.dtype == made.running_var.dtype == torch.float32
    assert torch.equal(made.running_mean, mean), "a trip through half precision would have rounded it"
    for dtype in (half, torch.float32):
        z = torch.randn(8, 3, dtype=dtype, requires_grad=True)
        y = layer(z)
        y.sum().backward()
        assert y.dtype == z.grad.dtype == dtype
        assert made.weight.grad.dtype == half
    assert set(layer.state_dict()) == set(nn.Sequential(nn.BatchNorm1d(3)).state_dict())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_whole_half_model_trains(half):
    net = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)).to(half)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    z = torch.randn(32, 3, dtype=half)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (net(z) - 1).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_double_makes_double_and_float_comes_back():
    layer = batchnorm.BatchNorm1d(3).double()
    assert {t.dtype for n, t in layer.state_dict().items() if "batches" not in n} == {torch.float64}
    assert layer(torch.randn(4, 3, dtype=torch.float64)).dtype == torch.float64
    layer.float()
    assert layer.running_mean.dtype == layer.weight.dtype == torch.float32
    layer.double().half()
    assert layer.running_mean.dtype in (torch.float32, torch.float64), "half never narrows"


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_statistics_of_a_half_batch_are_those_of_its_values_in_float64(half):
    # a mean of 300 with 40000 values: summed in half precision it would be off by whole units
    z = (torch.randn(200, 2, 200) + 300).to(half)
    mean, var = torch.zeros(2), torch.ones(2)
    batch_norm(z, mean, var, training=True, momentum=1.0)
    wide = z.double().transpose(0, 1).reshape(2, -1)
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"mask": True}, {"residual": True}, {"virtual_batch_size": 4}], ids=str
)
def test_every_path_rounds_once_at_the_end(half, options):
    z = (torch.randn(8, 3, 5) * 4).to(half)
    residual = torch.randn(8, 3, 5).to(half) if options.pop("residual", False) else None
    mask = torch.rand(8, 5) > 0.3 if options.pop("mask", False) else None
    run = {"training": True, "activation": "silu", "mask": mask, **options}
    y = batch_norm(z, None, None, residual=residual, **run)
    exact = batch_norm(
        z.double(), None, None, residual=None if residual is None else residual.double(), **run
    )
    assert y.dtype == half
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(half).eps, atol=1e-6)


def test_a_state_dict_in_half_loads_into_wide_vectors():
    saved = {k: v.half() if v.is_floating_point() else v for k, v in nn.BatchNorm1d(3).state_dict().items()}
    layer = batchnorm.BatchNorm1d(3)
    layer.load_state_dict(saved)
    assert layer.running_var.dtype == torch.float32
