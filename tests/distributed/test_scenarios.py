"""Ranks in odd places at once: masks with far means, meshes, sums in place of rows, loops that break off."""

from __future__ import annotations

import pytest
import torch
from ranks import run
from torch import nn

import batchnorm
from batchnorm.distributed import conversation


def rows_of(sizes, rank):
    return slice(0, sum(sizes)) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def four(kind):
    """All four ranks, as one group or as two nodes of two."""
    if kind == "world":
        return "world"
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2))


# -- values ----------------------------------------------------------------------------------------------------
def masked_far(rank, sizes, kind, limit):
    if rank is not None and limit is not None:
        conversation.GATHER_LIMIT = limit
    g = torch.Generator().manual_seed(11)
    z = (torch.randn(sum(sizes), 3, 9, 5, generator=g, dtype=torch.float64) + 1e4).float()
    keep = torch.rand(sum(sizes), 1, 9, 5, generator=g) < 0.7
    keep[rows_of(sizes, 3)] = False
    z = torch.where(keep, z, float("inf"))
    if rank is None:
        return z, keep
    layer = batchnorm.BatchNorm2d(3, momentum=1.0, running_var_correction=0, process_group=four(kind))
    mine = z[rows_of(sizes, rank)]
    if rank == 2:
        mine = mine.contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        layer(mine, mask=keep[rows_of(sizes, rank)])
    return layer.running_mean, layer.running_var


@pytest.mark.parametrize(("kind", "limit"), [("world", None), ("mesh", None), ("world", 0), ("mesh", 0)])
def test_masked_statistics_far_from_zero_are_those_of_float64(kind, limit):
    sizes = [6, 0, 5, 2]
    z, keep = masked_far(None, sizes, kind, limit)
    kept = z.double().movedim(1, 0)[keep.expand_as(z).movedim(1, 0)].view(3, -1)
    found = run(masked_far, 4, sizes, kind, limit)
    for mean, var in found:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(var, found[0][1])
        # one rounding to float32
        torch.testing.assert_close(mean.double(), kept.mean(1), rtol=2**-24, atol=0)
        torch.testing.assert_close(var.double(), kept.var(1, correction=0), rtol=2**-24 + 1e-9, atol=0)


def some_masked(rank, sizes, group):
    g = torch.Generator().manual_seed(5)
    z, r, dy = (torch.randn(sum(sizes), 4, 6, generator=g, dtype=torch.float64) for _ in range(3))
    keep = torch.rand(sum(sizes), 4, generator=g) < 0.5
    keep[rows_of(sizes, 0)] = True
    mine = rows_of(sizes, rank)
    layer = batchnorm.BatchNorm1d(
        6, channel_dim=-1, activation="gelu", dtype=torch.float64, process_group=group
    )
    z, r = z[mine].requires_grad_(), r[mine].requires_grad_()
    # the first rank keeps everything, and passes no mask
    y = layer(z, residual=r, mask=None if rank == 0 else keep[mine])
    y.backward(dy[mine])
    return y.detach(), z.grad, r.grad, layer.weight.grad, layer.bias.grad, layer.running_var


def test_a_rank_without_a_mask_joins_ranks_with_masks():
    sizes = [3, 4, 0, 2]
    found = run(some_masked, 4, sizes, "world")
    wanted = some_masked(None, sizes, None)
    for i in range(3):
        torch.testing.assert_close(torch.cat([f[i] for f in found]), wanted[i])
    for i in (3, 4):
        torch.testing.assert_close(sum(f[i] for f in found), wanted[i])
    for f in found:
        torch.testing.assert_close(f[5], wanted[5])


