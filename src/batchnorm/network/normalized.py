"""A layer with its batch norm, standing where the layer stood."""

from __future__ import annotations

from typing import Any

from torch import nn


class Normalized(nn.Sequential):
    """A layer and the batch norm behind it, in the place that the layer had.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution.
    norm : torch.nn.Module
        The batch norm of its output.

    Notes
    -----
    Attributes that it lacks are looked up on the layer, so that code which asks for ``net.fc.in_features``
    or ``net.conv.weight`` goes on working.
    """

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("layer", "norm") or name.startswith("__"):
                raise
            return getattr(super().__getattr__("layer"), name)
