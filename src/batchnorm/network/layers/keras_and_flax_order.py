"""In which order another library made the layers whose values it lists by name."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from batchnorm.errors import ArgumentError

_NUMBER = re.compile(r"(\d+)")


def in_order(channels: Mapping[str, int], wanted: Sequence[int], *, sorts: bool, who: str) -> list[str]:
    """Give the names in the order in which the layers were made.

    A dictionary that is sorted as text tells nothing about the order: ``BatchNorm_10`` stands before
    ``BatchNorm_2``. Names that differ in their numbers alone are put in the order of the numbers. Where
    other names stand beside each other, the listing counts, unless the library sorts; then only numbers of
    channels that are all different tell.

    Parameters
    ----------
    channels : mapping of str to int
        Names, joined by ``/``, as listed, and each layer's number of channels.
    wanted : sequence of int
        Numbers of channels of the model's layers, in order.
    sorts : bool
        The library sorts its dictionaries, as JAX does.
    who : str
        Who asks, for the message.

    Returns
    -------
    list of str
        The names in order.

    Raises
    ------
    ArgumentError
        The order can't be known, or the numbers of channels are not those of the model.
    """
    listed = list(channels)
    alphabetical = listed == sorted(listed, key=lambda name: name.split("/"))
    ordered = sorted(listed, key=_Place(listed).of) if alphabetical else listed
    unclear = _contradiction(listed) if not alphabetical else (_siblings(listed) if sorts else "")
    if unclear:
        by_channels = _by_channels(channels, wanted)
        if by_channels is None:
            raise ArgumentError(
                f"{who}: names='order', and {unclear}.",
                why="layers of one size in another order would take each other's values without a word.",
                mend="give names as a mapping from name to path.",
            )
        return by_channels
    for place, (name, width) in enumerate(zip(ordered, wanted, strict=True)):
        if channels[name] != width:
            raise ArgumentError(
                f"{who}: in order, layer {place} is {name!r} with {channels[name]} channels, and the model's has "
                f"{width}.",
                why="the two sides list their layers in different orders, or are different networks.",
                mend="give names as a mapping from name to path.",
            )
    return ordered


def _kind(part: str) -> str:
    """A part of a name without its numbers: what siblings that are numbered have in common."""
    # Keras gives its first layer of a kind no number
    return re.sub(r"_?#$", "", _NUMBER.sub("#", part))


def _numbers(part: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(part)) or (-1,)


class _Place:
    """Where a name belongs: by number among names of its kind, which stay where the first of them stood."""

    def __init__(self, listed: Sequence[str]) -> None:
        self._first: dict[tuple[str, str], int] = {}
        for place, name in enumerate(listed):
            above = ""
            for part in name.split("/"):
                self._first.setdefault((above, _kind(part)), place)
                above += "/" + part

    def of(self, name: str) -> list[tuple[int, tuple[int, ...]]]:
        key, above = [], ""
        for part in name.split("/"):
            key.append((self._first[above, _kind(part)], _numbers(part)))
            above += "/" + part
        return key


def _parts_that_differ(one: str, other: str) -> tuple[str, str]:
    for a, b in zip(one.split("/"), other.split("/"), strict=False):
        if a != b:
            return a, b
    return one, other


def _siblings(listed: Sequence[str]) -> str:
    """Two names that stand beside each other and differ in more than their numbers."""
    for one, other in itertools.pairwise(listed):
        a, b = _parts_that_differ(one, other)
        if _kind(a) != _kind(b):
            return f"{one!r} and {other!r} are sorted by name, which does not say which was made first"
    return ""


def _contradiction(listed: Sequence[str]) -> str:
    """Two names of one kind that are listed against their numbers."""
    last: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    for name in listed:
        above = ""
        for part in name.split("/"):
            key, number = (above, _kind(part)), _numbers(part)
            if key in last and number < last[key][0]:
                return f"{last[key][1]!r} is listed before {name!r}, against their numbers"
            last[key] = (number, name)
            above += "/" + part
    return ""


def _by_channels(channels: Mapping[str, int], wanted: Sequence[int]) -> list[str] | None:
    """The only order in which every layer gets as many values as it has channels; None where there are several."""
    by_width = {width: name for name, width in channels.items()}
    if max(Counter(channels.values()).values()) > 1 or sorted(by_width) != sorted(wanted):
        return None
    return [by_width[width] for width in wanted]
