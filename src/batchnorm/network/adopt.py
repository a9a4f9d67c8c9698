"""A batch norm takes on another class, and stays the same object.

The class is changed in place rather than the module replaced: hooks and their handles, Parameters known to
an optimizer, buffers, names, shared places, training flags and references from anywhere else all hold,
because nothing that they refer to is new.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer
from batchnorm.network.kinds import activation_name, has_hooks

OURS: dict[type[nn.Module], type[Layer]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
TORCH: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in OURS.items()}
# options of ours that change what a layer computes, with the value under which it computes what torch does
PLAIN = {
    "activation": None,
    "channel_dim": 1,
    "virtual_batch_size": None,
    "running_var_correction": 1,
    "process_group": None,
}
_BUFFERS = ("num_batches_skipped", "skipped_channels")
# what a layer of ours holds beyond torch's, found rather than listed
_EXTRAS = tuple(
    sorted(set(BatchNorm1d(1, device="meta").__dict__) - set(nn.BatchNorm1d(1, device="meta").__dict__))
)
# a trial input: where the channels may be, in 2 to 5 axes
_TRIAL_SHAPES = ((6, 0), (6, 0, 5), (6, 5, 0), (6, 0, 3, 2), (6, 3, 2, 0), (6, 0, 2, 2, 2), (6, 2, 2, 2, 0))


class Adopted:
    """First base of the classes that are made here, so that copies and pickles find the way back."""

    _adopted_from: type[nn.Module]
    _then_children = False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else self.__dict__
        return (_remake, (self._adopted_from, self._then_children), state)


class _NormThenChildren(Adopted):
    """Normalizes, then applies the layer's own children in order: a fused norm and activation."""

    _then_children = True
    # a forward that spells batch norm out asks for no number of axes
    _dimensions = (2, 3, 4, 5)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop and activate, in one call where nobody looks in between.

        Parameters
        ----------
        input : Tensor, shape (N, C, *S)
            Pre-activations z.

        Returns
        -------
        Tensor
            Of the shape of ``input``.
        """
        layer: Any = self
        children = [m for m in layer._modules.values() if m is not None and type(m) is not nn.Identity]
        hooked = any(m is not None and has_hooks(m) for m in layer._modules.values())
        name = activation_name(children[0], "", {}) if len(children) == 1 else None
        if name is not None and not hooked:
            return layer._forward(input, None, None, "zero", name)
        y = layer._forward(input, None, None, "zero")
        for child in layer._modules.values():
            if child is not None:
                y = child(y)
        return y


def _once(make: Callable[..., type[nn.Module]]) -> Callable[..., type[nn.Module]]:
    return functools.cache(make)


def _remake(origin: type[nn.Module], then_children: bool) -> nn.Module:
    made = ours_for(origin, then_children)
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


@_once
def ours_for(cls: type[nn.Module], then_children: bool = False) -> type[nn.Module]:
    """The class of ours that serves in the place of a class of torch, or of one derived from it.

    Parameters
    ----------
    cls : type
        ``torch.nn.BatchNorm1d/2d/3d`` or a subclass.
    then_children : bool, default False
        Whether the forward of ``cls`` is to be replaced by: normalize, then the children in order.

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
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if _is_parametrized(cls):
        # torch undoes a parametrization by going to the first base
        return type(
            cls.__name__, (ours_for(cls.__bases__[0]),), {**_own_namespace(cls), "_adopted_from": cls}
        )
    first = _NormThenChildren if then_children else Adopted
    return type(cls.__name__, (first, cls, OURS[base]), {**namespace, "_adopted_from": cls})


def _is_parametrized(cls: type) -> bool:
    return cls.__name__.startswith("Parametrized") and len(cls.__bases__) == 1 and "__deepcopy__" in vars(cls)


def _own_namespace(cls: type) -> dict[str, Any]:
    return {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}


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
    cls = type(layer)
    base = torch_base(cls)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "lazy: its class changes at the first batch, when it can be accelerated"
    if base is None:
        return (
            "pools over ranks" if isinstance(layer, nn.SyncBatchNorm) else "no BatchNorm1d, 2d or 3d of torch"
        )
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance"
    fresh = OURS[base].adopt(layer)
    own = set(layer.__dict__) | set(layer._modules) | set(layer._buffers) | set(layer._parameters)
    taken = sorted(own & {*_EXTRAS, *_BUFFERS, "domains"})
    if taken:
        return f"its class {cls.__name__} uses the name {taken[0]!r} for something else"
    then_children = False
    if _overrides_forward(cls, base):
        reason, then_children = _understand(layer, cls)
        if reason:
            return reason
    made = ours_for(cls, then_children)
    _take_on(layer, made, fresh)
    return ""


