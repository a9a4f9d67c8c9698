"""Where our Triton kernels have been measured to win, and nothing else.

``measured.json`` beside this file has one row a measurement, with its provenance, as ``batchnorm bench --gpu``
writes them. While it is empty no tensor is served by those kernels unless they are forced.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.kernels.contract import Norm
from batchnorm.kernels.triton.plan import kind_of

WINS = 1.03
"""How many times as fast as torch's a row must be: less is within what repeated runs differ by."""


class Key(NamedTuple):
    """What a measurement holds for.

    Parameters
    ----------
    architecture : str
        As ``sm_90``, or the name that a ROCm device gives itself.
    dtype : str
        Without ``torch.``.
    layout : str
        ``RC`` or ``NCS``, of `batchnorm.layout`; or ``strided``.
    form : str
        ``bn``, ``bn_act``, ``bn_add`` or ``bn_add_act``.
    size : int
        Binary logarithm of the tensor's bytes, rounded down.
    """

    architecture: str
    dtype: str
    layout: str
    form: str
    size: int


def form_of(norm: Norm) -> str:
    """Name what is done beside the normalization.

    Parameters
    ----------
    norm : Norm
        What is done.

    Returns
    -------
    str
        As in `Key`.
    """
    return "bn" + ("_add" if norm.residual is not None else "") + ("_act" if norm.activation else "")


@cache
def architecture(index: int) -> str:
    """Name the architecture of a CUDA or ROCm device.

    Parameters
    ----------
    index : int
        Of the device.

    Returns
    -------
    str
        As in `Key`.
    """
    properties = torch.cuda.get_device_properties(index)
    rocm = getattr(properties, "gcnArchName", "")
    return rocm.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def key_of(z: Tensor, norm: Norm, device: str | None = None) -> Key:
    """Give what a measurement of this call would be filed under.

    Parameters
    ----------
    z : Tensor
        Input, not empty.
    norm : Norm
        What is done with it.
    device : str, optional
        The architecture, where it is not to be asked of the device.

    Returns
    -------
    Key
        Of this call.
    """
    return Key(
        device or architecture(z.device.index or 0),
        str(z.dtype).removeprefix("torch."),
        kind_of(z, norm.axis) or "strided",
        form_of(norm),
        (z.numel() * z.element_size()).bit_length() - 1,
    )


def winners(rows: list[dict[str, Any]]) -> frozenset[Key]:
    """Find the keys under which every row says that Triton wins.

    Parameters
    ----------
    rows : list of dict
        With the fields of `Key` and ``over_torch``, time of the engine `torch` over that of `triton`.

    Returns
    -------
    frozenset of Key
        A key with one row below `WINS` is not among them.
    """
    worst: dict[Key, float] = {}
    for row in rows:
        key = Key(*(row[field] for field in Key._fields))
        worst[key] = min(row["over_torch"], worst.get(key, float("inf")))
    return frozenset(key for key, ratio in worst.items() if ratio >= WINS)


def measured() -> list[dict[str, Any]]:
    """Give the rows that the package was shipped with.

    Returns
    -------
    list of dict
        Empty where nothing was measured.
    """
    text = files("batchnorm.kernels").joinpath("measured.json").read_text(encoding="utf-8")
    return json.loads(text)["rows"]


WINNERS = winners(measured())
