"""Calibration over ranks: every rank ends with the statistics of all shards, or unchanged."""

from __future__ import annotations

import copy
import importlib
import os
import signal
import time

import pytest
import torch
from ranks import outcomes_of, run
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError, BatchNormError, DataError

TIMEOUT_S = 3
SHARDS = [[5, 2, 9], [], [1, 4]]


def model_of(first_alone=True):
    torch.manual_seed(0)
    layers = [] if first_alone else [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def shard_of(rank):
    g = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, generator=g, dtype=torch.float64) * (rank + 1) + 5 * rank for n in SHARDS[rank]]


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("mean", "var", "tracked"))}


def calibrated(rank, estimator, pooled):
    model = model_of(first_alone=not pooled)
    if pooled:
        batchnorm.synchronize(model)
    options = {} if pooled else {"group": "world"}
    batchnorm.calibrate(model, shard_of(rank), estimator=estimator, progress=False, **options)
    return statistics(model)


@pytest.mark.parametrize("estimator", ["pooled", "average"])
def test_shards_are_merged_exactly_and_to_the_same_bits(estimator):
    found = run(calibrated, 3, estimator, False)
    model = model_of()
    batches = [batch for rank in range(3) for batch in shard_of(rank)]
    batchnorm.calibrate(model, batches, estimator=estimator, progress=False)
    for state in found:
        for name, value in statistics(model).items():
            assert torch.equal(state[name], found[0][name])
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", ["pooled", "average", "moving"])
def test_layers_that_pool_are_measured_on_the_steps_of_all_ranks(estimator):
    found = run(calibrated, 3, estimator, True)
    model = model_of(first_alone=False)
    shards = [shard_of(rank) for rank in range(3)]
    steps = [torch.cat([s[i] for s in shards if i < len(s)]) for i in range(3)]
    batchnorm.calibrate(model, steps, estimator=estimator, progress=False)
    for state in found:
        for name, value in statistics(model).items():
            assert torch.equal(state[name], found[0][name])
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)


def shown(rank):
    module = importlib.import_module("batchnorm.network.statistics.calibrate")
    watched, asked = module.watched, []

    def noted(stream, title, show):
        asked.append(bool(show))
        return watched(stream, title, False)

    module.watched = noted
    batchnorm.calibrate(model_of(), shard_of(0), group="world")
    return asked


def test_progress_is_shown_on_the_first_rank_alone():
    assert run(shown, 3) == [[True], [False], [False]]


def refused(rank):
    model = model_of()
    with pytest.raises(ArgumentError, match="moving"):
        batchnorm.calibrate(model, shard_of(0), estimator="moving", progress=False, group="world")
    with pytest.raises(DataError, match="no batch"):
        batchnorm.calibrate(model, [], progress=False, group="world")


def test_what_has_no_answer_is_refused_on_every_rank():
    run(refused, 2)


def failing(rank, pooled, where):
    model = model_of(first_alone=False)
    if pooled:
        batchnorm.synchronize(model)
    before = copy.deepcopy(model.state_dict())

    def batches():
        for i in range(3):
            if rank == 1 and where == "loader" and i == 1:
                raise OSError("disk")
            yield torch.randn(3, 3, dtype=torch.float64)

    def forward(net, batch):
        if rank == 1 and where == "model":
            raise KeyError("bug")
        net(batch)

    try:
        batchnorm.calibrate(model, batches(), forward=forward, progress=False, group="world")
    except (BatchNormError, OSError, KeyError) as error:
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return type(error).__name__, str(error), same, model.training
    return None


def leaving(rank, pooled, how):
    model = model_of(first_alone=False)
    if pooled:
        batchnorm.synchronize(model)
    before = copy.deepcopy(model.state_dict())

    begun = 0.0

    def batches():
        nonlocal begun
        for i in range(3):
            begun = begun or time.monotonic() * (i == 1)
            if rank == 1 and i == 1:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(TIMEOUT_S + 4)
            yield torch.randn(3, 3, dtype=torch.float64)

    try:
        batchnorm.calibrate(model, batches(), progress=False, group="world")
    except BatchNormError as error:
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return str(error), same, time.monotonic() - begun
    return None


@pytest.mark.slow
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_rank_that_leaves_is_named_and_the_others_stay_as_they_were(pooled, how):
    outcomes = outcomes_of(leaving, 3, pooled, how, timeout=TIMEOUT_S)
    for rank in (0, 2):
        assert outcomes[rank].code == 0
        text, same, seconds = outcomes[rank].result
        assert "rank 1 did not come" in text
        assert same
        assert seconds < TIMEOUT_S + 5


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_exception_on_one_rank_leaves_every_rank_as_it_was(pooled, where):
    outcomes = run(failing, 3, pooled, where, timeout=8)
    for rank, (kind, text, same, training) in enumerate(outcomes):
        assert same
        assert training
        if rank == 1:
            assert kind == {"loader": "OSError", "model": "KeyError"}[where]
        else:
            assert kind == "PoolingError"
            assert "rank 1" in text
