"""An existing network with our batch norms in it, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import VerificationError
from batchnorm.modules import Layer
from batchnorm.network.adopt import become_ours, become_torch, torch_base
from batchnorm.network.example import call_with
from batchnorm.network.fused import PLANS, Fused, fused_type, is_plain
from batchnorm.network.record import Record, write_record
from batchnorm.network.rewrite import Rewriting, Tail, rewrite

_TOOL = "accelerate"


def accelerate(model: nn.Module, example: Any = None) -> nn.Module:
    """Make the batch norms of a network ours, and call each together with what follows it.

    Every ``torch.nn.BatchNorm1d/2d/3d``, and every layer of a class derived from them, becomes ours: the same
    object with the same Parameters, buffers, hooks, name and training flag, under another class. An
    optimizer made before stays valid, and the state dict has the same keys.

    Where a forward hands a norm's output to an activation, to a sum, or to a sum and an activation, and to
    nothing else, the three become one call, for a functional ``F.relu`` or ``out += identity`` as well as
    for a module. The forward as it was written stays in place, and is taken whenever something looks in
    between or has changed: a hook on the norm or the activation, another module put in their place, an
    attribute that the forward reads with another value, a call with other arguments than the usual.

    The model is changed in place. :func:`restore` undoes it.

    Parameters
    ----------
    model : Module
        Any network, in any mode.
    example : Tensor, tuple, dict, or None
        An input: a tensor, positional arguments, or keyword arguments. With it the outputs and the
        gradients of the changed network are compared with those of the given one, in training and in eval
        mode, on copies, before it is handed back.

    Returns
    -------
    Module
        ``model``. ``batchnorm.record(model)`` tells what became of each norm, and which were left alone.

    Raises
    ------
    VerificationError
        With an example: the answers differ. The model is as it was given.

    Notes
    -----
    Ours differ from torch's where torch's are silently wrong: a batch with NaN or inf does not enter the
    running statistics, and half precision keeps float32 statistics and affine values.

    Left alone: ``SyncBatchNorm``, lazy layers before their first batch, and layers of derived classes whose
    forward gives something else than batch norm followed by the layer's own children.

    Examples
    --------
    >>> import torch, batchnorm
    >>> from batchnorm.network.accelerate import accelerate
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> isinstance(accelerate(model)[1], batchnorm.BatchNorm1d)
    True
    """
    original = copy.deepcopy(model) if example is not None else None
    told = Record()
    undo: list[Callable[[], object]] = []
    try:
        _unfuse(model, undo)
        _adopt_all(model, undo, told)
        _fuse_all(model, undo, told)
        if original is not None:
            _verify(original, model, example)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return write_record(model, told)


def restore(model: nn.Module) -> nn.Module:
    """Give every batch norm of ours in a network back to ``torch.nn``; undo :func:`accelerate`.

    Layers that were built as ours become torch's as well, when torch has a layer that computes the same.

    Parameters
    ----------
    model : Module
        Any network. Changed in place; Parameters, buffers, hooks and modes stay.

    Returns
    -------
    Module
        ``model``. ``batchnorm.record(model)`` names the layers that torch cannot express, which stay ours.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.network.accelerate import accelerate, restore
    >>> type(restore(accelerate(torch.nn.BatchNorm1d(4)))).__module__
    'torch.nn.modules.batchnorm'
    """
    told = Record()
    _unfuse(model, [])
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, Layer):
            continue
        kind = type(layer).__name__
        reason = become_torch(layer)
        if reason:
            told.leave(path, kind, reason, tool="restore")
        else:
            told.add(path, kind, "restored", type(layer).__module__, tool="restore")
    return write_record(model, told)


def _adopt_all(model: nn.Module, undo: list[Callable[[], object]], told: Record) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, Layer):
            reason = become_ours(layer)
            if reason:
                told.leave(path, type(layer).__name__, reason, tool=_TOOL)
            else:
                undo.append(lambda layer=layer: become_torch(layer))  # type: ignore[misc]


def _fuse_all(model: nn.Module, undo: list[Callable[[], object]], told: Record) -> None:
    paths = {id(m): path for path, m in model.named_modules()}
    fused: dict[int, str] = {}
    tails: dict[int, Tail] = {}
    refused: dict[str, str] = {}
    for module in _inside_out(model):
        if not _may_be_rewritten(module):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = rewrite(module, tails)
        if result.reason:
            refused[paths[id(module)]] = result.reason
        if result.tail is not None:
            tails[id(module)] = result.tail
        if result.sites or result.tail is not None:
            _install(module, result, undo)
        for path, what in result.sites.items():
            where = paths[id(module)] or "the model"
            fused[id(module.get_submodule(path))] = f"{what} in {where}"
    for path, layer in model.named_modules():
        if isinstance(layer, Layer):
            detail = fused.get(id(layer), "")
            if not detail and getattr(type(layer), "_then_children", False):
                detail = "with its own activation"
            above = [refused[p] for p in _above(path) if p in refused][:1]
            told.add(
                path,
                type(layer).__name__,
                "accelerated",
                detail,
                "" if detail else "; ".join(above),
                tool=_TOOL,
            )


def _install(module: nn.Module, result: Rewriting, undo: list[Callable[[], object]]) -> None:
    origin = type(module)

    def back() -> None:
        module.__class__ = origin
        module.__dict__.pop(PLANS, None)

    module.__dict__[PLANS] = tuple(result.plans)
    undo.append(back)
    if result.sites:
        module.__class__ = fused_type(origin)


def _unfuse(model: nn.Module, undo: list[Callable[[], object]]) -> None:
    for module in model.modules():
        plans = module.__dict__.pop(PLANS, None)
        kind: type[nn.Module] = type(module)

        def back(module: nn.Module = module, plans: Any = plans, kind: type[nn.Module] = kind) -> None:
            module.__class__ = kind
            if plans is not None:
                module.__dict__[PLANS] = plans

        if plans is not None:
            undo.append(back)
            if isinstance(module, Fused):
                module.__class__ = module._fused_from  # type: ignore[assignment]


def _inside_out(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, after those inside it."""
    seen: set[int] = set()
    waiting: list[tuple[nn.Module, bool]] = [(model, False)]
    while waiting:
        module, entered = waiting.pop()
        if entered:
            yield module
        elif id(module) not in seen:
            seen.add(id(module))
            waiting.append((module, True))
            waiting += [(child, False) for child in reversed(list(module.children()))]


