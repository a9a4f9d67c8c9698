"""`batch_norm` and the layers against torch.nn and against the reference, over drawn inputs.

Tolerances. torch and we compute in float32 with different orders of summation; a mean of m values carries
an error of a few eps * max|z|, which the division by the standard deviation makes eps * max|z| / std in the
output. The inputs drawn have max|z| / std below about 30, so 1e-4 absolute holds in float32 with a margin of
ten. In half precision the output is rounded once: two units of the last place of the largest output.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm import reference
from batchnorm.errors import DtypeError
from batchnorm.functional import batch_norm
from batchnorm.kernels.activations import ACTIVATIONS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


@st.composite
def inputs(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    """A tensor of any kind of batch norm: shape, dtype, layout, values."""
    ndim = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
    if np.prod(shape) // shape[1] < 2:
        shape[0] = 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    z = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.5, 3.0])) + draw(
        st.sampled_from([0.0, -4.0])
    )
    z = z.to(draw(st.sampled_from(dtypes)))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "every other", "expanded"]))
    if layout == "channels_last" and ndim in (4, 5):
        z = z.contiguous(memory_format=torch.channels_last if ndim == 4 else torch.channels_last_3d)
    elif layout == "transposed":
        z = z.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "every other":
        z = torch.stack([z, z + 1], dim=1).flatten(0, 1)[::2]
    elif layout == "expanded" and ndim > 2:
        z = z[..., :1].expand(z.shape)
        if values(z) < 2:
            z = z.contiguous()
    return z


def values(z):
    return z.numel() // z.shape[1]


def close(a, b, dtype=None, scale=1.0):
    tolerance = TOLERANCE[dtype or a.dtype]
    torch.testing.assert_close(a.double(), b.double(), atol=tolerance * scale, rtol=tolerance)


@given(inputs(), st.booleans(), st.sampled_from([0.1, 1.0, 0.0, None]), st.booleans())
def test_a_layer_gives_outputs_gradients_and_buffers_of_torchs(z, training, momentum, affine):
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    name = LAYERS[z.dim()]
    ours = getattr(batchnorm, name)(z.shape[1], momentum=momentum, affine=affine, dtype=dtype)
    theirs = getattr(nn, name)(z.shape[1], momentum=momentum, affine=affine, dtype=torch.float64)
    with torch.no_grad():
        for tensor in [*ours.parameters(), ours.running_mean, ours.running_var]:
            tensor.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    ours.train(training), theirs.train(training)
    for _ in range(2):
        a, b = z.detach().requires_grad_(), z.double().clone().requires_grad_()
        y, expected = ours(a), theirs(b)
        assert y.dtype == z.dtype
        assert y.shape == z.shape
        close(y, expected)
        dy = torch.randn_like(y)
        y.backward(dy), expected.backward(dy.double())
        # a channel of nearly equal values has a large inverse standard deviation
        scale = max(1.0, b.grad.abs().max().item())
        close(a.grad, b.grad, scale=scale)
        a.grad = None
        if affine:
            close(ours.weight.grad, theirs.weight.grad, z.dtype, scale=values(z) ** 0.5)
            close(ours.bias.grad, theirs.bias.grad, z.dtype, scale=values(z) ** 0.5)
    for key, buffer in theirs.named_buffers():
        close(getattr(ours, key), buffer, dtype)


@given(
    inputs(dtypes=(torch.float64,)),
    st.sampled_from([None, *ACTIVATIONS]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_float64_agrees_with_the_reference_to_1e_10(z, activation, training, with_residual, data):
    axis = data.draw(st.sampled_from([1, -1]))
    c = z.shape[axis]
    assume(not training or z.numel() // c >= 2)  # one value per channel has its own tests
    gamma, beta, mean = (torch.randn(c, dtype=torch.float64) for _ in range(3))
    var = torch.rand(c, dtype=torch.float64) + 0.5
    residual = torch.randn_like(z) if with_residual else None
    dy = torch.randn_like(z)
    tensors = [t.detach().requires_grad_() for t in (z, gamma, beta)]
    added = None if residual is None else residual.clone().requires_grad_()
    y = batch_norm(
        tensors[0],
        mean,
        var,
        tensors[1],
        tensors[2],
        training,
        0.0,
        activation=activation,
        residual=added,
        channel_dim=axis,
    )
    y.backward(dy)
    options = {
        "channel_dim": axis,
        "activation": activation,
        "residual": None if residual is None else residual.numpy(),
    }
    a = [t.numpy() for t in (z, gamma, beta)]
    if training:
        expected, *_ = reference.forward_training(*a, **options)
        gradients = reference.backward_training(dy.numpy(), *a, **options)
    else:
        expected = reference.forward_inference(a[0], mean.numpy(), var.numpy(), *a[1:], **options)
        gradients = reference.backward_inference(
            dy.numpy(), a[0], mean.numpy(), var.numpy(), *a[1:], **options
        )
    # relative to the inverse standard deviation, which eps bounds by 316
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-10, rtol=1e-10)
    for tensor, gradient in zip([*tensors, added], gradients, strict=True):
        if tensor is not None:
            bound = 1e-10 * max(1.0, np.abs(gradient).max())
            np.testing.assert_allclose(tensor.grad.numpy(), gradient, atol=bound)


@given(inputs(), st.booleans())
def test_the_function_has_torchs_positional_signature(z, training):
    c = z.shape[1]
    vectors = [torch.rand(c) + 0.5 for _ in range(4)]
    wide = [v.double() for v in vectors]
    expected = F.batch_norm(z.double(), *wide, training, 0.3, 1e-3)
    y = batch_norm(z, *vectors, training, 0.3, 1e-3)
    close(y, expected)
    for ours, theirs in zip(vectors, wide, strict=True):
        close(ours, theirs, torch.float32)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_first_and_second_derivatives_against_finite_differences(activation, training, with_residual):
    z, residual = (torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gamma, beta = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def function(z, gamma, beta, *added):
        return batch_norm(
            z,
            None if training else mean,
            None if training else var,
            gamma,
            beta,
            training,
            activation=activation,
            residual=added[0] if added else None,
        )

    tensors = (z, gamma, beta, residual) if with_residual else (z, gamma, beta)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_m7_a_bias_before_the_layer_has_no_effect_and_no_gradient():
    linear, norm = nn.Linear(4, 3).double(), batchnorm.BatchNorm1d(3, dtype=torch.float64)
    x = torch.randn(16, 4, dtype=torch.float64)
    before = norm(linear(x))
    with torch.no_grad():
        linear.bias += 100
    after = norm(linear(x))
    torch.testing.assert_close(after, before, atol=1e-11, rtol=0)
    after.square().mul(torch.randn_like(after)).sum().backward()
    assert linear.bias.grad.abs().max() < 1e-12 < linear.weight.grad.abs().max()


def test_m8_every_mini_batch_has_its_own_statistics():
    layer = batchnorm.BatchNorm1d(2)
    x = torch.randn(32, 2)
    halves = torch.cat([layer(x[:16]), layer(x[16:] * 3 + 7)])
    torch.testing.assert_close(halves[16:].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(halves[:16].mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_m11_a_plain_average_of_all_batches_with_momentum_none():
    layer = batchnorm.BatchNorm1d(3, momentum=None)
    batches = torch.randn(5, 8, 3) * 2 + 1
    for batch in batches:
        layer(batch)
    torch.testing.assert_close(layer.running_mean, batches.mean(1).mean(0))
    torch.testing.assert_close(layer.running_var, batches.var(1).mean(0))


def test_an_empty_batch_passes_and_is_counted_as_in_torch_and_moves_nothing_else():
    layer = batchnorm.BatchNorm2d(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key] + (key == "num_batches_tracked"))


def test_in_place_inference_writes_into_its_input():
    z = torch.randn(4, 3, 5)
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    expected = batch_norm(z, mean, var, activation="relu")
    y = batch_norm(z, mean, var, activation="relu", inplace=True)
    assert y.data_ptr() == z.data_ptr()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_output_keeps_the_memory_format(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    for mode in (True, False):
        y = batchnorm.BatchNorm2d(3).train(mode)(x)
        assert y.is_contiguous(memory_format=memory_format)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.is_contiguous(memory_format=memory_format)


def test_constructor_takes_torchs_arguments_in_torchs_order():
    ours = batchnorm.BatchNorm2d(4, 1e-3, None, False, False, "cpu", torch.float64)
    assert (ours.eps, ours.momentum, ours.weight, ours.running_mean) == (1e-3, None, None, None)
    assert isinstance(ours, nn.BatchNorm2d)
    without = batchnorm.BatchNorm1d(4, bias=False)
    assert without.bias is None
    assert without.weight is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vectors", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_vectors_of_any_floating_dtype_serve_beside_any_input(dtype, vectors, training):
    """What matters is the value of a vector's elements, not how they are stored."""
    torch.manual_seed(0)
    z, dy = torch.randn(6, 5, 7).to(dtype), torch.randn(6, 5, 7).to(dtype)
    gamma, beta, mean, var = (
        t.to(vectors) for t in (torch.rand(5), torch.randn(5), torch.randn(5), torch.rand(5) + 0.5)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for as_given in (True, False):
        made = [t.clone() if as_given else t.to(wide, copy=True) for t in (gamma, beta, mean, var)]
        leaves = [z.clone().requires_grad_(), made[0].requires_grad_(), made[1].requires_grad_()]
        y = batch_norm(leaves[0], made[2], made[3], leaves[1], leaves[2], training)
        if not training:
            with torch.no_grad():
                assert torch.equal(batch_norm(z, made[2], made[3], leaves[1], leaves[2]), y)
        results.append([y, *torch.autograd.grad(y, leaves, dy), made[2], made[3]])
    for i, (have, want) in enumerate(zip(*results, strict=True)):
        if i in (0, 1):
            assert torch.equal(have, want)
        else:
            assert have.dtype == vectors
            off = max(torch.finfo(vectors).eps, torch.finfo(wide).eps)
            torch.testing.assert_close(have, want.to(vectors), rtol=2 * off, atol=off)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eval_with_a_residual_gives_the_same_bits_with_and_without_a_gradient(dtype, activation):
    torch.manual_seed(0)
    z, residual = torch.randn(8, 16, 9, 9).to(dtype), torch.randn(8, 16, 9, 9).to(dtype)
    gamma, beta, mean, var = torch.rand(16), torch.randn(16), torch.randn(16), torch.rand(16) + 0.5
    arguments = (mean, var, gamma, beta, False)
    with torch.no_grad():
        want = batch_norm(z, *arguments, residual=residual, activation=activation)
    leaves = [z.clone().requires_grad_(), residual.clone().requires_grad_()]
    have = batch_norm(leaves[0], *arguments, residual=leaves[1], activation=activation)
    assert torch.equal(have, want)
    dy = torch.randn(z.shape).to(dtype)
    dz, dresidual = torch.autograd.grad(have, leaves, dy)
    u = (z.double() - mean.view(-1, 1, 1)) * (var.view(-1, 1, 1) + 1e-5).rsqrt() * gamma.view(
        -1, 1, 1
    ) + beta.view(-1, 1, 1)
    u = (u + residual.double()).requires_grad_()
    apply = {None: lambda x: x, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation]
    (du,) = torch.autograd.grad(apply(u), u, dy.double())
    off = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(dresidual.double(), du, rtol=off, atol=off)
    scale = (gamma * (var + 1e-5).rsqrt()).view(-1, 1, 1)
    torch.testing.assert_close(dz.double(), du * scale, rtol=off, atol=off)


def test_no_momentum_in_training_is_refused_as_torch_refuses_it():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="momentum"):
        batch_norm(torch.randn(4, 3), mean, var, training=True, momentum=None)
    assert torch.equal(mean, torch.zeros(3))
    assert batch_norm(torch.randn(4, 3), mean, var, momentum=None).shape == (4, 3)


