"""Insertion: every hidden layer, before its nonlinearity, never an output layer; M1, M2, M5, M6, M7."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chains import next_call
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import ArgumentError, DataError, TraceError
from batchnorm.network.insert.insert import insert
from batchnorm.network.normalized import Normalized
from batchnorm.network.record import record
from batchnorm.network.values.find import find_flow


class MLP(nn.Module):
    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.fc1(x)))
        x = torch.tanh(self.fc2(x))
        return self.out(x)


class Residual(nn.Module):
    """Two blocks, one with a projection, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a1, self.a2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b1, self.b2 = nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.project = nn.Conv2d(4, 8, 1, stride=2)
        self.hidden = nn.Linear(8, 8)
        self.classes, self.box = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        y = F.relu(self.a1(x), inplace=True)
        x = torch.relu_(self.a2(y) + x)
        y = self.b2(F.relu(self.b1(x)))
        y += self.project(x)
        x = y.relu().mean((2, 3))
        x = F.gelu(self.hidden(x))
        return {"classes": self.classes(x), "box": torch.sigmoid(self.box(x))}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        x = torch.cat([self.up(b), a], dim=1)
        return self.out(F.relu(self.merge(x)))


def generator() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(8, 8, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def audio() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 4, 9, stride=4),
        nn.ReLU(),
        nn.Conv1d(4, 8, 5, stride=2),
        nn.ELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def video() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2), nn.SiLU(), nn.Conv3d(2, 1, 1)
    )


NETWORKS: dict[str, tuple[Any, tuple[int, ...], dict[str, str]]] = {
    "mlp": (MLP, (8, 6), {"fc1": "BatchNorm1d", "fc2": "BatchNorm1d"}),
    "residual": (
        Residual,
        (4, 3, 8, 8),
        {
            **dict.fromkeys(["stem", "a1", "a2", "b1", "b2", "project"], "BatchNorm2d"),
            "hidden": "BatchNorm1d",
        },
    ),
    "u-net": (UNet, (2, 1, 8, 8), dict.fromkeys(["down1", "down2", "up", "merge"], "BatchNorm2d")),
    "generator": (generator, (4, 8, 1, 1), dict.fromkeys(["0", "2"], "BatchNorm2d")),
    "audio": (audio, (3, 1, 64), dict.fromkeys(["0", "2"], "BatchNorm1d")),
    "video": (video, (2, 1, 5, 5, 5), dict.fromkeys(["0", "2"], "BatchNorm3d")),
}


def inserted(net: nn.Module) -> dict[str, str]:
    return {path: type(m.norm).__name__ for path, m in net.named_modules() if isinstance(m, Normalized)}


def tensors(out: Any) -> list[Tensor]:
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.mark.parametrize("how", ["alone", "example", "data"])
@pytest.mark.parametrize("name", NETWORKS)
def test_m6_every_hidden_layer_is_normalized_and_no_output_layer(name: str, how: str) -> None:
    make, shape, expected = NETWORKS[name]
    net, x = make(), torch.randn(shape)
    given: dict[str, Any] = {"alone": {}, "example": {"example": x}, "data": {"data": [x, x + 1]}}[how]
    result = insert(net, **given)
    assert inserted(result) == expected
    assert type(result) is type(net)
    # it trains: every parameter of every norm gets a gradient
    sum(t.sum() for t in tensors(result.train()(x))).backward()
    norms = [m for m in result.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(m.weight.grad is not None and m.num_batches_tracked > 0 for m in norms)


@pytest.mark.parametrize("name", NETWORKS)
def test_m5_with_data_the_function_of_the_network_is_kept(name: str) -> None:
    make, shape, _ = NETWORKS[name]
    net = make().double()
    data = [3 + 2 * torch.randn(n, *shape[1:], dtype=torch.double) for n in (5, 2, 7)]
    result = insert(net, data=data)
    x = torch.randn(shape, dtype=torch.double)
    for old, new in zip(tensors(net.eval()(x)), tensors(result.eval()(x)), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-10, atol=1e-10)


def test_m5_the_statistics_are_those_of_all_data_pooled_whatever_the_split() -> None:
    net = MLP()
    x = 100 + torch.randn(30, 6)
    result = insert(net, data=[(x[:29], "targets"), (x[29:], "targets")])
    z = net.fc1(x).double()
    norm = result.fc1.norm
    mean, var = z.mean(0), z.var(0, correction=0)
    torch.testing.assert_close(norm.bias.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_mean.double(), mean - net.fc1.bias.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(norm.weight.double(), (norm.running_var.double() + norm.eps).sqrt())


def test_m1_the_input_is_not_normalized_and_m2_the_norm_stands_before_the_nonlinearity() -> None:
    result = insert(MLP())
    flow = find_flow(result)
    for layer, activation in ((result.fc1, "relu"), (result.fc2, "tanh")):
        call = flow.calls(layer.layer)[0]
        norm = next_call(flow, call)
        assert norm.module is layer.norm
        assert next_call(flow, norm).op == activation
    first = flow.views[0].calls[0]
    assert first.module is result.fc1.layer


def test_m7_the_bias_is_dropped_and_that_of_the_output_layer_stays() -> None:
    net = MLP()
    result = insert(net)
    assert result.fc1.layer.bias is None
    assert "fc1.layer.bias" not in result.state_dict()
    assert result.out.bias is not None
    # b costs as much as beta gives: only gamma is new
    count = sum(p.numel() for p in result.parameters()) - sum(p.numel() for p in net.parameters())
    assert count == 8 + 8


def test_dropout_stays_behind_the_norm() -> None:
    result = insert(nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)))
    assert [type(m).__name__ for m in result] == ["Normalized", "Dropout", "ReLU", "Linear"]


