"""A layer on several ranks gives what one layer gives on all their values together."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn

import batchnorm
from batchnorm.distributed import conversation
from batchnorm.errors import ArgumentError, BatchNormError, NonFiniteError, TooFewValuesError

ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", "gelu"]
SHARDS = [[5, 3], [0, 4], [5, 0, 3], [1, 0, 4, 2], [0, 0]]
KINDS = {
    # name: (class, sample shape with C = 4, channel_dim, memory format)
    "(N, C)": (batchnorm.BatchNorm1d, (4,), 1, None),
    "(N, C, L)": (batchnorm.BatchNorm1d, (4, 3), 1, None),
    "(N, L, C)": (batchnorm.BatchNorm1d, (3, 4), -1, None),
    "NCHW": (batchnorm.BatchNorm2d, (4, 3, 2), 1, None),
    "channels_last": (batchnorm.BatchNorm2d, (4, 3, 2), 1, torch.channels_last),
    "a layout a rank": (batchnorm.BatchNorm2d, (4, 3, 2), 1, "mixed"),
    "NCDHW": (batchnorm.BatchNorm3d, (4, 2, 2, 2), 1, torch.channels_last_3d),
}
# of the largest value: rounding of the dtype, times the few roundings between z and a gradient
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def cases():
    plain = [(kind, dtype, None, False, True) for kind in KINDS for dtype in TOLERANCE]
    fused = [
        (kind, torch.float64, activation, residual, True)
        for kind in ("(N, C)", "NCHW")
        for activation in ACTIVATIONS
        for residual in (False, True)
    ]
    return [
        *plain,
        *fused,
        ("NCHW", torch.float32, "relu", True, True),
        ("channels_last", torch.bfloat16, "gelu", True, True),
        ("(N, C)", torch.float32, None, False, False),
    ]


def one(case, samples, group, layout=None):
    """Give output, gradients and statistics of one layer on its samples."""
    kind, dtype, activation, with_residual, affine = case
    cls, sample, axis, memory = KINDS[kind]
    if memory == "mixed":
        memory = [None, torch.channels_last][(layout or 0) % 2]
    torch.manual_seed(3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = cls(4, affine=affine, dtype=wide, activation=activation, channel_dim=axis, process_group=group)
    if affine:
        with torch.no_grad():
            layer.weight.uniform_(-1, 2)
            layer.bias.uniform_(-1, 1)
    z, r, dy = (torch.randn(12, *sample, dtype=torch.float64) for _ in range(3))
    z, r, dy = (t[samples].to(dtype) for t in (z * 2 + 1, r, dy))
    if memory is not None:
        z, r, dy = (t.contiguous(memory_format=memory) for t in (z, r, dy))
    z.requires_grad_()
    r.requires_grad_()
    for _ in range(2):  # the second step takes other roads: predicted messages
        z.grad = r.grad = None
        layer.zero_grad()
        y = layer(z, residual=r) if with_residual else layer(z)
        y.backward(dy)
    assert y.dtype == dtype
    assert not y.numel() or y.stride() == z.stride()
    local = [y.detach(), z.grad] + ([r.grad] if with_residual else [])
    summed = [layer.weight.grad, layer.bias.grad] if affine else []
    return local, summed, [layer.running_mean, layer.running_var, layer.num_batches_tracked]


def ranks_of_all_cases(rank, sizes, limit):
    if limit is not None:
        conversation.GATHER_LIMIT = limit
    start = sum(sizes[:rank])
    samples = slice(start, start + sizes[rank])
    return [one(case, samples, "world", rank) for case in cases()]


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        # one with an empty rank is among the fast ones
        *(pytest.param(s, None, marks=[] if s == [5, 0, 3] else pytest.mark.slow) for s in SHARDS),
        ([5, 0, 3], 0),
    ],
    ids=lambda v: str(v),
)
def test_every_layout_dtype_and_activation_equals_one_process(sizes, limit):
    results = run(ranks_of_all_cases, len(sizes), sizes, limit)
    for i, case in enumerate(cases()):
        wanted = one(case, slice(0, sum(sizes)), None)
        found = [result[i] for result in results]
        tolerance = TOLERANCE[case[1]]

        def near(a, b, case=case, tolerance=tolerance):
            scale = max(float(b.double().abs().max()), 1.0) if b.numel() else 1.0
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0, atol=tolerance * scale, msg=lambda m: f"{case}: {m}"
            )

        for j, whole in enumerate(wanted[0]):
            near(torch.cat([f[0][j] for f in found]), whole)
        for j, whole in enumerate(wanted[1]):
            near(sum(f[1][j] for f in found), whole)
        for f in found:
            for a, b in zip(f[2], wanted[2], strict=True):
                near(a, b)


def many_channels(rank, sizes, channels):
    kinds = []
    send = conversation.Conversation._send

    def noted(self, call, header, data, reduces):
        kinds.append((reduces, len(header) + len(data)))
        return send(self, call, header, data, reduces)

    conversation.Conversation._send = noted
    results = wide(sizes, channels, rank, "world")
    return results, kinds


def wide(sizes, channels, rank, group):
    torch.manual_seed(0)
    z = torch.randn(sum(sizes), channels, dtype=torch.float64) + 3
    z = (z if rank is None else z.split(sizes)[rank]).clone().requires_grad_()
    layer = batchnorm.BatchNorm1d(channels, dtype=torch.float64, process_group=group)
    for _ in range(3):
        y = layer(z)
        z.grad = None
        y.pow(3).sum().backward()
    return y.detach(), z.grad, layer.running_mean, layer.running_var


def test_above_a_mebibyte_sums_are_sent_instead_of_rows_and_every_rank_chooses_alike():
    sizes, channels = [4, 0, 3], 22000
    found = run(many_channels, 3, sizes, channels)
    wanted = wide(sizes, channels, None, None)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([f[0][i] for f in found]), wanted[i])
    for results, kinds in found:
        # mean, spread and backward: three sums a step, of O(C) words
        assert kinds[-3:] == [(True, channels + 10), (True, channels + 8), (True, 2 * channels + 8)]
        for i in (2, 3):
            torch.testing.assert_close(results[i], wanted[i])
            assert torch.equal(results[i], found[0][0][i])


# -- bits ------------------------------------------------------------------------------------------------------
def five_steps(rank, sizes):
    layer = batchnorm.BatchNorm2d(5, process_group="world")
    kept = []
    for step in range(5):
        g = torch.Generator().manual_seed(100 * step + rank)
        layer(torch.randn(sizes[rank], 5, 7, 3, generator=g) * 3 + 2).sum()
        kept.append((layer.running_mean.clone(), layer.running_var.clone()))
    return kept


@pytest.mark.parametrize("sizes", [[8, 2], [3, 0, 9], [1, 4, 2, 5]], ids=str)
def test_statistics_have_the_same_bits_on_every_rank_in_every_run_and_with_any_threads(sizes):
    runs = [run(five_steps, len(sizes), sizes, threads=threads) for threads in (1, 2, 1)]
    first = runs[0][0]
    for results in runs:
        for kept in results:
            for (mean, var), (wanted_mean, wanted_var) in zip(kept, first, strict=True):
                assert torch.equal(mean, wanted_mean)
                assert torch.equal(var, wanted_var)


def far_from_zero(rank, sizes, mean, std, sample):
    cls = batchnorm.BatchNorm2d if len(sample) == 3 else batchnorm.BatchNorm1d
    layer = cls(sample[0], momentum=1.0, process_group="world", running_var_correction=0)
    z = far_values(sizes, mean, std, sample)[rank]
    layer(z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 and rank % 2 else z)
    return layer.running_mean, layer.running_var


def far_values(sizes, mean, std, sample):
    g = torch.Generator().manual_seed(5)
    z = torch.randn(sum(sizes), *sample, generator=g, dtype=torch.float64) * std + mean
    return z.float().split(sizes)


@pytest.mark.parametrize("sample", [(3,), (48, 7, 5)], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1.0), (-3e5, 10.0), (0.0, 1e-5), (1e-2, 1e-5)])
def test_nothing_of_mean_and_variance_is_rounded_away(mean, std, sample):
    sizes = [500, 1, 300, 37]
    values = torch.cat(far_values(sizes, mean, std, sample)).double().transpose(0, 1).flatten(1)
    exact_mean, exact_var = values.mean(1), values.var(1, correction=0)
    # one rounding to float32 and no other: sums are taken in float64, here and there, whose own rounding is
    # 1e-16 of the largest value a term, 2e-11 of the variance at these means
    half = torch.finfo(torch.float32).eps / 2
    noise = 4e-16 * values.abs().amax(1)
    for found_mean, found_var in run(far_from_zero, 4, sizes, mean, std, sample):
        assert ((found_mean.double() - exact_mean).abs() <= half * exact_mean.abs() + noise).all()
        torch.testing.assert_close(found_var.double(), exact_var, rtol=half + 1e-10, atol=0)


# -- masks -----------------------------------------------------------------------------------------------------
def masked(rank, group, shards, policy):
    g = torch.Generator().manual_seed(7)
    z = torch.randn(9, 4, 5, generator=g, dtype=torch.float64) + 2
    keep = torch.rand(9, 5, generator=g) < 0.6
    keep[6:] = False  # one rank keeps nothing
    z[~keep.unsqueeze(1).expand_as(z)] = float("nan")
    layer = batchnorm.BatchNorm1d(4, dtype=torch.float64, process_group=group, on_single_value=policy)
    rows = shards[rank]
    z = z[rows].requires_grad_()
    y = layer(z, mask=keep[rows])
    y.pow(3).sum().backward()
    return y.detach(), z.grad, layer.weight.grad, layer.running_mean, layer.running_var


@pytest.mark.parametrize("policy", ["error", "running"])
def test_masks_uneven_over_ranks_with_one_that_keeps_nothing(policy):
    shards = [slice(0, 4), slice(4, 6), slice(6, 9)]
    found = run(masked, 3, "world", shards, policy)
    y, dz, dgamma, mean, var = masked(0, None, [slice(0, 9)], policy)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), dz)
    torch.testing.assert_close(sum(f[2] for f in found), dgamma)
    for f in found:
        torch.testing.assert_close(f[3], mean)
        torch.testing.assert_close(f[4], var)


# -- policies --------------------------------------------------------------------------------------------------
def attempt(layer, z, **arguments):
    before = copy.deepcopy(layer.state_dict())
    try:
        y = layer(z, **arguments)
    except BatchNormError as error:
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        return type(error), str(error)
    return y.detach(), layer.running_mean.clone(), int(layer.num_batches_tracked)


def policies(rank):
    def layer(**options):
        return batchnorm.BatchNorm1d(2, process_group="world", **options)

    one_value = torch.full((1 if rank == 1 else 0, 2), 3.0)
    bad = torch.ones(3, 2) * torch.arange(3.0).unsqueeze(1)
    if rank == 1:
        bad[1, 0] = float("inf")
    nothing = torch.zeros(2, dtype=torch.bool)
    return {
        "one value in all": attempt(layer(), one_value),
        "one value in all, running": attempt(layer(on_single_value="running"), one_value),
        "one value a rank": attempt(layer(), torch.full((1, 2), float(rank))),
        "no value": attempt(layer(), torch.empty(0, 2)),
        "all masked": attempt(layer(), torch.ones(2, 2), mask=nothing),
        "inf, skip": attempt(layer(), bad),
        "inf, raise": attempt(layer(on_nonfinite="raise"), bad),
    }


def test_policies_are_applied_to_the_pooled_values_so_that_all_ranks_do_the_same():
    first, second = run(policies, 2)
    for found in (first, second):
        assert found["one value in all"][0] is TooFewValuesError
        assert "have 1" in found["one value in all"][1]
        assert found["one value a rank"][2] == 1
        assert found["no value"][2] == 1  # counted, as torch counts it
        assert torch.equal(found["no value"][1], torch.zeros(2))
        assert found["all masked"][0] is TooFewValuesError
        assert found["inf, raise"][0] is NonFiniteError
        assert "rank 1" in found["inf, raise"][1]
        assert found["inf, skip"][1][0] == 0
        torch.testing.assert_close(found["inf, skip"][1][1], torch.tensor(0.1))
    torch.testing.assert_close(
        second["one value in all, running"][0], torch.full((1, 2), 3.0), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(second["one value a rank"][0], torch.ones(1, 2), rtol=1e-4, atol=0)


def test_parts_of_a_batch_and_pooling_exclude_each_other():
    with pytest.raises(ArgumentError, match="virtual_batch_size"):
        batchnorm.synchronize(nn.Sequential(batchnorm.BatchNorm1d(2, virtual_batch_size=4)))


def ghosts(rank):
    layer = batchnorm.BatchNorm1d(2, virtual_batch_size=1, process_group="world")
    with pytest.raises(ArgumentError, match="virtual_batch_size"):
        layer(torch.randn(4, 2))


def test_parts_of_a_batch_and_a_process_group_exclude_each_other_where_the_layer_was_made():
    run(ghosts, 2)


# -- domains, accumulation, checkpoints ------------------------------------------------------------------------
def in_a_window(rank, group, shards):
    torch.manual_seed(0)
    layer = batchnorm.BatchNorm1d(3, process_group=group)
    batches = [torch.randn(6, 3) for _ in range(3)]
    with batchnorm.accumulate(layer):
        for z in batches:
            layer(z[shards[rank]])
    with batchnorm.domain("other"):
        layer(batches[0][shards[rank]])
    return layer.state_dict()


def test_an_accumulated_window_and_a_domain_move_as_in_one_process():
    found = run(in_a_window, 2, "world", [slice(0, 5), slice(5, 6)])
    wanted = in_a_window(0, None, [slice(0, 6)])
    for state in found:
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, msg=lambda m, name=name: f"{name}: {m}")


def checkpointed(rank, group, shards, reentrant):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4),
        batchnorm.BatchNorm1d(4, process_group=group),
        nn.Tanh(),
        batchnorm.BatchNorm1d(4, process_group=group),
    ).double()
    z = torch.randn(6, 3, dtype=torch.float64)[shards[rank]].requires_grad_()
    for _ in range(2):
        net.zero_grad()
        y = net(z) if reentrant is None else checkpoint(net, z, use_reentrant=reentrant)
        y.pow(3).sum().backward()
    return z.grad, [p.grad for p in net.parameters()], net.state_dict()


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("sizes", [[4, 2], [6, 0]], ids=str)
def test_a_checkpointed_segment_sends_again_and_counts_once(reentrant, sizes):
    shards = [slice(0, sizes[0]), slice(sizes[0], 6)]
    found = run(checkpointed, 2, "world", shards, reentrant)
    dz, grads, state = checkpointed(0, None, [slice(0, 6)], None)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), dz)
    for i, grad in enumerate(grads):
        torch.testing.assert_close(sum(f[1][i] for f in found), grad)
    for f in found:
        for name, value in state.items():
            torch.testing.assert_close(f[2][name], value, msg=lambda m, name=name: f"{name}: {m}")


# -- who is not asked ------------------------------------------------------------------------------------------
def silent(rank):
    number = dist.group.WORLD._get_sequence_number_for_group
    layer = batchnorm.BatchNorm1d(3, process_group="world")
    before = number()
    if rank == 0:
        layer.eval()(torch.randn(4, 3))
        batchnorm.freeze(layer).train()(torch.randn(4, 3))
        untracked = batchnorm.BatchNorm1d(3, track_running_stats=False, process_group="world").eval()
        untracked(torch.randn(4, 3))
    return number() - before


def test_eval_and_frozen_layers_send_nothing():
    assert run(silent, 2) == [0, 0]


def alone(rank, init):
    torch.manual_seed(0)
    results = []
    groups = [None, "world"]
    if init:
        groups.append(dist.new_group([0]))
    for group, activation, mode in itertools.product(groups, (None, "relu"), (nullcontext, torch.no_grad)):
        layer = batchnorm.BatchNorm2d(4, process_group=group, activation=activation)
        g = torch.Generator().manual_seed(1)
        z = torch.randn(3, 4, 5, 5, generator=g).requires_grad_()
        with mode():
            y = layer(z)
        if y.requires_grad:
            y.pow(2).sum().backward()
        results.append([y.detach(), z.grad, layer.weight.grad, layer.running_var])
    size = len(results) // len(groups)
    for other in range(size, len(results), size):
        for a, b in zip(results[:size], results[other : other + size], strict=True):
            for x, w in zip(a, b, strict=True):
                assert x is w is None or torch.equal(x, w)


@pytest.mark.parametrize("init", [True, False])
def test_a_group_of_one_and_a_process_without_a_group_have_todays_bits(init):
    run(alone, 1, init, init=init)
