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
    dz, dgamma, dbeta, du = backward_inference(
        dy, z, mu, sigma2, gamma, beta, eps,
        channel_dim=channel_dim, activation=activation, residual=residual, mask=mask,
    )  # fmt: skip
    axis = channel_axis(z.ndim, channel_dim)
    z_norm = normalize(z, mu, sigma2, None, None, eps, channel_dim)
    through = _per_channel(dbeta, z, axis) + z_norm * _per_channel(dgamma, z, axis)
    scale = (1.0 if gamma is None else np.asarray(gamma, np.float64)) / np.sqrt(sigma2 + eps)
    dz = dz - _per_channel(scale, z, axis) * np.where(_where(mask, z, axis), through, 0.0) / max(m, 1)
    return dz, dgamma, dbeta, du


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
    axis = channel_axis(z.ndim, channel_dim)
    others = tuple(a for a in range(z.ndim) if a != axis)
    keep = _where(mask, z, axis)
    z_norm = np.where(keep, normalize(z, population_mu, population_sigma2, None, None, eps, channel_dim), 0.0)
    u = normalize(z, population_mu, population_sigma2, gamma, beta, eps, channel_dim)
    if residual is not None:
        u = u + np.asarray(residual, np.float64)
    du = np.where(
        keep, np.asarray(dy, np.float64) * activate_derivative(np.where(keep, u, 0.0), activation), 0.0
    )

    scale = 1 / np.sqrt(_per_channel(population_sigma2, z, axis) + eps)
    if gamma is not None:
        scale = scale * _per_channel(gamma, z, axis)
    return du * scale, (du * z_norm).sum(axis=others), du.sum(axis=others), du
