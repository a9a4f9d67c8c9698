"""Inputs that a network may accept, made up from what it says about itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

_SIDES = (64, 224, 32, 299, 128, 28, 384)


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
    with suppress(TypeError, ValueError):
        needed = [
            p
            for p in inspect.signature(model.forward).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(needed) > 1:
            return
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            yield draw(4, layer.in_features)
            yield draw(2, 5, layer.in_features)
            return
        if isinstance(layer, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.long, device=layer.weight.device)
            return
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            for side in (32, 400, 4000, 16000):
                yield draw(2, layer.in_channels, side)
                if layer.in_channels == 1:
                    yield draw(2, side)
            return
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            for side in (1, 4, 8) if isinstance(layer, nn.ConvTranspose2d) else _SIDES:
                yield draw(2, layer.in_channels, side, side)
            return
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d)):
            for side in (1, 4) if isinstance(layer, nn.ConvTranspose3d) else (16, 32, 64):
                yield draw(2, layer.in_channels, side, side, side)
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
