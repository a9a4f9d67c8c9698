"""What a module or a function is, for the flow of values: a layer, a norm, an activation, ..."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
OTHER_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STATISTICS = ("running_mean", "running_var")

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
# reads an argument's shape, dtype or device and none of its numbers
SHAPE_ONLY = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "is_cuda",
        "requires_grad",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "type",
        "is_contiguous",
        "is_floating_point",
        "element_size",
        "get_device",
        "zeros_like",
        "ones_like",
        "empty_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_empty",
        "new_full",
        "new_tensor",
        "__len__",
        "len",
        "sym_size",
    ]
)
# of these only the first argument's numbers are read
SHAPE_OF_SECOND = frozenset(["reshape_as", "view_as", "expand_as", "type_as", "resize_as"])
# may return a tensor that shares its storage with the first argument
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "reshape_as",
        "view_as",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "squeeze",
        "unsqueeze",
        "getitem",
        "__getitem__",
        "select",
        "slice",
        "narrow",
        "chunk",
        "split",
        "split_with_sizes",
        "unbind",
        "tensor_split",
        "expand",
        "expand_as",
        "contiguous",
        "to",
        "_to_copy",
        "float",
        "half",
        "bfloat16",
        "double",
        "type",
        "type_as",
        "swapaxes",
        "movedim",
        "moveaxis",
        "t",
        "T",
        "mT",
        "detach",
        "alias",
        "as_strided",
        "unfold",
        "diagonal",
        "real",
        "view_as_real",
        "identity",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
    ]
)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear map with a weight: Linear, Conv1d-3d or ConvTranspose1d-3d.

    Parameters
    ----------
    module : torch.nn.Module
        Any module. Subclasses count, lazy ones that have no weight yet do not.

    Returns
    -------
    bool
        True for a layer.
    """
    return isinstance(module, LAYERS) and not isinstance(module, nn.modules.lazy.LazyModuleMixin)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm: torch's, ours, or a frozen lookalike of another library.

    Parameters
    ----------
    module : torch.nn.Module
        Any module. A lookalike is a childless module with ``weight``, ``bias``, ``running_mean`` and
        ``running_var`` of one length, which is how the ``FrozenBatchNorm2d`` of detection libraries is made.

    Returns
    -------
    bool
        True for a batch norm.
    """
    if isinstance(module, _BatchNorm):
        return not isinstance(module, nn.modules.lazy.LazyModuleMixin)
    return is_frozen_lookalike(module)


def is_frozen_lookalike(module: nn.Module) -> bool:
    """Whether a module looks like the ``FrozenBatchNorm2d`` of detection libraries.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for a childless module that is none of torch's batch norms and has their four vectors.
    """
    if isinstance(module, _BatchNorm) or module._modules:
        return False
    tensors = {**module._buffers, **module._parameters}
    vectors = [tensors.get(name) for name in ("weight", "bias", *_STATISTICS)]
    return (
        all(v is not None and v.ndim == 1 for v in vectors)
        and len({v.shape for v in vectors if v is not None}) == 1
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: any batch norm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, ...

    Parameters
    ----------
    module : torch.nn.Module
        Any module. A class of another library counts when its name ends in ``Norm`` (with or without a
        number of axes behind it).

    Returns
    -------
    bool
        True for a norm.
    """
    name = type(module).__name__.rstrip("123456789dD")
    if is_batch_norm(module) or isinstance(module, OTHER_NORMS):
        return True
    # a module with children, such as a PreNorm, is a block and no norm
    return name.endswith("Norm") and not module._modules


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of this module is one step of the flow, not looked into.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for layers, batch norms, and the childless modules of ``torch.nn``.
    """
    # of an attention only the outside matters: no norm is in it, and its layers are read by name
    if is_layer(module) or is_batch_norm(module) or isinstance(module, (*OTHER_NORMS, nn.MultiheadAttention)):
        return True
    home = type(module).__module__
    if isinstance(module, _CONTAINERS):
        return False
    return home.startswith(("torch.nn.modules", "torch.ao.")) and not module._modules


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


def has_hooks(module: nn.Module) -> bool:
    """Whether forward or backward hooks are registered on a module.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True when somebody else sees, or may change, what goes in or comes out.
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is a dropout: passes its input on unchanged in eval mode, and only there.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for the dropouts of ``torch.nn``.
    """
    return isinstance(module, nn.modules.dropout._DropoutNd)
