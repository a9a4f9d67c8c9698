"""Subclasses of torch's batch norm with a forward of their own, such as a fused norm and activation.

What such a forward does is found by trial: it calls ``super().forward``, so that it may stay as it is over ours;
or it spells batch norm out, and then applies the layer's own children in order. A class is believed only if
outputs, gradients and statistics agree, in both modes and for every shape that it takes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.network.compare import Answers, compared, repeats
from batchnorm.network.inputs import copied
from batchnorm.network.layers.adopt import Adopted, ours_for, take_on, torch_base
from batchnorm.network.values.activations import activation_name
from batchnorm.network.values.modules import has_hooks
from batchnorm.network.values.norms import likeness

# a trial input: where the channels may be, in 2 to 5 axes
_TRIAL_SHAPES = ((6, 0), (6, 0, 5), (6, 5, 0), (6, 0, 3, 2), (6, 3, 2, 0), (6, 0, 2, 2, 2), (6, 2, 2, 2, 0))


class _NormThenChildren(Adopted):
    """Normalizes, then applies the layer's own children in order: a fused norm and activation."""

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
        name = activation_name(children[0]) if len(children) == 1 else None
        if name is not None and not hooked:
            return layer._forward(input, None, None, "zero", name)
        y = layer._forward(input, None, None, "zero")
        for child in layer._modules.values():
            if child is not None:
                y = child(y)
        return y


def adopt_subclass(layer: _BatchNorm) -> str:
    """Turn a layer whose class has a forward of its own into one over ours, in place.

    Parameters
    ----------
    layer : instance of a subclass of torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d
        Keeps its Parameters, buffers, hooks, children and attributes.

    Returns
    -------
    str
        Empty when done; otherwise the reason why the layer was left as it is.
    """
    cls = type(layer)
    base = torch_base(cls)
    if base is None or cls.forward is base.forward or "forward" in layer.__dict__:
        return f"its class {cls.__name__} is none with a forward of its own"
    reason, then_children = _understand(layer, cls)
    if not reason:
        take_on(layer, _class_for(cls, then_children))
    return reason


def _class_for(cls: Any, then_children: bool) -> type[nn.Module]:
    return ours_for(cls, _NormThenChildren if then_children else Adopted)


def _understand(layer: _BatchNorm, cls: type[nn.Module]) -> tuple[str, bool]:
    """Find by trial which of ours does what a forward of another library does: in both modes, to the digit.

    Two readings are tried on copies: the forward calls ``super().forward``, so that it may stay as it is;
    or it spells batch norm out, and then applies the layer's own children in order.
    """
    key = likeness(layer)
    if key in _UNDERSTOOD:
        return "", _UNDERSTOOD[key]
    for then_children in (False, True) if layer._modules else (False,):
        made = _class_for(cls, then_children)
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


def _same_on_trial(
    layer: _BatchNorm, made: type[nn.Module], shape: tuple[int, ...], training: bool
) -> bool | None:
    """Whether ours gives the same output, gradient and statistics; None where theirs refuses the shape."""
    theirs, ours = _bare_copy(layer), _bare_copy(layer)
    inner: Any = made._forward  # type: ignore[attr-defined]
    calls: list[nn.Module] = []

    def counted(layer: nn.Module, *args: Any) -> Any:
        calls.append(layer)
        return inner(layer, *args)

    take_on(ours, type("Trial", (made,), {"_forward": counted}))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn([n or layer.num_features for n in shape], generator=generator) * 2 + 0.5

    def ask(model: nn.Module, x: Tensor) -> Answers:
        model.train(training)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            entered = x.clone().requires_grad_()
            out = model(entered * 1)
            weights = torch.linspace(-1, 1, out.numel()).view_as(out)
            (gradient,) = torch.autograd.grad((out * weights).sum(), entered)
        return {"output": out.detach(), "gradient": gradient, **dict(model.named_buffers())}

    try:
        given = ask(copied(theirs), x)
    except Exception:  # a foreign forward may raise anything
        return None
    try:
        return bool(compared(given, ask(ours, x), repeats(theirs, x, ask)).right and calls)
    except Exception:
        return False


def _bare_copy(layer: _BatchNorm) -> _BatchNorm:
    """A float32 copy on the CPU, without hooks."""
    twin = copy.copy(layer)
    twin.__dict__ = dict(layer.__dict__)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = type(layer.__dict__[name])()
    return copy.deepcopy(twin).to("cpu").float()
