"""Derivatives of derivatives, torch.func and dispatch modes see a pooled layer as operations, or are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run

import batchnorm
from batchnorm.errors import ArgumentError


def second_derivative(rank, group, shards, activation, with_residual):
    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(3, dtype=torch.float64, process_group=group, activation=activation)
    z, r = (torch.randn(6, 3, dtype=torch.float64)[shards[rank]].requires_grad_() for _ in range(2))
    y = layer(z, residual=r if with_residual else None)
    (dz,) = torch.autograd.grad(y.pow(3).sum(), z, create_graph=True)
    dz.pow(2).sum().backward()
    return z.grad, layer.weight.grad, r.grad


@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("gelu", True), ("relu", True)])
@pytest.mark.parametrize("sizes", [[4, 2], [6, 0]], ids=str)
def test_second_derivatives_are_those_of_the_sum_of_all_losses(activation, with_residual, sizes):
    found = run(
        second_derivative, 2, "world", [slice(0, sizes[0]), slice(sizes[0], 6)], activation, with_residual
    )
    whole = second_derivative(0, None, [slice(0, 6)], activation, with_residual)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), whole[0])
    torch.testing.assert_close(sum(f[1] for f in found), whole[1])
    if with_residual:
        torch.testing.assert_close(torch.cat([f[2] for f in found]), whole[2])


def functional(rank, group, shards):
    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(3, dtype=torch.float64, process_group=group)
    z = torch.randn(6, 3, dtype=torch.float64)[shards[rank]]
    grad = torch.func.grad(lambda x: layer(x).pow(3).sum())(z)
    second = torch.func.grad(lambda x: torch.func.grad(lambda x: layer(x).pow(3).sum())(x).pow(2).sum())(z)
    refused = []
    if group is not None:
        for name, call in (
            ("vmap", lambda: torch.func.vmap(layer)(torch.stack((z, z)))),
            ("jvp", lambda: torch.func.jvp(layer, (z,), (z,))),
        ):
            try:
                call()
            except ArgumentError:
                refused.append(name)
    return grad, second, refused, layer.running_mean


def test_torch_func_is_right_in_reverse_mode_and_refused_aloud_in_the_others():
    found = run(functional, 2, "world", [slice(0, 4), slice(4, 6)])
    grad, second, _, mean = functional(0, None, [slice(0, 6)])
    torch.testing.assert_close(torch.cat([f[0] for f in found]), grad)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), second)
    for f in found:
        assert f[2] == ["vmap", "jvp"]
        torch.testing.assert_close(f[3], mean)


def watched(rank, group, shards):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(3, dtype=torch.float64, process_group=group)
    z = torch.randn(6, 3, dtype=torch.float64)[shards[rank]].requires_grad_()
    with FlopCounterMode(display=False):
        layer(z).pow(3).sum().backward()
    meta = copy.deepcopy(layer).to("meta")(z.detach().to("meta"))
    return z.grad, layer.running_var, meta.is_meta


def test_a_dispatch_mode_sees_operations_that_pool():
    found = run(watched, 2, "world", [slice(0, 4), slice(4, 6)])
    dz, var, _ = watched(0, None, [slice(0, 6)])
    torch.testing.assert_close(torch.cat([f[0] for f in found]), dz)
    for f in found:
        torch.testing.assert_close(f[1], var)
        assert f[2]
