"""Runs in seconds: the first thing to run after a change."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import batchnorm
from batchnorm import reference
from batchnorm.functional import batch_norm


def test_training_forward_and_backward_are_those_of_the_reference():
    z = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(3, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(z)
    y = batch_norm(z, None, None, gamma, beta, training=True, activation="silu")
    y.backward(dy)
    arrays = [t.detach().numpy() for t in (z, gamma, beta)]
    expected, _, _, _ = reference.forward_training(*arrays, activation="silu")
    dz, dgamma, dbeta, _ = reference.backward_training(dy.numpy(), *arrays, activation="silu")
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(z.grad.numpy(), dz, atol=1e-12)
    np.testing.assert_allclose(gamma.grad.numpy(), dgamma, atol=1e-12)
    np.testing.assert_allclose(beta.grad.numpy(), dbeta, atol=1e-12)


def test_a_layer_does_what_torchs_does():
    ours, theirs = batchnorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    theirs.load_state_dict(ours.state_dict())


def test_m10_one_sample_is_answered_with_the_statistics_of_training():
    layer = batchnorm.BatchNorm1d(2, momentum=None)
    for batch in torch.randn(20, 64, 2) * 3 + 5:
        layer(batch)
    one = layer.eval()(torch.tensor([[5.0, 5.0]]))
    assert one.abs().max() < 0.1  # the population's mean comes out as 0; alone it would be an error


def test_a_compiled_step_moves_the_statistics_as_an_eager_one():
    eager, compiled = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 3)
    torch.testing.assert_close(step(x), eager(x))
    torch.testing.assert_close(compiled.running_var, eager.running_var)
