"""Forward: mini-batch statistics (M3), scale and place (M4), and the test-time form (M9 - M11)."""

from __future__ import annotations

import numpy as np

from batchnorm.errors import TooFewValuesError
from batchnorm.layout import channel_axis, vector_shape
from batchnorm.reference.activations import activate


def _per_channel(vector: np.ndarray, z: np.ndarray, axis: int) -> np.ndarray:
    return np.asarray(vector, np.float64).reshape(vector_shape(z.ndim, axis))


def _where(mask: np.ndarray | None, z: np.ndarray, axis: int) -> np.ndarray:
    if mask is None:
        return np.ones(z.shape, bool)
    return np.broadcast_to(np.expand_dims(np.asarray(mask, bool), axis), z.shape)


def batch_statistics(
    z: np.ndarray, channel_dim: int = 1, mask: np.ndarray | None = None
) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and variance of each channel over a mini-batch.

    ::

        mu     = (1/m) sum_i z(i)
        sigma2 = (1/m) sum_i (z(i) - mu)**2

    Parameters
    ----------
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z].
    channel_dim : int, default 1
        The channel axis.
    mask : ndarray of bool, optional
        Shape of ``z`` without the channel axis. Only positions where it is True count.

    Returns
    -------
    m : int
        Values per channel.
    mu : ndarray, shape (C,)
        Mean [z].
    sigma2 : ndarray, shape (C,)
        Variance with divisor m [z]**2.
    """
    axis = channel_axis(z.ndim, channel_dim)
    z = np.asarray(z, np.float64)
    keep = np.moveaxis(_where(mask, z, axis), axis, 0).reshape(z.shape[axis], -1)
    values = np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1)
    m = int(keep[0].sum()) if len(keep) else 0
    if m == 0:
        return 0, np.zeros(len(values)), np.zeros(len(values))
    mu = np.where(keep, values, 0).sum(axis=1) / m
    sigma2 = np.square(np.where(keep, values - mu[:, None], 0)).sum(axis=1) / m
    return m, mu, sigma2


def normalize(
    z: np.ndarray,
    mu: np.ndarray,
    sigma2: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float = 1e-5,
    channel_dim: int = 1,
) -> np.ndarray:
    """Normalize with given statistics, then scale and shift.

    ::

        z_norm  = (z - mu) / sqrt(sigma2 + eps)
        z_tilde = gamma z_norm + beta

    Parameters
    ----------
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z].
    mu, sigma2 : ndarray, shape (C,)
        Mean [z] and variance [z]**2.
    gamma, beta : ndarray, shape (C,), optional
        Learned scale and place; 1 and 0 when absent.
    eps : float, default 1e-5
        Added to the variance [z]**2.
    channel_dim : int, default 1
        The channel axis.

    Returns
    -------
    ndarray
        z_tilde, of the shape of ``z``.
    """
    axis = channel_axis(z.ndim, channel_dim)
    z = np.asarray(z, np.float64)
    z_tilde = (z - _per_channel(mu, z, axis)) / np.sqrt(_per_channel(sigma2, z, axis) + eps)
    if gamma is not None:
        z_tilde = _per_channel(gamma, z, axis) * z_tilde
    if beta is not None:
        z_tilde = z_tilde + _per_channel(beta, z, axis)
    return z_tilde


def forward_training(
    z: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = 1,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
    """Batch normalization of a mini-batch with its own statistics (algorithm 1 of the paper).

    Parameters
    ----------
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z].
    gamma, beta : ndarray, shape (C,), optional
        Learned scale and place; 1 and 0 when absent.
    eps : float, default 1e-5
        Added to the variance [z]**2.
    channel_dim : int, default 1
        The channel axis.
    activation : str, optional
        Nonlinearity applied last.
    residual : ndarray, optional
        Added before the nonlinearity, of the shape of ``z``.
    mask : ndarray of bool, optional
        Shape of ``z`` without the channel axis. Where False, the value counts for nothing and 0 comes out.

    Returns
    -------
    y : ndarray
        ``activation(z_tilde + residual)``, of the shape of ``z``.
    m : int
        Values per channel.
    mu, sigma2 : ndarray, shape (C,)
        The mini-batch statistics, divisor m.

    Raises
    ------
    TooFewValuesError
        ``m < 2``.
    """
    m, mu, sigma2 = batch_statistics(z, channel_dim, mask)
    if m < 2:
        raise TooFewValuesError(f"reference: {m} values per channel have no variance to divide by.")
    y = _finish(
        normalize(z, mu, sigma2, gamma, beta, eps, channel_dim), z, channel_dim, activation, residual, mask
    )
    return y, m, mu, sigma2


def forward_inference(
    z: np.ndarray,
    population_mu: np.ndarray,
    population_sigma2: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = 1,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Batch normalization at test time, with population statistics (algorithm 2 of the paper).

    Parameters
    ----------
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z]. One sample is enough.
    population_mu, population_sigma2 : ndarray, shape (C,)
        Statistics collected over the mini-batches of training.
    gamma, beta : ndarray, shape (C,), optional
        Learned scale and place; 1 and 0 when absent.
    eps : float, default 1e-5
        Added to the variance [z]**2.
    channel_dim : int, default 1
        The channel axis.
    activation : str, optional
        Nonlinearity applied last.
    residual : ndarray, optional
        Added before the nonlinearity, of the shape of ``z``.
    mask : ndarray of bool, optional
        Shape of ``z`` without the channel axis; 0 comes out where it is False.

    Returns
    -------
    ndarray
        ``activation(z_tilde + residual)``, of the shape of ``z``.
    """
    z_tilde = normalize(z, population_mu, population_sigma2, gamma, beta, eps, channel_dim)
    return _finish(z_tilde, z, channel_dim, activation, residual, mask)


def _finish(
    z_tilde: np.ndarray,
    z: np.ndarray,
    channel_dim: int,
    activation: str | None,
    residual: np.ndarray | None,
    mask: np.ndarray | None,
) -> np.ndarray:
    u = z_tilde if residual is None else z_tilde + np.asarray(residual, np.float64)
    return np.where(_where(mask, z, channel_axis(z.ndim, channel_dim)), activate(u, activation), 0.0)
