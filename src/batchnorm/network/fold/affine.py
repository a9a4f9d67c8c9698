"""A batch norm in eval mode as one scale and one shift a channel, and both put into a layer's weights.

Everything is computed in float64 and cast back once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.network.compare import Answers, compared, repeats
from batchnorm.network.inputs import copied
from batchnorm.network.values.activations import ACTIVATIONS
from batchnorm.network.values.find import Unproven
from batchnorm.network.values.modules import TRANSPOSED

_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_KNOWN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *_OURS)


Change = Callable[[Any, "Affine"], None]
"""How a layer takes a norm in."""


@dataclass
class Affine:
    """What a batch norm does in eval mode: ``tail(scale * z + shift)``.

    Parameters
    ----------
    scale, shift : Tensor, shape (C,), float64
        One value a channel.
    tail : torch.nn.Module
        What is left when scale and shift are gone: Identity, or the activation inside the norm.
    channel_dim : int
        The norm's channel axis, negative when counted from the last.
    """

    scale: Tensor
    shift: Tensor
    tail: nn.Module
    channel_dim: int


def own_forward(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether a module runs the forward of one of the given classes, not one of its own.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.
    kinds : tuple of type
        Classes whose forward is known.

    Returns
    -------
    bool
        False where a subclass or the instance overrides it.
    """
    forward = getattr(type(module), "forward", None)
    known = [getattr(kind, "forward", None) for kind in kinds if isinstance(module, kind)]
    return "forward" not in vars(module) and any(forward is one for one in known)


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy, on the CPU where the device has no float64.

    Parameters
    ----------
    tensor : Tensor
        Any floating dtype.

    Returns
    -------
    Tensor
        Float64, detached.
    """
    return (tensor.detach().cpu() if tensor.device.type == "mps" else tensor.detach()).to(torch.float64)


def affine_of(norm: nn.Module) -> Affine:
    """Scale, shift and tail of a batch norm in eval mode.

    Parameters
    ----------
    norm : torch.nn.Module
        Torch's, ours, a subclass with its own forward, or a frozen lookalike. The last two are measured: run
        on numbers, and compared with what is claimed of them.

    Returns
    -------
    Affine
        In float64.

    Raises
    ------
    Unproven
        It keeps no statistics, keeps several, holds values that are not finite, or is no affine map.
    """
    if isinstance(norm, _BatchNorm) and (norm.running_mean is None or norm.running_var is None):
        raise Unproven(
            "it keeps no running statistics and normalizes by the batch at hand, also in eval mode"
        )
    if norm.running_mean.is_meta:
        raise Unproven("it has no values yet (meta device)")
    if "domains" in norm._modules:
        raise Unproven("it keeps statistics of several domains")
    if own_forward(norm, _KNOWN_NORMS):
        found = _by_formula(norm)
        activation = getattr(norm, "activation", None) if isinstance(norm, _OURS) else None
        if activation is not None:
            found.tail = ACTIVATIONS[activation]().train(norm.training)
    else:
        found = _by_measurement(norm)
    if not bool(torch.isfinite(found.scale).all() and torch.isfinite(found.shift).all()):
        raise Unproven("its statistics or affine values are not finite, or give a scale that is not")
    return found


def _by_formula(norm: Any) -> Affine:
    scale = (wide(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    shift = -wide(norm.running_mean) * scale
    if norm.bias is not None:
        shift = shift + wide(norm.bias)
    return Affine(
        scale, shift, nn.Identity(), getattr(norm, "channel_dim", 1) if isinstance(norm, _OURS) else 1
    )


def _by_measurement(norm: Any) -> Affine:
    """A forward that is not known: run it on numbers, and believe only what they confirm."""
    channels = int(norm.running_mean.numel())
    axes = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}
    extra = next((n for kind, n in axes.items() if isinstance(norm, kind)), 2)
    shape = (4, channels, *[3] * extra)
    column = (1, channels, *[1] * extra)
    parts = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    tail = copy.deepcopy(parts[0] if len(parts) == 1 else nn.Sequential(*parts)) if parts else nn.Identity()
    try:
        measured = copy.deepcopy(norm).to("cpu", torch.float64).eval()
        with torch.no_grad():
            if isinstance(norm, _BatchNorm):
                plain = _by_formula(measured)
            else:
                zero = measured(torch.zeros(shape, dtype=torch.float64))
                one = measured(torch.ones(shape, dtype=torch.float64))
                shift = zero.movedim(1, 0).flatten(1)[:, 0]
                plain = Affine(one.movedim(1, 0).flatten(1)[:, 0] - shift, shift, nn.Identity(), 1)
            generator = torch.Generator().manual_seed(0)
            sample = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
            plain_tail = copy.deepcopy(tail).to("cpu", torch.float64).eval()
            expected = plain_tail(sample * plain.scale.view(column) + plain.shift.view(column))
            agrees = torch.allclose(measured(sample.clone()), expected, rtol=1e-6, atol=1e-6)
    except Exception as error:
        raise Unproven(f"its own forward can't be measured: {type(error).__name__}") from error
    if not agrees:
        raise Unproven(f"the forward of {type(norm).__name__} is not a scale and a shift a channel")
    device = norm.running_mean.device if norm.running_mean.device.type != "mps" else "cpu"
    return Affine(plain.scale.to(device), plain.shift.to(device), tail, 1)


def foldable_layer(layer: nn.Module) -> str:
    """Why the weights of a layer can't be changed; empty when they can.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution.

    Returns
    -------
    str
        The reason.
    """
    weight = layer._parameters.get("weight")
    if hasattr(layer, "parametrizations") or weight is None or "bias" not in layer._parameters:
        return "the weight of {path} is computed by a parametrization"
    if weight.is_meta:
        return "the weight of {path} has no values yet (meta device)"
    if weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        return f"the weight of {{path}} is {str(weight.dtype).removeprefix('torch.')}"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight of {{path}} is a {type(weight).__name__}"
    return ""


def _rows(layer: Any, weight: Tensor) -> Tensor:
    """Weight as (groups, out / groups, in / groups, taps), whatever the layer."""
    if isinstance(layer, TRANSPOSED):
        grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1)
        return grouped.transpose(1, 2)
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _weight(layer: Any, rows: Tensor) -> Tensor:
    """Back from (groups, out / groups, in / groups, taps) to the layer's own shape."""
    if isinstance(layer, TRANSPOSED):
        rows = rows.transpose(1, 2)
    return rows.reshape(layer.weight.shape)


