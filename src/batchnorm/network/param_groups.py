"""Parameters in two groups, so that weight decay leaves gamma and beta alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from batchnorm.errors import ArgumentError
from batchnorm.network.model import check_model, check_number, check_sized, unwrapped
from batchnorm.network.record import Record, forget_tool, write_record
from batchnorm.network.values.norms import BIAS, is_norm, own_parameters


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimizer: with and without weight decay.

    Decay on gamma changes the scale of a layer's output, which is not what it is for; on the weights
    before a batch norm it changes the effective learning rate only (van Laarhoven 2017). Gamma and beta of
    every normalizing layer and every bias go without; the other parameters get it.

    A normalizing layer is one of ``torch.nn``, or a layer of any library whose own parameters are all
    vectors, one value a channel, and which is named a norm or behaves as one: what it puts out stays when
    its input is multiplied by a constant. So ``RMSNorm`` classes of model libraries count, and a learned
    scale, a slope of an activation or a position embedding does not.

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
        ``batchnorm.record(model)`` names the layers of the second.

    Raises
    ------
    ArgumentError
        A negative weight decay, something that is no network, or a model without a parameter that requires
        a gradient, or with one that has no shape yet.

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
    check_number(
        "param_groups",
        "weight_decay",
        weight_decay,
        "not negative, and finite",
        lambda decay: 0 <= decay < float("inf"),
        why="weights would grow without bound.",
        mend="1e-4 is usual for convolutional networks.",
    )
    check_model(model, "param_groups")
    check_sized(model, "param_groups")
    if any("_flat_param" in name for name, _ in model.named_parameters()):
        raise ArgumentError(
            "param_groups: FullyShardedDataParallel has made one parameter of many, gamma and beta among them.",
            why="it decays as a whole, or not.",
            mend="FullyShardedDataParallel(..., use_orig_params=True), or fully_shard(model).",
        )
    spared = list(_without_decay(unwrapped(model)))
    without = {id(parameter) for *_, held in spared for parameter in held.values()}
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
    told = Record(tool="param_groups")
    for path, module, held in spared:
        told.add(path, type(module).__name__, "without decay", ", ".join(held))
    forget_tool(model, "param_groups")
    write_record(model, told)
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Path and module of each layer that goes without, and its parameters that do."""
    for path, module in model.named_modules():
        own = dict(own_parameters(module))
        held = own if is_norm(module) else {name: p for name, p in own.items() if BIAS.search(name)}
        if held:
            yield path, module, held
