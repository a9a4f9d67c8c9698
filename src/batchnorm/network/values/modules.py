"""What a module is, for the flow of values: a layer, a norm, a leaf, a dropout."""

from __future__ import annotations

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


_STATISTICS = ("running_mean", "running_var")


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


def is_step(module: nn.Module) -> bool:
    """Whether a call of this module is one step of the flow, not looked into.

    Parameters
    ----------
    module : torch.nn.Module
        Any module.

    Returns
    -------
    bool
        True for layers, norms, and the childless modules of ``torch.nn``.
    """
    if is_layer(module) or is_norm(module):
        return True
    return not module._modules and type(module).__module__.startswith("torch.nn.modules")


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
