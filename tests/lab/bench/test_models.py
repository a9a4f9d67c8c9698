"""The whole networks are the published ones, and computing with our layers does not change them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[3] / "lab" / "benchmarks"))

from batchnorm_lab.bench import models

# parameters and multiply-adds at 224 x 224 with 1000 classes, as published with the papers' code
PUBLISHED = {"resnet50": (25_557_032, 4.09e9), "mobilenet_v2": (3_504_872, 0.30e9)}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_parameters_and_operations_are_the_published_ones(name):
    model = models.make(name, models.PlainNormAct)
    total = [0]

    def watch(layer, inputs, output):
        total[0] += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(watch)
    with torch.device("meta"):
        on_meta = model.to("meta").eval()
        on_meta(torch.empty(1, 3, 224, 224))
    parameters, operations = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert total[0] == pytest.approx(operations, rel=0.02)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_ours_written_in_computes_the_same_gradients(name):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    gradients = []
    for norm_act in (models.PlainNormAct, models.fused_norm_act):
        model = models.make(name, norm_act).double().eval()
        loss = model(images.double()).square().mean()
        first = next(model.parameters())
        gradients.append(torch.autograd.grad(loss, first)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-12)


def test_a_training_step_is_timed_in_turns(capsys):
    from batchnorm_lab.bench.steps import time_steps

    threads = torch.get_num_threads()
    try:
        outcome = time_steps(
            "mobilenet_v2",
            ["before", "after"],
            batch=4,
            size=32,
            layout="nchw",
            threads=1,
            rounds=2,
            path=None,
        )
    finally:
        torch.set_num_threads(threads)
    assert {sample.contender: len(sample.times) for sample in outcome.samples} == {"eager": 2, "ours": 2}
    assert "mobilenet_v2 batch 4" in capsys.readouterr().out
