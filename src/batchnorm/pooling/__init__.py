"""Statistics over ranks: what stands between the two halves of a step (`batchnorm.steps.Between`)."""

from batchnorm.pooling.graph import Pooling
from batchnorm.pooling.ranks import pools, settings_of

__all__ = ["Pooling", "pools", "settings_of"]
