"""What normalizes: known by its class, by its name, or by what it does."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

_OTHERS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# "q_bias", "bias_ih_l0" and "in_proj_bias" are biases, "unbiased" is none
BIAS = re.compile(r"(^|_)bias(_|$)")
_NAMED_NORM = re.compile(r"norm", re.IGNORECASE)
# a model holds many of a class, which differ in their number of channels alone
_TRIED: dict[tuple[Any, ...], bool] = {}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm: torch's, ours, or a frozen lookalike of another library.

    Parameters
    ----------
    module : torch.nn.Module
        Any module. A lookalike is a childless module with ``weight``, ``bias``, ``running_mean`` and
        ``running_var`` of one length, which is how the ``FrozenBatchNorm2d`` of detection libraries is made.

    Returns
    -------
    bool
        True for a batch norm.
    """
    if isinstance(module, _BatchNorm):
        return not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return is_frozen_lookalike(module)


def is_frozen_lookalike(module: nn.Module) -> bool:
    """Whether a module looks like the ``FrozenBatchNorm2d`` of detection libraries.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for a childless module that is none of torch's batch norms and has their four vectors.
    """
    if isinstance(module, _BatchNorm) or module._modules:
        return False
    tensors = {**module._buffers, **module._parameters}
    vectors = [tensors.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    return (
        all(v is not None and v.ndim == 1 for v in vectors)
        and len({v.shape for v in vectors if v is not None}) == 1
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: any batch norm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, ...

    Parameters
    ----------
    module : torch.nn.Module
        Any module. A layer of any library counts whose own parameters are all vectors, one value a channel, and
        which is named a norm or behaves as one: what it puts out stays when its input is multiplied by a constant.

    Returns
    -------
    bool
        True for a norm. A block that holds one, such as a PreNorm, is none.
    """
    if is_batch_norm(module) or isinstance(module, _OTHERS):
        return True
    own = dict(own_parameters(module))
    inside = [child for name, child in module.named_children() if name != "parametrizations"]
    if any(True for child in inside for _ in child.parameters()) or not all(map(_is_vector, own.values())):
        return False
    if not own:
        return type(module).__name__.rstrip("123456789dD").endswith("Norm") and not inside
    if any(_NAMED_NORM.search(cls.__name__) for cls in type(module).__mro__):
        return True
    if all(BIAS.search(name) for name in own):
        return False
    key = likeness(module)
    if key not in _TRIED:
        _TRIED[key] = _keeps_under_scale(module, max(parameter.numel() for parameter in own.values()))
    return _TRIED[key]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give the parameters of a module itself, with what torch keeps elsewhere of the ones that are parametrized.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Yields
    ------
    tuple of str and torch.nn.Parameter
        Its name in the module, and the parameter.
    """
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        for name, held in module.parametrizations.items():  # type: ignore[operator, union-attr]
            yield from ((name, parameter) for parameter in held.parameters())


def likeness(module: nn.Module) -> tuple[Any, ...]:
    """What a module's forward may depend on, but for the number of channels.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    tuple
        Equal for two that behave alike.
    """
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str, type(None)))}
    for name in ("num_features", "training"):
        plain.pop(name, None)
    present = tuple(
        k for table in (module._parameters, module._buffers) for k, v in table.items() if v is not None
    )
    children = tuple((name, type(child), repr(child)) for name, child in module._modules.items())
    return (type(module), tuple(sorted(plain.items(), key=str)), present, children)


def _is_vector(parameter: Tensor) -> bool:
    return not nn.parameter.is_lazy(parameter) and sum(size != 1 for size in parameter.shape) <= 1


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
