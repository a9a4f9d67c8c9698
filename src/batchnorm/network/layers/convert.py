"""From one kind of normalization layer to another, in place, and back without loss where that is possible."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import ArgumentError
from batchnorm.modules import Layer
from batchnorm.network.inputs import Forward, check_forward, own, run_each, target
from batchnorm.network.layers.adopt import OURS, TORCH, become_ours, become_torch, torch_base, why_not_plain
from batchnorm.network.layers.frozen import FrozenBatchNorm
from batchnorm.network.layers.one_by_one import Impossible, one_by_one
from batchnorm.network.model import Where, check_number, chooser, unwrapped
from batchnorm.network.undo import Undo, hook_before, set_modes, stop_gradients
from batchnorm.network.values.modules import LAYERS
from batchnorm.network.values.norms import is_frozen_lookalike

Kind = Literal["batchnorm", "torch", "sync", "frozen", "group", "layer", "instance"]

_TOOL = "convert"
_BEFORE = "_converted_from"
_BY_AXES = tuple(OURS)  # torch's layer for one axis of space, two and three
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
# options of ours that say what to do in a case where torch's layer has no choice
_OPTIONS = ("on_single_value", "on_nonfinite")
_SMALL = "the statistics of a sample do not depend on how few others are in its batch"


def convert(
    model: nn.Module,
    to: Kind,
    *,
    example: Any = None,
    groups: int = 32,
    process_group: Any = None,
    where: Where = None,
    forward: Forward = None,
    inplace: bool = True,
) -> nn.Module:
    """Turn every batch norm of a network into another kind of layer.

    Each layer stays the same object under another class: hooks, names, shared places and training flags
    stay, and gamma and beta stay the same Parameters, so that an optimizer made before remains valid.

    Parameters
    ----------
    model : Module
        Any network.
    to : str
        ``"batchnorm"``: ours. ``"torch"``: ``torch.nn.BatchNorm1d/2d/3d``. ``"sync"``:
        ``torch.nn.SyncBatchNorm``. ``"frozen"``: fixed statistics, gamma and beta, as in the
        ``FrozenBatchNorm2d`` of detection libraries; layers of that kind, recognized by their four buffers,
        are also taken as a source. Between these four the way back gives what was there.
        ``"group"``, ``"layer"``, ``"instance"``: ``torch.nn.GroupNorm``, the same with one group, and
        ``torch.nn.InstanceNorm1d/2d/3d``, for batches too small for statistics. They compute something
        else: train on, or from the start.
    example : Tensor, tuple, dict, or None
        An input, as for `fold`, for one run in eval mode, to see the number of axes of what enters a layer
        that does not say whether it is 1d, 2d or 3d (``SyncBatchNorm``). By default the layer before it tells.
    groups : int, default 32
        For ``"group"``: the most groups. The number taken is the largest that divides the channels and
        leaves at least two in a group.
    process_group : object, optional
        For ``"sync"``: the ranks that pool their statistics; by default all.
    where : str or callable, optional
        Which layers: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    forward : callable, optional
        ``forward(model, example)`` calls the network, where ``model(example)`` is not how it takes one.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy. ``batchnorm.record`` of it names every layer converted, and every one left alone with
        the reason.

    Raises
    ------
    ArgumentError
        ``to`` is unknown, ``groups`` is not positive, or ``model`` is no network that can be changed. On any
        exception the model is as it was.

    References
    ----------
    Wu and He 2018, arXiv:1803.08494 (group normalization, and layer norm as one group of it); Ulyanov et al.
    2016, arXiv:1607.08022 (instance normalization).

    Examples
    --------
    >>> import torch, batchnorm
    >>> from batchnorm.network.layers.convert import convert
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> type(convert(model, "sync")[1]).__name__
    'SyncBatchNorm'
    >>> type(convert(model, "batchnorm")[1]) is batchnorm.BatchNorm2d
    True
    """
    if not isinstance(to, str) or to not in Kind.__args__:  # type: ignore[attr-defined]
        raise ArgumentError(f"convert: to={to!r} is unknown.", mend=f"one of {', '.join(Kind.__args__)}.")  # type: ignore[attr-defined]
    check_number(_TOOL, "groups", groups, "a positive whole number", lambda n: n >= 1 and n == int(n))
    model, chosen = target(model, _TOOL, inplace), chooser(where, _TOOL)
    check_forward(forward, _TOOL)
    layers = [
        (path, m)
        for path, m in unwrapped(model).named_modules()
        if (isinstance(m, _BatchNorm) or _is_frozen(m)) and chosen(path, m)
    ]
    axes = _axes_seen(model, [m for _, m in layers], example, forward)

    def change(path: str, layer: nn.Module, undo: Undo) -> str | None:
        # a Parameter that a frozen layer keeps aside gets the layer's values back when it thaws
        for parameter in layer.__dict__.get(_BEFORE, {}).get("parameters", {}).values():
            if parameter is not None:
                undo.add(partial(setattr, parameter, "data", parameter.data))
        return _convert(layer, to, _Finder(unwrapped(model), path, layer, axes), groups, process_group)

    return one_by_one(model, layers, change, _TOOL, "converted")


def _convert(layer: nn.Module, to: str, finder: _Finder, groups: int, process_group: Any) -> str | None:
    """Convert one layer in place; None when it is of that kind already."""
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise Impossible("lazy: it has no channels before its first batch")
    if to == "frozen":
        return _freeze(layer)
    if to == "sync" and isinstance(layer, nn.SyncBatchNorm):
        return None
    if _is_frozen(layer):
        if to in ("group", "layer", "instance"):
            raise Impossible("frozen layers are not trained: thaw it first with to='batchnorm'")
        _thaw(layer, finder)
    if isinstance(layer, nn.SyncBatchNorm):
        _desync(layer, finder)
    if to == "batchnorm" and not isinstance(layer, Layer):
        _or_impossible(become_ours(layer))  # type: ignore[arg-type]
        layer.__dict__.update(finder.options)
    elif to != "batchnorm" and isinstance(layer, Layer):
        finder.options = {name: getattr(layer, name) for name in _OPTIONS}
        _or_impossible(become_torch(layer))
    if to in ("batchnorm", "torch"):
        same = type(layer) is finder.before
        return None if same else f"{type(layer).__module__.split('.')[0]} {type(layer).__name__}"
    if type(layer) not in _BY_AXES:
        raise Impossible(f"its class {type(layer).__name__} does more than batch norm, which would be lost")
    if to == "sync":
        layer.__dict__[_BEFORE] = {"class": type(layer), "options": finder.options}
        layer.__class__ = nn.SyncBatchNorm
        layer.process_group = process_group
        return "SyncBatchNorm"
    return _small_batch(layer, to, groups, finder)


def _or_impossible(reason: str) -> None:
    if reason:
        raise Impossible(reason)


# -- synchronized --------------------------------------------------------------------------------------------
def _desync(layer: nn.Module, finder: _Finder) -> None:
    before = layer.__dict__.pop(_BEFORE, {})
    finder.options = before.get("options", {})
    layer.__dict__.pop("process_group", None)
    layer.__class__ = before.get("class") or finder.batch_norm_class()


# -- frozen --------------------------------------------------------------------------------------------------
def _is_frozen(module: nn.Module) -> bool:
    # with Parameters it would be a batch norm that somebody wrote anew, and no frozen one
    return isinstance(module, FrozenBatchNorm) or (is_frozen_lookalike(module) and not module._parameters)


def _freeze(layer: Any) -> str | None:
    if _is_frozen(layer):
        return None
    if layer.running_mean is None or layer.running_var is None:
        raise Impossible("it keeps no statistics that could be frozen")
    if "domains" in layer._modules:
        raise Impossible("it keeps the statistics of several domains")
    cls = type(layer)
    if not (cls in _BY_AXES or cls in TORCH or cls is nn.SyncBatchNorm):
        raise Impossible(f"its class {cls.__name__} does more than batch norm, which would be lost")
    before = layer.__dict__.pop(_BEFORE, {})
    kept = {name: layer._buffers.pop(name) for name in (_COUNTER,) if name in layer._buffers}
    parameters = {name: layer._parameters.pop(name) for name in _AFFINE}
    mean = layer.running_mean
    for name, value in (("bias", 0.0), ("weight", 1.0)):
        held = parameters[name]
        made = torch.full_like(mean, value) if held is None else held.detach()
        # in the order in which such layers are written
        layer._buffers = {name: made, **layer._buffers}
    own = before.get("frozen")
    layer.__dict__[_BEFORE] = {"class": cls, "parameters": parameters, "buffers": kept, "before": before}
    layer.__class__ = own or FrozenBatchNorm
    return layer.__class__.__name__


def _thaw(layer: Any, finder: _Finder) -> None:
    before = layer.__dict__.pop(_BEFORE, None)
    affine = {name: layer._buffers.pop(name) for name in _AFFINE}
    if before is not None:
        for name, parameter in before["parameters"].items():
            if parameter is not None:
                # the same Parameter as before, with what the layer holds now
                parameter.data = affine[name]
            layer._parameters[name] = parameter
        for name, buffer in before["buffers"].items():
            layer._buffers[name] = None if buffer is None else buffer.to(layer.running_mean.device)
        layer.__class__ = before["class"]
        if before["before"]:
            layer.__dict__[_BEFORE] = before["before"]
        return
    layer._buffers.update(affine)
    eps = _eps_of(layer)
    base: Any = finder.batch_norm_class()
    foreign = type(layer)
    for name in _AFFINE:
        layer._parameters[name] = nn.Parameter(layer._buffers.pop(name))
    fresh = base(layer.running_mean.numel(), eps, device=layer.running_mean.device)
    _become(layer, fresh)
    layer._buffers["num_batches_tracked"] = fresh.num_batches_tracked
    layer.__dict__[_BEFORE] = {"frozen": foreign}


def _become(layer: nn.Module, fresh: nn.Module) -> None:
    """Take on the class and the settings of a fresh layer."""
    settings = {k: v for k, v in fresh.__dict__.items() if not k.startswith("_") and k != "training"}
    layer.__dict__.update(settings)
    layer.__class__ = type(fresh)


def _eps_of(layer: Any) -> float:
    """Find by trial the eps with which a foreign frozen layer computes."""
    given = layer._buffers
    z = torch.linspace(-2, 2, 8, device=given["running_mean"].device, dtype=given["running_mean"].dtype)
    z = z.view(8, 1, 1, 1).expand(8, given["running_mean"].numel(), 1, 1)
    with torch.no_grad():
        try:
            out = layer(z.clone())
        except Exception as error:
            raise Impossible(
                f"its class {type(layer).__name__} does not take (N, C, H, W): {error}"
            ) from error
        for eps in (getattr(layer, "eps", 1e-5), 1e-5, 1e-3, 1e-6, 1e-12, 0.0):
            inv = (given["running_var"] + eps).rsqrt() * given["weight"]
            wanted = (z - given["running_mean"].view(1, -1, 1, 1)) * inv.view(1, -1, 1, 1)
            wanted = wanted + given["bias"].view(1, -1, 1, 1)
            if isinstance(out, Tensor) and torch.allclose(out, wanted, rtol=1e-5, atol=1e-6):
                return float(eps)
    raise Impossible(f"its class {type(layer).__name__} computes something else than batch norm")


# -- for small batches ---------------------------------------------------------------------------------------
def _small_batch(layer: nn.Module, to: str, groups: int, finder: _Finder) -> str:
    why = why_not_plain(layer)
    _or_impossible(why)
    base, channels, affine = torch_base(type(layer)), int(layer.num_features), bool(layer.affine)  # type: ignore[arg-type]
    if to == "instance":
        if finder.axes == 2:
            raise Impossible("it normalizes (N, C): one value per channel and sample has no variance")
        kind = getattr(nn, base.__name__.replace("Batch", "Instance"))  # type: ignore[union-attr]
        made: nn.Module = kind(channels, layer.eps, affine=affine)
        said = f"{type(made).__name__}: {_SMALL}"
    else:
        most = max(1, min(groups, channels // 2)) if to == "group" else 1
        number = max(n for n in range(1, most + 1) if channels % n == 0)
        made = nn.GroupNorm(number, channels, layer.eps, affine)  # type: ignore[arg-type]
        said = f"GroupNorm with {number} {'group' if number == 1 else 'groups'}: {_SMALL}"
    for name in set(nn.BatchNorm1d(1, device="meta").__dict__) - set(made.__dict__):
        layer.__dict__.pop(name, None)
    for name in (*_STATISTICS, _COUNTER):
        layer._buffers.pop(name, None)
    layer._buffers.update(made._buffers)
    _become(layer, made)
    return said


# -- looking -------------------------------------------------------------------------------------------------
class _Finder:
    """What can be known about the data that enters a layer."""

    def __init__(self, model: nn.Module, path: str, layer: Any, axes: dict[int, int]) -> None:
        self.model, self.path, self.layer = model, path, layer
        self.axes = axes.get(id(layer))
        self.before, self.options = type(layer), {}  # type: ignore[var-annotated]

    def batch_norm_class(self) -> type[nn.Module]:
        """BatchNorm1d, 2d or 3d of torch, from a run, the class's name, or the layer before."""
        if self.axes is not None and 2 <= self.axes <= 5:
            return _BY_AXES[max(self.axes - 3, 0)]
        for cls in _BY_AXES:
            if self.before.__name__.lower().endswith(cls.__name__[-2:]):
                return cls
        holder = self.model.get_submodule(self.path.rpartition(".")[0])
        previous: Any = None
        for child in holder.children():
            if child is self.layer:
                break
            previous = child if isinstance(child, LAYERS) else previous
        channels = getattr(previous, "out_channels", getattr(previous, "out_features", None))
        if previous is not None and channels == self.layer.running_mean.numel():
            return _BY_AXES[max(previous.weight.ndim - 3, 0)]
        raise Impossible(
            "it does not say whether it is 1d, 2d or 3d: pass example=, one input of the network"
        )


def _axes_seen(model: nn.Module, layers: list[nn.Module], example: Any, forward: Forward) -> dict[int, int]:
    if example is None:
        return {}
    seen: dict[int, int] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = args[0] if args else kwargs.get("input")
        if isinstance(z, Tensor):  # else the layer itself says what is wrong
            seen[id(module)] = z.ndim

    end = Undo(always=True)
    with end, end:
        set_modes(end, model, False)
        for layer in layers:
            hook_before(end, layer, look)
        stop_gradients(end)
        run_each(model, [own(example)], _TOOL, forward)
    return seen
