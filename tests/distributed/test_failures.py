"""Ranks that do not do the same: every one that lives raises, names the layer and the rank, and nothing moves."""

from __future__ import annotations

import copy
import os
import signal
import time

import pytest
import torch
from ranks import outcomes_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.errors import BatchNormError

GROUP_TIMEOUT = 3


class Net(nn.Module):
    def __init__(self, first=4, last=4):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.layer1 = nn.ModuleDict({"bn": nn.BatchNorm1d(first)})
        self.head = nn.ModuleDict({"bn": nn.BatchNorm1d(last)})
        self.order = ("layer1", "head")
        self.times = 1

    def forward(self, x):
        x = self.stem(x)
        for name in self.order:
            bn = getattr(self, name).bn
            for _ in range(self.times):
                x = bn(x.repeat(1, 2)[:, : bn.num_features])
        return x.repeat(1, 2)[:, :4]


def sabotage(rank, how, who, wrapped, warm):
    model = batchnorm.synchronize(Net(last=6 if how == "swaps two sizes" else 4))
    run = DistributedDataParallel(model) if wrapped else model
    x = torch.randn(3, 3)
    for _ in range(warm):
        run(x).sum().backward()
    before = copy.deepcopy(model.state_dict())
    begun = time.monotonic()
    try:
        odd = rank == who
        if odd and how == "dies before":
            os.kill(os.getpid(), signal.SIGKILL)
        if odd and how == "dies in between":
            model.head.bn.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        if odd and how == "is in eval":
            model.eval()
        if odd and how == "sleeps":
            time.sleep(GROUP_TIMEOUT + 4)
            return None
        if odd and how.startswith("swaps"):
            model.order = ("head", "layer1")
        if odd and how == "calls twice":
            model.times = 2
        if odd and how == "another dtype":
            model.double()
            x = x.double()
        if odd and how == "another domain":
            with batchnorm.domain("fake"):
                run(x)
        y = run(x)
        if odd and how == "dies in backward":
            y.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        y.pow(2).sum().backward()
        if odd and how == "is in eval":
            time.sleep(GROUP_TIMEOUT + 4)
    except BatchNormError as error:
        # of the layer that raised, or of one after it: nothing moved
        at = error.at.split(".")[0]
        spent = time.monotonic() - begun
        moved = [
            k for k, v in model.state_dict().items() if k.startswith(at) and not torch.equal(v, before[k])
        ]
        return str(error), spent, moved
    return None


DISAGREE = ["swaps", "swaps two sizes", "calls twice", "another dtype", "another domain"]
ABSENT = ["dies before", "dies in between", "dies in backward", "is in eval", "sleeps"]


@pytest.mark.parametrize("how", DISAGREE)
@pytest.mark.parametrize("warm", [0, 3])
def test_who_is_elsewhere_is_named_at_once(how, warm):
    outcomes = outcomes_of(sabotage, 3, how, 1, False, warm, timeout=GROUP_TIMEOUT)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.trace
        text, spent, moved = outcome.result
        assert "rank 1 is in " in text
        assert "'layer1.bn'" in text or "'head.bn'" in text
        assert "at: " in text
        assert spent < 2
        assert how in ("another dtype", "calls twice", "another domain") or not moved


def check_absence(how, who, wrapped, ranks, store="tcp"):
    outcomes = outcomes_of(sabotage, ranks, how, who, wrapped, 2, timeout=GROUP_TIMEOUT, store=store)
    for rank, outcome in enumerate(outcomes):
        if rank == who:
            assert outcome.code == (-signal.SIGKILL if how.startswith("dies") else 0), outcome.trace
            continue
        assert outcome.code == 0, outcome.trace
        assert outcome.result is not None, "nothing was raised"
        text, spent, moved = outcome.result
        assert f"rank {who} did not come" in text or (who == 0 and "rank 0 does not answer" in text), text
        assert "'layer1.bn'" in text or "'head.bn'" in text
        assert spent < GROUP_TIMEOUT + 5
        assert how == "dies in backward" or not moved


@pytest.mark.parametrize("how", ABSENT)
def test_who_does_not_come_is_named(how):
    check_absence(how, 1, False, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "who", "wrapped", "ranks", "store"),
    [
        ("dies in between", 0, False, 3, "tcp"),
        ("dies in backward", 0, False, 3, "file"),
        ("dies in between", 2, True, 4, "tcp"),
        ("dies in backward", 3, False, 4, "tcp"),
        ("is in eval", 2, False, 4, "tcp"),
        ("sleeps", 0, True, 3, "file"),
    ],
)
def test_who_does_not_come_is_named_wherever_that_is(how, who, wrapped, ranks, store):
    check_absence(how, who, wrapped, ranks, store)
