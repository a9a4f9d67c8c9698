"""Batch norms taken into the layers beside them: ways, arithmetic, the channel axis, and the check."""

from batchnorm.network.fold.fold import fold

__all__ = ["fold"]
