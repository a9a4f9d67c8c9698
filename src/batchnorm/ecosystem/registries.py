"""What each library asks of a class, by the module that holds its registry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.ecosystem.plain import why_not_plain
from batchnorm.errors import ArgumentError

_UNFUSE = "build the layer without {name}, and write it behind the layer."


def _same_as_torch(table: str) -> Callable[[ModuleType, type], None]:
    """Enter a class with what a dictionary holds for the class of torch that it derives from."""

    def enter(library: ModuleType, cls: type) -> None:
        entries: Any = getattr(library, table, {})
        known = next((base for base in cls.__mro__[1:] if base in entries), None)
        if known is not None:
            entries.setdefault(cls, entries[known])

    return enter


def _opacus(library: ModuleType, cls: type) -> None:
    """Private training refuses a batch norm, and puts a group norm in its place when asked to."""

    def fix(module: nn.Module, **options: Any) -> nn.Module:
        obstacle = why_not_plain(module)
        if obstacle:
            raise ArgumentError(
                f"opacus: {type(module).__name__} can't be replaced: {obstacle}.",
                why="the group norm in its place would leave that out.",
                mend=_UNFUSE.format(name="it"),
            )
        return library.fix(module, **options)

    if issubclass(cls, nn.modules.batchnorm._BatchNorm):
        library.register_module_validator([cls])(library.validate)
        library.register_module_fixer([cls])(fix)


def _deep_lift(library: ModuleType, cls: type) -> None:
    """DeepLift's rule: the gradient of the norm itself, and for an activation in it what that activation has."""

    def rule(module: Any, inputs: Any, outputs: Any, grad_input: Any, grad_output: Any, eps: float) -> Any:
        if getattr(module, "activation", None) is None:
            return grad_input
        _check_one_input(module, inputs, outputs)
        return library.nonlinear(module, inputs, outputs, grad_input, grad_output, eps)

    library.SUPPORTED_NON_LINEAR.setdefault(cls, rule)


def _check_one_input(module: Any, z: Tensor, y: Tensor) -> None:
    # the rule divides by what one input changes; a residual changes the output too
    if not module.training:
        with torch.no_grad():
            alone = type(module).forward(module, z)
        if torch.allclose(alone, y, rtol=1e-4, atol=1e-5):
            return
    raise ArgumentError(
        f"DeepLift: {type(module).__name__} has activation={module.activation!r} inside, and "
        + ("normalizes by the batch." if module.training else "more than one input (a residual)."),
        why="the output does not change by that one input alone, as the rule for an activation has it.",
        mend="model.eval()." if module.training else _UNFUSE.format(name="activation="),
    )


def _layerwise_relevance(library: ModuleType, cls: type) -> None:
    """The rule that Captum has for torch's class; it would count an activation or a sum inside as linear."""
    entries = library.SUPPORTED_LAYERS_WITH_RULES
    known = next((base for base in cls.__mro__[1:] if base in entries), None)
    if known is None:
        return

    rule: Any = entries[known]

    class Rule(rule):
        def forward_hook(self, module: Any, inputs: Any, outputs: Any) -> Any:
            if getattr(module, "activation", None) is not None:
                raise ArgumentError(
                    f"LRP: {type(module).__name__} has activation={module.activation!r} inside.",
                    why="relevance passes through a norm and through an activation by different rules.",
                    mend=_UNFUSE.format(name="activation="),
                )
            return super().forward_hook(module, inputs, outputs)

    entries.setdefault(cls, Rule)


def _guided(library: ModuleType, cls: type) -> None:
    """Guided backpropagation and deconvolution find ``torch.nn.ReLU`` alone, and would take one inside for linear.

    There is no registry; what looks at each module is asked to refuse ours first.
    """
    base: Any = library.ModifiedReluGradientAttribution
    look = base._register_hooks
    if getattr(look, "refuses", None) is not None:
        return

    @functools.wraps(look)
    def refuse(attribution: Any, module: nn.Module, *rest: Any) -> Any:
        if getattr(module, "activation", None) == "relu" and hasattr(module, "running_mean"):
            raise ArgumentError(
                f"{type(attribution).__name__}: {type(module).__name__} has activation='relu' inside.",
                why="the gradient of a ReLU is replaced where it is a module of its own, and only there.",
                mend=_UNFUSE.format(name="activation="),
            )
        return look(attribution, module, *rest)

    refuse.refuses = cls  # type: ignore[attr-defined]
    base._register_hooks = refuse


REGISTRIES: dict[str, Callable[[ModuleType, type], None]] = {
    "opacus.validators.batch_norm": _opacus,
    "captum.attr._core.deep_lift": _deep_lift,
    "captum.attr._core.guided_backprop_deconvnet": _guided,
    "captum.attr._core.lrp": _layerwise_relevance,
    "thop.profile": _same_as_torch("register_hooks"),
    "ptflops.pytorch_ops": _same_as_torch("MODULES_MAPPING"),
    "torch_pruning.utils.op_counter": _same_as_torch("MODULES_MAPPING"),
}
