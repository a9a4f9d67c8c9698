"""Backward in closed form.

With z_norm the normalized value and d(.) the derivative of the loss, the chain rule through mu and sigma2
(both of which depend on every z) collapses to::

    dbeta  = sum_i dz_tilde(i)
    dgamma = sum_i dz_tilde(i) z_norm(i)
    dz(i)  = gamma / sqrt(sigma2 + eps) * (dz_tilde(i) - dbeta / m - z_norm(i) * dgamma / m)

At test time mu and sigma2 are constants, and only the first term of the last line is left.
"""

from __future__ import annotations

import numpy as np

from batchnorm.layout import channel_axis
from batchnorm.reference.activations import activate_derivative
from batchnorm.reference.forward import _per_channel, _where, batch_statistics, normalize


def backward_training(
    dy: np.ndarray,
    z: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float = 1e-5,
    *,
    channel_dim: int = 1,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give the gradients of `forward_training`.

    Parameters
    ----------
    dy : ndarray
        Derivative of the loss with respect to the output, of the shape of ``z``.
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z].
    gamma, beta : ndarray, shape (C,), optional
        Learned scale and place.
    eps : float, default 1e-5
        Added to the variance [z]**2.
    channel_dim : int, default 1
        The channel axis.
    activation : str, optional
        Nonlinearity that was applied last.
    residual : ndarray, optional
        What was added before it.
    mask : ndarray of bool, optional
        Which values count.

    Returns
    -------
    dz : ndarray
        Derivative with respect to ``z``.
    dgamma, dbeta : ndarray, shape (C,)
        Derivatives with respect to scale and place.
    dresidual : ndarray
        Derivative with respect to the residual.
    """
    m, mu, sigma2 = batch_statistics(z, channel_dim, mask)
    return _backward(
        dy,
        z,
        mu,
        sigma2,
        m,
        gamma,
        beta,
        eps,
        channel_dim,
        activation,
        residual,
        mask,
        through_statistics=True,
    )


def backward_inference(
    dy: np.ndarray,
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
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give the gradients of `forward_inference`, where the statistics are constants.

    Parameters
    ----------
    dy : ndarray
        Derivative of the loss with respect to the output, of the shape of ``z``.
    z : ndarray, shape (N, C, *S) or another place for C
        Pre-activations [z].
    population_mu, population_sigma2 : ndarray, shape (C,)
        Statistics that the forward was given.
    gamma, beta : ndarray, shape (C,), optional
        Learned scale and place.
    eps : float, default 1e-5
        Added to the variance [z]**2.
    channel_dim : int, default 1
        The channel axis.
    activation : str, optional
        Nonlinearity that was applied last.
    residual : ndarray, optional
        What was added before it.
    mask : ndarray of bool, optional
        Which values count.

    Returns
    -------
    dz : ndarray
        Derivative with respect to ``z``.
    dgamma, dbeta : ndarray, shape (C,)
        Derivatives with respect to scale and place.
    dresidual : ndarray
        Derivative with respect to the residual.
    """
    return _backward(
        dy,
        z,
        population_mu,
        population_sigma2,
        1,
        gamma,
        beta,
        eps,
        channel_dim,
        activation,
        residual,
        mask,
        through_statistics=False,
    )


def _backward(
    dy: np.ndarray,
    z: np.ndarray,
    mu: np.ndarray,
    sigma2: np.ndarray,
    m: int,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    eps: float,
    channel_dim: int,
    activation: str | None,
    residual: np.ndarray | None,
    mask: np.ndarray | None,
    *,
    through_statistics: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    axis = channel_axis(z.ndim, channel_dim)
    others = tuple(a for a in range(z.ndim) if a != axis)
    keep = _where(mask, z, axis)
    z_norm = np.where(keep, normalize(z, mu, sigma2, None, None, eps, channel_dim), 0.0)
    u = normalize(z, mu, sigma2, gamma, beta, eps, channel_dim)
    if residual is not None:
        u = u + np.asarray(residual, np.float64)
    du = np.where(
        keep, np.asarray(dy, np.float64) * activate_derivative(np.where(keep, u, 0.0), activation), 0.0
    )

    dbeta = du.sum(axis=others)
    dgamma = (du * z_norm).sum(axis=others)
    inner = du
    if through_statistics:
        inner = du - keep * (_per_channel(dbeta, z, axis) + z_norm * _per_channel(dgamma, z, axis)) / m
    inv_std = 1 / np.sqrt(_per_channel(sigma2, z, axis) + eps)
    dz = inner * inv_std if gamma is None else inner * inv_std * _per_channel(gamma, z, axis)
    return dz, dgamma, dbeta, du
