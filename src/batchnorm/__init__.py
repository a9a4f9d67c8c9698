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
    from batchnorm.network.accelerate.accelerate import accelerate, restore
    from batchnorm.network.fold.fold import fold
    from batchnorm.network.insert.insert import insert
    from batchnorm.network.layers.convert import convert
    from batchnorm.network.layers.frozen import FrozenBatchNorm
    from batchnorm.network.layers.keras_and_flax import load_flax, load_keras
    from batchnorm.network.normalized import Normalized
    from batchnorm.network.param_groups import param_groups
    from batchnorm.network.ranks.synchronize import desynchronize, synchronize
    from batchnorm.network.ranks.together import Joining, together
    from batchnorm.network.record import Record, record
    from batchnorm.network.statistics.accumulate import accumulate
    from batchnorm.network.statistics.adapt import adapt
    from batchnorm.network.statistics.calibrate import calibrate
    from batchnorm.network.statistics.freeze import freeze, unfreeze

__version__ = "0.1.0"

# a layer needs none of them: each is imported when it is first asked for
_ROOMS = {
    "accelerate.accelerate": ("accelerate", "restore"),
    "fold.fold": ("fold",),
    "param_groups": ("param_groups",),
    "insert.insert": ("insert",),
    "layers": ("FrozenBatchNorm", "convert", "load_flax", "load_keras"),
    "normalized": ("Normalized",),
    "ranks.synchronize": ("desynchronize", "synchronize"),
    "ranks.together": ("Joining", "together"),
    "record": ("Record", "record"),
    "statistics": ("accumulate", "adapt", "calibrate", "freeze", "unfreeze"),
}
_TOOLS = {tool: f"batchnorm.network.{room}" for room, tools in _ROOMS.items() for tool in tools}

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
