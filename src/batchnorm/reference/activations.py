"""The nonlinearities g that may follow batch normalization, and their derivatives."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.errors import ArgumentError

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(u: np.ndarray) -> np.ndarray:
    # exp of a negative number only: the other half would overflow
    e = np.exp(-np.abs(u))
    return np.where(u >= 0, 1 / (1 + e), e / (1 + e))


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
    if activation is None:
        return u
    if activation == "relu":
        return np.where(u < 0, 0.0, u)
    if activation == "relu6":
        return np.where(u < 0, 0.0, np.where(u > 6, 6.0, u))
    if activation == "leaky_relu":
        return np.where(u < 0, 0.01 * u, u)
    if activation == "silu":
        return u * _sigmoid(u)
    if activation == "hardswish":
        return u * np.clip(u + 3, 0, 6) / 6
    if activation == "sigmoid":
        return _sigmoid(u)
    if activation == "tanh":
        return np.tanh(u)
    if activation == "gelu":
        return 0.5 * u * (1 + _erf(u / math.sqrt(2))) if u.size else u
    raise ArgumentError(f"reference: unknown activation {activation!r}.")


def activate_derivative(u: np.ndarray, activation: str | None) -> np.ndarray:
    """Give the derivative of the nonlinearity at u.

    Parameters
    ----------
    u : ndarray
        Pre-activations, any shape.
    activation : str or None
        As for `activate`. At a kink the value is torch's: 0 for relu and relu6, the slope for leaky_relu.

    Returns
    -------
    ndarray
        g'(u), of the shape of ``u``.
    """
    if activation is None:
        return np.ones_like(u)
    if activation == "relu":
        return (u > 0).astype(u.dtype)
    if activation == "relu6":
        return ((u > 0) & (u < 6)).astype(u.dtype)
    if activation == "leaky_relu":
        return np.where(u > 0, 1.0, 0.01)
    if activation == "silu":
        s = _sigmoid(u)
        return s * (1 + u * (1 - s))
    if activation == "hardswish":
        return np.where(u <= -3, 0.0, np.where(u >= 3, 1.0, u / 3 + 0.5))
    if activation == "sigmoid":
        s = _sigmoid(u)
        return s * (1 - s)
    if activation == "tanh":
        return 1 - np.tanh(u) ** 2
    if activation == "gelu":
        if not u.size:
            return u
        return 0.5 * (1 + _erf(u / math.sqrt(2))) + u * np.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
    raise ArgumentError(f"reference: unknown activation {activation!r}.")
