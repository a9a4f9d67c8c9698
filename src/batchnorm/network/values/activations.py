"""Activations and other nonlinearities that are modules, and the names that an engine knows."""

from __future__ import annotations

from torch import nn

# by the name in kernels/contract.py
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


_OVER_SEVERAL = ("MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax")
NONLINEAR_MODULES: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name) for name in nn.modules.activation.__all__ if name not in _OVER_SEVERAL
)


def activation_name(module: nn.Module) -> str | None:
    """Name of an activation in the kernels' contract, when it is exactly one of those.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    str or None
        None where the engine has no kernel for it, with these settings.
    """
    if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0):
        return "relu6"
    name = next((name for name, kind in ACTIVATIONS.items() if type(module) is kind), None)
    settings = (getattr(module, "negative_slope", 0.01), getattr(module, "approximate", "none"))
    return name if settings == (0.01, "none") else None
