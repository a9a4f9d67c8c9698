"""The definition itself: M3, M4, M5, M11 by number, gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from batchnorm import reference
from batchnorm.errors import ShapeError, TooFewValuesError
from batchnorm.kernels.activations import ACTIVATIONS

rng = np.random.default_rng(0)


def test_m3_mean_zero_and_variance_one_after_normalizing():
    z = rng.normal(3, 5, (32, 4, 6))
    y, m, mu, sigma2 = reference.forward_training(z, eps=0.0)
    assert m == 32 * 6
    np.testing.assert_allclose(mu, z.mean((0, 2)), rtol=1e-14)
    np.testing.assert_allclose(sigma2, z.var((0, 2)), rtol=1e-13)
    np.testing.assert_allclose(y.mean((0, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(y.var((0, 2)), 1, rtol=1e-13)


def test_m4_gamma_and_beta_set_scale_and_place():
    z, gamma, beta = rng.normal(size=(16, 3)), np.array([2.0, 0.5, -1.0]), np.array([1.0, 0.0, 7.0])
    y, *_ = reference.forward_training(z, gamma, beta, eps=0.0)
    np.testing.assert_allclose(y.mean(0), beta, atol=1e-14)
    np.testing.assert_allclose(y.std(0), np.abs(gamma), rtol=1e-13)


@given(arrays(np.float64, (5, 2, 3), elements=st.floats(-1e3, 1e3)), st.sampled_from([1e-5, 1e-3, 1.0]))
def test_m5_normalization_is_undone_exactly(z, eps):
    _, mu, sigma2 = reference.batch_statistics(z)
    y, *_ = reference.forward_training(z, np.sqrt(sigma2 + eps), mu, eps)
    np.testing.assert_allclose(y, z, atol=1e-10)


def test_m11_running_averages():
    values = rng.normal(size=(7, 3))
    running = np.zeros(3)
    for k, value in enumerate(values, start=1):
        running = reference.plain_average(running, value, k)
    np.testing.assert_allclose(running, values.mean(0), atol=1e-15)
    moving = np.zeros(3)
    for value in values:
        moving = reference.moving_average(moving, value, 0.1)
    weights = 0.1 * 0.9 ** np.arange(6, -1, -1)
    np.testing.assert_allclose(moving, weights @ values, atol=1e-15)


@given(
    arrays(np.float64, (12, 2), elements=st.floats(-1e6, 1e6)),
    st.lists(st.integers(0, 12), max_size=4).map(sorted),
)
def test_merge_is_exact_whatever_the_split(z, cuts):
    parts = [reference.batch_statistics(part) for part in np.split(z, cuts)]
    m, mu, sigma2 = reference.merge(parts)
    assert m == 12
    # each merge rounds a handful of times, relative to the largest magnitude squared
    scale = max(np.abs(z).max(), 1e-300)
    np.testing.assert_allclose(mu, z.mean(0), atol=1e-14 * scale)
    np.testing.assert_allclose(sigma2, z.var(0), atol=1e-13 * scale**2)


def test_blend_includes_the_spread_between_the_means():
    mu, sigma2 = reference.blend(16, (0, np.zeros(1), np.ones(1)), (16, np.full(1, 4.0), np.zeros(1)))
    np.testing.assert_allclose([mu[0], sigma2[0]], [2.0, 4.5])


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_closed_form_backward_agrees_with_finite_differences(activation, masked, channel_dim):
    z, residual = rng.normal(size=(3, 2, 2)), rng.normal(size=(3, 2, 2))
    gamma, beta, dy = rng.normal(size=2), rng.normal(size=2), rng.normal(size=(3, 2, 2))
    mask = np.array([[True, False], [True, True], [False, True]]) if masked else None
    options = {"activation": activation, "mask": mask, "channel_dim": channel_dim}

    def loss(z, gamma, beta, residual):
        return (reference.forward_training(z, gamma, beta, residual=residual, **options)[0] * dy).sum()

    def inference_loss(z, gamma, beta, residual):
        y = reference.forward_inference(z, mean, var, gamma, beta, residual=residual, **options)
        return (y * dy).sum()

    mean, var = np.array([0.2, -0.3]), np.array([1.5, 0.7])
    inputs = (z, gamma, beta, residual)
    closed = reference.backward_training(dy, z, gamma, beta, residual=residual, **options)
    inference = reference.backward_inference(dy, z, mean, var, gamma, beta, residual=residual, **options)
    for function, gradients in ((loss, closed), (inference_loss, inference)):
        for i, gradient in enumerate(gradients):
            # central differences of step h: error h**2 f'''/6 + rounding 1e-16/h, about 1e-9 here
            np.testing.assert_allclose(gradient, _differences(function, inputs, i), atol=1e-7)


def _differences(function, inputs, i, h=1e-5):
    result = np.zeros_like(inputs[i])
    for index in np.ndindex(result.shape):
        values = []
        for step in (h, -h):
            moved = [v.copy() for v in inputs]
            moved[i][index] += step
            values.append(function(*moved))
        result[index] = (values[0] - values[1]) / (2 * h)
    return result


@pytest.mark.parametrize("with_bias", [True, False])
def test_folding_before_and_after_gives_the_same_function(with_bias):
    a, weight = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    bias = rng.normal(size=3) if with_bias else None

    def linear(weight, bias, a):
        return a @ weight.T + (0 if bias is None else bias)

    for width, fold in ((3, reference.fold_before), (4, reference.fold_after)):
        mu, sigma2 = rng.normal(size=width), rng.uniform(0.5, 2, width)
        gamma, beta = rng.normal(size=width), rng.normal(size=width)
        scale, shift = reference.affine_of(mu, sigma2, gamma, beta, 1e-5)

        def normalize(v, statistics=(mu, sigma2, gamma, beta)):
            return reference.normalize(v, *statistics)

        if fold is reference.fold_before:
            expected = normalize(linear(weight, bias, a))
        else:
            expected = linear(weight, bias, normalize(a))
        np.testing.assert_allclose(linear(*fold(weight, bias, scale, shift), a), expected, atol=1e-12)


def test_layouts_agree():
    z = rng.normal(size=(4, 3, 5))
    y, *_ = reference.forward_training(z)
    last, *_ = reference.forward_training(np.moveaxis(z, 1, -1), channel_dim=-1)
    np.testing.assert_allclose(np.moveaxis(last, -1, 1), y, atol=1e-15)


def test_masked_values_may_be_nan_and_never_matter():
    z = rng.normal(size=(2, 3, 4))
    mask = np.ones((2, 4), bool)
    mask[1, 2:] = False
    dirty = z.copy()
    dirty[1, :, 2:] = np.nan
    clean, *_ = reference.forward_training(z, mask=mask)
    y, *_ = reference.forward_training(dirty, mask=mask)
    np.testing.assert_array_equal(y, clean)
    for gradient in reference.backward_training(np.ones_like(z), dirty, mask=mask):
        assert np.isfinite(gradient).all()


def test_bad_input_is_refused():
    with pytest.raises(TooFewValuesError, match="1 values"):
        reference.forward_training(np.ones((1, 3)))
    with pytest.raises(ShapeError, match="at least 2 axes"):
        reference.forward_training(np.ones(3))
