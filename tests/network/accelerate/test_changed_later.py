"""Whatever Python decides is decided at each call: what is changed after `accelerate` counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Branching, answers, assert_same, image, prepared
from test_accelerated_answers import twins
from torch import nn

from batchnorm import accelerate

# torch's: a tensor that crosses a break of the graph
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # ours, where hooks break the graph in all four modes: the answers are looked at all the same
    pytest.mark.filterwarnings("ignore:accelerate. forward of Sequential was compiled"),
]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


def deploy(block):
    """As detection libraries do: fold by hand, replace the forward on the instance, delete the norm."""
    conv, norm = block.conv, block.norm
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    conv.bias = nn.Parameter((conv.bias - norm.running_mean).detach() * scale + norm.bias.detach())
    conv.weight = nn.Parameter(conv.weight.detach() * scale.view(-1, 1, 1, 1))
    block.forward = lambda x: block.act(conv(x)) * 2
    del block.norm


CHANGES = {
    "activation": lambda m: setattr(m[0], "relu", nn.ELU()),
    "norm": lambda m: setattr(m[0], "bn1", nn.GroupNorm(3, 3).double()),
    "branch": lambda m: setattr(m[1], "downsample", nn.Conv2d(3, 6, 1, 2).double()),
    "eval of one": lambda m: m[0].bn1.eval(),
    "norm gone": lambda m: setattr(m[0], "bn2", nn.Identity()),
    "deleted": lambda m: m.__delitem__(1),
    "appended": lambda m: m.append(nn.ReLU()),
    "forward of a norm": lambda m: setattr(m[0].bn1, "forward", lambda x: x * 2),
    "forward of the model": lambda m: setattr(m, "forward", lambda x: m[0](x) * 3),
    "class of a norm": lambda m: (
        setattr(m[0].bn1, "__class__", nn.SyncBatchNorm)
        or setattr(m[0].bn1, "process_group", None)
        or m[0].bn1.eval()
    ),
    "class of a block": lambda m: setattr(m[0], "__class__", Doubled),
    "momentum": lambda m: setattr(m[0].bn1, "momentum", 0.5),
    "eps": lambda m: setattr(m[0].bn1, "eps", 0.5),
    "statistics off": lambda m: setattr(m[0].bn1, "track_running_stats", False),
    "weight": lambda m: setattr(m[0].bn1, "weight", nn.Parameter(torch.full((3,), 2.0).double())),
    "data": lambda m: m[0].bn1.weight.data.mul_(3),
    "frozen": lambda m: m[0].bn1.requires_grad_(False),
    "hook": lambda m: m[0].bn1.register_forward_hook(lambda m, i, o: o * 2) and None,
    "pre-hook": lambda m: m[0].relu.register_forward_pre_hook(lambda m, i: (i[0] + 1,)) and None,
    "backward hook": lambda m: m[0].conv2.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)) and None,
}


class Doubled(NETWORKS["basic"][0]()[0].__class__):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("when", ["before the first call", "after it"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_counts(change, when):
    model, plain = twins(NETWORKS["basic"][0])
    if when == "after it":
        for network in (model, plain):
            answers(network, image(), True)
    for network in (model, plain):
        torch.manual_seed(5)
        CHANGES[change](network)
    assert_same(model, plain)


def test_a_forward_replaced_for_deployment():
    class Block(Branching):
        def forward(self, x):
            return self.act(self.norm(self.conv(x))) * 2

    model, plain = twins(lambda: nn.Sequential(Block(3), Block(3)))
    for network in (model, plain):
        network.eval()(image())
        deploy(network[0])
    with torch.no_grad():
        torch.testing.assert_close(model(image()), plain(image()))


def test_a_backbone_under_no_grad_stays_without_gradients():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            with torch.no_grad():
                f = self.backbone(x)
            return self.head(f)

    plain = prepared(Frozen)
    for example in (None, image()):
        model = accelerate(copy.deepcopy(plain), example)
        model(image()).sum().backward()
        assert all(p.grad is None for p in model.backbone.parameters())
        assert model.head.weight.grad is not None


def test_a_switch_on_the_class():
    class Switched(Branching):
        scale = 1.0

        def forward(self, x):
            return self.act(self.norm(self.conv(x))) * self.scale

    model, plain = twins(lambda: Switched(3))
    model(image())
    plain(image())
    Switched.scale = 2.0
    assert_same(model, plain)


@pytest.mark.parametrize(
    "what", ["forward", "a method", "a property", "decorated", "a base class", "a norm's"]
)
def test_a_method_replaced_on_a_class(what, monkeypatch):
    class Held:
        def shifted(self, y):
            return y + 1

    class Base(Branching):
        def __init__(self, c):
            super().__init__(c)
            self.held = Held()

        def finished(self, y):
            return self.held.shifted(y) * 2

    class Block(Base):
        @property
        def scale(self):
            return 2.0

        def body(self, x):
            return self.act(self.norm(self.conv(x)))

        @torch.no_grad()
        def teacher(self, x):
            return self.body(x)

        def forward(self, x):
            return self.finished(self.body(x)) * self.scale + self.teacher(x)

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    owner, name, new = {
        "forward": (Block, "forward", lambda self, x: self.body(x) * 5),
        "a method": (Block, "body", lambda self, x: self.norm(self.conv(x)) * 3),
        "a property": (Block, "scale", property(lambda self: 4.0)),
        "decorated": (Block, "teacher", lambda self, x: self.body(x) * 7),
        "a base class": (Base, "finished", lambda self, y: y - 1),
        "an object's": (Held, "shifted", lambda self, y: y - 2),
        "a norm's": (Norm, "forward", lambda self, x: nn.BatchNorm2d.forward(self, x) + 1),
    }[what]

    def make():
        model = nn.Sequential(Block(3), Block(3))
        model[1].norm = Norm(3)
        return model

    model, plain = twins(make)
    other = accelerate(copy.deepcopy(plain))
    reference = copy.deepcopy(plain)
    old = vars(owner)[name]
    for there in (old, new, old, new, old):
        monkeypatch.setattr(owner, name, there)
        assert_same(model, plain)
    if what == "a method":  # as a notebook's autoreload does: the function stays, and runs other code
        code = old.__code__
        monkeypatch.setattr(old, "__code__", new.__code__)
        assert_same(model, plain)
        monkeypatch.setattr(old, "__code__", code)
        assert_same(model, plain)
    assert_same(other, reference)  # of the same looks: it has what was compiled first


def test_instances_that_differ_by_a_dict():
    class Configured(nn.BatchNorm2d):
        def __init__(self, c, config):
            super().__init__(c)
            self.config = config

        def forward(self, x):
            y = super().forward(x)
            return F.relu(y) if self.config["activation"] else y * self.config["scale"]

    def make():
        return nn.Sequential(
            Configured(3, {"activation": True}), Configured(3, {"activation": False, "scale": 3.0})
        )

    model, plain = twins(make)
    assert_same(model, plain)
    for network in (model, plain):
        network[1].config["scale"] = 5.0
    assert_same(model, plain)


def test_two_that_look_alike_and_are_not():
    class Config:
        def __init__(self, act):
            self.act = act

    class Block(Branching):
        def __init__(self, act):
            super().__init__(3)
            self.config = Config(act)

        def forward(self, x):
            return self.config.act(self.norm(self.conv(x)))

    pairs = [twins(lambda act=act: Block(act)) for act in (torch.relu, torch.tanh, F.silu)]
    for model, plain in pairs:
        assert_same(model, plain)


def test_arguments_of_every_kind():
    class Optional(Branching):
        def forward(self, x, extra=None, *, scale=1.0, **more):
            y = self.act(self.norm(self.conv(x)))
            return (y if extra is None else y + extra) * scale + more.get("shift", 0)

    model, plain = twins(lambda: Optional(3))
    model.eval()
    plain.eval()
    x = image()
    for args, kwargs in [
        ((x,), {}),
        ((), {"x": x}),
        ((x, x), {}),
        ((x,), {"scale": 2.0}),
        ((x, None), {"shift": 3}),
    ]:
        torch.testing.assert_close(model(*args, **kwargs), plain(*args, **kwargs))