def _may_be_rewritten(module: nn.Module) -> bool:
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict, _BatchNorm)):
        return False
    if "forward" in module.__dict__ or not module._modules or type(module).__call__ is not nn.Module.__call__:
        return False
    return any(is_plain(m) for m in module.modules())


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


# -- comparing -----------------------------------------------------------------------------------------------
def _verify(original: nn.Module, model: nn.Module, example: Any) -> None:
    changed = copy.deepcopy(model)
    for training in (True, False):
        wanted = _answers(original, example, training)
        given = _answers(changed, example, training)
        for name, expected in wanted.items():
            got = given.get(name)
            if got is None or got.shape != expected.shape or not _close(got, expected):
                raise VerificationError(
                    f"accelerate: {name} of the accelerated network differ from those of the given one in "
                    f"{'training' if training else 'eval'} mode.",
                    why="it would not compute what you gave.",
                    mend="the model is as it was; please report its architecture.",
                )


def _close(got: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    # the scale of the whole tensor: a value near zero is a difference of large ones
    loose = 1e-3 if got.dtype in (torch.float32, torch.float64) else 5e-2
    scale = expected.abs().nan_to_num(0, 0, 0).max().clamp(min=1e-6) if expected.numel() else 1.0
    return bool(((got - expected).abs() <= loose * scale).logical_or(got.isnan() & expected.isnan()).all())


def _answers(model: nn.Module, example: Any, training: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one pass, the random numbers the same every time."""
    model.train(training)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(), torch.set_grad_enabled(True):
        torch.manual_seed(0)
        outputs = list(_tensors(call_with(model, copy.deepcopy(example))))
        parts = [o.float().square().mean() for o in outputs if o.requires_grad and o.is_floating_point()]
        if parts:
            torch.stack(parts).sum().backward()
    found = {f"outputs[{i}]": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradients of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    persistent = set(model.state_dict())
    found |= {f"values of {n}": b.clone() for n, b in model.named_buffers() if n in persistent}
    return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict) or hasattr(tree, "values"):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _tensors(item)


__all__ = ["accelerate", "restore", "torch_base"]
