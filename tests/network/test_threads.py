"""Tools look at one network while other threads serve others, or the same one."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import batchnorm


def network():
    parts = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
    ]
    return nn.Sequential(nn.Sequential(*parts[:3]), nn.Sequential(*parts[3:])).eval()


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()


class Served(nn.Module):
    """Asks what a network is often asked for, in Python."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        if not isinstance(x, torch.Tensor) or not torch.is_tensor(x) or self.training:
            raise ValueError("served in training mode, or not a tensor")
        return self.inner(x)


def serve(model, stop, found):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        while not stop.is_set():
            try:
                torch.testing.assert_close(model(x), expected)
            except BaseException as error:
                found.append(error)
                return


TOOLS = {
    "fold": lambda model: batchnorm.fold(model),
    "fold with an example": lambda model: batchnorm.fold(model, torch.randn(2, 3, 8, 8)),
    "insert": lambda model: batchnorm.insert(plain(), torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("same", [False, True], ids=["another network", "the same network"])
def test_a_network_is_served_while_a_tool_looks(tool, same):
    given = Served().eval()
    served, stop, found = given if same else Served().eval(), threading.Event(), []
    threads = [threading.Thread(target=serve, args=(served, stop, found)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(6):
            TOOLS[tool](given)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not found


def test_two_tools_at_once_do_not_disturb_each_other():
    found = []

    def work(kind):
        try:
            for _ in range(4):
                if kind == "fold":
                    assert isinstance(batchnorm.fold(network())[0][1], nn.Identity)
                else:
                    rows = batchnorm.record(batchnorm.insert(plain())).of("inserted")
                    assert [row.path for row in rows] == ["0"]
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("fold", "insert", "fold")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not found
    assert not hasattr(nn.modules.module, "isinstance")
