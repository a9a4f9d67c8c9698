"""What fold hands back was checked: in answers of any structure, and to the rounding that is the network's own."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import ArgumentError, VerificationError
from batchnorm.network.compare import apart
from batchnorm.network.fold import neighbours as folding
from batchnorm.network.fold import verify as fold_verify


class Answer:
    def __init__(self, scores):
        self.scores = scores


@dataclass
class Boxed:
    __slots__ = ("inner", "kind")
    kind: str
    inner: object


ANSWERS = {
    "tensor": lambda z: z,
    "object": lambda z: Answer(z),
    "object in a list in a dictionary": lambda z: {"a": [Answer(z)]},
    "data class with slots": lambda z: Boxed("z", Answer(z)),
    "complex": lambda z: torch.complex(z, -z),
    "numbers": lambda z: [float(x) for x in z.flatten()],
    "numbers near 0 among others": lambda z: [float(x) for x in (z - z.mean()).repeat(1, 50).flatten()],
    "complex numbers": lambda z: [complex(x) for x in z.flatten()],
    "array": lambda z: z.numpy(),
    "distribution": lambda z: torch.distributions.Normal(z, 1.0),
    "integers": lambda z: z.argmax(1),
    "plain integers": lambda z: z.argmax(1).tolist(),
    "booleans": lambda z: z > 0,
    "nothing": lambda z: None,
    "text": lambda z: "label",
}


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor):
        return ANSWERS[self.kind](self.out(self.bn(self.conv(x)).relu().mean((2, 3))))


def lived(net):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return net.eval()


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_right_fold_passes_and_a_wrong_one_never_does(kind, monkeypatch):
    net, x = lived(Net(kind)), torch.randn(4, 3, 6, 6)
    assert isinstance(batchnorm.fold(net, x).bn, nn.Identity)

    def wrong(layer, affine):
        right(layer, affine)
        with torch.no_grad():
            layer.bias += 0.1  # of every channel: one may be dead on an example

    right = folding.fold_into_before
    monkeypatch.setattr(folding, "fold_into_before", wrong)
    with pytest.raises(VerificationError, match="does not give the same answers"):
        batchnorm.fold(net, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_told_from_error_in_every_dtype(dtype, monkeypatch):
    net = nn.Sequential(*[m for _ in range(12) for m in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())])
    net, x = lived(net).to(dtype), torch.randn(2, 4, 5, 5, dtype=dtype)
    assert isinstance(batchnorm.fold(net, x)[1], nn.Identity)

    def wrong(layer, found):
        right(layer, found)
        if layer.weight.shape[0] == 4:
            with torch.no_grad():
                layer.bias += 0.05

    right = folding.fold_into_before
    monkeypatch.setattr(folding, "fold_into_before", wrong)
    monkeypatch.setitem(fold_verify._WAYS, "before", wrong)
    with pytest.raises(VerificationError):
        batchnorm.fold(net, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_network_that_amplifies_rounding_is_not_refused_for_it(dtype):
    class Amplifies(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return (self.bn(self.conv(x)) * 3e4).sin()

    net, x = lived(Amplifies()).to(dtype), torch.randn(8, 3, 16, 16, dtype=dtype)
    folded = batchnorm.fold(net, x)
    assert isinstance(folded.bn, nn.Identity)
    # more than a fixed bound of a few units in the last place would allow
    assert apart(net(x), folded(x)) > 100 * torch.finfo(dtype).eps


def test_answers_that_differ_each_time_are_compared_inside():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.calls = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0

        def forward(self, x):
            self.calls += 1
            return self.bn(self.conv(x)).mean() + self.calls

    net, x = lived(Random()), torch.randn(2, 3, 5, 5)
    assert isinstance(batchnorm.fold(net, x).bn, nn.Identity)


@functools.lru_cache(maxsize=8)
def anchors(side):
    return torch.arange(side).float(), None


@pytest.mark.parametrize("tool", [batchnorm.fold, batchnorm.insert], ids=lambda tool: tool.__name__)
def test_what_is_cached_while_a_network_is_looked_at_has_numbers_afterwards(tool):
    class Detector(nn.Module):
        """Keeps what it computed for a size, by instance and for the process, as detectors do."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        @functools.lru_cache(maxsize=8)  # noqa: B019 - by instance is the point
        def grid(self, side):
            return torch.arange(side).float()

        def forward(self, x):
            y = self.bn(self.conv(x)).relu()
            return self.out(y + self.grid(y.shape[-1]) + anchors(y.shape[-1])[0])

    net, x = lived(Detector()), torch.randn(2, 3, 6, 6)
    anchors.cache_clear()
    changed = tool(net, x)
    assert type(net(x)) is type(changed(x)) is Tensor
    if tool is batchnorm.fold:
        assert isinstance(changed.bn, nn.Identity)
        torch.testing.assert_close(changed(x), net(x))


