"""Parameters in two groups, so that weight decay leaves gamma and beta alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from batchnorm.errors import ArgumentError
from batchnorm.network.model import check_model, check_number, unwrapped
from batchnorm.network.record import Record, forget_tool, write_record
from batchnorm.network.values.modules import OTHER_NORMS, is_batch_norm

# "q_bias", "bias_ih_l0" and "in_proj_bias" are biases, "unbiased" is none
_BIAS = re.compile(r"(^|_)bias(_|$)")
_NAMED_NORM = re.compile(r"norm", re.IGNORECASE)


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
    found = list(_without_decay(unwrapped(model)))
    without = {id(parameter) for *_, parameter in found}
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
    told, layers = Record(tool="param_groups"), dict[str, tuple[nn.Module, list[str]]]()
    for path, module, name, _ in found:
        layers.setdefault(path, (module, []))[1].append(name)
    for path, (module, names) in layers.items():
        told.add(path, type(module).__name__, "without decay", ", ".join(names))
    forget_tool(model, "param_groups")
    write_record(model, told)
    return [group for group in groups if group["params"]]


def _without_decay(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    behaviour: dict[Any, bool] = {}
    for path, module in model.named_modules():
        own = dict(_own_parameters(module))
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in own.values()):
            raise ArgumentError(
                "param_groups: a layer is lazy, and its parameters have no shape yet.",
                why="what its first batch makes of them would be in no group.",
                mend="run the network on one batch first.",
                at=path,
            )
        normalizes = _normalizes(module, own, behaviour)
        yield from (
            (path, module, name, held) for name, held in own.items() if normalizes or _BIAS.search(name)
        )


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of a module itself, with what torch keeps elsewhere of the ones that are parametrized."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for name, held in module.parametrizations.items():  # type: ignore[operator, union-attr]
            yield from ((name, parameter) for parameter in held.parameters())


def _normalizes(module: nn.Module, own: dict[str, nn.Parameter], behaviour: dict[Any, bool]) -> bool:
    if is_batch_norm(module) or isinstance(module, OTHER_NORMS):
        return True
    if not own or not all(_is_vector(parameter) for parameter in own.values()):
        return False
    if any(
        True
        for name, child in module.named_children()
        if name != "parametrizations"
        for _ in child.parameters()
    ):
        return False  # a block that holds a norm, or goes without one and says so in its name
    if any(_NAMED_NORM.search(cls.__name__) for cls in type(module).__mro__):
        return True
    if all(_BIAS.search(name) for name in own):
        return False
    # a model holds many of a class, which differ in their number of channels alone
    key = (type(module), *own)
    if key not in behaviour:
        behaviour[key] = _keeps_under_scale(module, max(parameter.numel() for parameter in own.values()))
    return behaviour[key]


def _is_vector(parameter: Tensor) -> bool:
    return sum(size != 1 for size in parameter.shape) <= 1


def _keeps_under_scale(module: nn.Module, channels: int) -> bool:
    """Whether a module answers the same when its input is multiplied by 8; by trial, on a copy."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trial: Any = copy.deepcopy(module).to("cpu").float().train()
            for parameter in trial.parameters():
                # what a learned gate begins with may be 0, behind which nothing shows
                parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
            torch.manual_seed(0)
            for shape in ((6, channels), (6, 5, channels), (6, channels, 4, 4)):
                x = torch.randn(shape) * 2 + 0.5
                y, scaled = _answer(trial, x), _answer(trial, 8 * x)
                if y is not None and scaled is not None:
                    moves = float(y.std()) > 1e-3 and not torch.allclose(y[0], y[1], rtol=1e-3)
                    return moves and bool(torch.allclose(y, scaled, rtol=1e-2, atol=1e-2))
    except Exception:
        # a copy or a forward of another library may raise anything; then nothing was seen
        return False
    return False


def _answer(trial: Any, x: Tensor) -> Tensor | None:
    try:
        y = trial(x)
    except Exception:
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None
