"""Training on several ranks gives, step by step, the model that one process gives on all of the data."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.distributed.conversation import Conversation


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


def small_resnet():
    torch.manual_seed(0)
    stem = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(
        *stem, Block(6), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).double()


def mlp():
    torch.manual_seed(0)
    layers = [
        nn.Linear(3, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, 2),
    ]
    return nn.Sequential(*layers).double()


MAKE = {"mlp": (mlp, (3,)), "resnet": (small_resnet, (2, 6, 6))}


def batch_of(kind, step, sizes):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), *MAKE[kind][1], generator=g, dtype=torch.float64)
    return x.split(sizes)


def descend(model, loss):
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
            p.grad = None


def alone(kind, sizes, steps):
    model = MAKE[kind][0]()
    for step in range(steps):
        x = torch.cat(batch_of(kind, step, sizes))
        descend(model, model(x).pow(3).sum() / len(x))
    return model.state_dict()


def in_ranks(rank, kind, sizes, steps, options):
    model = MAKE[kind][0]()
    tools = {"": [], "before": [batchnorm.accelerate], "after": []}[options.get("accelerate", "")]
    tools += [batchnorm.synchronize]
    tools += [batchnorm.accelerate] if options.get("accelerate") == "after" else []
    for tool in tools:
        model = tool(model)
    settings = {k: options[k] for k in ("broadcast_buffers", "static_graph") if k in options}
    wrapped = DistributedDataParallel(model, **settings)
    for step in range(steps):
        x = batch_of(kind, step, sizes)[rank]
        loss = wrapped(x).pow(3).sum() * len(sizes) / sum(sizes)
        if options.get("two forwards"):
            half = loss * 0.5
            again = wrapped(x).pow(3).sum() * len(sizes) / sum(sizes)
            loss = half + again * 0.5
        descend(model, loss)
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_equal_models(found, wanted, but=()):
    for state in found:
        for name, value in wanted.items():
            if not name.endswith(but or "\n"):
                torch.testing.assert_close(
                    state[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
                )


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ([3, 2], {}),
        ([4, 0, 1], {"broadcast_buffers": False}),
        ([2, 3], {"static_graph": True}),
    ],
    ids=str,
)
def test_ddp_equals_one_process_step_by_step(kind, sizes, options):
    assert_equal_models(run(in_ranks, len(sizes), kind, sizes, 3, options), alone(kind, sizes, 3))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("sizes", [[3, 2], [2, 0, 3]], ids=str)
def test_an_accelerated_resnet_under_ddp_equals_one_process_step_by_step(order, sizes):
    found = run(in_ranks, len(sizes), "resnet", sizes, 3, {"accelerate": order}, timeout=200, limit=280)
    assert_equal_models(found, alone("resnet", sizes, 3))


def test_two_forwards_before_a_backward_under_ddp():
    wanted = alone("mlp", [3, 2], 1)
    found = run(in_ranks, 2, "mlp", [3, 2], 1, {"two forwards": True})
    assert_equal_models(found, wanted, ("running_mean", "running_var", "num_batches_tracked"))


def accumulating(rank, sizes):
    model = batchnorm.synchronize(mlp())
    wrapped = DistributedDataParallel(model)
    parts = [batch_of("mlp", step, sizes)[rank] for step in range(2)]
    with wrapped.no_sync():
        (wrapped(parts[0]).pow(3).sum() * len(sizes)).backward()
    (wrapped(parts[1]).pow(3).sum() * len(sizes)).backward()
    return [p.grad for p in model.parameters()]


def test_no_sync_pools_each_micro_batch_and_adds_their_gradients():
    sizes = [3, 2]
    model = mlp()
    for step in range(2):
        model(torch.cat(batch_of("mlp", step, sizes))).pow(3).sum().backward()
    for grads in run(accumulating, 2, sizes):
        for found, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad)


# -- messages --------------------------------------------------------------------------------------------------
def messages(rank, wrapped):
    """Give, for some steps, the messages of the group and of the layers, and the words of the longest beyond 2 C."""
    sent, words = [], []
    send = Conversation._send

    def counted(self, call, header, data, reduces):
        sent.append(str(call))
        words.append(len(header) + len(data) - 2 * call.channels)
        return send(self, call, header, data, reduces)

    Conversation._send = counted
    model = batchnorm.synchronize(mlp(), "own")
    group = batchnorm.distributed.groups.find(model[1].process_group[0])
    number = group._get_sequence_number_for_group
    run_ = DistributedDataParallel(model) if wrapped else model
    x = torch.randn(3 + rank, 3, dtype=torch.float64)
    per_step = []

    def step(work):
        before, mark = number(), len(sent)
        work()
        per_step.append((number() - before, len(sent) - mark, max(words[mark:], default=0)))

    def twice():
        (run_(x).pow(2).sum() + run_(x).pow(2).sum()).backward()

    for _ in range(4):
        step(lambda: run_(x).pow(2).sum().backward())
    for _ in range(3):
        with run_.no_sync() if wrapped else nullcontext():
            step(lambda: run_(x).pow(2).sum().backward())
    for _ in range(3):
        step(twice)
    with torch.no_grad():
        for _ in range(4):  # the two forwards before began alike, so it takes a round more
            step(lambda: run_(x))
    model.eval()
    step(lambda: run_(x).pow(2).sum().backward())
    return per_step


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_message_a_layer_and_direction_from_the_third_step_on(wrapped):
    for per_step in run(messages, 2, wrapped):
        # two layers: forward and backward, without DDP's messages too, then two forwards and one backward, then
        # forward alone, then eval; no message is longer than 2 C + 8 words
        assert per_step[2:7] == [(4, 4, 8)] * 5
        assert per_step[9] == (8, 8, 8)
        assert per_step[13] == (2, 2, 8)
        assert per_step[14] == (0, 0, 0)


# -- checkpoint, FSDP ------------------------------------------------------------------------------------------
def sharded(rank, policy):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = batchnorm.synchronize(mlp().float())
    half = torch.bfloat16 if policy else None
    settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=half)} if policy else {}
    for layer in model:
        if list(layer.parameters(recurse=False)):
            fully_shard(layer, **settings)
    fully_shard(model, **settings)
    sizes = [4, 4]
    for step in range(3):
        x = batch_of("mlp", step, sizes)[rank].float()
        loss = model(x).float().pow(3).sum() * len(sizes) / sum(sizes)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert model[1].running_mean.dtype == torch.float32
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


def test_fully_sharded_parameters_equal_one_process():
    wanted = {k: v.float() if v.is_floating_point() else v for k, v in alone("mlp", [4, 4], 3).items()}
    for state in run(sharded, 2, False):
        for name, value in wanted.items():
            scale = max(float(v.abs().max()) for v in wanted.values())
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5 * scale)


def test_fully_sharded_parameters_in_half_precision_leave_statistics_wide():
    first, second = run(sharded, 2, True)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert value.isfinite().all()


def on_a_mesh(rank, sizes):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = batchnorm.synchronize(mlp())
    blocks = nn.Sequential(checkpoint_wrapper(model[:3]), checkpoint_wrapper(model[3:5]), model[5])
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(blocks, mesh=mesh)
    for step in range(3):
        x = batch_of("mlp", step, sizes)[rank]
        descend(blocks, blocks(x).pow(3).sum() * len(sizes) / sum(sizes))
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in blocks.state_dict().values()]


def test_parameters_sharded_in_nodes_and_copied_between_with_checkpoints_equal_one_process():
    sizes = [3, 2, 0, 4]
    wanted = alone("mlp", sizes, 3)
    for values in run(on_a_mesh, 4, sizes):
        for (name, value), found in zip(wanted.items(), values, strict=True):
            torch.testing.assert_close(found, value, msg=lambda m, name=name: f"{name}: {m}")
