"""Batch normalization for PyTorch that is right in every case, fast, and explained."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from batchnorm import functional
from batchnorm.domain import domain
from batchnorm.errors import (
    ArgumentError,
    BatchNormError,
    DataError,
    DeviceError,
    DtypeError,
    MissingStatisticsError,
    NonFiniteError,
    PoolingError,
    ShapeError,
    TooFewValuesError,
    TraceError,
    VerificationError,
)
from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:  # as below, for those who read types
    from batchnorm.network.accelerate import accelerate, restore
    from batchnorm.network.accumulate import accumulate
    from batchnorm.network.adapt import adapt
    from batchnorm.network.calibrate import calibrate
    from batchnorm.network.convert import convert
    from batchnorm.network.fold import fold
    from batchnorm.network.foreign import load_flax, load_keras
    from batchnorm.network.freeze import freeze, unfreeze
    from batchnorm.network.frozen import FrozenBatchNorm
    from batchnorm.network.groups import param_groups
    from batchnorm.network.insert import insert
    from batchnorm.network.normalized import Normalized
    from batchnorm.network.record import Record, record
    from batchnorm.network.synchronize import desynchronize, synchronize
    from batchnorm.network.together import Joining, together

__version__ = "0.1.0"

# a layer needs none of them: each is imported when it is first asked for
_TOOLS = {
    "FrozenBatchNorm": "batchnorm.network.frozen",
    "Joining": "batchnorm.network.together",
    "Normalized": "batchnorm.network.normalized",
    "Record": "batchnorm.network.record",
    "accelerate": "batchnorm.network.accelerate",
    "accumulate": "batchnorm.network.accumulate",
    "adapt": "batchnorm.network.adapt",
    "calibrate": "batchnorm.network.calibrate",
    "convert": "batchnorm.network.convert",
    "desynchronize": "batchnorm.network.synchronize",
    "fold": "batchnorm.network.fold",
    "freeze": "batchnorm.network.freeze",
    "insert": "batchnorm.network.insert",
    "load_flax": "batchnorm.network.foreign",
    "load_keras": "batchnorm.network.foreign",
    "param_groups": "batchnorm.network.groups",
    "record": "batchnorm.network.record",
    "restore": "batchnorm.network.accelerate",
    "synchronize": "batchnorm.network.synchronize",
    "together": "batchnorm.network.together",
    "unfreeze": "batchnorm.network.freeze",
}

__all__ = [
    "ArgumentError",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "DataError",
    "DeviceError",
    "DtypeError",
    "FrozenBatchNorm",
    "Joining",
    "MissingStatisticsError",
    "NonFiniteError",
    "Normalized",
    "PoolingError",
    "Record",
    "ShapeError",
    "TooFewValuesError",
    "TraceError",
    "VerificationError",
    "accelerate",
    "accumulate",
    "adapt",
    "calibrate",
    "convert",
    "desynchronize",
    "domain",
    "fold",
    "freeze",
    "functional",
    "insert",
    "load_flax",
    "load_keras",
    "param_groups",
    "record",
    "restore",
    "synchronize",
    "together",
    "unfreeze",
]


if not TYPE_CHECKING:  # else every name would pass for one that is here

    def __getattr__(name: str) -> Any:
        if name not in _TOOLS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        tool = getattr(import_module(_TOOLS[name]), name)
        globals()[name] = tool
        return tool


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
