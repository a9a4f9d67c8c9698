"""Whole calls in the core: the same bits as the way that asks one by one, and nothing done where anybody watches."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.functional import batch_norm
from batchnorm.kernels import cpu
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.population import Tracking

pytestmark = pytest.mark.skipif(cpu.engine is None, reason="the C++ core is not there")


@pytest.fixture
def one_by_one(monkeypatch):
    def leave(*names):
        for name in names or ("train_at_once", "infer_at_once", "backward_at_once"):
            monkeypatch.setattr(cpu, name, lambda *given: None)

    return leave


def step(dtype, shape, activation, residual, training, vectors=torch.float32):
    torch.manual_seed(0)
    c = shape[1]
    z = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
    r = torch.randn(shape).to(dtype).requires_grad_() if residual else None
    gamma, beta = ((torch.rand(c) + 0.5).to(vectors).requires_grad_() for _ in range(2))
    mean, var = (
        torch.zeros(c, dtype=torch.promote_types(dtype, torch.float32)),
        torch.ones(c, dtype=torch.promote_types(dtype, torch.float32)),
    )
    y = batch_norm(z, mean, var, gamma, beta, training, 0.3, activation=activation, residual=r)
    y.backward(torch.randn(shape).to(dtype))
    return [y, mean, var, *(t.grad for t in (z, r, gamma, beta) if t is not None)]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "vectors"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_the_bits_are_those_of_the_long_way(one_by_one, activation, residual, training, dtype, vectors):
    for shape in ((6, 5), (4, 3, 2, 5)):
        quick = step(dtype, shape, activation, residual, training, vectors)
        one_by_one()
        for have, want in zip(
            quick, step(dtype, shape, activation, residual, training, vectors), strict=True
        ):
            assert have.dtype == want.dtype
            assert torch.equal(have, want)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("correction", [1, 0])
def test_running_statistics_are_those_of_the_long_way(one_by_one, momentum, correction):
    first = batchnorm.BatchNorm1d(4, momentum=momentum, running_var_correction=correction)
    second = copy.deepcopy(first)
    z = torch.randn(3, 7, 4)
    z[1, 2, 3] = torch.nan
    for batch in z:
        first(batch)
    one_by_one()
    for batch in z:
        second(batch)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert first.num_batches_skipped == second.num_batches_skipped == 1


def call(z=None, gamma=None, beta=None, residual=None, mean=None, var=None):
    z = torch.randn(4, 3) if z is None else z
    mean, var = torch.zeros(3) if mean is None else mean, torch.ones(3) if var is None else var
    trained = cpu.train_at_once(z, gamma, beta, residual, 1, 1e-5, None, Tracking(mean, var))
    inferred = cpu.infer_at_once(z, mean, var, gamma, beta, residual, 1, 1e-5, None)
    return trained, inferred


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_done_where_somebody_watches():
    z, seen = torch.randn(4, 3), []

    def look(x):
        mean, var = torch.zeros(3), torch.ones(3)
        seen.append((*call(z, mean=mean, var=var), mean, var))
        return x * 1

    assert all(y is not None for y in call())
    with Watcher():
        look(z)
    torch.jit.trace(look, z, check_trace=False)
    torch.func.vmap(look)(z)
    torch.func.grad(lambda x: look(x).sum())(z)
    torch.func.functionalize(look)(z)
    with forward_ad.dual_level():
        look(z)
    assert len(seen) == 6
    for trained, inferred, mean, var in seen:
        assert trained is None
        assert inferred is None
        assert torch.equal(mean, torch.zeros(3))
        assert torch.equal(var, torch.ones(3))
    assert all(y is not None for y in call())


def test_a_checkpoint_counts_a_batch_once():
    layer = batchnorm.BatchNorm1d(3, momentum=0.5)
    plain = torch.nn.BatchNorm1d(3, momentum=0.5)
    z = torch.randn(8, 3)
    for use_reentrant in (True, False):
        x = z.clone().requires_grad_()
        checkpoint(lambda x: layer(x).square(), x, use_reentrant=use_reentrant).sum().backward()
        plain(z)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    assert layer.num_batches_tracked == 2


NEGATIVE = torch._neg_view(torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "given",
    [
        {"z": torch._neg_view(torch.randn(4, 3))},
        {"gamma": NEGATIVE},
        {"beta": NEGATIVE},
        {"residual": torch._neg_view(torch.randn(4, 3))},
        {"z": torch.randn(4, 3).to_sparse()},
        {"z": torch.randn(4, 3).to_mkldnn()},
        {"z": torch.randn(4, 3, device="meta")},
        {"z": torch.randn(4, 3, dtype=torch.complex64)},
        {"z": torch.ones(4, 3, dtype=torch.int64)},
        {"z": torch.nn.Parameter(torch.randn(4, 3))},
        {"z": 3},
        {"mean": torch._neg_view(torch.ones(3))},
        {"z": [[1.0, 2.0, 3.0]]},
        {"gamma": [1.0, 1.0, 1.0]},
        {"gamma": torch.ones(4)},
        {"gamma": torch.ones(1)},
        {"beta": torch.ones(3, 1)},
        {"mean": torch.zeros(2)},
        {"var": torch.ones(3, dtype=torch.int64)},
        {"residual": torch.randn(4, 2)},
        {"residual": torch.randn(4, 3).double()},
        {"residual": "x"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_needs_a_look_is_declined(given):
    assert call(**given) == (None, None)


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), "a", None, 1, True])
def test_an_eps_that_must_be_looked_at_is_declined(eps):
    z, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    assert cpu.train_at_once(z, None, None, None, 1, eps, None, None) is None
    assert cpu.infer_at_once(z, mean, var, None, None, None, 1, eps, None) is None


@pytest.mark.parametrize(
    ("momentum", "correction"), [(1.5, 1), (-0.1, 1), (float("nan"), 1), ("a", 1), (0.1, 2), (0.1, None)]
)
def test_settings_out_of_range_are_declined(momentum, correction):
    tracking = Tracking(torch.zeros(3), torch.ones(3), None, momentum, correction)
    assert cpu.train_at_once(torch.randn(4, 3), None, None, None, 1, 1e-5, None, tracking) is None
    assert torch.equal(tracking.running_mean, torch.zeros(3))


def test_the_sign_that_memory_does_not_hold_is_seen():
    z = torch.randn(8, 3)
    statistics = torch._neg_view(torch.ones(3)), torch.ones(3)
    have, want = batch_norm(z, *statistics), torch.nn.functional.batch_norm(z, *statistics)
    torch.testing.assert_close(have, want)
    for gamma, beta in ((NEGATIVE, None), (None, NEGATIVE), (NEGATIVE, NEGATIVE)):
        for training in (True, False):
            statistics = torch.zeros(3), torch.ones(3)
            have = batch_norm(z, *statistics, gamma, beta, training)
            want = torch.nn.functional.batch_norm(z, torch.zeros(3), torch.ones(3), gamma, beta, training)
            torch.testing.assert_close(have, want)


def test_one_value_a_channel_is_declined():
    assert cpu.train_at_once(torch.randn(1, 3), None, None, None, 1, 1e-5, None, None) is None
    assert cpu.train_at_once(torch.randn(0, 3), None, None, None, 1, 1e-5, None, None) is None
    assert cpu.train_at_once(torch.randn(3), None, None, None, 1, 1e-5, None, None) is None


@pytest.mark.parametrize("other", ["create_graph", "batched"])
def test_a_backward_that_is_watched_goes_the_long_way(other):
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = batch_norm(z, None, None, training=True, activation="silu")
    dy = torch.randn(2, 6, 3, dtype=torch.float64)
    if other == "batched":
        (found,) = torch.autograd.grad(y, z, dy, is_grads_batched=True)
        for have, one in zip(found, dy, strict=True):
            y = batch_norm(z, None, None, training=True, activation="silu")
            torch.testing.assert_close(have, torch.autograd.grad(y, z, one)[0])
    else:
        (first,) = torch.autograd.grad(y, z, dy[0], create_graph=True)
        assert first.requires_grad
        assert torch.autograd.gradgradcheck(
            lambda z: batch_norm(z, None, None, training=True, activation="silu"), (z,), (dy[0],)
        )


def test_threads_of_other_modes_do_not_disturb():
    from threading import Thread

    found = []
    with Watcher(), torch.no_grad():
        thread = Thread(target=lambda: found.append(call(torch.randn(4, 3, requires_grad=True))[0]))
        thread.start()
        thread.join()
    assert found[0] is not None
    assert found[0].requires_grad
