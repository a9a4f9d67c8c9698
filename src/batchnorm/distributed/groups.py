"""Process groups by name.

A layer keeps the name of its group and no group: a name can be copied, pickled and loaded where no process
group is, and it is looked up when it is used, so that `torch.distributed` may be initialised later, or anew.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist

from batchnorm.errors import ArgumentError, PoolingError

WORLD = "world"
"""Stands for all ranks, whatever torch calls that group."""

Names = tuple[str, ...]
"""Groups to pool over one after the other: within a node, then between nodes. Most often one."""


def initialised() -> bool:
    """Whether this process belongs to a job of `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()


def names_of(group: Any) -> Names:
    """Give the names by which a layer keeps a group.

    Parameters
    ----------
    group : None, str, ProcessGroup, DeviceMesh, or a sequence of these
        None and ``"world"`` are all ranks. A mesh with several dimensions is pooled over one after the
        other, the last first: ranks of a node are neighbours along the last.

    Returns
    -------
    tuple of str
        One name for each group.

    Raises
    ------
    ArgumentError
        It is no group, or one that this rank is no member of.
    """
    if group is None:
        return (WORLD,)
    if isinstance(group, str):
        return (group,)
    if isinstance(group, (tuple, list)) and group:
        return tuple(name for part in group for name in names_of(part))
    if dist.is_available():
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ArgumentError(
                "process_group: this rank is no member of the group.",
                why="torch gives a placeholder to ranks outside a new group, and nobody would answer them.",
                mend="every rank makes every group, and passes the one that it belongs to.",
            )
        if isinstance(group, dist.ProcessGroup):
            whole = dist.is_initialized() and group is dist.group.WORLD
            return (WORLD if whole else group.group_name,)
        if hasattr(group, "get_all_groups"):
            return tuple(name for part in reversed(group.get_all_groups()) for name in names_of(part))
    raise ArgumentError(
        f"process_group: {group!r} is no process group.",
        why="statistics are pooled over the ranks of a group.",
        mend='None or "world" for all ranks, a ProcessGroup, the name of one, or a DeviceMesh.',
    )


def find(name: str) -> Any:
    """Give the group of a name.

    Parameters
    ----------
    name : str
        As `names_of` gave it.

    Returns
    -------
    ProcessGroup
        The group.

    Raises
    ------
    PoolingError
        There is no group of that name.
    """
    if name == WORLD:
        return dist.group.WORLD
    try:
        # what torch's own functional collectives look names up with
        return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except Exception as error:
        raise PoolingError(
            f"batch_norm: there is no process group named {name!r}.",
            why="the layer was synchronized over a group that this job has not made.",
            mend="make the group, then synchronize(model, group) again; or desynchronize(model).",
        ) from error


def members(names: Names) -> list[Any]:
    """Give the groups in which there is somebody to pool with.

    Parameters
    ----------
    names : tuple of str
        As `names_of` gave them.

    Returns
    -------
    list of ProcessGroup
        Those of more than one rank; empty where `torch.distributed` is not initialised.
    """
    if not initialised():
        return []
    return [group for group in map(find, names) if group.size() > 1]


def global_rank(group: Any, rank: int) -> int:
    """Give the rank in the job of a rank in a group.

    Parameters
    ----------
    group : ProcessGroup
        The group.
    rank : int
        Its place in the group.

    Returns
    -------
    int
        Its place among all ranks.
    """
    return dist.get_global_rank(group, rank)


def timeout_of(group: Any) -> float:
    """Give how long a group's messages wait.

    Parameters
    ----------
    group : ProcessGroup
        The group.

    Returns
    -------
    float
        In seconds; torch's default where the backend does not tell.
    """
    for device in group._device_types:
        with contextlib.suppress(
            RuntimeError, AttributeError
        ):  # no such backend here, or one without options
            return group._get_backend(device).options._timeout.total_seconds()
    return dist.distributed_c10d.default_pg_timeout.total_seconds()
