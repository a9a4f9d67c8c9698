"""Layers that become other layers: kinds of norm, those of other frameworks, fixed ones."""

from batchnorm.network.layers.convert import convert
from batchnorm.network.layers.frozen import FrozenBatchNorm
from batchnorm.network.layers.keras_and_flax import load_flax, load_keras

__all__ = ["FrozenBatchNorm", "convert", "load_flax", "load_keras"]
