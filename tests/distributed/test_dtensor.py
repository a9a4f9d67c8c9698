"""A DTensor is normalized shard by shard: the values of the whole, the placements of the input."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run
from torch import nn

import batchnorm
from batchnorm.distributed.conversation import Conversation
from batchnorm.errors import ArgumentError

SHAPE = (4, 6, 5)


def layer_of(activation=None):
    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(6, dtype=torch.float64, activation=activation)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    return layer


def values():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=g, dtype=torch.float64) * 2 + 1 for _ in range(3)]


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def placed(rank, shape, how, spread, extra):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    longest = [0]
    send = Conversation._send

    def measured(self, call, header, data, reduces):
        longest[0] = max(longest[0], len(header) + len(data))
        return send(self, call, header, data, reduces)

    Conversation._send = measured
    mesh = init_device_mesh("cpu", shape)
    placements = [Replicate() if d is None else Shard(d) for d in how]
    layer = layer_of("relu" if extra else None)
    if spread:
        layer = distribute_module(layer, mesh)
    z, r, dy = (distribute_tensor(t, mesh, placements) for t in values())
    z.requires_grad_()
    arguments = {"residual": r} if extra else {}
    if extra:
        keep = torch.arange(20).view(4, 5) % 3 > 0
        mask_placements = [Replicate() if d in (None, 1) else Shard(0 if d == 0 else 1) for d in how]
        arguments["mask"] = distribute_tensor(keep, mesh, mask_placements)
    y = layer(z, **arguments)
    assert y.placements == z.placements == tuple(placements)
    y.backward(dy)
    assert z.grad.placements == z.placements
    inferred = copy.deepcopy(layer).eval()(z.detach())
    assert inferred.placements == z.placements
    found = [y, z.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, inferred]
    return [whole(t).detach() for t in found], int(whole(layer.num_batches_tracked)), longest[0]


@pytest.mark.parametrize("spread", [True, False], ids=["distribute_module", "plain parameters"])
@pytest.mark.parametrize(
    ("shape", "how", "extra"),
    [
        ((2,), [0], False),
        ((2,), [1], False),
        ((2,), [2], True),
        ((2,), [None], False),
        ((2,), [0], True),
        ((2, 2), [0, 1], False),
        ((2, 2), [0, 2], False),
    ],
    ids=str,
)
def test_every_sharding_gives_the_values_of_the_whole(shape, how, extra, spread):
    z, r, dy = values()
    z.requires_grad_()
    layer = layer_of("relu" if extra else None)
    arguments = {"residual": r, "mask": torch.arange(20).view(4, 5) % 3 > 0} if extra else {}
    y = layer(z, **arguments)
    y.backward(dy)
    inferred = copy.deepcopy(layer).eval()(z.detach())
    wanted = [y, z.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, inferred]
    for found, counted, longest in run(placed, 2 * (len(shape) == 1) or 4, shape, how, spread, extra):
        assert counted == 1
        assert longest <= 2 * 6 + 8
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)


def second_derivatives(rank, n, shape, how, spread, extra):
    """Of every first derivative by every input, n samples; of the whole where rank is None."""
    g = torch.Generator().manual_seed(1)
    z, r, dy, v, u = (torch.randn((n, 6, 5), generator=g, dtype=torch.float64) for _ in range(5))
    keep = torch.arange(5 * n).view(n, 5) % 4 > 0
    layer, arguments = layer_of("tanh"), {}
    if rank is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

        mesh = init_device_mesh("cpu", shape)
        placements = [Shard(d) for d in how]
        z, r, dy, v, u = (distribute_tensor(t, mesh, placements) for t in (z, r, dy, v, u))
        keep = distribute_tensor(keep, mesh, [Replicate() if d == 1 else Shard(d and d - 1) for d in how])
        layer = distribute_module(layer, mesh) if spread else layer
    if extra:
        arguments = {"residual": r.requires_grad_(), "mask": keep}
    inputs = [z.requires_grad_(), layer.weight, layer.bias, *([r] if extra else [])]
    y = layer(z, **arguments)
    first = torch.autograd.grad(y, inputs, dy.requires_grad_(), create_graph=True)
    directions = [v, *(torch.full_like(t, 0.7) for t in first[1:3]), *([u] if extra else [])]
    second = torch.autograd.grad(first, [*inputs, dy], directions)
    return [whole(t).detach() for t in (y, *first, *second)]


@pytest.mark.parametrize(
    ("spread", "extra"),
    [
        (True, True),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, False), (False, True), (False, False))),
    ],
)
@pytest.mark.parametrize(
    ("n", "shape", "how"),
    [
        (4, (2,), [0]),
        (1, (2,), [0]),
        (4, (4,), [1]),
        (3, (4,), [2]),
        (1, (2, 2), [0, 2]),
        (1, (2, 2), [0, 1]),
    ],
    ids=str,
)
def test_second_derivatives_are_those_of_the_whole_where_a_shard_is_empty_too(n, shape, how, spread, extra):
    wanted = second_derivatives(None, n, shape, how, spread, extra)
    for found in run(
        second_derivatives, 2 * (len(shape) == 1 and shape[0] == 2) or 4, n, shape, how, spread, extra
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def refusals(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    z = values()[0]
    layer = layer_of()
    with pytest.raises(ArgumentError, match="Partial"):
        layer(DTensor.from_local(z, mesh, [Partial()], run_check=False))
    with pytest.raises(ArgumentError, match="residual"):
        layer(distribute_tensor(z, mesh, [Shard(0)]), residual=z)
    # the ranks of its own group are those of the mesh: counted once
    model = batchnorm.synchronize(nn.Sequential(layer))
    y = model(distribute_tensor(z, mesh, [Shard(0)]))
    return y.full_tensor().detach()


def test_parts_of_sums_and_what_has_no_place_are_refused():
    wanted = layer_of()(values()[0]).detach()
    for y in run(refusals, 2):
        torch.testing.assert_close(y, wanted)
