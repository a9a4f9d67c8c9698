"""The executable definition of batch normalization: NumPy, float64, the paper's symbols, any layout.

Every engine is tested against these functions. They are written to be read, not to be fast.
"""

from batchnorm.reference.activations import activate, activate_derivative
from batchnorm.reference.backward import backward_inference, backward_training
from batchnorm.reference.fold import affine_of, fold_after, fold_before
from batchnorm.reference.forward import batch_statistics, forward_inference, forward_training, normalize
from batchnorm.reference.population import (
    blend,
    merge,
    moving_average,
    plain_average,
    unbiased,
)

__all__ = [
    "activate",
    "activate_derivative",
    "affine_of",
    "backward_inference",
    "backward_training",
    "batch_statistics",
    "blend",
    "fold_after",
    "fold_before",
    "forward_inference",
    "forward_training",
    "merge",
    "moving_average",
    "normalize",
    "plain_average",
    "unbiased",
]
