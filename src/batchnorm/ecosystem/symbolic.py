"""What ``torch.fx`` writes down of a layer: one step, and torch's own class for a quantizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from batchnorm.ecosystem.plain import why_not_plain
from batchnorm.errors import ArgumentError
from batchnorm.kernels.activations import activate

_QUANTIZERS = ("torch.ao.quantization", "torchao.quantization")


def one_step(layer: nn.Module, z: Any, residual: Any, mask: Any, masked_output: str) -> Any:
    """Record a call of a layer in the graph that is being traced.

    Parameters
    ----------
    layer : torch.nn.Module
        A batch norm of ours.
    z : torch.fx.Proxy
        Its input.
    residual, mask : torch.fx.Proxy or None
        As for the layer.
    masked_output : str
        As for the layer.

    Returns
    -------
    torch.fx.Proxy
        Its output.

    Raises
    ------
    ArgumentError
        A quantizer traces, and no layer of torch computes what this one does.
    """
    tracer, path = z.tracer, z.tracer.path_of_module(layer)
    if any(cls.__module__.startswith(_QUANTIZERS) for cls in type(tracer).__mro__):
        return _for_a_quantizer(layer, path, z, residual, mask)
    how = None if masked_output == "zero" else masked_output
    given = {"residual": residual, "mask": mask, "masked_output": how}
    given = {name: value for name, value in given.items() if value is not None}
    return tracer.create_proxy("call_module", path, (z,), given)


def _for_a_quantizer(layer: Any, path: str, z: Any, residual: Any, mask: Any) -> Any:
    # it fuses and quantizes torch's exact classes; an activation of its own is one more that it can fuse
    # in eval mode the statistics of every batch norm are frozen
    obstacle = why_not_plain(layer, but=("activation", *(() if layer.training else ("frozen_statistics",))))
    if mask is not None:
        obstacle = "it is called with a mask"
    if obstacle:
        raise ArgumentError(
            f"quantization: {type(layer).__name__} can't be traced as a layer of torch: {obstacle}.",
            why="a quantizer knows torch's layers alone, and would leave this one in floating point or change it.",
            mend="batchnorm.fold(model) before quantizing; or a layer without that option.",
            at=path,
        )
    y = z.tracer.create_proxy("call_module", f"{path}.as_torch" if path else "as_torch", (z,), {})
    y = y if residual is None else y + residual
    # as the quantizer's patterns have it
    return F.relu(y) if layer.activation == "relu" else activate(y, layer.activation)
