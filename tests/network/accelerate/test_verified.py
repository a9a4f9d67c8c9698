"""`accelerate` with an example: what it finds, what it lets pass, and what is compiled by then."""

import copy

import pytest
import torch
from networks import NETWORKS, image, prepared
from torch import nn

from batchnorm import accelerate, record
from batchnorm.errors import VerificationError
from batchnorm.kernels import cpu
from batchnorm.network.accelerate import norm_calls

# as they are, before anything is changed for a test
_ALONE, _JOINED, _Tracking = norm_calls.ALONE, norm_calls.JOINED, norm_calls.Tracking


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["output", "gradient", "statistics"])
def test_a_wrong_kernel_is_found_and_the_model_stays_as_it_was(what, monkeypatch):
    model = prepared(NETWORKS["functional"][0])
    before = copy.deepcopy(model.state_dict())
    if what == "statistics":
        monkeypatch.setattr(
            norm_calls, "Tracking", lambda m, v, **k: _Tracking(m, v, **{**k, "momentum": 0.2})
        )
    else:
        method = "_normalize" if what == "output" else "_backward"
        original = getattr(cpu.CpuEngine, method)

        def off(*args, **kwargs):
            first, *rest = original(*args, **kwargs)
            return (first * 1.001, *rest)

        monkeypatch.setattr(cpu.CpuEngine, method, staticmethod(off))
    with pytest.raises(VerificationError, match=f"network, {what}"):
        accelerate(model, image())
    assert "_compiled_call_impl" not in vars(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_a_bias_in_front_of_a_norm_is_no_reason_to_refuse(seed):
    torch.manual_seed(seed)
    c = 3 + seed
    model = nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1), nn.BatchNorm2d(c), nn.SiLU(), nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip
    accelerate(model, torch.randn(3, 3, 6, 6))
    assert len(record(model).of("called")) == 2


@pytest.mark.parametrize("seed", range(3))
def test_values_whose_side_of_a_kink_is_rounding_are_no_reason_to_refuse(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))
    # every second image is one constant, whose every value lies at the mean of the others, but for rounding
    x = torch.randn(16, 3, 8, 8)
    x[1:8:2] = -x[0:8:2]
    x[8:] = 1e-8 * torch.randn(8, 3, 8, 8)
    accelerate(model, x)
    assert len(record(model).of("called")) == 1


def test_a_small_error_of_a_kernel_is_found_in_a_network_of_many_kinks(monkeypatch):
    original = cpu.CpuEngine._backward

    def off(*args, **kwargs):
        first, *rest = original(*args, **kwargs)
        return (first * 1.001, *rest)

    monkeypatch.setattr(cpu.CpuEngine, "_backward", staticmethod(off))
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    with pytest.raises(VerificationError, match="gradient of"):
        accelerate(nn.Sequential(*layers), torch.randn(4, 3, 16, 16))


def test_what_was_compiled_for_the_copies_serves_both_modes():
    model = accelerate(prepared(NETWORKS["functional"][0]), image())
    graphs = model._compiled_call_impl.compiled.graphs
    count = len(graphs)
    assert count >= 2
    for training in (True, False):
        model.train(training)(image()).sum().backward()
    assert len(graphs) == count


def test_random_state_modes_and_gradients_of_the_model_stay():
    model = prepared(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)))
    model.train()
    model[1].eval()
    before, x = torch.get_rng_state(), image().requires_grad_()
    accelerate(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert x.grad is None
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.parametrize("size", [6, 34])
def test_small_inputs_are_torchs_and_large_ones_ours(size, monkeypatch):
    # 4 x 4 x size x size values: below and above what a call costs
    monkeypatch.setattr(norm_calls, "ALONE", _ALONE)
    monkeypatch.setattr(norm_calls, "JOINED", _JOINED)
    served = []

    def noting(run):
        def noted(*args, **kwargs):
            found = run(*args, **kwargs)
            served.extend([] if found is None else [1])
            return found

        return noted

    for name in ("train_at_once", "infer_at_once"):
        monkeypatch.setattr(cpu, name, noting(getattr(cpu, name)))
    monkeypatch.setattr(cpu.CpuEngine, "_normalize", staticmethod(noting(cpu.CpuEngine._normalize)))
    model = prepared(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    plain = copy.deepcopy(model)
    accelerate(model)
    x = torch.randn(4, 3, size, size).double()
    for training in (True, False):
        served.clear()
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
        assert bool(served) == (size > 6 or not training)
        assert ("576 values are so few" in record(model).reason("1")) == (size == 6 and training)
    # now the size is one that changes, so each call decides
    for side in (5, 60):
        x = torch.randn(4, 3, side, side).double()
        served.clear()
        torch.testing.assert_close(model.train()(x), plain.train()(x))
        assert bool(served) == (side == 60)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
