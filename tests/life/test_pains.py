"""Silent wrong answers of today's software, and the right ones here, side by side.

What concerns folding, fusing and converting whole networks has its tests beside those tools.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import batchnorm


def exact(z, eps=1e-5):
    wide = z.double()
    others = [a for a in range(z.dim()) if a != 1]
    shape = [1, -1] + [1] * (z.dim() - 2)
    mean, var = wide.mean(others), wide.var(others, correction=0)
    return (wide - mean.view(shape)) / (var.view(shape) + eps).sqrt(), mean, var


def layouts(z):
    """The same values as NCHW, channels_last and (N, C)."""
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).contiguous()
    return {"NCHW": z, "channels_last": z.contiguous(memory_format=torch.channels_last), "NC": flat}


def errors_of(library, z):
    """Largest error of the output, and of the variance as a factor."""
    found = {}
    for name, laid in layouts(z).items():
        layer = (library.BatchNorm1d if name == "NC" else library.BatchNorm2d)(z.shape[1], momentum=1.0)
        y = layer(laid)
        wanted, _, var = exact(laid)
        m = laid.numel() / laid.shape[1]
        ratio = layer.running_var.double() * (m - 1) / m / var
        found[name] = (float((y.double() - wanted).detach().abs().max()), float((ratio - 1).abs().max()))
    return found


def test_a_mean_a_million_times_the_deviation():
    z = (torch.randn(32, 4, 64, 64, dtype=torch.float64) + 1e6).float()
    theirs, ours = errors_of(nn, z), errors_of(batchnorm, z)
    assert max(error for error, _ in theirs.values()) > 1, "torch is off by whole deviations in some layout"
    for layout, (error, variance) in ours.items():
        assert error < 1e-2, layout
        assert variance < 1e-3, layout
        assert error <= theirs["NCHW"][0] * 1.01 + 1e-6, "never worse than torch's best layout"


def test_a_large_constant_comes_out_as_beta():
    z = torch.full((16, 3, 7, 9), 1e8)
    worst = 0.0
    for laid in layouts(z).values():
        cls = "BatchNorm1d" if laid.dim() == 2 else "BatchNorm2d"
        theirs, ours = getattr(nn, cls)(3), getattr(batchnorm, cls)(3)
        nn.init.normal_(ours.bias)
        worst = max(worst, float(theirs(laid).detach().abs().max()))
        beta = ours.bias.detach().view([1, 3] + [1] * (laid.dim() - 2)).expand_as(laid)
        torch.testing.assert_close(ours(laid), beta, rtol=1e-6, atol=1e-6)
    assert worst > 1, "torch: not even near 0"


def test_the_same_bits_for_every_number_of_threads():
    z = torch.randn(64, 8, 9, 9)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, laid in layouts(z).items():
                layer = (batchnorm.BatchNorm1d if name == "NC" else batchnorm.BatchNorm2d)(8)
                leaf = laid.clone(memory_format=torch.preserve_format).requires_grad_()
                y = layer(leaf)
                y.square().sum().backward()
                got = [y, leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var]
                for a, b in zip(got, results.setdefault(name, got), strict=True):
                    assert torch.equal(a, b), (name, threads)
    finally:
        torch.set_num_threads(before)


def test_the_variance_of_a_far_off_mean_is_never_negative():
    # precise-BN as many wrote it: E[x^2] - E[x]^2 over batches, in float32
    batches = [torch.randn(64, 8) * 0.1 + 1000 for _ in range(10)]
    squares = torch.stack([b.square().mean(0) for b in batches]).mean(0)
    means = torch.stack([b.mean(0) for b in batches]).mean(0)
    textbook = squares - means.square()
    layer = batchnorm.BatchNorm1d(8)
    batchnorm.calibrate(layer, batches, progress=False)
    true = torch.cat(batches).double().var(0)
    assert float((textbook / true - 1).abs().max()) > 1
    torch.testing.assert_close(layer.running_var.double(), true, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", ["uneven", "apart"])
def test_update_bn_weighs_batches_alike_and_forgets_the_spread_between_them(case):
    if case == "uneven":
        batches = [torch.randn(64, 1), torch.randn(4, 1) * 3 + 10]
    else:
        batches = [torch.randn(32, 1) + shift for shift in (-3.0, 0.0, 3.0)]
    together = torch.cat(batches)
    theirs, ours = nn.Sequential(nn.BatchNorm1d(1)), nn.Sequential(batchnorm.BatchNorm1d(1))
    update_bn(batches, theirs)
    batchnorm.calibrate(ours, batches, progress=False)
    true = together.var(0)
    variance_off = float((theirs[0].running_var / true - 1).abs())
    mean_off = float((theirs[0].running_mean - together.mean(0)).abs())
    assert mean_off > 3 if case == "uneven" else variance_off > 0.5
    torch.testing.assert_close(ours[0].running_mean, together.mean(0))
    torch.testing.assert_close(ours[0].running_var, true)


def test_one_nan_batch():
    bad = torch.randn(8, 2)
    bad[0, 0] = float("nan")
    theirs, ours = nn.BatchNorm1d(2), batchnorm.BatchNorm1d(2)
    for layer in (theirs, ours):
        layer(bad)
        for _ in range(50):
            layer(torch.randn(8, 2))
    assert torch.isnan(theirs.running_mean).any()
    assert torch.isfinite(ours.running_mean).all()
    assert ours.num_batches_skipped == 1


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    theirs, ours = nn.BatchNorm1d(2), batchnorm.BatchNorm1d(2)
    for layer in (theirs, ours):
        z = torch.randn(8, 2, requires_grad=True)
        checkpoint(layer, z, use_reentrant=reentrant).sum().backward()
    assert theirs.num_batches_tracked == 2
    assert ours.num_batches_tracked == 1


def test_train_thaws_a_norm_in_eval():
    theirs, ours = nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(batchnorm.BatchNorm1d(2))
    theirs[0].eval()
    batchnorm.freeze(ours)
    for net in (theirs, ours):
        net.train()
        net(torch.randn(8, 2))
    assert theirs[0].num_batches_tracked == 1
    assert ours[0].num_batches_tracked == 0


def test_averaged_weights_have_stale_statistics_until_they_are_calibrated():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 2, bias=False), batchnorm.BatchNorm1d(2))
    averaged = AveragedModel(net, use_buffers=True)
    for scale in (1.0, 5.0):
        nn.init.eye_(net[0].weight).data.mul_(scale)
        net[1].reset_running_stats()
        for _ in range(100):
            net(torch.randn(64, 2) + 1)
        averaged.update_parameters(net)
    data = [torch.randn(256, 2) + 1 for _ in range(4)]
    z = torch.cat(data)
    norm = averaged.module[1]
    true = averaged.module[0](z).detach().var(0)
    assert float((norm.running_var / true - 1).abs().max()) > 0.3, (
        "an average of variances is not the variance"
    )
    batchnorm.calibrate(averaged, data, progress=False)
    torch.testing.assert_close(norm.running_var, true, rtol=1e-4, atol=1e-4)


def test_two_forwards_before_a_backward_and_buffers_that_are_broadcast_between_them():
    # what DDP does with the buffers at every forward of training
    def twice(layer):
        z = torch.randn(8, 2, requires_grad=True)
        first = layer(z)
        with torch.no_grad():
            for buffer in layer.buffers():
                buffer.copy_(buffer.clone())
        (first.square().sum() + layer(torch.randn(8, 2)).sum()).backward()
        return z, layer

    for training in (True, False):
        z, layer = twice(batchnorm.BatchNorm1d(2).train(training))
        alone = z.detach().clone().requires_grad_()
        batchnorm.BatchNorm1d(2).train(training)(alone).square().sum().backward()
        torch.testing.assert_close(z.grad, alone.grad)
        assert layer.num_batches_tracked == 2 * training


def test_vmap_over_a_layer_in_training():
    z = torch.randn(3, 8, 2)
    with pytest.raises(RuntimeError, match="in place"):
        torch.func.vmap(partial(nn.BatchNorm1d(2)))(z)
    layer = batchnorm.BatchNorm1d(2)
    torch.func.vmap(layer)(z)
    assert layer.num_batches_tracked == 3
