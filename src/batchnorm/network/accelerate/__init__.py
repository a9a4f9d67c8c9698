"""A network's batch norms, each called together with what follows it: a TorchDynamo backend, and its use in place.

``backend`` is what Dynamo calls with a graph; ``fuse`` rewrites it, by what ``patterns`` recognizes and ``effects``
allows; ``call`` is what stands in it then. ``inplace`` puts the compiled call in a model's place and steps aside
where somebody else is to see the model; ``verify`` compares; ``told`` says what became of each norm.
"""

from batchnorm.network.accelerate.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
