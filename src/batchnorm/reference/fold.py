"""Batch normalization with constant statistics is an affine map, and joins the linear map next to it."""

from __future__ import annotations

import numpy as np


def affine_of(
    mu: np.ndarray, sigma2: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Write test-time batch normalization as ``z_tilde = scale * z + shift``.

    Parameters
    ----------
    mu, sigma2 : ndarray, shape (C,)
        Population statistics.
    gamma, beta : ndarray, shape (C,), or None
        Learned scale and place.
    eps : float
        Added to the variance.

    Returns
    -------
    scale, shift : ndarray, shape (C,)
        ``gamma / sqrt(sigma2 + eps)`` and ``beta - scale * mu``.
    """
    scale = 1 / np.sqrt(np.asarray(sigma2, np.float64) + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -scale * mu
    return scale, shift if beta is None else shift + beta


def fold_before(
    weight: np.ndarray, bias: np.ndarray | None, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fold into the linear map before: ``scale * (W a + b) + shift``.

    Parameters
    ----------
    weight : ndarray, shape (C, ...)
        W, output channels first.
    bias : ndarray, shape (C,), or None
        The linear map's b.
    scale, shift : ndarray, shape (C,)
        From `affine_of`.

    Returns
    -------
    weight, bias : ndarray
        Of the shapes given.
    """
    folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded, shift if bias is None else scale * bias + shift


def fold_after(
    weight: np.ndarray, bias: np.ndarray | None, scale: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fold into the linear map after: ``W (scale * a + shift) + b``.

    Exact only where the map sees nothing but ``a``: zero padding in between would have to be shifted too.

    Parameters
    ----------
    weight : ndarray, shape (C_out, C, ...)
        W, input channels second.
    bias : ndarray, shape (C_out,), or None
        The linear map's b.
    scale, shift : ndarray, shape (C,)
        From `affine_of`.

    Returns
    -------
    weight, bias : ndarray
        Of the shapes ``weight`` and (C_out,).
    """
    along = [1, -1, *[1] * (weight.ndim - 2)]
    constant = (weight * shift.reshape(along)).sum(axis=tuple(range(1, weight.ndim)))
    return weight * scale.reshape(along), constant if bias is None else bias + constant
