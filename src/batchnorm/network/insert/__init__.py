"""Batch norms put into a network: which layers are hidden ones, and the change."""

from batchnorm.network.insert.insert import insert

__all__ = ["insert"]