def channels_out(layer: Any) -> int:
    """Number of output channels of a layer.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution.

    Returns
    -------
    int
        ``out_features`` or ``out_channels``.
    """
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def channels_in(layer: Any) -> int:
    """Number of input channels of a layer.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution.

    Returns
    -------
    int
        ``in_features`` or ``in_channels``.
    """
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


@torch.no_grad()
def fold_into_before(layer: Any, affine: Affine) -> None:
    """Change a layer so that it gives ``scale * layer(x) + shift``.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution; changed in place.
    affine : Affine
        One value for each output channel.

    Raises
    ------
    Unproven
        The new weights do not fit the layer's dtype; nothing was changed.
    """
    # a product with a float64 factor is float64: no wide copy of the weight is needed
    rows = _rows(layer, layer.weight if layer.weight.device.type != "mps" else layer.weight.cpu())
    scale = affine.scale.to(rows.device)
    shift = affine.shift.to(rows.device)
    bias = shift if layer.bias is None else wide(layer.bias) * scale + shift
    _write(layer, _weight(layer, rows * scale.view(rows.shape[0], rows.shape[1], 1, 1)), bias)


def exact_after(layer: Any, affine: Affine) -> str:
    """Why a shift of a layer's input is not a change of its bias; empty when it is one.

    Parameters
    ----------
    layer : torch.nn.Module
        The layer that reads the norm's output.
    affine : Affine
        The norm.

    Returns
    -------
    str
        The reason.
    """
    if isinstance(layer, nn.Linear) or not bool(affine.shift.any()):
        return ""
    if isinstance(layer, TRANSPOSED):
        if all(n == 1 for n in (*layer.kernel_size, *layer.stride)) and not any(
            (*layer.padding, *layer.output_padding)
        ):
            return ""
        return "a transposed convolution gives each place another number of taps, so a shift is no bias"
    if layer.padding_mode != "zeros" or (all(n == 1 for n in layer.kernel_size) and layer.padding == "same"):
        return ""
    if layer.padding == "valid" or (layer.padding != "same" and not any(layer.padding)):
        return ""
    return "it pads with zeros, which the norm would have shifted"


