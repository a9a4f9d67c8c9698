"""Padding and other positions that do not count: they enter nothing, and may hold NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import batchnorm
from batchnorm import reference
from batchnorm.functional import batch_norm

DIMENSIONS = {
    2: batchnorm.BatchNorm1d,
    3: batchnorm.BatchNorm1d,
    4: batchnorm.BatchNorm2d,
    5: batchnorm.BatchNorm3d,
}


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_state(layer, before):
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def poisoned(z, mask, value, axis=1):
    return torch.where(mask.unsqueeze(axis), z, value)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 6), (3, 3, 4, 4), (2, 3, 2, 3, 4)], ids=str)
def test_what_is_masked_changes_no_output_no_gradient_and_no_statistic(shape, poison):
    mask = torch.rand(shape[:1] + shape[2:]) > 0.4
    z, residual = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    dy = torch.randn(shape, dtype=torch.float64)
    layer = DIMENSIONS[len(shape)](3, dtype=torch.float64, activation="silu")
    before = state(layer)
    runs = []
    for fill in (0.0, poison):
        layer.load_state_dict(
            {**layer.state_dict(), **{k: v.clone() for k, v in before.items() if "skip" not in k}}
        )
        layer.zero_grad()
        zi = poisoned(z, mask, fill).requires_grad_()
        ri = poisoned(residual, mask, fill).requires_grad_()
        y = layer(zi, residual=ri, mask=mask)
        # what arrives from behind a masked position may be NaN as well
        y.backward(poisoned(dy, mask, 0.0 if fill == 0 else 5.0))
        runs.append([y, zi.grad, ri.grad, layer.weight.grad, layer.bias.grad, *state(layer).values()])
    for clean, dirty in zip(*runs, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    outside = ~mask.unsqueeze(1).expand(shape)
    y, dz, dresidual = runs[1][:3]
    for tensor in (y, dz, dresidual):
        assert torch.equal(tensor[outside], torch.zeros_like(tensor[outside]))
    kept = z.movedim(1, -1)[mask]
    torch.testing.assert_close(layer.running_mean, 0.1 * kept.mean(0))
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * kept.var(0))


@given(
    n=st.integers(1, 4),
    length=st.integers(1, 5),
    seed=st.integers(0, 99),
    activation=st.sampled_from([None, "relu", "gelu"]),
    channel_dim=st.sampled_from([1, -1]),
)
def test_outputs_and_gradients_are_those_of_the_reference(n, length, seed, activation, channel_dim):
    torch.manual_seed(seed)
    shape = (n, 3, length) if channel_dim == 1 else (n, length, 3)
    z, gamma, beta = torch.randn(shape).double(), torch.randn(3).double(), torch.randn(3).double()
    mask, dy = torch.rand(n, length) > 0.3, torch.randn(shape).double()
    leaves = [t.requires_grad_() for t in (z, gamma, beta)]
    run = {"activation": activation, "channel_dim": channel_dim}
    if int(mask.sum()) < 2:
        with pytest.raises(batchnorm.TooFewValuesError):
            batch_norm(z, None, None, gamma, beta, training=True, mask=mask, **run)
        return
    y = batch_norm(z, None, None, gamma, beta, training=True, mask=mask, **run)
    arrays = [t.detach().numpy() for t in leaves]
    expected, *_ = reference.forward_training(*arrays, mask=mask.numpy(), **run)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad(y, leaves, dy)
    wanted = reference.backward_training(dy.numpy(), *arrays, mask=mask.numpy(), **run)
    for gradient, want in zip(gradients, wanted, strict=False):
        np.testing.assert_allclose(gradient.numpy(), want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_output_input_hands_masked_values_and_their_gradient_through(training, dtype):
    layer = batchnorm.BatchNorm1d(3).train(training)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    z = torch.randn(2, 3, 3, dtype=dtype, requires_grad=True)
    y = layer(z, mask=mask, masked_output="input")
    outside = ~mask.unsqueeze(1).expand_as(z)
    assert y.dtype == dtype
    assert torch.equal(y[outside], z[outside])
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.equal(z.grad[outside], dy[outside])


def test_in_eval_masked_nan_reaches_neither_output_nor_any_gradient():
    layer = batchnorm.BatchNorm2d(3, activation="relu").eval()
    mask = torch.rand(2, 4, 4) > 0.5
    z = poisoned(torch.randn(2, 3, 4, 4), mask, float("nan")).requires_grad_()
    y = layer(z, mask=mask)
    y.sum().backward()
    for tensor in (y, z.grad, layer.weight.grad, layer.bias.grad):
        assert torch.isfinite(tensor).all()
    plain = layer(z.detach().nan_to_num())
    torch.testing.assert_close(y, torch.where(mask.unsqueeze(1), plain, 0))


@pytest.mark.parametrize("form", [(1, 1, 4), (3, 1, 1), (3, 4, 1), (3, 1, 4, 4), (1, 1, 4, 4)], ids=str)
def test_a_mask_broadcasts_over_axes_of_size_one(form):
    z = torch.randn(3, 2, 4, 4)
    mask = torch.rand(form) > 0.5
    full = (mask if len(form) == 3 else mask.squeeze(1)).expand(3, 4, 4)
    layer = batchnorm.BatchNorm2d(2)
    torch.testing.assert_close(layer(z, mask=mask), layer(z, mask=full), rtol=0, atol=0)


@pytest.mark.parametrize("form", [(3,), (4, 4), (3, 2, 4, 4), (3, 4, 5), (2, 4, 4)], ids=str)
def test_a_mask_that_could_mean_two_things_is_refused(form):
    layer = batchnorm.BatchNorm2d(2)
    before = state(layer)
    with pytest.raises(batchnorm.ShapeError, match="mask has shape"):
        layer(torch.randn(3, 2, 4, 4), mask=torch.ones(form, dtype=torch.bool))
    assert_state(layer, before)


@pytest.mark.parametrize("kept", [0, 1])
def test_with_too_few_positions_left_the_one_value_policy_decides(kept):
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, :kept] = True
    z = poisoned(torch.randn(4, 3, 5), mask, float("nan"))
    strict = batchnorm.BatchNorm1d(3)
    before = state(strict)
    with pytest.raises(batchnorm.TooFewValuesError, match=f"the mask keeps {kept}"):
        strict(z, mask=mask)
    assert_state(strict, before)

    lenient = batchnorm.BatchNorm1d(3, on_single_value="running")
    lenient(torch.randn(64, 3) * 3 + 5)
    before = state(lenient)
    z.requires_grad_()
    y = lenient(z, mask=mask)
    y.sum().backward()
    assert_state(lenient, before)
    for tensor in (y, z.grad, lenient.weight.grad, lenient.bias.grad):
        assert torch.isfinite(tensor).all()
    torch.testing.assert_close(y, lenient.eval()(z, mask=mask))


def test_nan_at_a_position_that_counts_is_still_seen():
    layer = batchnorm.BatchNorm1d(3)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 0] = False
    z = torch.randn(4, 3, 5)
    z[1, 2, 3] = float("nan")
    y = layer(z, mask=mask)
    assert torch.isnan(y[:, 2][mask]).all()
    assert torch.isfinite(y[:, :2]).all()
    assert layer.num_batches_skipped == 1
    assert torch.equal(layer.running_mean[2], torch.tensor(0.0))


def test_a_mask_that_keeps_everything_is_no_mask():
    z = torch.randn(4, 3, 5, dtype=torch.float64)
    plain, masked = (
        batchnorm.BatchNorm1d(3, dtype=torch.float64),
        batchnorm.BatchNorm1d(3, dtype=torch.float64),
    )
    torch.testing.assert_close(masked(z, mask=torch.ones(4, 5, dtype=torch.bool)), plain(z))
    for a, b in zip(masked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_does_not_enter_where_it_does_in_torch():
    # two sequences of mean 10, padded with zeros to twice their length
    z = torch.zeros(2, 1, 8)
    z[:, :, :4] = 10 + torch.randn(2, 1, 4)
    mask = torch.arange(8).expand(2, 8) < 4
    theirs, ours = torch.nn.BatchNorm1d(1, momentum=1.0), batchnorm.BatchNorm1d(1, momentum=1.0)
    theirs(z)
    ours(z, mask=mask)
    assert float(theirs.running_mean) < 6, "torch counts the padding"
    torch.testing.assert_close(ours.running_mean, z[:, :, :4].mean((0, 2)))
    torch.testing.assert_close(ours.running_var, z[:, :, :4].transpose(0, 1).reshape(1, -1).var(1))


def test_masked_layers_pass_gradgradcheck():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    z = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(z, gamma):
        return batch_norm(z, None, None, gamma, training=True, mask=mask, masked_output="input")

    assert torch.autograd.gradcheck(run, (z, gamma))
    assert torch.autograd.gradgradcheck(run, (z, gamma))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("policy", ["error", "running"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_compiled_masked_step_is_the_eager_one(training, policy, activation):
    """One graph, another count of kept values at every call; masked NaN reaches nothing."""
    torch._dynamo.reset()
    layers = [
        batchnorm.BatchNorm1d(3, activation=activation, on_single_value=policy).train(training)
        for _ in range(2)
    ]
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    for kept in (11, 5, 2):
        mask = torch.zeros(4, 5, dtype=torch.bool)
        mask.view(-1)[torch.randperm(20)[:kept]] = True
        given = torch.where(mask.unsqueeze(1), torch.randn(4, 3, 5), torch.nan)
        results = []
        for layer in (layers[0], compiled):
            z, residual = (given.clone().requires_grad_() for _ in range(2))
            y = layer(z, residual, mask)
            y.square().sum().backward()
            results.append((y, z.grad, residual.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
        for (name, one), (_, other) in zip(
            layers[0].named_parameters(), layers[1].named_parameters(), strict=True
        ):
            torch.testing.assert_close(one.grad, other.grad, msg=name)
        for one, other in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu"])
def test_masked_layers_with_a_residual_pass_gradcheck(activation):
    """In eval too, and where the running statistics stand in for too few values."""
    torch.manual_seed(1)
    z, residual = (torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma = torch.rand(3, dtype=torch.float64, requires_grad=True)
    for kept in (9, 1, 0):
        mask = torch.zeros(4, 5, dtype=torch.bool)
        mask.view(-1)[:kept] = True
        for training in (True, False):
            # channels differ, so that no value lies on a kink
            def run(z, gamma, residual, mask=mask, training=training):
                mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
                return batch_norm(
                    z, mean, var, gamma, None, training, mask=mask, residual=residual, activation=activation,
                    on_single_value="running",
                )  # fmt: skip

            assert torch.autograd.gradcheck(run, (z, gamma, residual))
            assert torch.autograd.gradgradcheck(run, (z, gamma, residual))


def test_a_masked_step_that_fails_moves_nothing():
    layer = batchnorm.BatchNorm1d(3)
    before = [b.clone() for b in layer.buffers()]
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(batchnorm.TooFewValuesError):
        layer(torch.randn(4, 3, 5), None, mask)
    for old, new in zip(before, layer.buffers(), strict=True):
        assert torch.equal(old, new)
