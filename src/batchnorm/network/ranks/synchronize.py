"""Pool the training statistics of every batch norm of a network over ranks, and take that back."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.distributed.groups import Names, initialised, names_of, timeout_of
from batchnorm.errors import ArgumentError
from batchnorm.modules import BatchNorm2d, Layer
from batchnorm.network.inputs import target
from batchnorm.network.layers.adopt import become_ours, become_torch, take_on
from batchnorm.network.layers.one_by_one import Impossible, one_by_one
from batchnorm.network.layers.subclasses import adopt_subclass
from batchnorm.network.model import Where, chooser, unwrapped
from batchnorm.network.record import Record, write_record
from batchnorm.network.undo import Undo, keep_modules

_TOOL = "synchronize"
_BEFORE = "_before_synchronize"
_NETWORK = "pooled_network"


class PooledBatchNorm(BatchNorm2d):
    __doc__ = """What a ``torch.nn.SyncBatchNorm`` becomes: of any number of axes, as that is."""
    _dimensions: tuple[int, ...] = (2, 3, 4, 5)  # type: ignore[assignment]


def synchronize(
    model: nn.Module, group: Any = None, *, where: Where = None, inplace: bool = True
) -> nn.Module:
    """Pool the training statistics of every batch norm over the ranks of a process group.

    Then the layers normalize with mean and variance of all ranks' values, weighted by how many each has (a
    rank may have none), and the gradients of the inputs are those of the sum of all ranks' losses. The
    gradients of gamma and beta stay local sums, as those of every other parameter, for
    ``DistributedDataParallel`` or FSDP to average. A step costs one message a layer and direction; eval,
    frozen layers, a group of one and a process without `torch.distributed` cost none.

    Every layer stays the same object, with its hooks, Parameters, buffers and shared places. Layers of torch
    and of classes derived from them become ours; `desynchronize` gives back what was there.

    Parameters
    ----------
    model : Module
        The network, before it is wrapped (``DistributedDataParallel``, ``fully_shard``) or after. Call it on
        every rank.
    group : None, str, ProcessGroup or DeviceMesh
        None or ``"world"``: all ranks, looked up when a batch comes, so that it may be called before
        ``init_process_group``. A mesh with two dimensions: pooled along the last, then along the first; fewer
        bytes for many ranks. ``"own"``: all ranks, in a new process group that nothing else uses, so that no
        other collective is ever mistaken for one of these. A ``torch.nn.SyncBatchNorm`` keeps its own group
        under None.
    where : str or callable, optional
        Which layers: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy. ``batchnorm.record(model)`` names every layer, and those left alone with the reason.

    Raises
    ------
    ArgumentError
        A layer has a ``virtual_batch_size``; the group is none, or not one of this rank's. On any exception
        the model is as it was.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, for the statistics of a mini-batch; Chan, Golub and LeVeque 1983
    for their merge.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> batchnorm.synchronize(model)[1].process_group
    ('world',)
    >>> type(batchnorm.desynchronize(model)[1]) is torch.nn.BatchNorm2d
    True
    """
    model, chosen = target(model, _TOOL, inplace), chooser(where, _TOOL)
    names = _own_group() if isinstance(group, str) and group == "own" else names_of(group)
    named = unwrapped(model).named_modules()
    layers = [(path, m) for path, m in named if isinstance(m, _BatchNorm) and chosen(path, m)]
    for path, layer in layers:
        if getattr(layer, "virtual_batch_size", None) is not None:
            raise ArgumentError(
                f"synchronize: virtual_batch_size={layer.virtual_batch_size!r} normalizes parts of a batch apart.",
                why="it is the opposite wish, and ranks with batches of different sizes would cut different parts.",
                mend="set virtual_batch_size=None; or leave this model unsynchronized.",
                at=path,
            )

    number = _number(layers, names)

    def change(path: str, layer: nn.Module, undo: Undo) -> str:
        told = f"pools over {', '.join(_synchronize(path, layer, names, group is None))}"
        layer.__dict__[_NETWORK] = number
        return told

    return one_by_one(model, layers, change, _TOOL, "synchronized")


def desynchronize(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Undo `synchronize`: every layer has its class and group from before, and keeps what it has learned.

    Parameters
    ----------
    model : Module
        The network.
    inplace : bool, default True
        False leaves the given network as it is, and changes a copy.

    Returns
    -------
    Module
        ``model``, or its copy. ``batchnorm.record(model)`` names every layer; one with an option that its class
        of before does not have stays ours, without pooling.

    Raises
    ------
    ArgumentError
        ``model`` is no network.

    Examples
    --------
    >>> import torch, batchnorm
    >>> model = batchnorm.synchronize(torch.nn.Sequential(torch.nn.SyncBatchNorm(4)))
    >>> type(batchnorm.desynchronize(model)[0]).__name__
    'SyncBatchNorm'
    """
    model = target(model, "desynchronize", inplace)
    told, undo = Record(tool="desynchronize"), Undo()
    with undo, undo:
        keep_modules(undo, list(model.modules()))
        for path, layer in unwrapped(model).named_modules():
            if isinstance(layer, Layer) and layer.process_group is not None:
                kind = type(layer).__name__
                reason = _desynchronize(layer)
                why = f"stays ours: {reason}" if reason else ""
                told.add(path, kind, "desynchronized", type(layer).__name__, why)
            elif isinstance(layer, nn.SyncBatchNorm):
                why = "torch's own: convert(model, 'batchnorm') makes it one that does not pool"
                told.leave(path, type(layer).__name__, why)
        return write_record(model, told)