def sizes_of_images(rank, group):
    g = torch.Generator().manual_seed(2)
    images = [torch.randn(1 + i % 2, 5, 2 + i, 7 - i, generator=g, dtype=torch.float64) for i in range(4)]
    layer = batchnorm.BatchNorm2d(5, dtype=torch.float64, activation="silu", process_group=group)
    if group is None:
        images = [i.transpose(0, 1).reshape(1, 5, 1, -1) for i in images]
        images = [torch.cat(images, 3)]
        rank = 0
    z = images[rank].requires_grad_()
    layer(z).pow(2).sum().backward()
    grad = z.grad.transpose(0, 1).reshape(5, -1)
    return grad, layer.weight.grad, layer.running_mean, layer.running_var


def test_ranks_with_images_of_other_sizes_count_by_their_pixels():
    found = run(sizes_of_images, 4, "world")
    wanted = sizes_of_images(0, None)
    torch.testing.assert_close(torch.cat([f[0] for f in found], 1), wanted[0])
    torch.testing.assert_close(sum(f[1] for f in found), wanted[1])
    for f in found:
        torch.testing.assert_close(f[2], wanted[2])
        torch.testing.assert_close(f[3], wanted[3])


def second(rank, sizes, kind):
    g = torch.Generator().manual_seed(3)
    z = torch.randn(sum(sizes), 3, 2, generator=g, dtype=torch.float64)
    keep = torch.rand(sum(sizes), 2, generator=g) < 0.7
    mine = rows_of(sizes, rank)
    layer = batchnorm.BatchNorm1d(3, dtype=torch.float64, activation="tanh")
    if kind is not None:
        layer.process_group = four(kind)
    z = z[mine].requires_grad_()
    (dz,) = torch.autograd.grad(layer(z, mask=keep[mine]).pow(3).sum(), z, create_graph=True)
    dz.pow(2).sum().backward()
    twice = z.grad.clone()

    def loss(weight, x):
        out = torch.func.functional_call(layer, {"weight": weight}, (x,), {"mask": keep[mine]})
        return out.pow(3).sum()

    by_func = torch.func.grad(loss, argnums=(0, 1))(layer.weight.detach(), z.detach())
    return twice, by_func[1], by_func[0], layer.weight.grad


@pytest.mark.parametrize("kind", ["world", "mesh"])
def test_second_derivatives_and_functional_calls_with_masks_over_four_ranks(kind):
    sizes = [3, 0, 1, 4]
    found = run(second, 4, sizes, kind)
    wanted = second(None, sizes, None)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([f[i] for f in found]), wanted[i])
    for i in (2, 3):
        torch.testing.assert_close(sum(f[i] for f in found), wanted[i])


def checkpoints(rank, sizes, kind, how):
    from torch.utils.checkpoint import checkpoint, checkpoint_sequential

    torch.manual_seed(0)
    parts = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()]
    net = nn.Sequential(*parts, nn.Linear(4, 2)).double()
    if kind is not None:
        batchnorm.synchronize(net, four(kind))
    g = torch.Generator().manual_seed(9)
    mine = rows_of(sizes, rank)

    def front_and_inner(x):
        return checkpoint(net[3:], net[:3](x), use_reentrant=False)

    for _ in range(3):
        x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)[mine].requires_grad_()
        net.zero_grad()
        if how == "plain":
            y = net(x)
        elif how == "sequential":
            y = checkpoint_sequential(net, 3, x, use_reentrant=False)
        else:
            y = checkpoint(front_and_inner, x, use_reentrant=False)
        y.pow(3).sum().backward()
    return x.grad, [p.grad for p in net.parameters()], net.state_dict()


@pytest.mark.parametrize(("how", "kind"), [("sequential", "mesh"), ("nested", "world")])
def test_checkpoints_in_checkpoints_pool_again_and_count_once(how, kind):
    sizes = [2, 3, 0, 1]
    found = run(checkpoints, 4, sizes, kind, how)
    dx, grads, state = checkpoints(None, sizes, None, "plain")
    torch.testing.assert_close(torch.cat([f[0] for f in found]), dx)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(sum(f[1][i] for f in found), grad)
    for f in found:
        for name, value in state.items():
            torch.testing.assert_close(f[2][name], value, msg=lambda m, name=name: f"{name}: {m}")
