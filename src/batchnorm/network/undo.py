"""What puts a model back as it was, also where Ctrl-C comes while it is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

Step = Callable[[], Any]


class Undo:
    """Steps that are run in reverse when a ``with`` block ends: after an exception, or always.

    A step is added before the change that it undoes, and may run several times. Enter the same object
    twice, ``with undo, undo:``. An exception can come between any two instructions, that is, inside the
    first exit too; the second one then runs every step again. Don't end the block with a loop: what comes
    between a loop and the end of a block belongs to neither for Python.

    Parameters
    ----------
    always : bool, default False
        Run the steps when the block ends without an exception as well.

    Examples
    --------
    >>> from batchnorm.network.undo import Undo
    >>> undo, values = Undo(), [1]
    >>> try:
    ...     with undo, undo:
    ...         undo.add(lambda: values.__setitem__(0, 1))
    ...         values[0] = 2
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(values)
    [1]
    """

    def __init__(self, always: bool = False) -> None:
        self._always = always
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Take a step, before the change that it undoes.

        Parameters
        ----------
        step : callable
            Without arguments; running it twice is as running it once.
        """
        self._steps.append(step)

    def back(self) -> None:
        """Run every step, the latest first."""
        for step in reversed(self._steps):
            step()

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self._always:
            self.back()


def keep_modules(undo: Undo, modules: Iterable[nn.Module]) -> None:
    """Give modules their class, attributes, containers, hooks and parts back when undone; values are not copied.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    modules : iterable of torch.nn.Module
        What will be changed.
    """
    undo.add(partial(_put_back, [_looks(module) for module in modules]))


_Looks = tuple[nn.Module, type, dict[str, Any], list[tuple[Any, Any]]]


def _looks(module: nn.Module) -> _Looks:
    held = dict(module.__dict__)
    # put back as the objects they are: handles of hooks refer to torch's own tables
    tables = [(value, value.copy()) for value in held.values() if isinstance(value, (dict, set, list))]
    return module, type(module), held, tables


def _put_back(looks: list[_Looks]) -> None:
    for module, cls, held, tables in looks:
        module.__class__ = cls
        module.__dict__.clear()
        module.__dict__.update(held)
        for table, before in tables:
            table.clear()
            (table.extend if isinstance(table, list) else table.update)(before)


def keep_attribute(undo: Undo, module: nn.Module, name: str) -> None:
    """Give a module one attribute back, or take it away again, when it is undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    module : torch.nn.Module
        Any module.
    name : str
        A plain attribute: no Parameter, buffer or module.
    """
    held = module.__dict__
    undo.add(partial(held.__setitem__, name, held[name]) if name in held else partial(held.pop, name, None))


def set_modes(undo: Undo, model: nn.Module, training: bool | None) -> None:
    """Set every module's mode, to be undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    model : torch.nn.Module
        The flags are set directly: overridden ``train()`` methods are not called.
    training : bool or None
        The mode; None leaves every module as it is.
    """
    saved = [(module, module.training) for module in model.modules()]
    undo.add(partial(_set_flags, saved))
    if training is not None:
        _set_flags([(module, training) for module, _ in saved])


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, training in flags:
        module.training = training


def stop_gradients(undo: Undo) -> None:
    """Record no gradient, to be undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    """
    undo.add(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(False)


def hook_before(undo: Undo, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> None:
    """Call ``hook(module, args, kwargs)`` before each forward of a module, to be undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    module : torch.nn.Module
        Any module.
    hook : callable
        May return other arguments, as torch's own hooks.
    first : bool, default False
        Before the hooks that the module has.
    """
    undo.add(partial(_unhook, hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))
    module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True)


def hook_after(undo: Undo, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
    """Call ``hook(module, args, kwargs, output)`` after each forward of a module, to be undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    module : torch.nn.Module
        Any module.
    hook : callable
        May return another output, as torch's own hooks.
    always : bool, default False
        Also where the forward raises; the output is None then.
    """
    ends = ("", "_with_kwargs", "_always_called")
    undo.add(partial(_unhook, hook, *(module.__dict__[f"_forward_hooks{end}"] for end in ends)))
    module.register_forward_hook(hook, with_kwargs=True, always_call=always)


def _unhook(hook: Callable[..., Any], table: dict[int, Any], *others: dict[int, Any]) -> None:
    # found by what it is: an interrupt inside torch's registration leaves no handle
    for key in [key for key, held in list(table.items()) if held == hook]:
        for each in (*others, table):
            each.pop(key, None)


def keep_values(undo: Undo, tensors: list[torch.Tensor]) -> None:
    """Give tensors their present values back when it is undone.

    Parameters
    ----------
    undo : Undo
        Takes the step.
    tensors : list of Tensor
        Buffers or Parameters that will be written in place.
    """
    undo.add(partial(write_together, tensors, [tensor.detach().clone() for tensor in tensors]))


def write_together(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Write several tensors in place, in one call that no Ctrl-C comes into.

    Parameters
    ----------
    tensors, values : list of Tensor
        Where to, and what; a value is cast to the dtype and moved to the device of its tensor.
    """
    # without a switch of the gradient mode, which an interrupt would leave switched
    plain = [tensor.detach() for tensor in tensors]
    values = [value.detach().to(tensor) for tensor, value in zip(plain, values, strict=True)]
    if plain:
        torch._foreach_copy_(plain, values)
