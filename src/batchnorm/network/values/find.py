"""One finding of layers and of how values flow between them, for every tool that changes a network.

Evidence comes from runs (``observe``). A statement about a module holds when it holds in every view that
calls the module; what cannot be seen raises :class:`Unproven` with the reason, which the tools write into
their record.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from batchnorm.errors import BatchNormError, TraceError
from batchnorm.network.compare import tensors_in
from batchnorm.network.inputs import Forward, run
from batchnorm.network.made_up_inputs import guesses
from batchnorm.network.values.norms import is_batch_norm
from batchnorm.network.values.observe import run_once, watch
from batchnorm.network.values.values import Call, Value, View

_NO_INPUT = "no input could be made up for it; pass example="


class Unproven(Exception):
    """A statement about the flow of values can't be shown; the text is the reason for the record."""


@dataclass(eq=False)
class Flow:
    """How values flow through a network.

    Parameters
    ----------
    model : torch.nn.Module
        The network looked at; nothing in it was changed.
    views : list of View
        Every look at a part of it.
    example : object
        The input of the runs; None where none was found.
    why : str
        Why there are no views; empty where there are.
    """

    model: nn.Module
    views: list[View]
    example: Any = None
    why: str = ""
    _calls: dict[int, list[Call]] = field(default_factory=dict)
    _names: dict[int, list[str]] = field(default_factory=dict)
    _owners: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, module in self.model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
            for tensor in module._parameters.values():
                self._owners.setdefault(id(tensor), []).append(name)
        for view in self.views:
            for call in view.calls:
                if call.module is not None:
                    self._calls.setdefault(id(call.module), []).append(call)

    def path(self, module: nn.Module) -> str:
        """Path of a module in the model.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        str
            The first of its names.
        """
        return self._names[id(module)][0]

    def names(self, module: nn.Module) -> list[str]:
        """Every path under which a module is registered.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of str
            More than one for a module registered twice.
        """
        return self._names[id(module)]

    def calls(self, module: nn.Module) -> list[Call]:
        """Every call of a module, in every view.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of Call
            Never empty.

        Raises
        ------
        Unproven
            No view calls it, or it may be called where nobody looked.
        """
        calls = self._calls.get(id(module), [])
        if not calls:
            raise Unproven(self.why or "no call of it was seen")
        return calls

    def sole_reader(self, value: Value) -> Call:
        """The one call that reads a value.

        Parameters
        ----------
        value : Value
            Output of a call.

        Returns
        -------
        Call
            Its only consumer.

        Raises
        ------
        Unproven
            It is read by several, by none, or by somebody that was not seen.
        """
        if value.escape:
            raise Unproven(f"its output is {value.escape}")
        if len(value.consumers) != 1:
            readers = (
                ", ".join(dict.fromkeys(f"{c.op} {c.path}".strip() for c in value.consumers)) or "nothing"
            )
            raise Unproven(f"its output is used {len(value.consumers)} times: by {readers}")
        return value.consumers[0]

    def shared(self, module: nn.Module) -> str:
        """Whose are the parameters of a module besides its own.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        str
            ``"weight is shared with fc2"``; empty where they are its own.
        """
        for name, tensor in module._parameters.items():
            others = [
                p or "the model" for p in self._owners.get(id(tensor), []) if p not in self.names(module)
            ]
            if tensor is not None and others:
                return f"{name} is shared with {', '.join(others)}"
        return ""

    def readers_elsewhere(self, module: nn.Module) -> list[str]:
        """Who reads parameters or buffers of a module by name, other than the module when it is called.

        Parameters
        ----------
        module : torch.nn.Module
            A module of the model.

        Returns
        -------
        list of str
            Paths of the modules whose forward does; ``"(the model)"`` for the model's own.
        """
        tensors = [*module._parameters.values(), *module._buffers.values()]
        found: set[str] = set()
        for tensor in tensors:
            found.update(*(view.reads.get(id(tensor), ()) for view in self.views if tensor is not None))
        return sorted(path or "(the model)" for path in found)


