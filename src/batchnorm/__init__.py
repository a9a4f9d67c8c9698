"""Batch normalization for PyTorch that is right in every case, fast, and explained."""

from batchnorm.domain import domain
from batchnorm.errors import (
    ArgumentError,
    BatchNormError,
    DataError,
    DeviceError,
    DtypeError,
    MissingStatisticsError,
    NonFiniteError,
    ShapeError,
    TooFewValuesError,
    TraceError,
    VerificationError,
)
from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.network.accelerate import accelerate, restore
from batchnorm.network.accumulate import accumulate
from batchnorm.network.adapt import adapt
from batchnorm.network.calibrate import calibrate
from batchnorm.network.convert import convert
from batchnorm.network.fold import fold
from batchnorm.network.foreign import load_flax, load_keras
from batchnorm.network.freeze import freeze, unfreeze
from batchnorm.network.groups import param_groups
from batchnorm.network.insert import insert
from batchnorm.network.record import record

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "MissingStatisticsError",
    "NonFiniteError",
    "ShapeError",
    "TooFewValuesError",
    "TraceError",
    "VerificationError",
    "accelerate",
    "accumulate",
    "adapt",
    "calibrate",
    "convert",
    "domain",
    "fold",
    "freeze",
    "insert",
    "load_flax",
    "load_keras",
    "param_groups",
    "record",
    "restore",
    "unfreeze",
]
