"""Loops that break off, networks in turn, policies and calibration where ranks are in odd places."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes_of, run
from test_scenarios import four, rows_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.distributed import conversation
from batchnorm.errors import BatchNormError, NonFiniteError, PoolingError, TooFewValuesError


def adversaries(rank, sizes, group):
    """Two networks in turn, the second three times as often, and the first now and then twice."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    if group:
        for net in (one, other):
            batchnorm.synchronize(net, group)
    g = torch.Generator().manual_seed(4)
    for step in range(7):
        for _ in range(3):
            x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)[rows_of(sizes, rank)]
            (other(one(x).detach()).sum() - other(x).pow(2).sum()).backward()
        for _ in range(1 + (step % 3 == 2)):
            x = torch.randn(sum(sizes), 3, generator=g, dtype=torch.float64)[rows_of(sizes, rank)]
            other(one(x)).pow(2).sum().backward()
    return [[p.grad for p in net.parameters()] for net in (one, other)], one[1].running_var


def test_two_networks_that_train_in_turn():
    sizes = [2, 3, 1]
    found = run(adversaries, 3, sizes, "world")
    wanted, var = adversaries(None, sizes, None)
    for net, grads in enumerate(wanted):
        for i, grad in enumerate(grads):
            torch.testing.assert_close(sum(f[0][net][i] for f in found), grad)
    for f in found:
        torch.testing.assert_close(f[1], var)


LENGTHS = [0, 3, 1, 2]


def dictionaries(rank, group):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    if group:
        net = DistributedDataParallel(batchnorm.synchronize(net), broadcast_buffers=False)
    made = []
    for r, length in enumerate(LENGTHS):
        g = torch.Generator().manual_seed(r)
        made.append(
            [
                {"x": torch.randn(2 + (r + i) % 3, 3, generator=g, dtype=torch.float64), "tag": "a"}
                for i in range(length)
            ]
        )
    if group:
        steps = batchnorm.together(made[rank])
    else:
        steps = [{"x": torch.cat([m[i]["x"] for m in made if i < len(m)])} for i in range(max(LENGTHS))]
    seen = []
    for batch in steps:
        share = steps.ranks / steps.samples if group else 1 / len(batch["x"])
        net.zero_grad()
        (net(batch["x"]).pow(2).sum() * share).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
        seen.append(len(batch["x"]))
    return (net.module if group else net).state_dict(), seen


def test_loaders_of_dictionaries_of_which_one_is_empty_from_the_start():
    found = run(dictionaries, 4, True)
    wanted, _ = dictionaries(0, False)
    for rank, (state, seen) in enumerate(found):
        assert len(seen) == 3
        assert seen[LENGTHS[rank] :] == [0] * (3 - LENGTHS[rank])
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, msg=lambda m, name=name: f"{name}: {m}")


def skips_a_backward(rank):
    net = batchnorm.synchronize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    told = ""
    for step in range(6):
        loss = net(torch.randn(3, 3)).pow(2).sum()
        if step == 3 and rank == 2:
            continue  # as loops do that leave out a batch whose loss is not finite
        begun = time.monotonic()
        try:
            loss.backward()
        except PoolingError as error:
            told = str(error)
            break
    else:
        begun = time.monotonic()
    return told, time.monotonic() - begun


def test_a_rank_that_leaves_out_a_backward_is_named_at_once():
    outcomes = outcomes_of(skips_a_backward, 3, timeout=20)
    for rank, outcome in enumerate(outcomes):
        if rank == 2:
            assert isinstance(outcome.error, PoolingError), outcome.trace
            continue
        told, spent = outcome.result
        assert "rank 2 is in '1' (forward" in told
        assert f"rank {rank} is in '1' (backward" in told
        assert spent < 2


def begins_anew(rank, folder):
    """A rank is late, the group is lost, and the ranks go on in a new one."""
    torch.manual_seed(0)
    net = batchnorm.synchronize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = torch.randn(6, 3).split(2)[rank]
    net(x)
    if rank == 1:
        time.sleep(4)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(PoolingError):
        net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/new", 3), rank=rank, world_size=3)
    net(x)
    return net[1].running_mean, int(net[1].num_batches_tracked)


