"""Compiled graphs pool in the order of the code, whatever the batches of the ranks."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from ranks import run
from torch import nn

import batchnorm
from batchnorm.distributed.conversation import Conversation

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


def test_a_compiled_graph_in_a_group_of_one_has_todays_bits():
    run(compiled_alone, 1, timeout=200, limit=200)
