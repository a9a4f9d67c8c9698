"""While another thread compiles, torch.compiler.is_compiling() says yes in this one too: nothing may follow."""

import pytest
import torch

import batchnorm
from batchnorm.errors import TooFewValuesError


@pytest.fixture
def another_compiles(monkeypatch):
    # what the other thread's compilation does for as long as it lasts
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()


def steps(layer):
    z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for batch in (z, z + 1, torch.full_like(z, torch.nan), z * 2):
        leaf = batch.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        yield leaf.grad
    yield from (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    yield layer.eval()(z)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"on_nonfinite": "skip"}])
def test_a_layer_trains_as_ever(another_compiles, monkeypatch, options):
    found = list(steps(layer := batchnorm.BatchNorm1d(3, **options)))
    skipped = layer.num_batches_skipped
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", False)
    wanted = list(steps(layer := batchnorm.BatchNorm1d(3, **options)))
    assert skipped == layer.num_batches_skipped
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


def test_errors_are_raised_as_ever(another_compiles):
    with pytest.raises(TooFewValuesError):
        batchnorm.BatchNorm1d(3)(torch.randn(1, 3))


def test_the_operator_that_counts_in_a_graph_counts_once(another_compiles):
    mean = torch.zeros(3)
    skipped = torch.tensor([True, False, False])
    assert torch.equal(torch.ops.batchnorm.count_skips(mean, skipped), skipped)
    assert batchnorm.skips.counted(mean) == 1
