"""A plugin of Lightning's trainer; needs ``lightning`` (or ``pytorch_lightning``), and is imported when asked for.

::

    from batchnorm.lightning import PooledBatchNorm
    trainer = Trainer(strategy="ddp", plugins=[PooledBatchNorm()])
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from batchnorm.network.ranks.synchronize import desynchronize, synchronize

try:
    from lightning.pytorch.plugins import LayerSync
except ImportError:
    from pytorch_lightning.plugins import LayerSync  # type: ignore[assignment, unused-ignore]


class PooledBatchNorm(LayerSync):  # type: ignore[misc, unused-ignore]
    """Pool batch norms over ranks while the trainer runs, and give the model back as it was.

    Pass it without ``sync_batchnorm=True``: Lightning refuses both together.

    Parameters
    ----------
    group : None, str, ProcessGroup or DeviceMesh
        As for `batchnorm.synchronize`.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def apply(self, model: Module) -> Module:
        """Pool, when the strategy has set up its processes.

        Parameters
        ----------
        model : Module
            The trainer's.

        Returns
        -------
        Module
            ``model``.
        """
        return synchronize(model, self.group)

    def revert(self, model: Module) -> Module:
        """Give the layers back, at the end.

        Parameters
        ----------
        model : Module
            The trainer's.

        Returns
        -------
        Module
            ``model``.
        """
        return desynchronize(model)
