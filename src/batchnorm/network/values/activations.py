"""Activations and other nonlinearities: modules and functions, and the names that an engine knows."""

from __future__ import annotations

from typing import Any

from torch import nn

# name of the activation in kernels/contract.py, by exact module class
_ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
}


_NONLINEAR_MODULES = (
    *_ACTIVATION_MODULES,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GLU,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Tanhshrink,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.Softplus,
    nn.Softsign,
    nn.Threshold,
)


_NONLINEAR_FUNCTIONS = frozenset(
    [
        "relu",
        "relu6",
        "leaky_relu",
        "silu",
        "hardswish",
        "sigmoid",
        "tanh",
        "gelu",
        "elu",
        "celu",
        "selu",
        "glu",
        "hardtanh",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "logsigmoid",
        "log_sigmoid",
        "log_sigmoid_forward",
        "mish",
        "prelu",
        "_prelu_kernel",
        "rrelu",
        "rrelu_with_noise",
        "softplus",
        "softsign",
        "threshold",
        "clamp",
        "clamp_min",
        "clip",
        "sin",
    ]
)


def activation_name(module: nn.Module | None, function: str, arguments: dict[str, Any]) -> str | None:
    """Name of an activation in the kernels' contract, when it is exactly one of those.

    Parameters
    ----------
    module : torch.nn.Module or None
        The activation module; None for a function.
    function : str
        Canonical name of the function, when it is one.
    arguments : dict
        Its scalar arguments by name (``negative_slope``, ``approximate``, ``min_val``, ``max_val``).

    Returns
    -------
    str or None
        ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"hardswish"``, ``"sigmoid"``,
        ``"tanh"``, ``"gelu"`` (erf); None for everything else.
    """
    if module is not None:
        name = _ACTIVATION_MODULES.get(type(module))
        if type(module) is nn.Hardtanh and (module.min_val, module.max_val) == (0.0, 6.0):
            name = "relu6"
        given = {"negative_slope": getattr(module, "negative_slope", 0.01)}
        given["approximate"] = getattr(module, "approximate", "none")
    else:
        name = function if function in _ACTIVATION_MODULES.values() else None
        given = {"negative_slope": 0.01, "approximate": "none", **arguments}
        if function in ("hardtanh", "clamp", "clip"):
            low = arguments.get("min_val", arguments.get("min", -1.0))
            high = arguments.get("max_val", arguments.get("max", 1.0))
            name = "relu6" if (low, high) == (0, 6) else None
    if name == "leaky_relu" and given["negative_slope"] != 0.01:
        return None
    if name == "gelu" and given["approximate"] != "none":
        return None
    return name


def is_nonlinear(module: nn.Module | None, function: str) -> bool:
    """Whether a step is an elementwise nonlinearity (or a gate such as GLU).

    Parameters
    ----------
    module : torch.nn.Module or None
        The module called; None for a function.
    function : str
        Canonical name of the function, when it is one.

    Returns
    -------
    bool
        True for activations of every kind; False for softmax and pooling.
    """
    if module is not None:
        return isinstance(module, _NONLINEAR_MODULES)
    return function in _NONLINEAR_FUNCTIONS
