"""What a module is, for the flow of values: a layer, a leaf, a dropout."""

from __future__ import annotations

from torch import nn

from batchnorm.network.values.norms import is_norm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


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
