"""A batch norm that never moves, as detection libraries have it: four buffers, no parameter, no mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.ecosystem.registration import announce
from batchnorm.functional import batch_norm


class FrozenBatchNorm(nn.Module):
    """Normalize with fixed statistics and fixed gamma and beta, in training as in eval.

    The state dict has the keys of the ``FrozenBatchNorm2d`` of detection libraries, both ways; a
    ``num_batches_tracked`` in what is loaded is passed over.

    Parameters
    ----------
    num_features : int
        Number of channels C.
    eps : float, default 1e-5
        Added to the variance [z]**2.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.network.layers.frozen import FrozenBatchNorm
    >>> sorted(FrozenBatchNorm(3).state_dict())
    ['bias', 'running_mean', 'running_var', 'weight']
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``.

        Parameters
        ----------
        input : Tensor, shape (N, C, *S)
            Pre-activations z.
        residual : Tensor, optional
            Added before the activation.

        Returns
        -------
        Tensor
            Of the shape of ``input``.
        """
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            # a layer of ours that was frozen keeps what it was built with
            activation=getattr(self, "activation", None),
            channel_dim=getattr(self, "channel_dim", 1),
        )

    def extra_repr(self) -> str:
        """Tell the number of channels and eps.

        Returns
        -------
        str
            As the constructor takes them.
        """
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


announce(FrozenBatchNorm)
