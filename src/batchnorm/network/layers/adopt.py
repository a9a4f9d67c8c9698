"""A batch norm takes on another class, and stays the same object.

The class is changed in place rather than the module replaced: hooks and their handles, Parameters known to
an optimizer, buffers, names, shared places, training flags and references from anywhere else all hold,
because nothing that they refer to is new.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.ecosystem.plain import PLAIN
from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer

OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
TORCH: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()}
# what a layer of ours holds beyond torch's, found rather than listed
_EXTRAS = tuple(
    sorted(set(BatchNorm1d(1, device="meta").__dict__) - set(nn.BatchNorm1d(1, device="meta").__dict__))
)


class Adopted:
    """First base of the classes that are made here, so that copies and pickles find the way back."""

    _adopted_from: type[nn.Module]
    _first: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else self.__dict__
        return (_remake, (self._adopted_from, self._first), state)


def _remake(origin: Any, first: type) -> nn.Module:
    made = ours_for(origin, first)
    return made.__new__(made)


def torch_base(cls: type) -> type[nn.Module] | None:
    """The one of ``torch.nn.BatchNorm1d/2d/3d`` that a class derives from.

    Parameters
    ----------
    cls : type
        Any class.

    Returns
    -------
    type or None
        None for every other class.
    """
    return next((base for base in OURS if issubclass(cls, base)), None)


@functools.cache
def ours_for(cls: Any, first: type = Adopted) -> type[nn.Module]:
    """The class of ours that serves in the place of a class of torch, or of one derived from it.

    Parameters
    ----------
    cls : type
        ``torch.nn.BatchNorm1d/2d/3d`` or a subclass.
    first : type
        First base of a class that is made for a subclass.

    Returns
    -------
    type
        Of ours itself for a class of torch; for a subclass one that derives from both, with its name, in
        which a call of ``super().forward`` arrives at ours.
    """
    base = torch_base(cls)
    if base is None:
        raise TypeError(f"{cls.__name__} is no batch norm of torch.")
    if cls is base:
        return OURS[base]
    namespace = {
        **{name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")},
        "_adopted_from": cls,
        "_first": first,
    }
    if _is_parametrized(cls):
        # torch undoes a parametrization by going to the first base
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        return type(cls.__name__, (ours_for(cls.__bases__[0]),), {**own, **namespace})
    return type(cls.__name__, (first, cls, OURS[base]), namespace)


def _is_parametrized(cls: type) -> bool:
    return cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1 and "__deepcopy__" in vars(cls)


def become_ours(layer: _BatchNorm) -> str:
    """Turn a batch norm of torch, or of a class derived from torch's, into ours, in place.

    Parameters
    ----------
    layer : torch.nn.BatchNorm1d, BatchNorm2d, BatchNorm3d, or a subclass
        Keeps its Parameters, buffers, hooks and attributes.

    Returns
    -------
    str
        Empty when done; otherwise the reason why the layer was left as it is.
    """
    cls: Any = type(layer)
    base = torch_base(cls)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its class changes at the first batch, when it can be converted"
    if base is None:
        return (
            "pools over ranks" if isinstance(layer, nn.SyncBatchNorm) else "no BatchNorm1d, 2d or 3d of torch"
        )
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    own = set(layer.__dict__) | set(layer._modules) | set(layer._buffers) | set(layer._parameters)
    taken = sorted(own & {*_EXTRAS, "domains"})
    if taken:
        return f"its class {cls.__name__} uses the name {taken[0]!r} for something else"
    if cls.forward is not base.forward:
        return f"its class {cls.__name__} has a forward of its own; accelerate calls what is in it by our operator"
    take_on(layer, ours_for(cls))
    return ""


def take_on(layer: Any, made: type[nn.Module]) -> None:
    """Give a layer another class, and the attributes that the class needs beside its own.

    Parameters
    ----------
    layer : torch.nn.Module
        A batch norm; changed in place.
    made : type
        From :func:`ours_for`.
    """
    fresh = OURS[torch_base(made)].adopt(layer)  # type: ignore[index]
    layer.__class__ = made
    for name in _EXTRAS:
        layer.__dict__.setdefault(name, fresh.__dict__[name])
    layer.widen()


def become_torch(layer: nn.Module) -> str:
    """Turn a batch norm of ours back into torch's, or into the class it was adopted from, in place.

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d or BatchNorm3d of this package
        Keeps its Parameters, buffers, hooks and attributes.

    Returns
    -------
    str
        Empty when done; otherwise the reason why the layer was left as it is.
    """
    reason = why_not_plain(layer)
    if reason:
        return reason
    cls = type(layer)
    origin = cls.__dict__.get("_adopted_from") or TORCH.get(cls)
    if origin is None:
        return f"its class {cls.__name__} derives from ours"
    layer.__class__ = origin
    for name in _EXTRAS:
        layer.__dict__.pop(name, None)
    weight = layer._parameters.get("weight")
    for name in ("running_mean", "running_var"):
        buffer = layer._buffers[name]
        if weight is not None and buffer is not None and weight.dtype in (torch.float16, torch.bfloat16):
            # torch's layer wants vectors of one dtype
            layer._buffers[name] = buffer.to(weight.dtype)
    return ""


def why_not_plain(layer: nn.Module) -> str:
    """Say which option makes a layer of ours compute what no layer of torch does.

    Parameters
    ----------
    layer : torch.nn.Module
        A batch norm.

    Returns
    -------
    str
        Empty when there is none.
    """
    if "domains" in layer._modules:
        return "it keeps the statistics of several domains"
    if getattr(layer, "frozen_statistics", False):
        return "its statistics are frozen, which torch cannot express; unfreeze it first"
    for name, plain in PLAIN.items():
        value = getattr(layer, name, plain)
        if isinstance(layer, Layer) and value != plain:
            return f"{name}={value!r} has no counterpart in torch"
    return ""
