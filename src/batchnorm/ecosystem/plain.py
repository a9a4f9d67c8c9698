"""Whether a layer of ours computes what torch's layer computes, and that layer of torch."""

from __future__ import annotations

from typing import Any

from torch import nn

PLAIN = {
    "activation": None,
    "channel_dim": 1,
    "virtual_batch_size": None,
    "running_var_correction": 1,
    "process_group": None,
}
"""Options that change what a layer computes, with the value under which it computes what torch's does."""

_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def why_not_plain(layer: nn.Module, but: tuple[str, ...] = ()) -> str:
    """Say what makes a layer of ours compute something that no layer of torch does.

    Parameters
    ----------
    layer : torch.nn.Module
        A batch norm.
    but : tuple of str
        Options that do not matter.

    Returns
    -------
    str
        Empty when nothing does.
    """
    if "domains" in layer._modules:
        return "it keeps the statistics of several domains"
    for name, plain in {**PLAIN, "frozen_statistics": False}.items():
        value = getattr(layer, name, plain)
        if value != plain and name not in but:
            return f"it has {name}={value!r}"
    return ""


def torch_layer(layer: Any) -> nn.Module:
    """Make the layer of torch that computes what a layer of ours does, but for its activation.

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d or BatchNorm3d of this package
        A plain one.

    Returns
    -------
    torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d
        With the same Parameters, buffers and training flag.
    """
    base: Any = next(cls for cls in type(layer).__mro__ if cls in _TORCH)
    made = base(
        layer.num_features,
        layer.eps,
        layer.momentum,
        layer.affine,
        layer.track_running_stats,
        device="meta",
    )
    for name in made._parameters:
        made._parameters[name] = layer._parameters.get(name)
    for name in made._buffers:
        made._buffers[name] = layer._buffers.get(name)
    made.training = layer.training
    return made