# which network of its kind a network is, kept beside its first layer: twice synchronized it is no other
_numbers: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()
_kinds: Counter[tuple[Any, ...]] = Counter()


def _number(layers: list[tuple[str, Any]], names: Names) -> int:
    """What tells a network from those that have layers of the same names and sizes in the same groups.

    It is the order in which this process synchronized them, which is the same on every rank that runs the same
    code. Without it one network's numbers would be taken for another's where ranks call them in another order.
    """
    if not layers:
        return 1
    kind = names, tuple((path, layer.num_features) for path, layer in layers)
    known = _numbers.setdefault(layers[0][1], {})
    if kind not in known:
        _kinds[kind] += 1
        known[kind] = _kinds[kind]
    return known[kind]


def _own_group() -> Names:
    if not initialised():
        raise ArgumentError(
            'synchronize: group="own" makes a process group, and torch.distributed is not initialised.',
            why="every rank has to take part when a group is made.",
            mend="init_process_group() first; or group=None, which is looked up when it is used.",
        )
    # a new group would have torch's timeout, not that of the job
    return names_of(dist.new_group(timeout=datetime.timedelta(seconds=timeout_of(dist.group.WORLD))))


def _synchronize(path: str, layer: Any, names: Names, by_default: bool) -> Names:
    before: dict[str, Any] = layer.__dict__.get(_BEFORE, {})
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise Impossible("lazy: it has no channels before its first batch; run one, then synchronize")
    if isinstance(layer, Layer):
        before = before or {"group": layer.process_group, "path": layer.pooled_as, "class": None}
        if by_default and before.get("group") is not None and _BEFORE not in layer.__dict__:
            names = before["group"]
    elif isinstance(layer, nn.SyncBatchNorm):
        if type(layer) is not nn.SyncBatchNorm or "forward" in layer.__dict__:
            raise Impossible(
                f"its class {type(layer).__name__} does more than batch norm, which would be lost"
            )
        own = layer.__dict__.pop("process_group")
        before = {"class": nn.SyncBatchNorm, "group": None, "path": "", "own": own}
        if by_default and own is not None:
            names = names_of(own)
        take_on(layer, PooledBatchNorm)
    else:
        before = {"class": type(layer), "group": None, "path": ""}
        reason = become_ours(layer)
        if reason and adopt_subclass(layer):
            raise Impossible(reason)
    layer.__dict__[_BEFORE] = before
    layer.process_group, layer.pooled_as = names, path or type(layer).__name__
    return names


def _desynchronize(layer: Any) -> str:
    before = layer.__dict__.pop(_BEFORE, {"group": None, "path": "", "class": None})
    layer.process_group, layer.pooled_as = before["group"], before["path"]
    layer.__dict__.pop(_NETWORK, None)
    if before["class"] is None:
        return ""
    if before["class"] is not nn.SyncBatchNorm:
        return become_torch(layer)
    layer.__class__ = BatchNorm2d
    reason = become_torch(layer)
    if reason:
        layer.__class__ = PooledBatchNorm
        return reason
    layer.__class__ = nn.SyncBatchNorm
    layer.process_group = before["own"]
    return ""


__all__ = ["PooledBatchNorm", "desynchronize", "synchronize"]
