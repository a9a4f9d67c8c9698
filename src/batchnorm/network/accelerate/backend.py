"""The TorchDynamo backend ``batchnorm``: graphs as torch runs them, their norms called with what follows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch._dynamo
from torch import Tensor, fx, nn

from batchnorm.compiling import MARK
from batchnorm.functional import infer_step, train_step
from batchnorm.network.accelerate.fuse import fuse
from batchnorm.network.accelerate.rows import Graph, first_line

torch._dynamo.allow_in_graph([train_step, infer_step])


def batchnorm(module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph; what ``torch.compile(model, backend="batchnorm")`` calls.

    Parameters
    ----------
    module : torch.fx.GraphModule
        What Dynamo made of a piece of Python.
    example_inputs : list
        Its inputs.

    Returns
    -------
    callable
        Takes and returns what the graph does.
    """
    return compile_graph(module, example_inputs, ())[0]


setattr(batchnorm, MARK, True)


def compile_graph(
    module: fx.GraphModule, example_inputs: list[Any], models: Iterable[nn.Module]
) -> tuple[Callable[..., Any], Graph]:
    """Compile a graph, and say what became of its norms.

    Parameters
    ----------
    module, example_inputs
        As for :func:`batchnorm`.
    models : iterable of Module
        Where the graph may come from, to tell a norm's path.

    Returns
    -------
    run : callable
        Takes and returns what the graph does.
    told : Graph
        Its norms.
    """
    written = module.forward
    end = getattr(module, "compile_subgraph_reason", None)
    ended = "" if end is None or not end.graph_break else first_line(str(end.reason))
    try:
        rewritten = fx.GraphModule(module, copy.deepcopy(module.graph))
        found = fuse(rewritten, _places(module, example_inputs, models))
    except Exception as error:  # a speed-up must not cost the answer
        warnings.warn(
            f"accelerate: a graph runs as it was written, without our calls: {type(error).__name__}: {error}. "
            f"Please report the model.",
            stacklevel=2,
        )
        return written, Graph([], 0, ended, f"it could not be rewritten: {error}")
    calls = sum(node.op in ("call_function", "call_method", "call_module") for node in module.graph.nodes)
    return rewritten.forward, Graph(found, calls, ended)


def _places(
    module: fx.GraphModule, example_inputs: list[Any], models: Iterable[nn.Module]
) -> dict[str, tuple[str, str]]:
    """Path and class of the module that owns each Parameter or buffer among a graph's inputs."""
    owners = {
        id(tensor): (path, type(owner).__name__)
        for model in models
        for path, owner in model.named_modules()
        for table in (owner._parameters, owner._buffers)
        for tensor in table.values()
        if tensor is not None
    }
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    return {
        node.name: owners[id(tensor)]
        for node, tensor in zip(inputs, example_inputs, strict=False)
        if isinstance(tensor, Tensor) and id(tensor) in owners
    }
