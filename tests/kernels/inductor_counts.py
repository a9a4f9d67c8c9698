"""What Inductor makes of a compiled module for a GPU, counted without one: bytes that its kernels move, and launches.

The module is traced on meta tensors, forward and backward apart, as Inductor is given them. The graphs are then said
to be a GPU's and lowered, up to the scheduler's fused nodes, each of which is one launch. All of that is private to
torch, so whoever counts asks for the version first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

GPU = torch.device("cuda", 0)


class Made(NamedTuple):
    """Of forward and backward together."""

    launches: int
    bytes: int


def count(module: nn.Module, *inputs: Tensor) -> Made:
    """Count for a training step of a module; it and its inputs are on meta."""
    from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[torch.fx.GraphModule, list]] = []

    def keep(graph: torch.fx.GraphModule, given: list) -> Callable:
        graphs.append((copy.deepcopy(graph), given))
        return make_boxed_func(graph)

    def backend(graph: torch.fx.GraphModule, given: list) -> Callable:
        return aot_module_simplified(
            graph, given, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(), keep_inference_input_mutations=True,
        )  # fmt: skip

    torch.compiler.reset()
    y = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    y.backward(torch.empty_like(y))
    assert len(graphs) == 2
    made = [_lowered(graph, given) for graph, given in graphs]
    return Made(sum(m.launches for m in made), sum(m.bytes for m in made))


def _lowered(graph: torch.fx.GraphModule, given: list[Any]) -> Made:
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    _said_to_be_a_gpus(graph)
    h100 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for name, answer in (
            ("torch._inductor.runtime.hints.DeviceProperties.create", h100),
            ("torch.cuda.get_device_properties", h100),
            ("torch._inductor.scheduler.has_triton", True),
            ("torch.cuda.is_available", True),
        ):
            stack.enter_context(mock.patch(name, return_value=answer))
        with mode:
            fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU) for t in given]
        stack.enter_context(V.set_fake_mode(mode))
        stack.enter_context(V.set_debug_handler(DebugContext()))
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fake)
        view_to_reshape(graph)
        post_grad_passes(graph, False)
        lowering = GraphLowering(graph)
        with V.set_graph_handler(lowering):
            lowering.run(*fake)
            lowering._update_scheduler()
            moved = lowering.count_bytes()[0]
        # naming what an operator gave is no launch
        launches = [
            node for node in lowering.scheduler.nodes
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(node.node, MultiOutput)
        ]  # fmt: skip
    return Made(len(launches), moved)


def _said_to_be_a_gpus(graph: torch.fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda leaf: GPU if isinstance(leaf, torch.device) else leaf
        )
    graph.recompile()