def test_the_given_network_is_untouched_and_modes_are_kept() -> None:
    net = MLP().train()
    net.fc2.eval()
    before = copy.deepcopy(net.state_dict())
    result = insert(net, data=torch.randn(9, 6))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert not net.fc2.training
    assert not net.fc1._forward_hooks
    assert result.training
    assert result.fc1.norm.training
    assert not result.fc2.norm.training
    assert inserted(net) == {}


def test_never_twice() -> None:
    once = insert(Residual())
    twice = insert(once)
    assert inserted(twice) == inserted(once)
    reasons = {row.path: row.reason for row in record(twice).left_alone}
    assert "already normalized" in reasons["a1.layer"]
    assert "already normalized" in reasons["project.layer"]


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(5), nn.LayerNorm(5), nn.GroupNorm(1, 5), batchnorm.BatchNorm1d(5)],
    ids=lambda m: type(m).__name__,
)
def test_layers_that_any_norm_follows_are_left_alone(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    assert list(inserted(insert(net))) == ["3"]


def test_gamma_of_the_last_norm_of_a_residual_branch_may_begin_at_zero() -> None:
    result = insert(Residual(), zero_init_residual=True)
    zero = [path for path in inserted(result) if not result.get_submodule(path).norm.weight.any()]
    assert zero == ["a2", "b2"]


def test_linear_layers_get_a_norm_over_their_features_whatever_the_number_of_axes() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for shape in ((8, 4), (3, 5, 4)):
        assert insert(net)(torch.randn(shape)).shape == (*shape[:-1], 2)
    flat, sequence = insert(net, torch.randn(8, 4)), insert(net, torch.randn(3, 6, 4))
    grid = insert(net, torch.randn(2, 3, 3, 4))
    assert [m[0].norm.channel_dim for m in (flat, sequence, grid)] == [1, -1, -1]
    x = torch.randn(3, 6, 4)
    sequence(x)
    z = net[0](x) - net[0].bias
    torch.testing.assert_close(sequence[0].norm.running_mean, 0.1 * z.mean((0, 1)))
    assert grid(torch.randn(2, 3, 3, 4)).shape == (2, 3, 3, 2)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tied, self.again = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.again.weight
        self.read, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc(F.relu(self.fc(x))))
        x = F.relu(self.again(F.relu(self.tied(x))))
        return self.out(F.relu(self.read(x)) @ self.read.weight)


def test_shared_layers_tied_weights_and_weights_read_by_name_are_left_alone_with_the_reason() -> None:
    result = insert(Shared(), torch.randn(5, 4))
    reasons = {row.path: row.reason for row in record(result).left_alone}
    assert inserted(result) == {}
    assert "called 2 times" in reasons["fc"]
    assert "shared with again" in reasons["tied"]
    assert "read by name" in reasons["read"]
    assert "output layer" in reasons["out"]


def test_the_scores_of_an_attention_are_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.proj, self.out = (nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1)
            return self.out(F.gelu(self.proj(scores @ self.v(x))))

    result = insert(Attention(), torch.randn(2, 3, 4))
    assert list(inserted(result)) == ["proj"]
    assert "bmm" in record(result).reason("q")


def test_a_value_that_is_returned_and_used_belongs_to_a_head() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.early(x)
            return z, self.late(F.relu(z))

    assert "output layer" in record(insert(Deep())).reason("early")


def test_what_cannot_be_traced_is_seen_on_an_example_and_refused_without() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for row in x:
                y = y + row
            return self.out(F.relu(self.fc(y)))

    net = Needs()
    with pytest.raises(TraceError, match="can't be seen") as caught:
        insert(net)
    assert "example=" in str(caught.value)
    given = {"x": torch.randn(2, 4), "y": torch.randn(3, 4)}
    assert list(inserted(insert(net, given))) == ["fc"]
    assert list(inserted(insert(net, data=[given]))) == ["fc"]


def test_attributes_of_a_layer_are_still_found_where_it_stood() -> None:
    net = MLP()
    result = insert(net)
    assert result.fc1.in_features == 6
    assert torch.equal(result.fc1.weight, net.fc1.weight)
    with pytest.raises(AttributeError):
        result.fc1.nothing  # noqa: B018
    assert inserted(copy.deepcopy(result)) == inserted(result)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "a string"}, ArgumentError),
        ({"model": nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 1))}, ArgumentError),
        ({"data": []}, DataError),
        ({"data": [torch.randn(4, 6)], "zero_init_residual": True}, ArgumentError),
        ({"eps": 0.0}, ArgumentError),
        ({"example": torch.randn(4, 7)}, TraceError),
        ({"data": [torch.full((4, 6), float("nan"))]}, DataError),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(change: dict[str, Any], error: type[Exception]) -> None:
    net = MLP()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error):
        insert(**{"model": net, **change})
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())


def test_weight_norm_and_half_precision_networks_are_taken() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU(), nn.Conv1d(4, 2, 1)
    )
    x = torch.randn(3, 2, 9)
    result = insert(net, data=[x])
    torch.testing.assert_close(result.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    coarse = insert(MLP().bfloat16(), torch.randn(5, 6).bfloat16())
    assert coarse.fc1.norm.weight.dtype == torch.float32
    assert coarse(torch.randn(5, 6).bfloat16()).dtype == torch.bfloat16


def test_networks_of_transformers_without_batch_norm_keep_their_function() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    net = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(3, 3, 16, 16)
    result = insert(net, data=[{"pixel_values": x}])
    torch.testing.assert_close(result(x).logits, net(x).logits, rtol=1e-4, atol=1e-5)
    # the two-layer part of each block has the only hidden layers with an elementwise nonlinearity
    assert len(inserted(result)) == 2
