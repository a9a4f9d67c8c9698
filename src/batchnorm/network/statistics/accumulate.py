"""One step of the running statistics for a window of micro-batches."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError
from batchnorm.micro_batches import Accumulator
from batchnorm.modules import Layer
from batchnorm.network.model import check_model
from batchnorm.network.undo import Undo, keep_values


class accumulate:
    """Pool the statistics of the micro-batches inside a ``with`` block and commit them once, at its end.

    With gradient accumulation the running statistics would take a step for every micro-batch. Inside this
    block they take one: count, mean and variance of all micro-batches are merged (Chan), the spread between
    them included, as though they had been one batch, and move the running statistics when the block ends.
    An exception inside leaves the statistics as they were.

    What it does not do: **each micro-batch is still normalized with its own statistics**, in the forward
    and so in the gradient. Only a larger batch, or pooling over ranks, changes that.

    Parameters
    ----------
    model : Module
        A network with batch norms of this package, or one such layer.

    Raises
    ------
    ArgumentError
        The model has no batch norm of this package, or is inside another ``accumulate`` already.

    Examples
    --------
    >>> import torch, batchnorm
    >>> layer = batchnorm.BatchNorm1d(1, momentum=1.0)
    >>> with batchnorm.accumulate(layer):
    ...     _ = layer(torch.tensor([[0.0], [2.0]]))
    ...     _ = layer(torch.tensor([[4.0], [6.0]]))
    >>> layer.running_mean, int(layer.num_batches_tracked)
    (tensor([3.]), 1)
    """

    def __init__(self, model: nn.Module) -> None:
        check_model(model, "accumulate")
        self._layers = {path: module for path, module in model.named_modules() if isinstance(module, Layer)}
        self._end = Undo(always=True)
        self._end.add(self._close)
        if not self._layers:
            raise ArgumentError(
                f"accumulate: {type(model).__name__} has no batch norm of this package.",
                why="the statistics of torch.nn's layers move inside their own kernel, a step each time.",
                mend='batchnorm.convert(model, "batchnorm") first: it makes them ours and keeps their parameters.',
            )

    def __enter__(self) -> accumulate:
        for path, layer in self._layers.items():
            if layer.accumulator is not None:
                raise ArgumentError(
                    "accumulate: this layer is inside another accumulate block.",
                    why="two windows would each commit the same batches.",
                    mend="use one block a step.",
                    at=path,
                )
        self._gradients = torch.is_grad_enabled()
        begun = Undo()
        with begun, begun:
            begun.add(self._close)
            for layer in self._layers.values():
                layer.accumulator = Accumulator(layer.populations())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._end, self._end:
            if kind is None:
                self._commit()
            else:  # Ctrl-C at the end of a no_grad block of a layer's forward left it in force
                torch.set_grad_enabled(self._gradients)

    def _commit(self) -> None:
        moved = [population for layer in self._layers.values() for population in layer.populations()]
        pools = [layer.accumulator for layer in self._layers.values()]
        undo = Undo()
        with undo, undo:
            undo.add(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
            keep_values(undo, [value for each in moved for value in each if isinstance(value, Tensor)])
            for pool in pools:
                if pool is not None:
                    pool.commit()
            self._close()

    def _close(self) -> None:
        for layer in self._layers.values():
            layer.accumulator = None
