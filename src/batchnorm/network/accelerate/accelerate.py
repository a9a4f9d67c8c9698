"""A model compiled in place with our backend, and back."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.jit import ScriptModule

from batchnorm.network.accelerate.compiled import Accelerated, Compiled, compiled_for
from batchnorm.network.accelerate.rows import TOOL
from batchnorm.network.accelerate.verify import verify
from batchnorm.network.inputs import Forward, check_forward, copied
from batchnorm.network.model import check_model, unwrapped
from batchnorm.network.record import Record, forget_tool, write_record

_PLACE = "_compiled_call_impl"  # where torch.nn.Module.compile puts what a call runs


def accelerate(
    model: nn.Module,
    example: Any = None,
    *,
    forward: Forward = None,
    inplace: bool = True,
) -> nn.Module:
    """Make a network faster, and nothing else.

    The model is compiled in place, as ``Module.compile`` does it, with the TorchDynamo backend of this package:
    Dynamo follows the Python of the forward and guards what it rests on; in its graphs each batch norm, and the sum
    and activation behind it, become one call of our operator; the rest runs as it was written, by torch, at once
    and without a compiler. Layers stay what they are. Running statistics move as the layer's own rules say:
    torch's for torch's layers, ours for ours (`convert` with ``"batchnorm"`` makes them ours).

    Parameters
    ----------
    model : Module
        Any network, in any mode. Its call is replaced, nothing else of it is.
    example : Tensor, tuple, dict, or None
        An input, as for `fold`. With it, copies of the network and of the accelerated one are run in both modes,
        and outputs, gradients and statistics compared, before the model is handed back; and what was compiled for
        the copies serves it from the first call of each mode on.
    forward : callable, optional
        ``forward(model, example)`` calls the network, where ``model(example)`` is not how it takes one.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy. ``batchnorm.record`` of it, after a call, tells graphs, what became of each norm,
        and why.

    Raises
    ------
    ArgumentError
        ``model`` is no network.
    VerificationError
        With an example: the answers differ. The model is as it was given.

    Notes
    -----
    The first call of each mode compiles, which takes seconds in a deep network.

    Copies (``copy.deepcopy``, pickling, ``torch.save``) hold the plain network: accelerate them again. Tracers,
    exporters, an outer ``torch.compile``, and transformations such as ``torch.func`` are given the plain network.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> model = batchnorm.accelerate(model)
    >>> type(model[1]).__module__
    'torch.nn.modules.batchnorm'
    """
    check_model(model, TOOL)
    check_forward(forward, TOOL)
    model = model if inplace else copied(model)
    told = Record()
    reason = _why_not(model)
    if reason:
        told.leave("", type(model).__name__, reason, tool=TOOL)
        return write_record(model, told)
    restore(model)
    compiled = compiled_for(model)
    if example is not None:
        verify(model, example, lambda copy: _put(copy, compiled), forward)
    _put(model, compiled)
    told.add("", type(model).__name__, "accelerated", "its call; other methods run as written", tool=TOOL)
    return write_record(model, told)


def restore(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Take off what :func:`accelerate` put on; the model is as it was before.

    Parameters
    ----------
    model : Module
        Any network; its layers were never changed.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy. What stays as `freeze` or `convert` left it is named in ``batchnorm.record``
        of it: `unfreeze` is the way back. To give layers of ours back to ``torch.nn``:
        ``batchnorm.convert(model, "torch")``.

    Raises
    ------
    ArgumentError
        ``model`` is no network.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = torch.nn.BatchNorm1d(4)
    >>> vars(batchnorm.restore(batchnorm.accelerate(model))).get("_compiled_call_impl") is None
    True
    """
    check_model(model, "restore")
    model = model if inplace else copied(model)
    for module in model.modules():
        if isinstance(module.__dict__.get(_PLACE), Accelerated):
            del module.__dict__[_PLACE]
        forget_tool(module, TOOL)
    forget_tool(model, "restore")
    told = Record()
    for path, module in unwrapped(model).named_modules():
        if getattr(module, "frozen_statistics", False) or getattr(module, "frozen_affine", False):
            told.leave(path, type(module).__name__, "frozen: unfreeze(model) lets it move", tool="restore")
    return write_record(model, told) if told.rows else model


def _put(model: nn.Module, compiled: Compiled) -> nn.Module:
    object.__setattr__(model, _PLACE, Accelerated(model, compiled))
    return model


def _why_not(model: nn.Module) -> str:
    if isinstance(model, ScriptModule):
        return "it is TorchScript, in which Dynamo sees nothing: accelerate the network it was made from"
    present = getattr(model, _PLACE, None)
    if present is not None and not isinstance(present, Accelerated):
        return "it is compiled in place already, and that compiler decides"
    if hasattr(model, "_orig_mod") and hasattr(model, "dynamo_ctx"):
        return "it is compiled already, and that compiler decides"
    return ""
