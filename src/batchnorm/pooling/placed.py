"""Inputs that are spread over a device mesh: a DTensor is normalized shard by shard, and stays where it is.

Along a mesh dimension that shards the batch or space, statistics are pooled. Along one that shards the
channels each rank has its slice of gamma, beta and the statistics, and nothing is pooled. What a rank holds of
the activations never leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.distributed.calls import Call
from batchnorm.distributed.conversation import conversation
from batchnorm.distributed.groups import Names, find, names_of
from batchnorm.errors import ArgumentError
from batchnorm.layout import channel_axis
from batchnorm.pooling import is_placed
from batchnorm.pooling.graph import Pooling
from batchnorm.pooling.ranks import Settings
from batchnorm.population import Tracking


class _Plan(NamedTuple):
    """What each mesh dimension is to a batch norm: pooled over, a slice of the channels, or a copy."""

    mesh: Any
    placements: tuple[Any, ...]
    pooled: Names
    sliced: int | None
    vector: list[Any]
    gradient: list[Any]


def train_shards(
    run: Callable[..., Tensor],
    z: Any,
    vectors: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    masked_output: str,
    tracking: Any,
    population: Tracking | None,
    options: Any,
    between: Any,
) -> Tensor:
    """Train on this rank's shard, pooled with the others.

    Parameters
    ----------
    run : callable
        `batchnorm.functional.train`.
    z : DTensor
        Input.
    vectors : (gamma, beta)
        DTensors, or plain tensors that are the same on every rank.
    residual, mask, masked_output, tracking, population, options
        As for ``run``.
    between : Pooling or None
        Of a layer that pools over a group of its own besides.

    Returns
    -------
    DTensor
        With the placements of ``z``.
    """
    axis = channel_axis(z.dim(), options.channel_dim)
    plan = _plan(z, axis)
    path = "batch_norm" if between is None else between.path
    local, added, kept = z.to_local(), _as_input(residual, plan), _mask(mask, plan, axis, z.dim())
    pooling = Pooling(
        _levels(plan.pooled, between),
        path,
        local.shape[axis],
        str(local.dtype)[6:],
        "" if between is None else between.domain,
        options.on_single_value,
        options.on_nonfinite,
        mask is not None,
        Settings(options.eps, options.momentum) if between is None else between.settings,
    )
    buffers = None if population is None else Tracking(*(_slice(t, plan) for t in population))
    moved: Any = (
        Tracking(*(_slice(t, plan) for t in tracking)) if isinstance(tracking, Tracking) else tracking
    )
    if (
        plan.sliced is not None
        and tracking is not None
        and not (isinstance(tracking, Tracking) and _is_sliced(tracking))
    ):
        moved = _whole(run, tracking, plan, path, z.shape[axis])
    y = run(
        local,
        *(_vector(v, plan) for v in vectors),
        added,
        kept,
        masked_output,
        moved,
        buffers,
        options,
        pooling if pooling.groups else None,
    )
    return _placed(y, z, plan)


def infer_shards(
    run: Callable[..., Tensor],
    z: Any,
    statistics: tuple[Tensor, Tensor],
    vectors: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    mask: Tensor | None,
    masked_output: str,
    options: Any,
) -> Tensor:
    """Normalize this rank's shard with population statistics, without a message.

    Parameters
    ----------
    run : callable
        `batchnorm.functional.infer`.
    z : DTensor
        Input.
    statistics : (mean, var)
        DTensors, or plain tensors that are the same on every rank.
    vectors, residual, mask, masked_output, options
        As for `train_shards`.

    Returns
    -------
    DTensor
        With the placements of ``z``.
    """
    axis = channel_axis(z.dim(), options.channel_dim)
    plan = _plan(z, axis)
    mean, var = (_slice(t, plan) for t in statistics)
    gamma, beta = (_vector(v, plan) for v in vectors)
    kept = _mask(mask, plan, axis, z.dim())
    y = run(z.to_local(), mean, var, gamma, beta, _as_input(residual, plan), kept, masked_output, options)
    return _placed(y, z, plan)


def _placed(y: Tensor, z: Any, plan: _Plan) -> Tensor:
    return type(z).from_local(
        y, plan.mesh, plan.placements, run_check=False, shape=z.shape, stride=z.stride()
    )


def _plan(z: Any, axis: int) -> _Plan:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, pooled, sliced = z.device_mesh, [], None
    vector: list[Any] = []
    gradient: list[Any] = []
    for i, placement in enumerate(z.placements):
        if type(placement) is Shard:
            across = placement.dim % z.dim() == axis
            vector.append(Shard(0) if across else Replicate())
            gradient.append(Shard(0) if across else Partial())
            if not across:
                pooled.append(i)
            elif sliced is None:
                sliced = i
            else:
                raise _unsupported(z, "shards the channels along two mesh dimensions")
        elif type(placement) is Replicate:
            vector.append(Replicate())
            gradient.append(Replicate())
        else:
            raise _unsupported(z, f"is placed as {placement}")
    # neighbours along the last dimension are nearest
    groups = tuple(name for i in reversed(pooled) for name in names_of(mesh.get_group(i)))
    return _Plan(mesh, z.placements, groups, sliced, vector, gradient)


def _unsupported(z: Any, what: str) -> ArgumentError:
    return ArgumentError(
        f"batch_norm: an input with placements {tuple(z.placements)} {what}.",
        why="a mean of parts of a sum is no mean of the values.",
        mend="input.redistribute(placements=...) to Shard or Replicate first.",
    )


def _levels(pooled: Names, between: Pooling | None) -> Names:
    if between is None or set(between.groups) <= set(pooled):
        return pooled
    import torch.distributed as dist

    met = {rank for name in pooled for rank in dist.get_process_group_ranks(find(name))}
    more = [name for name in between.groups if name not in pooled]
    for name in more:
        others = set(dist.get_process_group_ranks(find(name))) - {dist.get_rank()}
        if others & met:
            raise ArgumentError(
                "batch_norm: the ranks of the layer's process_group already share this input's mesh.",
                why="their values would be counted twice.",
                mend="a DTensor pools by itself: desynchronize(model), or give the group of the other ranks.",
            )
    return (*pooled, *more)


def _as_input(tensor: Any, plan: _Plan) -> Tensor | None:
    if tensor is None:
        return None
    if not is_placed(tensor):
        raise _must_be_placed("residual")
    return tensor.redistribute(plan.mesh, plan.placements).to_local()


def _mask(mask: Any, plan: _Plan, axis: int, ndim: int) -> Tensor | None:
    if mask is None:
        return None
    if not is_placed(mask):
        raise _must_be_placed("mask")
    from torch.distributed.tensor import Replicate, Shard

    short = mask.dim() == ndim - 1
    wanted: list[Any] = []
    for placement in plan.placements:
        if not isinstance(placement, Shard) or placement.dim % ndim == axis:
            wanted.append(Replicate())
            continue
        d = placement.dim % ndim
        d = d - 1 if short and d > axis else d
        # an axis of size 1 broadcasts against every shard
        wanted.append(Replicate() if mask.shape[d] == 1 else Shard(d))
    return mask.redistribute(plan.mesh, wanted).to_local()


def _must_be_placed(name: str) -> ArgumentError:
    return ArgumentError(
        f"batch_norm: the input is a DTensor and {name} is none.",
        why="it is not clear which part of it belongs to this rank's shard.",
        mend=f"distribute_tensor({name}, mesh, placements), or DTensor.from_local.",
    )


def _vector(vector: Any, plan: _Plan) -> Tensor | None:
    """This rank's slice of gamma or beta; its gradient is a part of a sum along the pooled dimensions."""
    if vector is None:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    if not is_placed(vector):
        vector = DTensor.from_local(vector, plan.mesh, [Replicate()] * plan.mesh.ndim, run_check=False)
    return vector.redistribute(plan.mesh, plan.vector).to_local(grad_placements=plan.gradient)