KEPT: dict[int, tuple[Tensor, int]] = {}
GRID: Tensor | None = None
TRAINED: Tensor | None = None


class Grids:
    def __init__(self):
        self.made = None

    def of(self, side):
        if self.made is None:
            self.made = torch.arange(side).float() + 1
        return self.made


def by_dict(side):
    if side not in KEPT:
        KEPT[side] = torch.arange(side).float() + 1, side
    return KEPT[side][0]


def by_module(side):
    global GRID
    if GRID is None:
        GRID = torch.arange(side).float() + 1
    return GRID


def by_mode(side):
    global TRAINED
    if TRAINED is None:
        TRAINED = torch.arange(side).float()
    return TRAINED


@pytest.mark.parametrize("asks", [False, True], ids=["", "and a number is asked for"])
@pytest.mark.parametrize("given", [False, True], ids=["made up", "example"])
@pytest.mark.parametrize("keeper", ["function", "dict", "module", "class", "object"])
@pytest.mark.parametrize("tool", [batchnorm.fold, batchnorm.insert], ids=lambda tool: tool.__name__)
def test_whatever_keeps_what_a_run_computed_keeps_numbers(tool, keeper, given, asks):
    class Detector(nn.Module):
        made = None

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
            self.grids = Grids()

        def of_class(self, side):
            if Detector.made is None:
                Detector.made = torch.arange(side).float() + 1
            return Detector.made

        def forward(self, x):
            y = self.bn(self.conv(x)).relu()
            keepers = {"function": lambda side: anchors(side)[0], "dict": by_dict, "module": by_module}
            keepers |= {"class": self.of_class, "object": self.grids.of}
            grid = keepers[keeper](8)[: y.shape[-1]]
            if self.training:  # something else is kept in each mode
                grid = grid + by_mode(8)[: y.shape[-1]]
            grid = torch.nn.functional.pad(grid, (0, y.shape[-1] - grid.shape[-1]))
            return self.out(y + grid) * (int(grid.sum()) if asks else 1)

    global GRID, TRAINED
    GRID = TRAINED = None
    KEPT.clear()
    anchors.cache_clear()
    net, x = lived(Detector()), torch.randn(2, 3, 6, 6)
    changed = tool(net, x) if given else tool(net)
    assert type(net(x)) is type(changed(x)) is Tensor
    if tool is batchnorm.fold:
        assert isinstance(changed.bn, nn.Identity)
        torch.testing.assert_close(changed(x), net(x))
    assert type(net.train()(x)) is Tensor


def test_fx_sees_a_layer_and_its_activation_as_neighbours():
    net = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    folded = batchnorm.fold(net)
    nodes = [node.target for node in torch.fx.symbolic_trace(folded).graph.nodes if node.op == "call_module"]
    assert nodes == ["0", "2"]
    copied = copy.deepcopy(folded)
    assert type(copied[1]) is type(folded[1])


def test_a_folded_network_saved_whole_needs_torch_alone():
    folded = batchnorm.fold(lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    vars(folded).pop("_batchnorm_record")
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    assert b"batchnorm.network" not in buffer.getvalue()
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert type(loaded[1]) is nn.Identity
    assert not loaded[1].training


def test_saving_for_from_pretrained_is_refused():
    class Pretrained(Net):
        def save_pretrained(self, folder):
            raise AssertionError("would be written without the norms")

    folded = batchnorm.fold(lived(Pretrained("tensor")), torch.randn(2, 3, 6, 6))
    for network in (folded, copy.deepcopy(folded)):
        with pytest.raises(ArgumentError, match="folded away"):
            network.save_pretrained("folder")
