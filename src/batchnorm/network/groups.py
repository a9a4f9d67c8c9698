"""Parameters in two groups, so that weight decay leaves gamma and beta alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.errors import ArgumentError

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimizer: with and without weight decay.

    Decay on gamma changes the scale of a layer's output, which is not what it is for; on the weights
    before a batch norm it changes the effective learning rate only (van Laarhoven 2017). Gamma and beta of
    every normalizing layer and every bias go without; the other parameters get it.

    Parameters
    ----------
    model : Module
        The network.
    weight_decay : float
        For the group that decays; not negative.

    Returns
    -------
    list of dict
        Two groups, the decaying one first, with every parameter that requires a gradient in one of them,
        once, in the order of ``model.parameters()``. A group without parameters is left out.

    Raises
    ------
    ArgumentError
        A negative weight decay, or a model without a parameter that requires a gradient.

    References
    ----------
    van Laarhoven 2017, arXiv:1706.05350; He et al. 2019, arXiv:1812.01187, section 3.1.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), batchnorm.BatchNorm1d(3))
    >>> groups = batchnorm.param_groups(model, 0.01)
    >>> [(len(g["params"]), g["weight_decay"]) for g in groups]
    [(1, 0.01), (3, 0.0)]
    """
    if not weight_decay >= 0:
        raise ArgumentError(
            f"param_groups: weight_decay must not be negative, and is {weight_decay}.",
            why="weights would grow without bound.",
            mend="1e-4 is usual for convolutional networks.",
        )
    without: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS) or name == "bias" or name.endswith("_bias"):
                without.add(id(parameter))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ArgumentError(
            f"param_groups: {type(model).__name__} has no parameter that requires a gradient.",
            why="an optimizer would have nothing to do.",
            mend="unfreeze something first.",
        )
    groups = [
        {"params": [p for p in parameters if id(p) not in without], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in without], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
