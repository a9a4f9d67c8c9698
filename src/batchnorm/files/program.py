"""An exported program as a network of modules, which the tools can change."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

_LAYERS: dict[str, Any] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_NORMS: dict[int, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def raised(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a network whose layers are modules, so that the tools can change them.

    Parameters
    ----------
    program : torch.export.ExportedProgram
        As ``torch.export`` makes it; not changed.

    Returns
    -------
    torch.fx.GraphModule
        Convolutions, linear maps and batch norms of the program are modules of ``torch.nn``, at the paths of
        their weights; everything else is as it was.
    """
    # the checks of sizes that a program brings are code made from text in the file
    options = (
        {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    )
    network = program.module(**options)
    for node in list(network.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name.removeprefix("aten::")
            bound = _bound(node)
            made, data = _module_for(network, name, bound)
            if made is not None:
                path = _at(bound["weight"] if bound.get("weight") is not None else bound["running_mean"])
                _call_module(network, node, path, made, data)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _bound(node: fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update({a.name: value for a, value in zip(schema, node.args, strict=False)})
    return {**given, **node.kwargs}


def _at(node: Any) -> str:
    return str(node.target).rpartition(".")[0]


def _module_for(network: fx.GraphModule, name: str, given: dict[str, Any]) -> tuple[nn.Module | None, Any]:
    """The module that computes what an operation does, and its input; None for any other."""

    names = ("weight", "bias", "running_mean", "running_var")
    vectors = {k: _tensor(network, given[k]) for k in names if k in given}
    if any(given.get(k) is not None and v is None for k, v in vectors.items()):
        return None, None
    weight, bias = vectors.get("weight"), vectors.get("bias")
    made: nn.Module
    if name == "linear" and weight is not None:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    elif name in _LAYERS and weight is not None and not isinstance(given["padding"], str):
        groups, sides = given["groups"], list(weight.shape[:2])
        sides[1] *= groups
        settings = ("stride", "padding", "dilation", "output_padding")
        made = _LAYERS[name](
            *(sides if name.startswith("conv_transpose") else sides[::-1]),
            tuple(weight.shape[2:]),
            groups=groups,
            bias=bias is not None,
            device="meta",
            **{key: _wide(given[key], weight) for key in settings if key in given},
        )
    elif name == "batch_norm" and vectors["running_mean"] is not None and not given["training"]:
        value = given["input"].meta.get("val")
        kind = _NORMS.get(value.ndim) if value is not None else None
        if kind is None:
            return None, None
        mean = vectors["running_mean"]
        made = kind(mean.numel(), given["eps"], given["momentum"], weight is not None, device="meta")
        made._buffers.update(running_mean=mean, running_var=vectors["running_var"])
        made.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    else:
        return None, None
    for key, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            made._parameters[key] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
            )
        else:
            made._parameters[key] = None
    return made.eval(), given["input"]


def _wide(value: Any, weight: Tensor) -> tuple[int, ...]:
    values = tuple(value)
    return values * (weight.ndim - 2) if len(values) == 1 else values


def _tensor(network: fx.GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    holder, _, name = str(node.target).rpartition(".")
    found = getattr(network.get_submodule(holder), name, None)
    return found if isinstance(found, Tensor) else None


def _call_module(network: fx.GraphModule, node: fx.Node, path: str, made: nn.Module, data: Any) -> None:
    parent, _, name = path.rpartition(".")
    holder = network.get_submodule(parent)
    before = holder._modules.get(name)
    if before is not None and type(before) is type(made) and repr(before) == repr(made):
        pass  # the same layer, called once more
    elif before is not None and type(before) is not nn.Module:
        return  # one weight under two operations: the second stays as it is
    else:
        for child, module in (before._modules if before is not None else {}).items():
            made.add_module(child, module)
        made.training = False
        setattr(holder, name, made)
    with network.graph.inserting_before(node):
        call = network.graph.call_module(path, (data,))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    network.graph.erase_node(node)