def _slice(given: Any, plan: _Plan) -> Any:
    """This rank's part of a buffer, which shares its memory."""
    if not isinstance(given, Tensor):
        return given
    tensor: Any = given
    with torch.no_grad():
        whole = not is_placed(tensor) or all(p.is_replicate() for p in tensor.placements)
        local = tensor.to_local() if is_placed(tensor) else tensor
        if plan.sliced is None or not whole or not local.dim():
            return local
        start, length = _bounds(len(local), plan)
        return local.narrow(0, start, length)


def _is_sliced(tracking: Tracking) -> bool:
    mean: Any = tracking.running_mean
    return is_placed(mean) and any(p.is_shard() for p in mean.placements)


def _bounds(channels: int, plan: _Plan) -> tuple[int, int]:
    size, at = plan.mesh.size(plan.sliced), plan.mesh.get_local_rank(plan.sliced)
    share = -(-channels // size)
    start = min(at * share, channels)
    return start, min(share, channels - start)


def _whole(run: Any, tracking: Any, plan: _Plan, path: str, channels: int) -> Any:
    """What moves statistics that every rank holds whole, though it has seen a slice of the channels."""
    group = plan.mesh.get_group(plan.sliced)
    share = -(-channels // group.size())
    if isinstance(tracking, Tracking):
        terms: Any = tracking
        whole: Any = Tracking(*(t.to_local() if is_placed(t) else t for t in terms))
    else:
        whole = tracking

    def sink(count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        from batchnorm.running_update import tell

        own = torch.zeros(2, share, dtype=torch.float64, device=mean.device)
        own[0, : len(mean)], own[1, : len(var)] = mean, var
        call = Call(path, "channels", channels, "float64")
        rows = conversation(group).rows(call, own.view(-1)).view(-1, 2, share)
        every = rows.transpose(0, 1).reshape(2, -1)[:, :channels].to(mean.dtype)
        if isinstance(whole, Tracking):
            tell(whole, [(count, every[0], every[1])], pooled=True)
        else:
            whole(count, every[0], every[1])

    return sink