@torch.no_grad()
def fold_into_after(layer: Any, affine: Affine) -> None:
    """Change a layer so that it gives ``layer(scale * x + shift)``.

    Parameters
    ----------
    layer : torch.nn.Module
        Linear, convolution or transposed convolution for which :func:`exact_after` has no objection; changed
        in place.
    affine : Affine
        One value for each input channel.

    Raises
    ------
    Unproven
        The new weights do not fit the layer's dtype; nothing was changed.
    """
    rows = _rows(layer, wide(layer.weight))
    scale = affine.scale.to(rows.device).view(rows.shape[0], 1, rows.shape[2], 1)
    shift = affine.shift.to(rows.device).view(rows.shape[0], 1, rows.shape[2], 1)
    added = (rows * shift).sum((2, 3)).flatten()
    bias = added if layer.bias is None else wide(layer.bias) + added
    if layer.bias is None and not bool(affine.shift.any()):
        bias = None  # type: ignore[assignment]
    _write(layer, _weight(layer, rows * scale), bias)


def _write(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    dtype = layer.weight.dtype
    fresh = [t.to(layer.weight.device, dtype) for t in (weight, bias) if t is not None]
    if not all(bool(torch.isfinite(t).all()) for t in fresh):
        raise Unproven(f"the folded weights do not fit {str(dtype).removeprefix('torch.')}")
    layer.weight.copy_(fresh[0])  # in place: strides, requires_grad and identity stay
    if bias is None:
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(fresh[1], requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(fresh[1])


@torch.no_grad()
def fold_into_norm(first: Any, affine: Affine) -> None:
    """Change a batch norm so that it gives ``scale * norm(x) + shift``.

    Parameters
    ----------
    first : torch.nn.Module
        A batch norm with gamma and beta and no activation; changed in place.
    affine : Affine
        The batch norm behind it.
    """
    scale, shift = affine.scale.to(first.weight.device), affine.shift.to(first.weight.device)
    first.weight.copy_(wide(first.weight).to(scale.device) * scale)
    first.bias.copy_(wide(first.bias).to(scale.device) * scale + shift)


def agrees_on_trial(layer: nn.Module, affine: Affine, change: Change, *, after: bool) -> bool:
    """Whether a layer with a forward of its own does what a change of its weights says; by trial, in float64.

    Parameters
    ----------
    layer : torch.nn.Module
        Not changed.
    affine : Affine
        The norm that is to go in.
    change : callable
        :func:`fold_into_before` or :func:`fold_into_after`.
    after : bool
        True when the norm stands in front of the layer.

    Returns
    -------
    bool
        False also where it fails on the trial.
    """
    given: Any = copied(layer).to("cpu", torch.float64).eval()
    changed = copied(given)
    change(changed, affine)
    # an image just larger than the kernel; of a Linear, none
    space = [
        (k - 1) * d + 3
        for k, d in zip(*(getattr(given, n, ()) for n in ("kernel_size", "dilation")), strict=True)
    ]
    x = torch.randn(
        4, channels_in(layer), *space, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    scale, shift = (v.cpu().view(1, -1, *[1] * len(space)) for v in (affine.scale, affine.shift))

    @torch.no_grad()
    def ask(network: nn.Module, x: Tensor) -> Answers:
        return {"its output": network(x * scale + shift) if after else network(x) * scale + shift}

    try:
        with torch.no_grad():
            found = {"its output": changed(x)}
        return compared(ask(given, x), found, repeats(given, x, ask)).right is True
    except Exception:  # a forward of somebody else may raise anything
        return False