def find_flow(
    model: nn.Module,
    example: Any = None,
    *,
    modes_needed: tuple[bool, ...] = (False,),
    forward: Forward = None,
    tool: str = "find_flow",
) -> Flow:
    """Find how values flow through a network, in runs on one input.

    Parameters
    ----------
    model : torch.nn.Module
        Any network; a copy that nobody else uses, for it gets hooks meanwhile. Modes, buffers, attributes
        and parts are put back.
    example : Tensor, tuple, mapping or None
        An input, as :func:`batchnorm.network.inputs.run` takes it. Without it inputs are made up from what
        the network says about itself; two of them are looked at, for their sizes differ.
    modes_needed : tuple of bool
        Training flags for which statements must hold: ``(False,)`` for inference, ``(False, True)`` for both.
        A mode in which the network fails is left out, but for the first one.
    forward : callable, optional
        ``forward(model, example)`` calls the network.
    tool : str
        Who asks, for the message.

    Returns
    -------
    Flow
        A view for each run. Arguments that are flags, or None unless given, are looked at both ways.

    Raises
    ------
    TraceError
        The network fails on the example.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.network.values.find import find_flow
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> flow = find_flow(net)
    >>> flow.sole_reader(flow.calls(net[0])[0].output).path
    '1'
    """
    state, call = torch.get_rng_state(), partial(run, tool=tool, forward=forward)
    try:
        if example is not None:
            return Flow(model, _views(model, example, modes_needed, call, first=True), example)
        found: list[Any] = []
        views: list[View] = []
        for guess in guesses(model):
            if len(found) == 2:
                break
            with suppress(Exception):
                # fake tensors may go where numbers do not, and the second input is there for its size alone
                views += _views(model, guess, modes_needed, call, first=not found, guessed=True)
                found.append(guess)
        return Flow(model, views, found[0] if found else None, "" if found else _NO_INPUT)
    except BatchNormError:
        raise
    except Exception as error:
        raise TraceError(
            f"{tool}: the network fails on the example: {type(error).__name__}: {error}",
            mend="give an input that the network takes in eval mode.",
        ) from error
    finally:
        torch.set_rng_state(state)


def _views(
    model: nn.Module,
    example: Any,
    modes_needed: tuple[bool, ...],
    call: Callable[..., Any],
    *,
    first: bool,
    guessed: bool = False,
) -> list[View]:
    for training in modes_needed if first else ():
        try:
            run_once(model, call, example, training)
        except Exception:  # of what was given, the run that is watched tells it
            if guessed and training is modes_needed[0]:
                raise
    views = watch(model, call, example, training=modes_needed[0])
    for training in modes_needed[1:]:
        with suppress(Exception):
            views += watch(model, call, example, training=training)
    turned = _turned(model, example) if first and call.keywords["forward"] is None else {}  # type: ignore[attr-defined]
    flags = {name: value for name, value in turned.items() if isinstance(value, bool)}
    tensors = {name: value for name, value in turned.items() if name not in flags}
    for named in [turned, flags, tensors] if flags and tensors else [turned] if turned else []:
        try:
            for training in modes_needed:
                views += watch(model, partial(call, **named), example, training=training)
        except Exception:
            continue  # a value that the network does not take
        if named is turned:
            break
    return views


def _turned(model: nn.Module, example: Any) -> dict[str, Any]:
    """Optional arguments with other than their defaults: flags turned round, tensors that are None given."""
    with suppress(TypeError, ValueError):
        first = next(tensors_in(example), None)
        found: dict[str, Any] = {}
        for p in inspect.signature(model.forward).parameters.values():
            if p.kind is p.POSITIONAL_ONLY or (isinstance(example, Mapping) and p.name in example):
                continue
            if isinstance(p.default, bool) or (p.default is None and "bool" in str(p.annotation)):
                found[p.name] = not p.default
            elif p.default is None and first is not None:
                found[p.name] = first.detach().clone()
        return found
    return {}


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every batch norm of a model with its path: torch's, ours, frozen lookalikes.

    Parameters
    ----------
    model : torch.nn.Module
        Any network.

    Returns
    -------
    list of tuple of str and torch.nn.Module
        Each module once, in the order of ``named_modules()``.
    """
    return [(path, m) for path, m in model.named_modules() if is_batch_norm(m)]