@pytest.mark.parametrize("which", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_vectors_of_whole_or_complex_numbers_are_refused_by_name(which, training, dtype):
    given = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": None, "bias": None}
    given[which] = torch.ones(3, dtype=dtype)
    with pytest.raises(DtypeError, match=which):
        batch_norm(torch.randn(4, 3), **given, training=training)
    assert torch.equal(given[which], torch.ones(3, dtype=dtype))


def test_eps_of_0_is_right_in_inference_and_refused_in_training():
    z, mean, var = torch.randn(4, 3), torch.randn(3), torch.rand(3) + 0.5
    want = torch.nn.functional.batch_norm(z, mean, var, eps=0.0)
    torch.testing.assert_close(batch_norm(z, mean, var, eps=0.0), want)
    with pytest.raises(batchnorm.ArgumentError, match="eps"):
        batch_norm(z, mean, var, training=True, eps=0.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("step", [0, 2], ids=["expanded", "strided"])
def test_vectors_of_any_strides_give_the_gradients_of_dense_ones(step, training):
    # torch 2.13 reads such a weight as if its values lay together, and gives wrong gradients without a word
    weight = torch.linspace(0.5, 2.0, 12).as_strided((6,), (step,))
    gradients = []
    for vector in (weight.clone(memory_format=torch.contiguous_format), weight):
        z = torch.arange(48.0).reshape(8, 6).sin().requires_grad_()
        y = batchnorm.functional.batch_norm(z, torch.zeros(6), torch.ones(6), vector, vector, training)
        gradients.append(torch.autograd.grad((y * torch.arange(48.0).reshape(8, 6).cos()).sum(), z)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
