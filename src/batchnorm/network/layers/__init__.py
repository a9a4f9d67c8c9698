"""Layers that become other layers: kinds of norm, those of other frameworks, fixed ones."""

from batchnorm.network.layers.convert import convert
from batchnorm.network.layers.foreign import load_flax, load_keras
from batchnorm.network.layers.frozen import FrozenBatchNorm

__all__ = ["FrozenBatchNorm", "convert", "load_flax", "load_keras"]
