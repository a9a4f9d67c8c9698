"""What a rank is doing when it speaks to the others, told in one number and in words."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

PIECES = 4
_BITS = 13


class Call(NamedTuple):
    """One use of one layer, as far as all ranks must agree on it.

    Parameters
    ----------
    path : str
        The layer's path in the model.
    step : str
        ``"forward"``, ``"backward"``, or what else is exchanged.
    channels : int
        C.
    dtype : str
        Of the layer's input.
    domain : str
        The domain in force; empty outside every one.
    policy : str
        Options that decide what is done with the pooled values.
    settings : str
        Other options that must be the same. They may change from step to step, so no call is predicted by them.
    """

    path: str
    step: str
    channels: int
    dtype: str
    domain: str = ""
    policy: str = ""
    settings: str = ""

    def __str__(self) -> str:
        inside = f", domain {self.domain!r}" if self.domain else ""
        more = "".join(f", {text}" for text in (self.policy, self.settings) if text)
        return f"{self.path!r} ({self.step}, {self.channels} channels, {self.dtype}{inside}{more})"


@lru_cache(maxsize=4096)
def code_of(call: Call) -> int:
    """Give the number that stands for a call in a message.

    Parameters
    ----------
    call : Call
        What a rank does.

    Returns
    -------
    int
        52 bits, so that float64 holds it exactly; the same in every process.
    """
    digest = blake2b(repr(tuple(call)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - PIECES * _BITS)


def pieces_of(code: int) -> list[int]:
    """Cut a code into numbers so small that their squares can be added up exactly.

    Parameters
    ----------
    code : int
        From `code_of`.

    Returns
    -------
    list of int
        `PIECES` numbers of 13 bits: a sum of their squares over 2**20 ranks fits into float64.
    """
    return [(code >> (_BITS * i)) & ((1 << _BITS) - 1) for i in range(PIECES)]
