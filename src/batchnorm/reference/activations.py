"""The nonlinearities g that may follow batch normalization, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from batchnorm.errors import ArgumentError

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(u: np.ndarray) -> np.ndarray:
    # exp of a negative number only: the other half would overflow
    e = np.exp(-np.abs(u))
    return np.where(u >= 0, 1 / (1 + e), e / (1 + e))


def _sigmoid_slope(u: np.ndarray) -> np.ndarray:
    return _sigmoid(u) * (1 - _sigmoid(u))


def _phi(u: np.ndarray) -> np.ndarray:
    """The distribution function of the standard normal, by which gelu multiplies."""
    return 0.5 * (1 + _erf(u / math.sqrt(2)))


Function = Callable[[np.ndarray], np.ndarray]
ACTIVATIONS: dict[str | None, tuple[Function, Function]] = {
    None: (lambda u: u, np.ones_like),
    "relu": (lambda u: np.where(u < 0, 0.0, u), lambda u: np.where(u > 0, 1.0, 0.0)),
    # not by np.clip: NaN stays, and so does the sign of 0
    "relu6": (
        lambda u: np.where(u < 0, 0.0, np.where(u > 6, 6.0, u)),
        lambda u: np.where((u > 0) & (u < 6), 1.0, 0.0),
    ),
    "leaky_relu": (lambda u: np.where(u < 0, 0.01 * u, u), lambda u: np.where(u > 0, 1.0, 0.01)),
    "silu": (lambda u: u * _sigmoid(u), lambda u: _sigmoid(u) + u * _sigmoid_slope(u)),
    "hardswish": (
        lambda u: u * np.clip(u + 3, 0, 6) / 6,
        lambda u: np.where(u <= -3, 0.0, np.where(u >= 3, 1.0, u / 3 + 0.5)),
    ),
    "sigmoid": (_sigmoid, _sigmoid_slope),
    "tanh": (np.tanh, lambda u: 1 - np.tanh(u) ** 2),
    "gelu": (
        lambda u: u * _phi(u),
        lambda u: _phi(u) + u * np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi),
    ),
}
"""Each nonlinearity and its derivative. At a kink it is torch's: 0 for relu and relu6, the slope for leaky_relu."""


def activate(u: np.ndarray, activation: str | None) -> np.ndarray:
    """Apply a nonlinearity to the pre-activation u.

    Parameters
    ----------
    u : ndarray
        Pre-activations, any shape.
    activation : str or None
        One of relu, relu6, leaky_relu (slope 0.01), silu, hardswish, sigmoid, tanh, gelu (erf); None is
        the identity.

    Returns
    -------
    ndarray
        g(u), of the shape of ``u``.
    """
    return _pair(activation)[0](u)


def activate_derivative(u: np.ndarray, activation: str | None) -> np.ndarray:
    """Give the derivative of the nonlinearity at u.

    Parameters
    ----------
    u : ndarray
        Pre-activations, any shape.
    activation : str or None
        As for `activate`.

    Returns
    -------
    ndarray
        g'(u), of the shape of ``u``.
    """
    return _pair(activation)[1](u)


def _pair(activation: str | None) -> tuple[Function, Function]:
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"reference: unknown activation {activation!r}.")
    return ACTIVATIONS[activation]
