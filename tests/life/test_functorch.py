"""torch.func, forward-mode derivatives and derivatives of derivatives, in training mode with statistics too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import batchnorm

KINDS = ["train", "eval", "untracked", "frozen"]


def layer(kind="train", **options):
    made = batchnorm.BatchNorm1d(3, dtype=torch.float64, track_running_stats=kind != "untracked", **options)
    nn.init.uniform_(made.weight, 0.5, 2)
    made.running_var is not None and made.running_var.uniform_(0.5, 2)
    if kind == "frozen":
        batchnorm.freeze(made)
    return made.train(kind != "eval")


def inputs(n=4):
    return torch.randn(n, 3, 2, dtype=torch.float64)


def state(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_state(ours, theirs):
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def loss(made, z):
    return (made(z).square() * torch.arange(1.0, 7.0, dtype=z.dtype).view(3, 2)).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_grad_vjp_jacrev_and_jacfwd_agree_with_autograd_and_count_one_batch(kind):
    z = inputs()
    for transform in (
        lambda m: grad(lambda z: loss(m, z))(z),
        lambda m: vjp(lambda z: loss(m, z), z)[1](torch.ones((), dtype=z.dtype))[0],
        lambda m: jacrev(lambda z: loss(m, z))(z),
        lambda m: jacfwd(lambda z: loss(m, z))(z),
    ):
        ours, plain = (copy.deepcopy(made) for made in [layer(kind, activation="gelu")] * 2)
        leaf = z.clone().requires_grad_()
        expected = torch.autograd.grad(loss(plain, leaf), leaf)[0]
        torch.testing.assert_close(transform(ours), expected)
        assert_same_state(ours, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_is_the_directional_derivative_and_counts_one_batch(kind):
    ours = layer(kind, activation="tanh")
    plain = copy.deepcopy(ours)
    z, direction = inputs(), inputs()
    y, tangent = jvp(ours, (z,), (direction,))
    torch.testing.assert_close(y, plain(z))
    assert_same_state(ours, plain)
    step = 1e-6
    probe = copy.deepcopy(plain)
    difference = (probe(z + step * direction) - probe(z - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_is_the_jacobian_of_the_gradient(kind):
    ours = layer(kind, activation="silu")
    z = inputs(2)
    expected = torch.autograd.functional.hessian(lambda z: loss(copy.deepcopy(ours), z), z)
    torch.testing.assert_close(hessian(lambda z: loss(ours, z))(z), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"momentum": None}], ids=str)
def test_vmap_is_a_loop_over_examples_statistics_included(kind, options):
    ours = layer(kind, **options)
    looped = copy.deepcopy(ours)
    z = inputs(20).view(5, 4, 3, 2)
    z[2, 0, 1] = float("nan")  # skipped in that example alone
    y = vmap(ours)(z)
    torch.testing.assert_close(y, torch.stack([looped(example) for example in z]), equal_nan=True)
    assert_same_state(ours, looped)


def test_vmap_along_another_axis_and_nested():
    ours = layer()
    looped = copy.deepcopy(ours)
    z = torch.randn(4, 2, 3, 3, 2, dtype=torch.float64)
    y = vmap(vmap(ours, in_dims=0, out_dims=0), in_dims=1, out_dims=1)(z)
    for j in range(z.shape[1]):
        for i in range(z.shape[0]):
            torch.testing.assert_close(y[i, j], looped(z[i, j]))
    assert_same_state(ours, looped)


def test_gradients_of_each_example_with_masks_of_their_own():
    ours = layer(activation="relu")
    looped = copy.deepcopy(ours)
    z, mask = inputs(12).view(3, 4, 3, 2), torch.rand(3, 4, 2) > 0.3

    def one(made, parameters, z, mask):
        return functional_call(made, parameters, (z,), {"mask": mask}).square().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    each = vmap(lambda z, mask: grad(lambda p: one(ours, p, z, mask))(parameters))(z, mask)
    for i in range(3):
        leaf = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(one(looped, leaf, z[i], mask[i]), list(leaf.values()))
        for gradient, wanted in zip(each.values(), expected, strict=True):
            torch.testing.assert_close(gradient[i], wanted)
    assert_same_state(ours, looped)


def test_an_error_in_one_example_of_vmap_moves_nothing():
    ours = layer(on_nonfinite="raise")
    z = inputs(12).view(3, 4, 3, 2)
    z[2, 0, 0] = float("nan")
    before = state(ours)
    with pytest.raises(batchnorm.NonFiniteError):
        vmap(ours)(z)
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(batchnorm.TooFewValuesError):
        vmap(lambda z, mask: ours(z, mask=mask))(inputs(12).view(3, 4, 3, 2), mask)
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name])


def test_torchs_layer_cannot_do_what_ours_can():
    theirs, ours = nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    z = torch.randn(5, 4, 3)
    for transform in (lambda m: vmap(m)(z), lambda m: jacrev(m)(z[0]), lambda m: jvp(m, (z[0],), (z[0],))):
        with pytest.raises(RuntimeError, match=r"in-place|inplace|running"):
            transform(theirs)
        transform(ours)
    assert ours.num_batches_tracked == 7


def test_accumulate_pools_what_vmap_tells():
    ours = layer(momentum=1.0)
    z = inputs(12).view(3, 4, 3, 2)
    with batchnorm.accumulate(ours):
        vmap(ours)(z)
    assert ours.num_batches_tracked == 1
    flat = z.view(12, 3, 2)
    torch.testing.assert_close(ours.running_mean, flat.mean((0, 2)))
    torch.testing.assert_close(ours.running_var, flat.transpose(0, 1).reshape(3, -1).var(1))


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_functional_call_moves_the_buffers_that_are_passed_and_no_others(kind):
    made = layer(kind)
    plain = copy.deepcopy(made)
    before = state(made)
    parameters = {name: p.detach() * 2 for name, p in made.named_parameters()}
    buffers = {name: b.clone() for name, b in made.named_buffers()}
    z = inputs()
    y = functional_call(made, (parameters, buffers), (z,))
    for name, buffer in made.named_buffers():
        assert torch.equal(buffer, before[name])
    for name, p in plain.named_parameters():
        p.data.copy_(parameters[name])
    torch.testing.assert_close(y, plain(z))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("shared", [True, False], ids=["one input", "an input each"])
def test_an_ensemble_runs_as_one_model_with_a_state_each(kind, shared):
    members = [layer(kind) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(members[0]).to("meta")
    z = inputs() if shared else inputs(12).view(3, 4, 3, 2)

    def run(parameters, buffers, z):
        return functional_call(skeleton, (parameters, buffers), (z,))

    y = vmap(run, in_dims=(0, 0, None if shared else 0))(parameters, buffers, z)
    for i, member in enumerate(members):
        torch.testing.assert_close(y[i], member(z if shared else z[i]))
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)


def test_gradient_of_an_ensemble_in_training():
    members = [layer() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    z = inputs()

    def run(parameters, buffers):
        return functional_call(members[0], (parameters, buffers), (z,)).pow(3).sum()

    each = vmap(grad(run))(parameters, buffers)
    for i, member in enumerate(members):
        expected = torch.autograd.grad(member(z).pow(3).sum(), list(member.parameters()))
        for gradient, wanted in zip(each.values(), expected, strict=True):
            torch.testing.assert_close(gradient[i], wanted)
        for name, buffer in member.named_buffers():
            torch.testing.assert_close(buffers[name][i], buffer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_first_and_second_derivatives_in_every_mode_of_differentiation(kind, activation):
    made = layer(kind, activation=activation)
    z, residual = (inputs(3).requires_grad_() for _ in range(2))

    def run(z, residual, weight, bias):
        return functional_call(made, {"weight": weight, "bias": bias}, (z, residual))

    arguments = (z, residual, *made.parameters())
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, arguments)


def test_forward_mode_leaves_no_derivative_in_the_statistics():
    made = layer()
    plain = copy.deepcopy(made)
    z = inputs()
    with forward_ad.dual_level():
        made(forward_ad.make_dual(z, inputs()))
        assert forward_ad.unpack_dual(made.running_mean).tangent is None
    plain(z)
    assert_same_state(made, plain)


def test_batched_gradients_through_one_forward():
    for kind in ("train", "eval"):
        made = layer(kind, activation="relu")
        z = inputs().requires_grad_()
        y = made(z)
        directions = torch.randn(5, *y.shape, dtype=y.dtype)
        together = torch.autograd.grad(y, z, directions, is_grads_batched=True, retain_graph=True)[0]
        apart = torch.stack([torch.autograd.grad(y, z, d, retain_graph=True)[0] for d in directions])
        torch.testing.assert_close(together, apart)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize():
    made = layer("eval")
    z = inputs()
    y, tangent_of = linearize(made, z)
    torch.testing.assert_close(y, made(z))
    torch.testing.assert_close(tangent_of(z), jvp(made, (z,), (z,))[1])