def _take_on(layer: nn.Module, made: type[nn.Module], fresh: nn.Module) -> None:
    layer.__class__ = made
    for name in _EXTRAS:
        layer.__dict__[name] = fresh.__dict__[name]
    for name in _BUFFERS:
        layer.register_buffer(name, getattr(fresh, name), persistent=False)


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
    for name in _BUFFERS:
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)
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


def _overrides_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    return cls.forward is not base.forward


def _understand(layer: _BatchNorm, cls: type[nn.Module]) -> tuple[str, bool]:
    """Find by trial which of ours does what a forward of another library does: in both modes, to the digit.

    Two readings are tried on copies: the forward calls ``super().forward``, so that it may stay as it is;
    or it spells batch norm out, and then applies the layer's own children in order.
    """
    key = _likeness(layer)
    if key in _UNDERSTOOD:
        return "", _UNDERSTOOD[key]
    for then_children in (False, True) if layer._modules else (False,):
        made = ours_for(cls, then_children)
        trials = [
            _same_on_trial(layer, made, shape, training)
            for training in (True, False)
            for shape in _TRIAL_SHAPES
        ]
        if False not in trials and True in trials:
            _UNDERSTOOD[key] = then_children
            return "", then_children
    return f"{cls.__name__} has a forward of its own that is not understood", False


# a model holds many layers that differ in their number of channels alone
_UNDERSTOOD: dict[tuple[Any, ...], bool] = {}


def _likeness(layer: nn.Module) -> tuple[Any, ...]:
    """What a layer's forward may depend on, but for the number of channels."""
    plain = {k: v for k, v in layer.__dict__.items() if isinstance(v, (bool, int, float, str, type(None)))}
    for name in ("num_features", "training"):
        plain.pop(name, None)
    present = tuple(
        k for table in (layer._parameters, layer._buffers) for k, v in table.items() if v is not None
    )
    children = tuple((name, type(child), repr(child)) for name, child in layer._modules.items())
    return (type(layer), tuple(sorted(plain.items(), key=str)), present, children)


def _same_on_trial(
    layer: _BatchNorm, made: type[nn.Module], shape: tuple[int, ...], training: bool
) -> bool | None:
    """Whether ours gives the same output, gradient and statistics; None where theirs refuses the shape."""
    theirs, ours = _bare_copy(layer), _bare_copy(layer)
    counter = _Counter()
    fresh = OURS[torch_base(type(layer))].adopt(ours)  # type: ignore[index]
    _take_on(ours, type("Trial", (made,), {"_forward": counter.around(made)}), fresh)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([n or layer.num_features for n in shape], generator=generator) * 2 + 0.5
    results: list[tuple[Any, ...]] = []
    for model in (theirs, ours):
        model.train(training)
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                entered = x.clone().requires_grad_()
                out = model(entered * 1)
                weights = torch.linspace(-1, 1, out.numel()).view_as(out)
                (grad,) = torch.autograd.grad((out * weights).sum(), entered)
        except Exception:
            # a foreign forward may raise anything
            return None if model is theirs else False
        results.append((out, grad, model.running_mean, model.running_var, model.num_batches_tracked))
    if not counter.calls:
        return False
    return all(
        (a is None) == (b is None)
        and (a is None or torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5))
        for a, b in zip(*results, strict=True)
    )


class _Counter:
    def __init__(self) -> None:
        self.calls = 0

    def around(self, made: type[nn.Module]) -> Any:
        inner: Any = made._forward  # type: ignore[attr-defined]

        def counted(layer: nn.Module, *args: Any) -> Any:
            self.calls += 1
            return inner(layer, *args)

        return counted


def _bare_copy(layer: _BatchNorm) -> _BatchNorm:
    """A float32 copy on the CPU, without hooks."""
    twin = copy.copy(layer)
    twin.__dict__ = dict(layer.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = type(layer.__dict__[name])()
    return copy.deepcopy(twin).to("cpu").float()
