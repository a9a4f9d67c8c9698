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
    "domain",
]
