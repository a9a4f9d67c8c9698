"""A network with statistics of its own, folded and compared."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.network.fold.fold import fold
from batchnorm.network.record import record

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def trained(net: nn.Module) -> nn.Module:
    """Statistics and affine values such as training leaves, none of them 0 or 1."""
    for m in net.modules():
        if getattr(m, "running_mean", None) is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if getattr(m, "weight", None) is not None:
                with torch.no_grad():
                    m.weight.uniform_(0.5, 1.5)
                    m.bias.normal_()
    return net


def norms(net: nn.Module) -> list[str]:
    return [
        path for path, m in net.named_modules() if isinstance(m, _BatchNorm) or hasattr(m, "running_mean")
    ]


def check(
    net: nn.Module, x: Any, *, left: list[str], example: bool | None = None, tol: float = 1e-5
) -> nn.Module:
    """Fold alone and on an example; the answers stay, and exactly these norms are left."""
    trained(net)
    net.eval()
    expected = net(x)
    state = copy.deepcopy(net.state_dict())
    for used in [None, x] if example is None else [x] if example else [None]:
        net.train()
        folded = fold(net, used)
        assert net.training
        assert not folded.training
        assert norms(folded) == left, str(record(folded))
        for path in left:
            assert record(folded).reason(path), f"no reason for {path}"
        torch.testing.assert_close(folded(x), expected, rtol=tol, atol=tol)
        assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
        net.eval()
    return folded


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) * self.bn(self.b(x))
