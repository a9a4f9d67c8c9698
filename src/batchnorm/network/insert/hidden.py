"""Which layers of a network are hidden and not yet normalized, by where their output flows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from batchnorm.network.values import operations
from batchnorm.network.values.activations import NONLINEAR_MODULES
from batchnorm.network.values.find import Flow, Unproven
from batchnorm.network.values.modules import LAYERS
from batchnorm.network.values.norms import is_norm
from batchnorm.network.values.values import Call, Value

_THROUGH_MODULES = ("pooling", "padding", "upsampling", "pixelshuffle", "flatten", "dropout", "linear")


@dataclass
class Verdict:
    """Whether a layer gets a norm.

    Parameters
    ----------
    insert : bool
        True for a hidden layer that is not normalized yet.
    reason : str
        Why not; or, for one that is, what stands behind it.
    shape : tuple of int
        Shape of its output.
    calls : list of Call
        Its calls in the views of the whole model.
    """

    insert: bool
    reason: str
    shape: tuple[int, ...] = ()
    calls: list[Call] = field(default_factory=list)


def judge(flow: Flow, layer: nn.Module) -> Verdict:
    """Decide whether a layer is hidden and not normalized.

    Parameters
    ----------
    flow : Flow
        With at least one view of the whole model.
    layer : torch.nn.Module
        A layer of the model.

    Returns
    -------
    Verdict
        With the reason either way.
    """
    try:
        flow.calls(layer)
    except Unproven as why:
        return Verdict(False, str(why))
    shape: tuple[int, ...] = ()
    behind, called = "", []
    for view in flow.views:
        calls = [call for call in view.calls if call.module is layer]
        if len(calls) > 1:
            return Verdict(
                False, f"called {len(calls)} times in one pass: its calls would share their statistics"
            )
        for call in calls:
            called.append(call)
            shape = call.output.shape
            verdict = _judge_call(call)
            if not verdict.insert:
                return verdict
            behind = verdict.reason
    if not called:
        return Verdict(False, "no call of it was seen")
    return Verdict(True, behind, shape, called)


def _judge_call(call: Call) -> Verdict:
    if not _reaches_layer(call.output):
        return Verdict(False, "an output layer: no layer follows it (M6)")
    found: dict[str, str] = {}
    _collect(call.output, found, set())
    if "norm" in found:
        return Verdict(False, f"already normalized by {found['norm']}")
    if "escape" in found:
        return Verdict(False, f"an output layer: its result is {found['escape']}")
    if "nonlinear" in found:
        return Verdict(True, f"before {found['nonlinear']}")
    if "other" in found:
        return Verdict(False, f"no nonlinearity follows it, its output goes into {found['other']}")
    if "layer" in found:
        return Verdict(True, f"before {found['layer']}, with no nonlinearity in between")
    return Verdict(False, "its output is not used")


def _collect(value: Value, found: dict[str, str], seen: set[int]) -> None:
    """Kinds of the first calls that make something else of a value, with one name each."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if value.escape:
        found.setdefault("escape", value.escape)
    for call in value.consumers:
        kind = kind_of(call)
        if kind == "through":
            for out in call.outputs:
                _collect(out, found, seen)
        else:
            found.setdefault(kind, f"{call.op} {call.path}" if call.module is not None else call.op)


def kind_of(call: Call) -> str:
    """What a call does to pre-activations.

    Parameters
    ----------
    call : Call
        A call of any view.

    Returns
    -------
    str
        ``"norm"``, ``"nonlinear"``, ``"layer"``, ``"through"`` (pre-activations come out) or ``"other"``.
    """
    module = call.module
    if module is not None:
        if isinstance(module, NONLINEAR_MODULES):
            return "nonlinear"
        if is_norm(module):
            return "norm"
        if isinstance(module, LAYERS):
            return "layer"
        home = type(module).__module__
        passes = home.startswith("torch.nn.modules.") and home.rsplit(".", 1)[-1] in _THROUGH_MODULES
        return "through" if passes and not isinstance(module, nn.Bilinear) else "other"
    if call.op in operations.NONLINEAR:
        return "nonlinear"
    if call.op in operations.LAYERS:
        return "layer"
    if call.op in operations.NORMS:
        return "norm"
    return "through" if call.op in operations.THROUGH else "other"


def _reaches_layer(value: Value) -> bool:
    """Whether any layer, or anything that holds one, lies downstream."""
    waiting, seen = [value], {id(value)}
    while waiting:
        for call in waiting.pop().consumers:
            if kind_of(call) == "layer" or (call.module is not None and _holds_matrix(call.module)):
                return True
            for out in call.outputs:
                if id(out) not in seen:
                    seen.add(id(out))
                    waiting.append(out)
    return False


def _holds_matrix(module: nn.Module) -> bool:
    """Whether an opaque module has weights of its own: a recurrent layer, or a block that was not followed."""
    return any(p.dim() > 1 for p in module.parameters())


def ends_residual_branch(call: Call) -> bool:
    """Whether a call is the last layer of the longer of two ways that a sum brings together.

    Parameters
    ----------
    call : Call
        Of a layer, in a view of the whole model.

    Returns
    -------
    bool
        True for the last layer of a residual branch, False for a projection on the shortcut.
    """
    value = call.output
    while len(value.consumers) == 1 and not value.escape:
        reader = value.consumers[0]
        if reader.is_sum:
            other = next((v for v in reader.inputs if v is not value), None)
            return other is not None and _longer(value, other)
        if not reader.passes_on:
            return False
        value = reader.output
    return False


def _longer(branch: Value, shortcut: Value) -> bool:
    mine, theirs = _depths(branch), _depths(shortcut)
    common = [(mine[v] + theirs[v], mine[v] - theirs[v]) for v in mine if v in theirs]
    return bool(common) and min(common)[1] > 0


def _depths(value: Value) -> dict[Value, int]:
    """Fewest layers between a value and each value that it is made of."""
    depths = {value: 0}
    waiting = [value]
    while waiting:
        here = waiting.pop(0)
        if here.producer is None:
            continue
        step = depths[here] + (kind_of(here.producer) == "layer")
        for source in here.producer.inputs:
            if source not in depths or step < depths[source]:
                depths[source] = step
                waiting.append(source)
    return depths
