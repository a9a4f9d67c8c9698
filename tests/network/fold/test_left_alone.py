"""What fold leaves alone, what it keeps, and whole networks through it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import SharedNorm, check, norms, trained
from torch import Tensor, nn
from torch.nn.utils import prune

import batchnorm
from batchnorm.errors import ArgumentError, ShapeError, TraceError, VerificationError
from batchnorm.network.fold.affine import foldable_layer
from batchnorm.network.fold.fold import fold
from batchnorm.network.insert.insert import insert
from batchnorm.network.record import record


# -- hooks, parametrizations, other people's modules --------------------------------------------------------
def _pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def _hooked(which: int) -> nn.Module:
    net = _pair()
    net[which].register_forward_hook(lambda module, args, out: None)
    return net


def _pruned() -> nn.Module:
    net = _pair()
    prune.l1_unstructured(net[0], "weight", 0.5)
    return net


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


def _without_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))


def _domains() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNorm2d(4))
    net[1].add_domain("night")
    return net


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.square().sum((1, 2, 3), keepdim=True).sqrt(), self.bias)


class Stubborn(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _hooked(0), "hooks"),
        (lambda: _hooked(1), "hooks"),
        (_pruned, "hooks"),
        (_weight_norm, "parametrization"),
        (_without_statistics, "no running statistics"),
        (_domains, "several domains"),
        (lambda: nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4)), "scales with its weight"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Stubborn(4)), "not a scale and a shift"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "it follows ReLU"),
    ],
)
def test_what_cannot_be_folded_is_left_alone_with_the_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    net = make()
    left = [path for path in norms(net) if "domains" not in path]
    trained(net)
    x = torch.randn(2, 3, 6, 6)
    for example in (None, x):
        folded = fold(net, example)
        assert reason in record(folded).reason(left[0])
        torch.testing.assert_close(folded(x), net.eval()(x))


class Frozen(nn.Module):
    """A lookalike with its eps in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-2).rsqrt()
        return x * scale + (self.bias - self.running_mean * scale.flatten()).reshape(1, -1, 1, 1)


class WithActivation(nn.BatchNorm2d):
    """Norm, dropout and activation in one module, as model libraries have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


class Same(nn.Conv2d):
    """Pads by itself, as ports from another framework do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, self.stride)


@pytest.mark.parametrize(
    ("norm", "rest"),
    [
        (Frozen, "FoldedAway"),
        (WithActivation, "SiLU"),
        (nn.SyncBatchNorm, "FoldedAway"),
        (batchnorm.BatchNorm2d, "FoldedAway"),
        (lambda c: batchnorm.BatchNorm2d(c, activation="gelu"), "GELU"),
        (lambda c: batchnorm.BatchNorm2d(c, activation="leaky_relu"), "LeakyReLU"),
    ],
)
@pytest.mark.parametrize("layer", [nn.Conv2d, Same])
def test_norms_and_layers_of_every_make_are_folded(norm: Any, rest: str, layer: Any) -> None:
    net = nn.Sequential(layer(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1))
    trained(net)
    assert type(check(net, torch.randn(2, 3, 6, 6), left=[])[1]).__name__ == rest


def test_a_residual_given_to_our_norm_keeps_it() -> None:
    class Given(SharedNorm):
        def __init__(self) -> None:
            super().__init__()
            self.bn = batchnorm.BatchNorm2d(4, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x), residual=x[:, :1].expand(-1, 4, -1, -1))

    assert "residual" in record(check(Given(), torch.randn(2, 3, 4, 4), left=["bn"])).reason("bn")


# -- what is kept --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_memory_format_requires_grad_and_names_are_kept(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    net.to(dtype).to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    tol = 50 * torch.finfo(dtype).eps
    folded = check(net, torch.randn(2, 4, 6, 6, dtype=dtype), left=[], tol=tol)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded[0].weight.requires_grad
    assert not folded[0].bias.requires_grad
    assert folded[3].weight.requires_grad
    assert [name for name, _ in folded.named_children()] == ["0", "1", "2", "3"]


