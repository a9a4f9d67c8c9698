"""Activation checkpointing, and several forwards before a backward: statistics move once a forward."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import batchnorm

# the reentrant form preserves the autocast of torch.cpu through a name that torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.*:FutureWarning")


def block(cls=batchnorm.BatchNorm1d, **options):
    return nn.Sequential(nn.Conv1d(3, 3, 1), cls(3, **options), nn.ReLU())


def assert_same(a, b):
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def train(model, run, steps=2):
    torch.manual_seed(1)
    for _ in range(steps):
        z = torch.randn(4, 3, 5, requires_grad=True)
        run(model, z).square().sum().backward()


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"virtual_batch_size": 2}, {"activation": "gelu"}, {"on_nonfinite": "raise"}],
    ids=str,
)
def test_statistics_move_once_a_step(reentrant, options):
    ours = block(**options)
    plain = copy.deepcopy(ours)
    train(ours, partial(checkpoint, use_reentrant=reentrant))
    train(plain, lambda model, z: model(z))
    assert ours[1].num_batches_tracked == plain[1].num_batches_tracked
    assert_same(ours, plain)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_torchs_layer_counts_every_step_twice(reentrant):
    theirs, ours = block(nn.BatchNorm1d), block()
    for model in (theirs, ours):
        train(model, partial(checkpoint, use_reentrant=reentrant), steps=3)
    assert theirs[1].num_batches_tracked == 6
    assert ours[1].num_batches_tracked == 3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_nested_checkpoints_count_once(reentrant):
    outer, inner = block(), block()
    model = nn.ModuleList([outer, inner])
    plain = copy.deepcopy(model)

    def run(model, z):
        return checkpoint(
            lambda z: model[0](checkpoint(model[1], z, use_reentrant=reentrant)), z, use_reentrant=reentrant
        )

    train(model, run)
    train(plain, lambda model, z: model[0](model[1](z)))
    assert_same(model, plain)


def test_checkpoint_sequential_counts_once():
    model = nn.Sequential(*[block() for _ in range(4)])
    plain = copy.deepcopy(model)
    train(model, lambda model, z: checkpoint_sequential(model, 2, z, use_reentrant=False))
    train(plain, lambda model, z: model(z))
    assert_same(model, plain)


def test_a_selective_checkpoint_that_keeps_operations_gives_the_same_and_counts_once():
    # the policy keeps kinds of operation that moving the statistics is made of
    kept = [torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.where.self]

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    model = block(activation="silu")
    plain = copy.deepcopy(model)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    train(model, lambda model, z: checkpoint(model, z, use_reentrant=False, context_fn=contexts))
    train(plain, lambda model, z: model(z))
    assert_same(model, plain)


def test_accumulation_counts_a_checkpointed_micro_batch_once():
    model = block()
    plain = copy.deepcopy(model)
    for network, run in ((model, partial(checkpoint, use_reentrant=False)), (plain, lambda m, z: m(z))):
        with batchnorm.accumulate(network):
            train(network, run)
    assert model[1].num_batches_tracked == 1
    assert_same(model, plain)


def test_masks_and_domains_in_a_checkpoint():
    layer = batchnorm.BatchNorm1d(3)
    plain = copy.deepcopy(layer)
    mask = torch.rand(4, 5) > 0.3
    with batchnorm.domain("fake"):
        train(layer, lambda m, z: checkpoint(m, z, None, mask, use_reentrant=False))
        train(plain, lambda m, z: m(z, None, mask))
    assert layer.domains["fake"].num_batches_tracked == 2
    assert layer.num_batches_tracked == 0
    assert_same(layer, plain)


@pytest.mark.parametrize(
    ("inside", "backend"),
    [
        (True, "aot_eager"),
        (False, "aot_eager"),
        (False, "inductor"),
        pytest.param(True, "inductor", marks=pytest.mark.slow),
    ],
    ids=lambda value: {True: "checkpoint in graph", False: "graph in checkpoint"}.get(value, value),
)
def test_compiled_segments_count_once(inside, backend):
    torch.compiler.reset()
    model = block()
    plain = copy.deepcopy(model)

    if inside:
        run = torch.compile(
            lambda model, z: checkpoint(model, z, use_reentrant=False), backend=backend, fullgraph=True
        )
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)

        def run(model, z):
            return checkpoint(compiled, z, use_reentrant=False)

    train(model, run)
    train(plain, lambda model, z: model(z))
    assert_same(model, plain)


def test_a_graph_in_a_reentrant_checkpoint_counts_once():
    torch.compiler.reset()
    model = block()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(model, lambda model, z: checkpoint(compiled, z, use_reentrant=True), steps=3)
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_two_forwards_before_a_backward(training):
    ours, plain = (
        copy.deepcopy(b)
        for b in [nn.Sequential(nn.Linear(3, 3), batchnorm.BatchNorm1d(3)).train(training)] * 2
    )
    first, second = torch.randn(2, 8, 3)
    (ours(first).square().sum() + ours(second + 3).pow(3).sum()).backward()
    for z, power in ((first, 2), (second + 3, 3)):
        plain(z).pow(power).sum().backward()
    assert_same(ours, plain)


def test_in_eval_the_statistics_may_move_between_forward_and_backward():
    # torch's backward reads the live buffers, which by then are others; ours kept copies
    z = torch.randn(8, 3, requires_grad=True)
    slopes = []
    for cls in (nn.BatchNorm1d, batchnorm.BatchNorm1d):
        layer = cls(3, momentum=1.0).eval()
        y = layer(z)
        layer.train()(torch.randn(8, 3) * 10)
        slopes.append(torch.autograd.grad(y.sum(), z)[0][0, 0])
    exact = 1 / (1 + layer.eps) ** 0.5
    assert slopes[0] < exact / 2, "torch: wrong without an error"
    torch.testing.assert_close(float(slopes[1]), exact)


def _two_forwards(rank, world, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        net = nn.Sequential(nn.Linear(3, 4), batchnorm.BatchNorm1d(4), nn.Linear(4, 1))
        model = nn.parallel.DistributedDataParallel(net)
        torch.manual_seed(rank)
        for _ in range(2):
            real, fake = torch.randn(2, 8, 3)
            # DDP broadcasts the buffers at every forward, which writes to them in place
            (model(real).sum() - model(fake + 1).square().sum()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
            model.zero_grad()
        flat = torch.cat([p.detach().flatten() for p in net.parameters()])
        gathered = [torch.empty_like(flat) for _ in range(world)]
        dist.all_gather(gathered, flat)
        assert all(torch.equal(gathered[0], other) for other in gathered)
        assert net[1].num_batches_tracked == 4
        assert torch.isfinite(flat).all()
        results.put(rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_forwards_before_a_backward_under_ddp(world, tmp_path):
    address = f"file://{tmp_path}/rendezvous"
    if world == 1:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        _two_forwards(0, 1, address, results)
        assert results.get() == 0
        return
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.spawn(_two_forwards, (world, address, results), nprocs=world)
    assert {results.get() for _ in range(world)} == {0, 1}
