"""What follows a norm in the flow of values: an activation, with a sum in between or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from batchnorm.network.values.activations import ACTIVATIONS, activation_name
from batchnorm.network.values.find import Flow, Unproven
from batchnorm.network.values.values import Call


@dataclass(eq=False)
class NormChain:
    """What follows a batch norm, the same in every call of it.

    Parameters
    ----------
    norm : torch.nn.Module
        The batch norm.
    path : str
        Its path.
    activation : str or None
        Name in the kernels' contract of the activation that alone reads the norm's output, or that alone
        reads the sum; None when there is none.
    with_sum : bool
        Whether a sum with another value stands between norm and activation.
    calls : list of tuple
        ``(norm call, sum call or None, activation call or None)``, one for each call of the norm.
    reason : str
        Why there is no activation.
    """

    norm: nn.Module
    path: str
    activation: str | None = None
    with_sum: bool = False
    calls: list[tuple[Call, Call | None, Call | None]] = field(default_factory=list)
    reason: str = ""


def activation_of(call: Call) -> str | None:
    if call.module is not None:
        return activation_name(call.module)
    if call.op == "hardtanh":
        return "relu6" if tuple(call.args[1:3]) == (0.0, 6.0) else None
    if call.op == "leaky_relu" and call.args[1:2] != (0.01,) and len(call.args) > 1:
        return None
    return call.op if call.op in ACTIVATIONS and not call.kwargs else None


def next_call(flow: Flow, call: Call) -> Call:
    """The one call that reads the output of a call, past Identity and dropout in eval mode."""
    reader = flow.sole_reader(call.output)
    while reader.passes_on:
        reader = flow.sole_reader(reader.output)
    return reader


def chain_after(flow: Flow, norm: nn.Module) -> NormChain:
    """Find ``norm -> activation`` or ``norm -> sum -> activation``.

    Parameters
    ----------
    flow : Flow
        From :func:`find_flow`, for the modes in which the chain must hold.
    norm : torch.nn.Module
        A batch norm of the model.

    Returns
    -------
    NormChain
        With the activation, or the reason why there is none.
    """
    chain = NormChain(norm, flow.path(norm))
    try:
        kinds = set()
        for call in flow.calls(norm):
            reader, total = next_call(flow, call), None
            if reader.is_sum:
                total, reader = reader, next_call(flow, reader)
            if activation_of(reader) is None:
                raise Unproven(f"followed by {reader.op} {reader.path}".strip())
            kinds.add((total is not None, activation_of(reader)))
            chain.calls.append((call, total, reader))
        if len(kinds) > 1:
            raise Unproven("its calls are followed by different things")
        chain.with_sum, chain.activation = kinds.pop()
    except Unproven as why:
        return NormChain(norm, chain.path, reason=str(why))
    return chain
