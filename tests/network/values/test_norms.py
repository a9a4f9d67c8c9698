"""What normalizes is known by its class, its name or what it does; the same for every tool."""

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.network.values.norms import is_batch_norm, is_norm


class Gain(nn.Module):
    """Normalizes, and neither its name nor its base tells."""

    def __init__(self, channels, normalize=True):
        super().__init__()
        self.gain, self.normalize = nn.Parameter(torch.ones(channels)), normalize

    def forward(self, x):
        return self.gain * (x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() if self.normalize else x)


class PreNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(self.norm(x))


@pytest.mark.parametrize(
    ("module", "normalizes"),
    [
        (nn.BatchNorm2d(4), True),
        (batchnorm.BatchNorm1d(4), True),
        (nn.GroupNorm(2, 4, affine=False), True),
        (nn.InstanceNorm2d(4), True),
        (nn.LocalResponseNorm(2), True),
        (Gain(4), True),
        (Gain(4, normalize=False), False),
        (PreNorm(), False),
        (nn.PReLU(4), False),
        (nn.Linear(4, 1, bias=False), False),
        (nn.Identity(), False),
        (nn.LazyBatchNorm1d(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_is_what_normalizes(module, normalizes):
    assert is_norm(module) is normalizes


def test_a_layer_behind_which_such_a_norm_stands_is_not_normalized_again():
    net = nn.Sequential(nn.Linear(3, 4), Gain(4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    record = batchnorm.record(batchnorm.insert(net, torch.randn(8, 3)))
    assert [row.path for row in record.of("inserted")] == ["3"]
    assert "already normalized by Gain" in record.reason("0")
    # and param_groups says the same of it
    batchnorm.param_groups(net, 0.1)
    assert "gain" in next(row.detail for row in batchnorm.record(net) if row.path == "1")
    assert not is_batch_norm(net[1])