@pytest.mark.slow
def test_after_a_lost_message_the_ranks_can_begin_anew(tmp_path):
    found = run(begins_anew, 3, str(tmp_path), timeout=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(6, 3)
    net(x), net(x)
    for mean, counted in found:
        torch.testing.assert_close(mean, net[1].running_mean)
        assert counted == 2


# -- policies where sums are sent in place of rows, and on a mesh -----------------------------------------------
def policies(rank, kind, limit):
    if limit is not None:
        conversation.GATHER_LIMIT = limit
    group = four(kind)
    told = {}

    def attempt(name, z, mask=None, **options):
        layer = batchnorm.BatchNorm1d(2, process_group=group, **options)
        before = copy.deepcopy(layer.state_dict())
        try:
            y = layer(z, mask=mask)
        except BatchNormError as error:
            told[name] = type(error)
            assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
        else:
            told[name] = y.detach(), layer.running_mean.clone()

    one = torch.full((1 if rank == 3 else 0, 2), 5.0)
    bad = torch.arange(6.0).view(3, 2)
    if rank == 2:
        bad[0, 1] = float("nan")
    attempt("one value", one)
    attempt("one value, running", one, on_single_value="running")
    attempt("nan", bad, on_nonfinite="raise")
    attempt("nan, skip", bad)
    attempt("nan under a mask", bad, torch.isfinite(bad).all(1), on_nonfinite="raise")
    attempt("nothing kept", bad, torch.zeros(3, dtype=torch.bool))
    attempt("nothing kept, running", bad, torch.zeros(3, dtype=torch.bool), on_single_value="running")
    odd = batchnorm.BatchNorm1d(3 if rank == 1 else 2, process_group=group)
    begun = time.monotonic()
    try:
        odd(torch.randn(4, odd.num_features))
    except PoolingError as error:
        told["differ"] = str(error), time.monotonic() - begun
    return told


@pytest.mark.parametrize(("kind", "limit"), [("world", None), ("world", 0), ("mesh", None), ("mesh", 0)])
def test_policies_hold_with_rows_and_with_sums_in_a_group_and_on_a_mesh(kind, limit):
    for told in run(policies, 4, kind, limit, timeout=20):
        assert told["one value"] is TooFewValuesError
        torch.testing.assert_close(told["one value, running"][1], torch.zeros(2))
        assert told["nan"] is NonFiniteError
        assert told["nan, skip"][1][1] == 0
        torch.testing.assert_close(told["nan, skip"][1][0], torch.tensor(0.2))
        kept = torch.arange(6.0).view(3, 2).repeat(4, 1)[[i for i in range(12) if i != 6]]
        torch.testing.assert_close(told["nan under a mask"][1], 0.1 * kept.mean(0))
        assert told["nothing kept"] is TooFewValuesError
        assert not told["nothing kept, running"][0].any()
        text, spent = told["differ"]
        assert "rank 1" in text
        assert spent < 4


# -- copies and groups ------------------------------------------------------------------------------------------
def make_own(rank):
    model = batchnorm.synchronize(nn.Sequential(nn.BatchNorm1d(2)), "own")
    twin = copy.deepcopy(model)
    x = torch.arange(8.0).view(4, 2)[rank::2]
    assert torch.equal(twin(x), model(x))
    return pickle.dumps(model)


def load_it(rank, data):
    model = pickle.loads(data)
    if not dist.is_initialized():
        return model(torch.arange(8.0).view(4, 2)).detach()
    with pytest.raises(PoolingError, match="no process group named") as error:
        model(torch.randn(3, 2))
    assert "desynchronize" in str(error.value)
    return batchnorm.synchronize(model)(torch.arange(8.0).view(4, 2)[rank::2]).detach()


def test_a_model_of_a_group_of_its_own_is_loaded_elsewhere():
    data = run(make_own, 2)[0]
    wanted = nn.BatchNorm1d(2)(torch.arange(8.0).view(4, 2)).detach()
    (alone,) = run(load_it, 1, data, init=False)
    torch.testing.assert_close(alone, wanted)
    for rank, y in enumerate(run(load_it, 2, data)):
        torch.testing.assert_close(y, wanted[rank::2])


def calibrates(rank, estimator, pooled, where):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    if pooled:
        batchnorm.synchronize(net)
    before = copy.deepcopy(net.state_dict())
    bad, at = where

    def batches():
        for i in range([3, 0, 2, 1][rank]):
            if rank == bad and i == at:
                raise ValueError("this file is broken")
            yield torch.randn(2 + rank, 3, dtype=torch.float64)
        if rank == bad and at == "end":
            raise ValueError("this file is broken")

    with pytest.raises((PoolingError, ValueError)) as error:
        batchnorm.calibrate(
            net, batches(), estimator=estimator, progress=False, group=None if pooled else "world"
        )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    # the ranks are together again
    batchnorm.calibrate(net, [torch.ones(2, 3).double()] * (rank == 2), progress=False, group="world")
    return type(error.value).__name__, str(error.value), net[1].running_mean


@pytest.mark.parametrize("estimator", ["pooled", "average"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("where", [(0, 2), (1, "end"), (2, 0)], ids=str)
def test_calibration_that_fails_on_any_rank_at_any_batch_changes_nobody(estimator, pooled, where):
    found = run(calibrates, 4, estimator, pooled, where, timeout=8)
    for rank, (kind, text, mean) in enumerate(found):
        assert kind == ("ValueError" if rank == where[0] else "PoolingError")
        assert rank == where[0] or f"rank {where[0]}" in text
        assert torch.equal(mean, found[0][2])


def twins(rank, order, again):
    torch.manual_seed(0)
    a, b = (batchnorm.synchronize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))) for _ in range(2))
    if again and rank:  # no other network for that
        batchnorm.synchronize(b)
        batchnorm.synchronize(a)
    x = torch.randn(3, 3)
    for _ in range(3):
        a(x), b(x)
    before = [net[1].running_mean.clone() for net in (a, b)]
    try:
        for net in (a, b) if order[rank] else (b, a):
            net(x)
    except PoolingError as error:
        assert all(map(torch.equal, before, [net[1].running_mean for net in (a, b)]))
        return str(error)
    return ""


@pytest.mark.parametrize("again", [False, True])
def test_networks_of_the_same_names_called_in_another_order_on_a_rank_are_told_apart(again):
    for text in run(twins, 2, (True, False), again):
        assert "network 2 of this kind" in text
        assert text.count("'1' (forward") == 2
    assert run(twins, 2, (False, False), again) == ["", ""]
