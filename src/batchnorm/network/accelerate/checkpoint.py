"""Activation checkpointing inside a graph, run as torch runs it outside of one.

Dynamo makes a checkpointed piece a graph of its own, whose inputs are all that it reads, buffers among them. Run as
it is, torch's checkpoint keeps those inputs, and refuses the backward where the piece changed one: a norm's counter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch._higher_order_ops.wrap import TagActivationCheckpoint, tag_activation_checkpoint
from torch.utils.checkpoint import checkpoint

from batchnorm.network.accelerate.effects import overlap, storages, written


def bodies(graph: fx.Graph, module: fx.GraphModule) -> dict[fx.Node, fx.GraphModule]:
    """Give the checkpointed pieces of a graph.

    Parameters
    ----------
    graph : torch.fx.Graph
        A graph of Dynamo.
    module : torch.fx.GraphModule
        That holds them.

    Returns
    -------
    dict
        Step to piece.
    """
    found = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target is tag_activation_checkpoint:
            name = node.args[0]
            if isinstance(name, fx.Node) and name.op == "get_attr":
                found[node] = module.get_submodule(str(name.target))
    return found  # type: ignore[return-value]


def replace(graph: fx.Graph, node: fx.Node, body: fx.GraphModule) -> None:
    """Let a step run torch's checkpoint, which never keeps what the piece changes.

    Parameters
    ----------
    graph : torch.fx.Graph
        Changed: the step is replaced.
    node : torch.fx.Node
        The step.
    body : torch.fx.GraphModule
        The piece.
    """
    steps = list(body.graph.nodes)
    changed = frozenset().union(*(written(step) for step in steps))
    inputs = [step for step in steps if step.op == "placeholder"]
    kept_out = frozenset(i for i, step in enumerate(inputs) if overlap(storages(step), changed))
    options, extra = TagActivationCheckpoint.divide_kwargs(dict(node.kwargs))
    if extra:
        return
    context = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        options["context_fn"] = context
    with graph.inserting_before(node):
        new = graph.call_function(_running(kept_out, options), node.args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _running(kept_out: frozenset[int], options: dict[str, Any]) -> Callable[..., Any]:
    def checkpointed(body: fx.GraphModule, *inputs: Any) -> Any:
        # as outside of a graph: Parameters and buffers are the function's own, and no arguments of it
        own = [i in kept_out or isinstance(value, nn.Parameter) for i, value in enumerate(inputs)]

        def run(*given: Any) -> Any:
            rest = iter(given)
            return body.forward(
                *(value if mine else next(rest) for mine, value in zip(own, inputs, strict=True))
            )

        return checkpoint(run, *(v for mine, v in zip(own, inputs, strict=True) if not mine), **options)

    return checkpointed
