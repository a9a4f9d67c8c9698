"""Inputs that a network may accept, made up from what it says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from batchnorm.network.inputs import required

_SIDES = (64, 224, 32, 299, 128, 28, 384)
# by the number of axes of space: before a convolution, and before a transposed one
_OF_CONVOLUTIONS = {1: (32, 400, 4000, 16000), 2: _SIDES, 3: (16, 32, 64)}
_OF_TRANSPOSED = {1: _OF_CONVOLUTIONS[1], 2: (1, 4, 8), 3: (1, 4)}


def guesses(model: nn.Module) -> Iterator[Any]:
    """Inputs that a network may accept, as far as its signature, configuration and first layer tell.

    Parameters
    ----------
    model : torch.nn.Module
        Looked at, not run.

    Yields
    ------
    Tensor or dict
        As :func:`call_with` takes them, the most likely first; the global random state is not touched.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    like = first if first is not None else torch.empty(0)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(like.device, like.dtype)

    config, name = getattr(model, "config", None), getattr(model, "main_input_name", "")
    if config is not None and name:
        yield from _guesses_from_config(config, name, draw)
    given = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
    if isinstance(given, dict) and isinstance(given.get("input_size"), tuple):
        channels, *sides = given["input_size"]
        yield draw(2, channels, *[min(_SIDES[0], side) for side in sides])
        yield draw(2, channels, *sides)
    if (required(model) or 0) > 1:
        return
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            yield draw(4, layer.in_features)
            yield draw(2, 5, layer.in_features)
            return
        if isinstance(layer, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.long, device=layer.weight.device)
            return
        if isinstance(layer, nn.modules.conv._ConvNd):
            axes = len(layer.kernel_size)
            for side in (_OF_TRANSPOSED if layer.transposed else _OF_CONVOLUTIONS)[axes]:
                yield draw(2, layer.in_channels, *[side] * axes)
                if axes == layer.in_channels == 1:
                    yield draw(2, side)
            return
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            channels = layer.num_features
            yield from (draw(2, channels, *[8] * axes) for axes in range(4))
            return


def _guesses_from_config(config: Any, name: str, draw: Any) -> Iterator[dict[str, torch.Tensor]]:
    channels = getattr(config, "num_channels", 3) or 3
    if name == "pixel_values":
        own = getattr(config, "image_size", None)
        sides = [own] if isinstance(own, int) else list(own) if isinstance(own, (tuple, list)) else []
        for side in dict.fromkeys([_SIDES[0], *sides[:1], *_SIDES]):
            yield {name: draw(2, channels, side, side)}
    elif name in ("input_values", "input_features"):
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_dim", None) or 80
        for length in (400, 2000, 16000):
            yield {name: draw(2, length)}
            yield {name: draw(2, length // 10, bins)}
            yield {name: draw(2, bins, length // 10)}
