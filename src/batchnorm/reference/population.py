"""From the statistics of mini-batches to those of the population (M11)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Statistics = tuple[float, np.ndarray, np.ndarray]


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Merge the statistics of several batches, exactly.

    For two parts (Chan, Golub and LeVeque 1983), with ``delta = mu_b - mu_a`` and ``m = m_a + m_b``::

        mu    = mu_a + delta * m_b / m
        sum2  = m_a sigma2_a + m_b sigma2_b + delta**2 * m_a m_b / m
        sigma2 = sum2 / m

    The last term is the spread between the batches; an average of variances leaves it out.

    Parameters
    ----------
    parts : iterable of (m, mu, sigma2)
        Count, mean and variance (divisor m) of each batch. Empty batches count for nothing.

    Returns
    -------
    m : float
        Values per channel in all.
    mu, sigma2 : ndarray, shape (C,)
        Mean and variance (divisor m) of all values together.
    """
    m, mu, sum2 = 0.0, np.zeros(()), np.zeros(())
    for m_b, mu_b, sigma2_b in parts:
        if m_b == 0:
            continue
        delta = mu_b - mu
        total = m + m_b
        mu = mu + delta * (m_b / total)
        sum2 = sum2 + m_b * np.asarray(sigma2_b, np.float64) + delta**2 * (m * m_b / total)
        m = total
    return m, mu, sum2 / m if m else sum2


def unbiased(m: float, sigma2: np.ndarray) -> np.ndarray:
    """Turn a variance with divisor m into one with divisor m - 1.

    Parameters
    ----------
    m : float
        Values per channel, more than 1.
    sigma2 : ndarray, shape (C,)
        Variance, divisor m.

    Returns
    -------
    ndarray, shape (C,)
        Variance, divisor m - 1.
    """
    return sigma2 * (m / (m - 1))


def moving_average(running: np.ndarray, batch: np.ndarray, momentum: float = 0.1) -> np.ndarray:
    """Exponentially weighted average: one step of it.

    Parameters
    ----------
    running : ndarray, shape (C,)
        The average so far.
    batch : ndarray, shape (C,)
        The new batch's value.
    momentum : float, default 0.1
        Weight of the NEW batch (torch's meaning; Keras' and ONNX' is one minus it).

    Returns
    -------
    ndarray, shape (C,)
        ``(1 - momentum) * running + momentum * batch``.
    """
    return (1 - momentum) * running + momentum * batch


def plain_average(running: np.ndarray, batch: np.ndarray, k: int) -> np.ndarray:
    """Plain average over batches: one step of it.

    Parameters
    ----------
    running : ndarray, shape (C,)
        The average of the first k - 1 batches.
    batch : ndarray, shape (C,)
        The k-th batch's value.
    k : int
        Number of batches seen with this one, from 1.

    Returns
    -------
    ndarray, shape (C,)
        The average of k batches.
    """
    return running + (batch - running) / k


def blend(prior: float, source: Statistics, batch: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Mix the source statistics, worth ``prior`` samples, with those of a test batch.

    Parameters
    ----------
    prior : float
        How many samples the source statistics are worth.
    source, batch : (m, mu, sigma2)
        Statistics of training, and of n test samples. Of ``m`` only the batch's enters, as n.

    Returns
    -------
    mu, sigma2 : ndarray, shape (C,)
        Mean and variance of the mixture of the two distributions, spread between the means included.
    """
    _, mu, sigma2 = merge([(prior, source[1], source[2]), batch])
    return mu, sigma2
