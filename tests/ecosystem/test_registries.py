"""Libraries that look a layer up by its class know ours, whichever is imported first."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError


class Derived(batchnorm.BatchNorm2d):
    """As a user may write one."""


def layers():
    adopted = nn.Sequential(nn.BatchNorm2d(4))
    return [
        batchnorm.BatchNorm2d(4),
        batchnorm.BatchNorm2d(4, track_running_stats=False),
        Derived(4),
        batchnorm.convert(adopted, "batchnorm")[0],
        batchnorm.freeze(batchnorm.BatchNorm2d(4)),
    ]


@pytest.mark.parametrize("first", ["batchnorm", "opacus.validators"])
def test_private_training_refuses_a_batch_norm_whichever_is_imported_first(first):
    pytest.importorskip("opacus")
    code = f"""
import warnings; warnings.simplefilter("ignore")
import {first}, batchnorm, sys
assert ("opacus" in sys.modules) == ({first!r} != "batchnorm"), "importing ours imports nothing of theirs"
from opacus.validators import ModuleValidator
assert ModuleValidator.validate(batchnorm.BatchNorm1d(3)), "called valid"
import opacus.validators.batch_norm as module
assert type(module.__spec__.loader).__module__.startswith("importlib") or "frozen" in str(module.__spec__.loader)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore")
def test_no_epsilon_is_reported_for_a_network_with_batch_norm():
    opacus = pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator
    from opacus.validators.errors import UnsupportedModuleError

    for layer in layers():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), layer).train()
        assert not ModuleValidator.is_valid(net)
        with pytest.raises(UnsupportedModuleError):
            opacus.PrivacyEngine().make_private(
                module=net,
                optimizer=torch.optim.SGD(net.parameters(), 0.1),
                data_loader=torch.utils.data.DataLoader([(torch.ones(3, 8, 8), 1)] * 4),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )


@pytest.mark.filterwarnings("ignore")
def test_private_training_puts_a_group_norm_in_its_place_or_says_what_would_be_lost():
    pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    fixed = ModuleValidator.fix(nn.Sequential(batchnorm.BatchNorm2d(4), Derived(4)))
    assert [type(module) for module in fixed] == [nn.GroupNorm, nn.GroupNorm]
    with pytest.raises(ArgumentError, match="activation='relu'"):
        ModuleValidator.fix(nn.Sequential(batchnorm.BatchNorm2d(4, activation="relu")))


def attributed(norm, fused=None):
    torch.manual_seed(0)
    middle = [norm(4, activation=fused)] if fused else [norm(4), nn.ReLU()]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 3, 2)).eval()
    net[1].running_mean.uniform_(-1, 1)
    net[1].running_var.uniform_(0.5, 2)
    nn.init.normal_(net[1].weight)
    return net


X = torch.linspace(-3, 3, 2 * 3 * 8 * 8).view(2, 3, 8, 8).cos()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["DeepLift", "LRP", "GuidedBackprop", "IntegratedGradients"])
def test_attributions_are_those_of_torchs_layer(method):
    kind = getattr(pytest.importorskip("captum.attr"), method)
    target = (1, 0, 0)
    expected = kind(attributed(nn.BatchNorm2d)).attribute(X, target=target)
    got = kind(attributed(batchnorm.BatchNorm2d)).attribute(X, target=target)
    # a forward of two layers and its gradient, in another order of float32 operations
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    fused = kind(attributed(batchnorm.BatchNorm2d, "relu"))
    if method in ("LRP", "GuidedBackprop"):
        with pytest.raises(ArgumentError, match="activation='relu' inside"):
            fused.attribute(X, target=target)
    else:
        torch.testing.assert_close(
            fused.attribute(X, target=target), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


@pytest.mark.filterwarnings("ignore")
def test_deep_lift_refuses_where_a_residual_enters_an_activation():
    attr = pytest.importorskip("captum.attr")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), batchnorm.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), residual=x).mean((2, 3))

    with pytest.raises(ArgumentError, match="residual"):
        attr.DeepLift(Block().eval()).attribute(X, target=0)
    frozen = batchnorm.convert(attributed(batchnorm.BatchNorm2d, "relu"), "frozen")
    expected = attr.DeepLift(attributed(nn.BatchNorm2d)).attribute(X, target=(1, 0, 0))
    torch.testing.assert_close(
        attr.DeepLift(frozen).attribute(X, target=(1, 0, 0)),
        expected,
        rtol=1e-4,
        atol=1e-5 * float(expected.abs().max()),
    )


@pytest.mark.filterwarnings("ignore")
def test_operations_are_counted_as_torchs():
    def counts(net):
        found = {}
        if thop := pytest.importorskip("thop"):
            found["thop"] = thop.profile(net, (X,), verbose=False)
        ptflops = pytest.importorskip("ptflops")
        for backend in ("pytorch", "aten"):
            found[backend] = ptflops.get_model_complexity_info(
                net,
                (3, 8, 8),
                print_per_layer_stat=False,
                verbose=False,
                as_strings=False,
                backend=backend,
            )
        pruning = pytest.importorskip("torch_pruning")
        found["torch_pruning"] = pruning.utils.count_ops_and_params(net, X)
        return found

    assert counts(attributed(batchnorm.BatchNorm2d)) == counts(attributed(nn.BatchNorm2d))
