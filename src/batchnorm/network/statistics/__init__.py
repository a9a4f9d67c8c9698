"""Population statistics of a network: measured, adapted, accumulated, frozen."""

from batchnorm.network.statistics.accumulate import accumulate
from batchnorm.network.statistics.adapt import adapt
from batchnorm.network.statistics.calibrate import calibrate
from batchnorm.network.statistics.freeze import freeze, unfreeze

__all__ = ["accumulate", "adapt", "calibrate", "freeze", "unfreeze"]
