"""Statistics over ranks: what stands between the two halves of a step (`batchnorm.steps.Between`)."""

from batchnorm.pooling.ranks import Pooling, pools

__all__ = ["Pooling", "pools"]