def test_values_that_the_dtype_cannot_hold_are_not_folded() -> None:
    net = trained(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
    net[1].running_var.fill_(1e-12)
    net[1].eps = 1e-12
    net[1].weight.data.fill_(1e3)
    net = net.half().eval()
    net[1].float()
    folded = fold(net)
    assert norms(folded) == ["1"]
    assert "do not fit float16" in record(folded).reason("1")


def test_statistics_that_are_not_finite_are_not_folded() -> None:
    net = trained(_pair())
    net[1].running_mean[0] = float("nan")
    folded = fold(net)
    assert "not finite" in record(folded).reason("1")


def test_complex_and_other_weights_are_refused() -> None:
    assert "complex64" in foldable_layer(nn.Linear(2, 2, dtype=torch.complex64))
    assert foldable_layer(nn.Linear(2, 2)) == ""


# -- round trips and real networks ----------------------------------------------------------------------------
@pytest.mark.parametrize("given", ["nothing", "example", "data"])
def test_what_insert_made_is_a_plain_network_again(given: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.c1(x))
            x = F.relu(self.c2(x) + x).mean((2, 3))
            return self.out(F.gelu(self.fc(x)))

    net, x = Net(), torch.randn(8, 3, 6, 6)
    normalized = insert(net, **{"nothing": {}, "example": {"example": x}, "data": {"data": [x]}}[given])
    if given != "data":
        trained(normalized)
    folded = fold(normalized, x)
    assert folded.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(folded(x), normalized.eval()(x), rtol=1e-5, atol=1e-5)
    if given == "data":
        torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_network_of_an_unusual_input_is_folded_on_an_example_and_left_alone_without() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = _pair()

        def forward(self, images: list[Tensor], scale: float) -> list[Tensor]:
            return [self.block(image[None]) * scale for image in images]

    net = trained(Parent()).eval()
    assert "pass example=" in record(fold(net)).reason("block.1")
    images = [torch.randn(3, 6, 6)]
    folded = fold(net, (images, 2.0))
    assert norms(folded) == []
    torch.testing.assert_close(folded(images, 2.0), net(images, 2.0), rtol=1e-5, atol=1e-5)


def test_an_answer_that_changes_is_never_handed_back() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            z = self.bn(self.conv(x))
            return z if type(self.bn) is nn.BatchNorm2d else 2 * z

    class Reads(Looks):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.num_features

    for kind in (Looks, Reads):
        net = trained(kind())
        with pytest.raises(VerificationError):
            fold(net, torch.randn(1, 3, 5, 5))
        assert norms(net) == ["bn"]


def test_a_norm_kept_in_a_plain_list_is_left_alone() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.steps = [self.conv, self.bn]

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    assert "steps" in record(check(Keeps(), torch.randn(1, 3, 5, 5), left=["bn"])).reason("bn")


@pytest.mark.parametrize(
    ("model", "example", "error"),
    [
        ("a string", None, ArgumentError),
        (_pair(), torch.randn(1, 5, 6, 6), TraceError),
    ],
)
def test_bad_input_is_refused(model: Any, example: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        fold(model, example)


def test_a_scripted_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(_pair())
    with pytest.raises(ArgumentError, match="scripted"):
        fold(scripted)


def test_networks_of_transformers_are_folded_whole() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 32, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 2, 2, 2, 2], ["Subsample", 8, 2, 2, 2, 2]],
    )  # fmt: skip
    net = trained(transformers.LevitForImageClassification(config)).eval()
    x = torch.randn(2, 3, 32, 32)
    folded = fold(net, {"pixel_values": x})
    left = {path: record(folded).reason(path) for path in norms(folded)}
    # the head's norms stand behind a mean and in front of a Linear, which takes them
    assert left == {}
    torch.testing.assert_close(folded(x).logits, net(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_resnet_50_is_folded_in_under_two_seconds() -> None:
    transformers = pytest.importorskip("transformers")
    net = trained(transformers.ResNetModel(transformers.ResNetConfig())).eval()
    fold(_pair())
    took, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            # of one thread: what other programs take meanwhile does not count
            begun = time.process_time()
            folded = fold(net)
            took.append(time.process_time() - begun)
    finally:
        torch.set_num_threads(threads)
    assert norms(folded) == []
    assert min(took) < 2


def test_a_hook_on_a_block_around_the_layer_keeps_the_norm_outside_of_it() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    seen = []
    net[0].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    x = torch.randn(2, 3, 6, 6)
    folded = check(net, x, left=["1"])
    seen.clear()
    torch.testing.assert_close(folded(x), net(x))
    torch.testing.assert_close(seen[0], seen[1])


def test_an_activation_inside_the_norm_of_a_linear_layer_does_not_hide_the_guard() -> None:
    net = trained(nn.Sequential(nn.Linear(4, 6), batchnorm.BatchNorm1d(6, activation="relu"))).eval()
    folded = fold(net)
    x = torch.randn(3, 4)
    torch.testing.assert_close(folded(x), net(x))
    with pytest.raises(ShapeError):
        folded(torch.randn(3, 6, 4))


def test_the_example_is_not_spoiled_by_a_network_that_writes_into_its_input() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = _pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x.mul_(2))

    net, x = trained(Writes()), torch.randn(1, 3, 5, 5)
    kept = x.clone()
    assert norms(fold(net, x)) == []
    assert torch.equal(x, kept)


def test_an_accelerated_network_is_folded_as_well() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    folded = fold(batchnorm.accelerate(net), x)
    assert norms(folded) == []
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_batch_norm_comes_back_as_a_copy() -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    folded = fold(net)
    assert folded is not net
    assert len(record(folded)) == 0


def test_weights_of_old_style_weight_norm_with_a_history_do_not_stop_the_copy() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = trained(
            nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), *_pair()[:0])
        )
    x = torch.randn(1, 3, 5, 5)
    net(x)  # leaves a weight that is no leaf
    folded = fold(net, x)
    assert "hooks" in record(folded).reason("1")
    torch.testing.assert_close(folded(x), net.eval()(x))


def test_rounding_of_a_deep_half_precision_network_is_told_from_a_wrong_fold() -> None:
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    net = trained(nn.Sequential(*layers)).to(torch.bfloat16).eval()
    assert norms(fold(net, torch.randn(2, 4, 8, 8, dtype=torch.bfloat16))) == []
