"""Ranks that do not do the same: every one that lives raises, names the layer and the rank, and nothing moves."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import outcomes_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.distributed.conversation import Conversation
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


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def watched(model):
    """Give what the statistics of every layer were when it was last entered or left."""
    seen = {}

    def note(path):
        return lambda layer, *_: seen.update({path: [t.clone() for t in layer.buffers()]})

    for path, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.register_forward_pre_hook(note(path))
            layer.register_forward_hook(note(path))
    return seen


def dies_at_message(number, after):
    """Let this process be killed at the message of that number: before it is sent, or when it has come."""
    send, sent = Conversation._send, [0]

    def deadly(self, *arguments):
        sent[0] += 1
        if sent[0] == number and not after:
            die()
        came = send(self, *arguments)
        if sent[0] == number:
            die()  # what it sent has come to the others
        return came

    Conversation._send = deadly


def make(how, rank, mesh):
    model = Net(last=6 if how == "swaps two sizes" else 4)
    if not mesh:
        return batchnorm.synchronize(model)
    # as a mesh of (2, 2) has them; its own have torch's timeout of half an hour
    groups = [
        dist.new_group(ranks, timeout=datetime.timedelta(seconds=GROUP_TIMEOUT))
        for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])
    ]
    return batchnorm.synchronize(model, (groups[rank // 2], groups[2 + rank % 2]))


def sabotage(rank, how, who, wrapped, warm, mesh=False):
    model = make(how, rank, mesh)
    # DDP's own broadcast of buffers would fail first, and name nobody
    run = DistributedDataParallel(model, broadcast_buffers=False) if wrapped else model
    x = torch.randn(3, 3)
    for _ in range(warm):
        run(x).sum().backward()
    seen = watched(model)
    begun = time.monotonic()
    try:
        odd = rank == who
        if odd and how == "dies before":
            die()
        if odd and how == "dies in between":
            model.head.bn.register_forward_pre_hook(die)
        if odd and "message" in how:
            dies_at_message(int(how.split()[-1]), after="after" in how)
        if odd and how == "is in eval":
            model.eval()
        if odd and how == "is frozen":
            batchnorm.freeze(model)
        if odd and how == "sleeps":
            time.sleep(GROUP_TIMEOUT + 4)
            return None
        if odd and how == "raises":
            raise KeyError("a bug of this rank")
        if odd and how.startswith("swaps"):
            model.order = ("head", "layer1")
        if odd and how == "calls twice":
            model.times = 2
        if odd and how == "another dtype":
            model.double()
            x = x.double()
        if odd and how == "another policy":
            model.layer1.bn.on_nonfinite = "raise"
        if odd and how in OPTIONS:
            setattr(model.layer1.bn, how, OPTIONS[how])
        if odd and how == "another domain":
            with batchnorm.domain("fake"):
                run(x)
        y = run(x)
        if odd and how == "dies in backward":
            y.register_hook(die)
        if odd and how == "no backward":
            time.sleep(GROUP_TIMEOUT + 4)
            return None
        y.pow(2).sum().backward()
        if odd and how in ("is in eval", "is frozen"):
            time.sleep(GROUP_TIMEOUT + 4)
    except BatchNormError as error:
        spent = time.monotonic() - begun
        layer = model.get_submodule(error.at)
        moved = not all(map(torch.equal, layer.buffers(), seen[error.at]))
        return str(error), spent, moved
    except KeyError:
        time.sleep(GROUP_TIMEOUT + 4)
    return None


OPTIONS = {"eps": 1e-3, "momentum": 0.01, "running_var_correction": 0, "track_running_stats": False}
DISAGREE = [
    *("swaps", "swaps two sizes", "calls twice", "another dtype", "another domain", "another policy"),
    *OPTIONS,
]
ABSENT = ["dies before", "dies in between", "dies in backward", "is in eval", "sleeps"]


def check_disagreement(how, who, wrapped, ranks, warm):
    outcomes = outcomes_of(sabotage, ranks, how, who, wrapped, warm, timeout=GROUP_TIMEOUT)
    for outcome in outcomes:
        assert outcome.code == 0, outcome.trace
        assert outcome.result is not None, outcome.trace
        text, spent, moved = outcome.result
        assert f"rank {who} is in " in text
        assert "'layer1.bn'" in text or "'head.bn'" in text
        if how in ("eps", "momentum"):
            # both values are named
            assert f"{how} {OPTIONS[how]}" in text
            assert {"eps": "eps 1e-05", "momentum": "momentum 0.1"}[how] in text
        assert "at: " in text
        assert spent < 2
        assert not moved


@pytest.mark.parametrize("how", DISAGREE)
@pytest.mark.parametrize("warm", [0, 3])
def test_who_is_elsewhere_is_named_at_once(how, warm):
    check_disagreement(how, 1, False, 3, warm)


@pytest.mark.slow
@pytest.mark.parametrize("how", DISAGREE)
@pytest.mark.parametrize(
    ("who", "wrapped", "ranks", "warm"), [(0, True, 2, 1), (3, True, 4, 3), (2, False, 4, 2)]
)
def test_who_is_elsewhere_is_named_at_once_wherever_that_is(how, who, wrapped, ranks, warm):
    check_disagreement(how, who, wrapped, ranks, warm)


def check_absence(how, who, wrapped, ranks, store="tcp", warm=2, mesh=False):
    outcomes = outcomes_of(sabotage, ranks, how, who, wrapped, warm, mesh, timeout=GROUP_TIMEOUT, store=store)
    for rank, outcome in enumerate(outcomes):
        if rank == who:
            assert outcome.code == (-signal.SIGKILL if how.startswith("dies") else 0), outcome.trace
            continue
        assert outcome.code == 0, outcome.trace
        assert outcome.result is not None, f"nothing was raised; {outcome.trace}"
        text, spent, moved = outcome.result
        assert f"rank {who} did not come" in text or (who == 0 and "rank 0 does not answer" in text), text
        assert "'layer1.bn'" in text or "'head.bn'" in text
        assert spent < GROUP_TIMEOUT + 5
        assert not moved


@pytest.mark.parametrize(
    "how", [pytest.param(h, marks=pytest.mark.slow) if h == "sleeps" else h for h in ABSENT]
)
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
        ("dies after message 1", 1, False, 3, "tcp"),
        ("dies after message 3", 0, False, 3, "file"),
        ("is in eval", 2, False, 4, "tcp"),
        ("is in eval", 0, True, 2, "file"),
        ("is frozen", 1, False, 2, "tcp"),
        ("sleeps", 0, True, 3, "file"),
        ("raises", 1, True, 3, "tcp"),
        ("no backward", 2, False, 3, "tcp"),
    ],
)
def test_who_does_not_come_is_named_wherever_that_is(how, who, wrapped, ranks, store):
    check_absence(how, who, wrapped, ranks, store)


@pytest.mark.slow
@pytest.mark.parametrize("message", [1, 2, 3, 4])
@pytest.mark.parametrize(("who", "ranks", "wrapped", "store"), [(1, 2, True, "tcp"), (0, 3, False, "file")])
def test_who_is_killed_at_any_message_is_named(message, who, ranks, wrapped, store):
    check_absence(f"dies at message {message}", who, wrapped, ranks, store, warm=3)


@pytest.mark.slow
@pytest.mark.parametrize(("message", "warm"), [(1, 0), (2, 0), (3, 0), (2, 1), (3, 2)])
def test_who_is_killed_before_the_loop_is_known_is_named(message, warm):
    check_absence(f"dies at message {message}", 2, False, 4, warm=warm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["dies in between", "dies in backward", "dies at message 2", "is in eval", "sleeps"]
)
@pytest.mark.parametrize("who", [0, 3])
def test_who_does_not_come_to_a_mesh_of_four_is_named_on_every_rank(how, who):
    check_absence(how, who, False, 4, "file", mesh=True)


def killed_at_a_time(rank, who, delay):
    model = batchnorm.synchronize(Net())
    x = torch.randn(3 - rank, 3)
    model(x).sum().backward()
    if rank == who:
        threading.Timer(delay, die).start()
    seen = watched(model)
    begun = time.monotonic()
    try:
        while time.monotonic() - begun < 20:
            model(x).pow(2).sum().backward()
    except BatchNormError as error:
        layer = model.get_submodule(error.at)
        return (
            str(error),
            time.monotonic() - begun - delay,
            all(map(torch.equal, layer.buffers(), seen[error.at])),
        )
    return None


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.21, 0.222, 0.37, 0.5, 0.613])
@pytest.mark.parametrize(("who", "store"), [(1, "tcp"), (0, "file"), (2, "file")])
def test_who_is_killed_at_any_time_is_named(who, store, delay):
    outcomes = outcomes_of(killed_at_a_time, 3, who, delay, timeout=GROUP_TIMEOUT, store=store)
    for rank, outcome in enumerate(outcomes):
        if rank == who:
            assert outcome.code == -signal.SIGKILL, outcome.trace
            continue
        assert outcome.code == 0, outcome.trace
        text, spent, still = outcome.result
        assert f"rank {who} did not come" in text, text
        assert spent < GROUP_TIMEOUT + 5
        assert still
