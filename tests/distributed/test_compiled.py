"""Compiled graphs pool in the order of the code, whatever the batches of the ranks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.distributed.conversation import Conversation
from batchnorm.errors import PoolingError

RAGGED = [[5, 0], [0, 4], [3, 1], [2, 6]]


def norms(group=None):
    torch.manual_seed(0)
    make = functools.partial(batchnorm.BatchNorm1d, 4, dtype=torch.float64)
    net = nn.Sequential(
        *(nn.Linear(3, 4), make(activation="relu"), nn.Linear(4, 4), make(), nn.Linear(4, 4), make())
    ).double()
    net.unused = make()
    return net if group is None else batchnorm.synchronize(net, group)


class Last(nn.Module):
    """Three norms in a row, and a fourth whose output nobody uses."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for layer in list(self.net.children())[:3]:
            x = layer(x)
        self.net.unused(x)
        for layer in list(self.net.children())[3:6]:
            x = layer(x)
        return x


def compiled(rank, backend):
    calls = []
    agree = Conversation._agree

    def noted(self, call, *rest):
        calls.append(str(call))
        return agree(self, call, *rest)

    Conversation._agree = noted
    net = norms("world")
    model = torch.compile(Last(net), fullgraph=True, backend=backend, dynamic=True)
    results = []
    for step, sizes in enumerate(RAGGED):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64).split(sizes)[rank]
        net.zero_grad()
        y = model(x)
        y.pow(3).sum().backward()
        results.append((y.detach(), [None if p.grad is None else p.grad for p in net.parameters()]))
    return results, net.state_dict(), calls


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_graphs_pool_in_the_same_order_on_ragged_and_empty_ranks(backend):
    found = run(compiled, 2, backend, timeout=280, limit=290)
    net = norms()
    model = Last(net)
    for step, sizes in enumerate(RAGGED):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)
        net.zero_grad()
        y = model(x)
        y.pow(3).sum().backward()
        torch.testing.assert_close(torch.cat([f[0][step][0] for f in found]), y.detach())
        for i, p in enumerate(net.parameters()):
            if p.grad is not None:
                torch.testing.assert_close(sum(f[0][step][1][i] for f in found), p.grad)
    for _, state, calls in found:
        assert calls == found[0][2]
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value)


def compiled_in_buckets(rank, sizes):
    # buckets so small that the graph is cut between any two layers
    dist._DEFAULT_FIRST_BUCKET_BYTES = 100
    net = norms("world")
    wrapped = DistributedDataParallel(net, bucket_cap_mb=1e-4)
    model = torch.compile(wrapped, backend="aot_eager", dynamic=True)
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(3):
        net.zero_grad()
        (model(x.split(sizes)[rank]).pow(3).sum() * len(sizes)).backward()
    return [p.grad for p in net.parameters()], net.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[3, 4], [5, 0]], ids=str)
def test_a_graph_that_ddp_cuts_into_buckets_pools_across_the_cuts(sizes):
    net = norms()
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(3):
        net.zero_grad()
        net(x).pow(3).sum().backward()
    for grads, state in run(compiled_in_buckets, 2, sizes, timeout=200, limit=280):
        for found, p in zip(grads, net.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad)
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value)


def momentum_by_steps(rank):
    torch.manual_seed(0)
    net, plain = norms("world"), norms()
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    for momentum in (0.1, 0.2, 0.3, None):
        for module in (net, plain):
            module[1].momentum = momentum
        x = torch.randn(6, 3, dtype=torch.float64)
        model(x[rank::2])
        plain(x)
    torch.testing.assert_close(net[1].running_var, plain[1].running_var)
    return net[1].running_var


@pytest.mark.slow
def test_a_momentum_that_changes_is_followed_by_compiled_graphs():
    first, second = run(momentum_by_steps, 2, timeout=200, limit=280)
    assert torch.equal(first, second)


# and the words that name them; the third value of a number is a symbol of the graph
OTHER_OPTIONS = {
    ("eps", 1e-3): ("eps 1e-05", "eps 0.001"),
    ("momentum", 0.2): ("momentum 0.1", "momentum 0.2"),
    ("eps", 2e-3): ("eps 1e-05", "eps 0.002"),
    ("momentum", None): ("momentum 0.1", "momentum None"),
    ("running_var_correction", 0): ("running_var_correction 0",),
    ("track_running_stats", False): ("no running statistics",),
}


def compiled_with_other_options(rank):
    said = {}
    x = torch.randn(3, 3, dtype=torch.float64)
    net = norms("world")
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    model(x)
    usual = {"eps": 1e-5, "momentum": 0.1, "running_var_correction": 1, "track_running_stats": True}
    layer = net[3]
    for name, other in OTHER_OPTIONS:
        if rank:
            setattr(layer, name, other)
        before = layer.running_var.clone()
        try:
            model(x)
        except PoolingError as error:
            said[name, other] = str(error)
        assert torch.equal(layer.running_var, before)
        setattr(layer, name, usual[name])
    model(x)
    return said


@pytest.mark.slow
def test_compiled_graphs_name_the_option_in_which_ranks_differ():
    for said in run(compiled_with_other_options, 2, timeout=200, limit=280):
        assert set(said) == set(OTHER_OPTIONS)
        for key, wanted in OTHER_OPTIONS.items():
            assert "'3'" in said[key]
            for word in (*wanted, "rank 0", "rank 1"):
                assert word in said[key]


def compiled_alone(rank):
    torch.manual_seed(0)
    net, plain = norms("world"), norms()
    x = torch.randn(6, 3, dtype=torch.float64)
    model = torch.compile(net, fullgraph=True, backend="aot_eager")
    twin = copy.deepcopy(plain)
    model(x).pow(2).sum().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).pow(2).sum().backward()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    assert torch.equal(net[1].running_var, twin[1].running_var)


@pytest.mark.slow
def test_a_compiled_graph_in_a_group_of_one_has_todays_bits():
    run(compiled_alone, 1, timeout=200, limit=200)
