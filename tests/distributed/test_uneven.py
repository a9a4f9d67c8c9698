"""Loaders of different lengths: a rank that ran out goes on without samples, and the model is that of one process."""

from __future__ import annotations

import signal

import pytest
import torch
from ranks import outcomes_of, run
from test_training import assert_equal_models, descend, mlp
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.errors import BatchNormError, PoolingError

STEPS = [4, 2, 3]
# samples of an average step: a sum that is not divided would let the weights grow until they have no digits left
TAME = 8


def loaders(kind="mlp"):
    """Batches of each rank: 4, 2 and 3 of them, of different sizes."""
    made = []
    for rank, steps in enumerate(STEPS):
        g = torch.Generator().manual_seed(rank)
        made.append(
            [torch.randn(2 + (rank + i) % 3, 3, generator=g, dtype=torch.float64) for i in range(steps)]
        )
    return made


def uneven(rank, how):
    model = batchnorm.synchronize(mlp())
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    mine = loaders()[rank]
    if how == "together":
        steps = batchnorm.together(mine)
        for x in steps:
            descend(model, wrapped(x).pow(2).sum() * steps.ranks / steps.samples)
    elif how == "join":

        def step(x):
            descend(model, wrapped(x).pow(2).sum() * 3 / TAME)

        with Join([batchnorm.Joining(wrapped, step, mine[0])]):
            for x in mine:
                step(x)
    else:
        try:
            with wrapped.join():
                for x in mine:
                    descend(model, wrapped(x).pow(3).sum())
        except PoolingError as error:
            return str(error)
        except RuntimeError:
            return None
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("how", ["together", "join"])
def test_uneven_loaders_equal_one_process(how):
    model = mlp()
    for step in range(max(STEPS)):
        x = torch.cat([mine[step] for mine in loaders() if step < len(mine)])
        descend(model, model(x).pow(2).sum() / (len(x) if how == "together" else TAME))
    assert_equal_models(run(uneven, 3, how), model.state_dict())


@pytest.mark.slow
def test_join_of_ddp_alone_fails_with_the_way_out():
    texts = [text for text in run(uneven, 3, "ddp", timeout=3) if text]
    assert texts
    assert all("batchnorm.together" in text for text in texts)


def broken_loader(rank, empty):
    def batches():
        yield torch.ones(2, 3)
        if rank == 1:
            raise OSError("disk")
        yield torch.ones(2, 3)

    mine = [] if empty and rank == 1 else batches()
    seen = []
    try:
        for x in batchnorm.together(mine):
            seen.append(tuple(x.shape))
    except (PoolingError, OSError) as error:
        return seen, str(error)
    return seen, ""


def test_a_loader_that_raises_ends_the_loop_on_every_rank():
    first, second = run(broken_loader, 2, False)
    assert first[0] == second[0] == [(2, 3)]
    assert "rank 1" in first[1]
    assert second[1] == "disk"


def killed_at_message(rank, number):
    from test_failures import dies_at_message

    if rank == 1:
        dies_at_message(number, after=False)
    try:
        for _ in batchnorm.together([torch.ones(2, 3)] * (3 if rank == 0 else 0)):
            pass
    except BatchNormError as error:
        return str(error)
    return ""


# the question who has more, how long an example is, the example, the question again
@pytest.mark.parametrize("number", [1, 3, 5, pytest.param(7, marks=pytest.mark.slow)])
def test_a_rank_that_dies_while_it_is_asked_or_told_is_named(number):
    first, second, third = outcomes_of(killed_at_message, 3, number, timeout=4)
    assert second.code == -signal.SIGKILL
    for outcome in (first, third):
        assert outcome.code == 0, outcome.trace
        assert "rank 1 did not come" in outcome.result
        assert "'together'" in outcome.result


def test_a_rank_without_any_batch_learns_what_one_looks_like():
    first, second = run(broken_loader, 2, True)
    assert first == ([(2, 3), (2, 3)], "")
    assert second == ([(0, 3), (0, 3)], "")
