"""Real ranks of a study: each result comes back, an error of one ends all, and training is that of one process."""

import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from batchnorm import synchronize
from batchnorm.errors import BatchNormError
from batchnorm_lab.data import load
from batchnorm_lab.studies.ensemble import MLPEnsemble
from batchnorm_lab.studies.ranks import on_ranks
from batchnorm_lab.studies.training import EnsembleOptimizer, train

pytest.importorskip("sklearn")


def work(advance, how):
    advance(0.5)
    if dist.get_rank() == 1 and how == "raises":
        raise KeyError("a bug")
    if dist.get_rank() == 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank(), dist.get_world_size()


@pytest.mark.slow
def test_results_come_in_the_order_of_ranks_and_rank_0_tells_how_far_it_is():
    told = []
    assert on_ranks(work, 3, "", advance=told.append) == [(0, 3), (1, 3), (2, 3)]
    assert told == [0.5]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "says"), [("raises", "a bug"), ("dies", "it died")])
def test_a_rank_that_fails_ends_the_others_with_its_error(how, says):
    with pytest.raises(BatchNormError, match=says) as caught:
        on_ranks(work, 2, how)
    assert "rank 1 of 2" in str(caught.value)


def trained(advance, data, over_ranks):
    networks = MLPEnsemble(
        (64, 12, 10), seeds=[0, 1], activation="relu", places={"before"}, dtype=torch.float64
    ).double()
    if over_ranks:
        synchronize(networks)
    optimizer = EnsembleOptimizer(networks, [0.1, 0.2])
    optimizer.rates = optimizer.rates.double()
    train(networks, optimizer, data, steps=6, batch=8, over_ranks=over_ranks, advance=advance)
    return {name: value.detach().clone() for name, value in networks.state_dict().items()}


@pytest.mark.slow
def test_training_over_ranks_is_that_of_one_process_with_all_samples():
    data = load("digits")
    data = replace(data, train_images=data.train_images.double())
    wanted = trained(lambda share: None, data, False)
    for state in on_ranks(trained, 4, data, True):
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)
