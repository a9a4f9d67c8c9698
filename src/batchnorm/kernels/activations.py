"""The activations that join the normalizing pass: one table of what they are, for every engine and route."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEAKY_SLOPE = 0.01


class Activation(NamedTuple):
    """One activation, as torch operations and as the C++ core knows it.

    Parameters
    ----------
    code : int
        Its number in ``csrc/dtypes.h``.
    value : callable
        ``activation(u)``, differentiable as often as wanted.
    backward : callable
        ``(dy, u) -> dy * activation'(u)``, for an engine's own backward.
    side : callable, optional
        Of a piecewise linear one: where the derivative is 1, given u. Its derivative is one bit an element.
    slope : float, default 0
        Of a piecewise linear one: the derivative everywhere else.
    """

    code: int
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    side: Callable[[Tensor], Tensor] | None = None
    slope: float = 0.0


_aten = torch.ops.aten

# `side` is what torch's derivative does at the kink and at NaN
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(1, F.relu, lambda dy, u: _aten.threshold_backward(dy, u, 0), lambda u: ~(u <= 0)),
    "relu6": Activation(
        2, F.relu6, lambda dy, u: _aten.hardtanh_backward(dy, u, 0, 6), lambda u: ~((u <= 0) | (u >= 6))
    ),
    "leaky_relu": Activation(
        3,
        lambda u: F.leaky_relu(u, LEAKY_SLOPE),
        lambda dy, u: _aten.leaky_relu_backward(dy, u, LEAKY_SLOPE, False),
        lambda u: u > 0,
        LEAKY_SLOPE,
    ),
    "silu": Activation(4, F.silu, _aten.silu_backward),
    "hardswish": Activation(5, F.hardswish, _aten.hardswish_backward),
    "sigmoid": Activation(6, torch.sigmoid, lambda dy, u: _aten.sigmoid_backward(dy, torch.sigmoid(u))),
    "tanh": Activation(7, torch.tanh, lambda dy, u: _aten.tanh_backward(dy, torch.tanh(u))),
    "gelu": Activation(8, F.gelu, _aten.gelu_backward),
}
"""By name. leaky_relu has slope 0.01; gelu is the exact (erf) one."""

PIECEWISE_LINEAR = tuple(name for name, a in ACTIVATIONS.items() if a.side)

CODES: dict[str | None, int] = {None: 0} | {name: a.code for name, a in ACTIVATIONS.items()}

_IDENTITY = Activation(0, lambda u: u, lambda dy, u: dy)


def find(activation: str | None) -> Activation:
    """Give an activation by its name; the identity for None.

    Parameters
    ----------
    activation : str or None
        One of `ACTIVATIONS`.

    Returns
    -------
    Activation
        What it is.
    """
    return _IDENTITY if activation is None else ACTIVATIONS[activation]


def activate(u: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by its name.

    Parameters
    ----------
    u : Tensor
        Pre-activation.
    activation : str or None
        One of `ACTIVATIONS`.

    Returns
    -------
    Tensor
        ``activation(u)``; ``u`` itself for None.
    """
    return find(activation).value(u)
