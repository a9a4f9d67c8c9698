"""Whole training steps of ResNet-50 and MobileNetV2, eager and compiled, before and after ``accelerate``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import batchnorm
from batchnorm_lab.bench import models

VARIANTS = ("eager", "eager, accelerated", "compiled", "compiled, accelerated")


def _network(name: str, dry: bool) -> nn.Module:
    if dry:
        norm = models.PlainNormAct
        return nn.Sequential(models.conv(3, 4, 3), norm(4, "relu"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return models.make(name, models.PlainNormAct)


def make(name: str, variant: str, batch: int, side: int, device: str, dry: bool) -> Callable[[], Any]:
    """Make one training step: forward under autocast to bfloat16, loss, backward, and an update.

    Parameters
    ----------
    name : {"resnet50", "mobilenet_v2"}
        The network.
    variant : str
        One of `VARIANTS`.
    batch, side : int
        Images, and their side in pixels.
    device : str
        Where.
    dry : bool
        A tiny network, compiled without a code generator.

    Returns
    -------
    callable
        Makes one step.
    """
    network = _network(name, dry).to(device)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if "accelerated" in variant:
        accelerated = batchnorm.accelerate(copy.deepcopy(network))
        network = network if accelerated is None else accelerated
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    run: Callable[..., Any] = network
    if variant.startswith("compiled"):
        run = torch.compile(network, backend="aot_eager" if dry else "inductor")
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = run(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
