"""Acceleration changes speed and nothing else: outputs, gradients, statistics, hooks, identity, state dict."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm
from batchnorm.errors import VerificationError
from batchnorm.modules import Layer
from batchnorm.network.accelerate import accelerate, restore
from batchnorm.network.record import record

# -- networks as people write them ---------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """One ReLU module for two places, `out += identity`, an optional downsampling branch."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        h = F.silu(self.bn(self.conv(x)), inplace=True)
        return torch.relu(x + self.bn2(self.conv2(h)))


class ConvLayer(nn.Module):
    """The norm is the last step of a child; sum and activation are the parent's."""

    def __init__(self, c, act):
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.activation = act

    def forward(self, hidden_state):
        return self.activation(self.normalization(self.convolution(hidden_state)))


class Nested(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer = nn.Sequential(ConvLayer(c, nn.GELU()), Tail(c))
        self.activation = nn.Hardswish()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        hidden_state += residual
        return self.activation(hidden_state)


class Tail(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return self.norm(self.conv(x))


class RepVGG(nn.Module):
    """Three norms in one sum."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c))
        self.point = nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c))
        self.identity = nn.BatchNorm2d(c)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.dense(x) + self.point(x) + self.identity(x))


class Dense(nn.Module):
    """Pre-activation and concatenation; the input may be a list."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Conv2d(c, c, 1)
        self.norm2, self.relu2, self.conv2 = (
            nn.BatchNorm2d(c),
            nn.ReLU6(inplace=True),
            nn.Conv2d(c, c, 3, padding=1),
        )

    def forward(self, x):
        x = torch.cat(x, 1) if isinstance(x, list) else x
        new = self.conv1(self.relu1(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.norm2(new)))], 1)


class Branching(nn.Module):
    """Other ways in training and in eval."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.training:
            return self.act(F.dropout(y, 0.5, self.training))
        return self.act(F.dropout(y, 0.5, self.training)) + 1


class DropPath(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)
        self.drop_block, self.act1 = nn.Identity(), nn.LeakyReLU(inplace=True)

    def forward(self, x):
        return self.act1(self.drop_block(self.bn1(self.conv(x))))


NETWORKS = {
    "basic": (lambda: nn.Sequential(BasicBlock(3, 3), BasicBlock(3, 6, 2)), 4, 5),
    "functional": (lambda: Functional(3), 2, 2),
    "nested": (lambda: Nested(3), 2, 2),
    "repvgg": (lambda: RepVGG(3), 2, 3),
    "dense": (lambda: Dense(3), 2, 2),
    "branching": (lambda: Branching(3), 0, 1),
    "drop path": (lambda: DropPath(3), 1, 1),
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.ConvTranspose2d(3, 3, 2),
            nn.BatchNorm2d(3),
            nn.Sigmoid(),
        ),
        2,
        2,
    ),
}


# -- networks in which something stands in the way -----------------------------------------------------------


class UsedTwice(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y) + y


class Returned(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y), y


class InputOverwritten(Branching):
    """The sum stands after a change of what the norm has read."""

    gradients = False  # torch itself refuses them

    def forward(self, x):
        z = self.conv(x)
        y = self.norm(z)
        return self.act(y + z.mul_(3.0))


class CallerSees(Branching):
    """`x += ...` changes the tensor that the caller holds."""

    gradients = False

    def forward(self, x):
        x = x * 1
        kept = x
        x += self.norm(self.conv(x))
        return self.act(x) + kept


class Remembers(Branching):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.act(self.norm(self.conv(x))) * self.calls


class Random(Branching):
    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return y * 2 if random.random() < 0.5 else y


class ByValue(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y) if y.mean() > 0 else y


class OtherSlope(Branching):
    def forward(self, x):
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Broadcast(Branching):
    """What is added has another shape: one call is not possible, and the answer is right all the same."""

    def __init__(self, c):
        super().__init__(c)
        self.offset = nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + self.offset)


class CalledTwice(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(self.norm(x) + y)


class AskedForGradients(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y) if torch.is_grad_enabled() else y


TRAPS = [
    UsedTwice,
    Returned,
    InputOverwritten,
    CallerSees,
    Remembers,
    Random,
    ByValue,
    OtherSlope,
    Broadcast,
    CalledTwice,
    AskedForGradients,
]


# -- comparing -----------------------------------------------------------------------------------------------


def prepared(make):
    torch.manual_seed(0)
    model = make().double()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return model


def image(seed=0):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


def answers(model, x, training):
    model.train(training)
    model.zero_grad()
    torch.manual_seed(1)
    random.seed(1)
    gradients = getattr(model, "gradients", True)
    x = x.clone().requires_grad_()
    with torch.set_grad_enabled(gradients):
        out = model(x)
    outs = out if isinstance(out, tuple) else (out,)
    if gradients:
        sum((o * torch.linspace(-1, 2, o.numel()).view_as(o)).sum() for o in outs).backward()
    with torch.no_grad():
        random.seed(1)
        torch.manual_seed(1)
        again = model(x)
    found = [*outs, *(again if isinstance(again, tuple) else (again,))]
    found += [t.grad for t in (x, *model.parameters()) if gradients]
    return [*found, *(v.clone() for v in model.state_dict().values())]


def assert_same(model, reference, x=None, **tolerance):
    x = image() if x is None else x
    for training in (True, False):
        for ours, theirs in zip(answers(model, x, training), answers(reference, x, training), strict=True):
            torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-9, "atol": 1e-9}))


def fused(model):
    return [row for row in record(model) if row.detail]


def count_calls(monkeypatch):
    """Calls of our norms, with what was asked of them."""
    calls, plain = [], Layer._forward

    def counted(self, z, residual, mask, masked_output, activation=None):
        calls.append((residual is not None, activation))
        return plain(self, z, residual, mask, masked_output, activation)

    monkeypatch.setattr(Layer, "_forward", counted)
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_same_answers_and_as_many_calls_as_there_should_be(name, monkeypatch):
    make, together, norms = NETWORKS[name]
    model = prepared(make)
    reference = copy.deepcopy(model)
    assert accelerate(model) is model
    assert sum(isinstance(m, Layer) for m in model.modules()) == norms
    assert len(fused(model)) == together
    calls = count_calls(monkeypatch)
    model(image())
    assert len(calls) == norms
    assert sum(added or activation is not None for added, activation in calls) == together
    monkeypatch.undo()
    reference(image())
    assert_same(model, reference)


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_give_the_same_answers(trap):
    model = prepared(lambda: trap(3))
    reference = copy.deepcopy(model)
    accelerate(model)
    assert isinstance(model.norm, Layer)
    assert_same(model, reference)


def test_float32_and_bfloat16():
    model = prepared(NETWORKS["basic"][0]).float()
    reference = copy.deepcopy(model)
    accelerate(model)
    assert_same(model, reference, image().float(), rtol=1e-3, atol=1e-4)
    half = restore(model).bfloat16()
    reference = copy.deepcopy(half)
    accelerate(half)
    x = image().bfloat16()
    torch.testing.assert_close(half.eval()(x), reference.eval()(x), rtol=5e-2, atol=5e-2)
    assert half.train()(x).dtype == torch.bfloat16


# -- what must stay ------------------------------------------------------------------------------------------


def test_nothing_that_refers_to_the_model_goes_stale():
    model = prepared(NETWORKS["basic"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    buffers = {k: id(v) for k, v in model.named_buffers()}
    keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    accelerate(model)
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert buffers.items() <= {k: id(v) for k, v in model.named_buffers()}.items()
    assert [m.training for m in model.modules()] == modes
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    before = parameters[1][1].detach().clone()
    model(image()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(parameters[1][1], before)


def test_restore_is_exact():
    model = prepared(NETWORKS["nested"][0])
    before = {n: (type(m), set(vars(m)), list(m._buffers)) for n, m in model.named_modules()}
    reference = copy.deepcopy(model)
    restore(accelerate(model))
    vars(model).pop("_batchnorm_record")
    assert {n: (type(m), set(vars(m)), list(m._buffers)) for n, m in model.named_modules()} == before
    assert_same(model, reference, rtol=0, atol=0)


def test_twice_is_once():
    model = prepared(NETWORKS["basic"][0])
    reference = copy.deepcopy(model)
    accelerate(accelerate(model))
    assert_same(model, reference)
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["basic", "nested", "repvgg", "functional"])
def test_every_hook_sees_what_it_saw(name, when):
    model = prepared(NETWORKS[name][0])
    reference = copy.deepcopy(model)

    def listen(network):
        seen = []

        def forward_hook(path):
            return lambda _, i, o: seen.append((path, i[0].detach().clone(), o.detach().clone()))

        def backward_hook(path):
            return lambda _, i, o: seen.append((path, o[0].clone()))

        for path, m in network.named_modules():
            m.register_forward_hook(forward_hook(path))
            if name == "repvgg":  # torch refuses them where an activation works in place
                m.register_full_backward_hook(backward_hook(path))
        return seen

    theirs = listen(reference)
    if when == "before":
        ours = listen(model)
        accelerate(model)
    else:
        accelerate(model)
        ours = listen(model)
    for network in (model, reference):
        network(image().requires_grad_()).sum().backward()
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a[0] == b[0]
        for x, y in zip(a[1:], b[1:], strict=True):
            torch.testing.assert_close(x, y)


def test_a_global_hook_sees_every_module():
    model = prepared(NETWORKS["basic"][0])
    reference = copy.deepcopy(model)
    accelerate(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        model(image())
        ours, seen[:] = list(seen), []
        reference(image())
    finally:
        handle.remove()
    assert ours == seen


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "relu", nn.ELU()),
        lambda m: setattr(m[0], "bn1", nn.GroupNorm(3, 3).double()),
        lambda m: setattr(m[1], "downsample", nn.Conv2d(3, 6, 1, 2).double()),
        lambda m: m[0].bn1.eval(),
        lambda m: setattr(m[0], "bn2", nn.Identity()),
        lambda m: m.append(nn.ReLU()),
        lambda m: setattr(m[0].bn1, "forward", lambda x: x * 2),
    ],
)
def test_what_is_changed_later_counts(change):
    model = prepared(NETWORKS["basic"][0])
    reference = copy.deepcopy(model)
    accelerate(model)
    for network in (model, reference):
        torch.manual_seed(5)
        change(network)
    assert_same(model, reference)


def test_arguments_other_than_those_it_was_seen_with():
    class Optional(Branching):
        def forward(self, x, extra=None, *, scale=1.0, **more):
            y = self.act(self.norm(self.conv(x)))
            return (y if extra is None else y + extra) * scale + more.get("shift", 0)

    model = prepared(lambda: Optional(3)).eval()
    reference = copy.deepcopy(model)
    accelerate(model)
    x = image()
    for args, kwargs in [
        ((x,), {}),
        ((), {"x": x}),
        ((x, x), {}),
        ((x,), {"scale": 2.0}),
        ((x, None), {"shift": 3}),
    ]:
        torch.testing.assert_close(model(*args, **kwargs), reference(*args, **kwargs))
    dense = prepared(lambda: Dense(6)).eval()
    expected = dense([x, x])
    torch.testing.assert_close(accelerate(dense)([x, x]), expected)


def test_attributes_that_the_forward_reads():
    class Switched(Branching):
        use_act, scale = True, 2.0

        def __init__(self, c):
            super().__init__(c)
            self.use_act, self.scale = True, 2.0

        def forward(self, x):
            y = self.norm(self.conv(x))
            return (self.act(y) if self.use_act else y) * self.scale

    model = prepared(lambda: Switched(3)).eval()
    reference = copy.deepcopy(model)
    accelerate(model)
    assert fused(model)
    for scale, use_act in [(2.0, True), (3.0, True), (2.0, False)]:
        for network in (model, reference):
            network.scale, network.use_act = scale, use_act
        torch.testing.assert_close(model(image()), reference(image()))


# -- copies, files, compilers --------------------------------------------------------------------------------


def test_copies_and_pickles_stay_accelerated(monkeypatch):
    model = accelerate(prepared(NETWORKS["basic"][0]))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    calls = count_calls(monkeypatch)
    for twin in (copy.deepcopy(model), loaded):
        calls.clear()
        torch.testing.assert_close(twin.eval()(image()), model.eval()(image()))
        assert calls[0] == (False, "relu")
        twin[0].conv1.weight.data.zero_()
        restore(twin)
    assert model[0].conv1.weight.abs().sum() > 0
    assert isinstance(model[0].bn1, Layer)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    model = prepared(NETWORKS["basic"][0]).float().train(training)
    reference = copy.deepcopy(model)
    compiled = torch.compile(accelerate(model), fullgraph=True, backend="aot_eager")
    x = image().float()
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_traces_and_exports():
    model = prepared(NETWORKS["functional"][0]).float().eval()
    x = image().float()
    expected = model(x)
    accelerate(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


def test_functional_call_and_checkpointing():
    model = accelerate(prepared(NETWORKS["basic"][0]))
    reference = restore(copy.deepcopy(model))
    other = {k: v * 1.5 for k, v in model.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(model, other, (image(),)),
        torch.func.functional_call(reference, other, (image(),)),
    )
    x = image().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    out.sum().backward()
    reference(image()).sum()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])


# -- layers of other libraries -------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """Batch norm spelled out, then the layer's own children, as image libraries have it."""

    def __init__(self, c, act=None):
        super().__init__(c)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True) if act is None else act

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, factor, self.eps
        )
        return self.act(self.drop(x))


class CallsSuper(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2 if x.numel() else x


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.flatten(2)).view_as(x)


class Other(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, None, self.bias, self.training, 0.3)


@pytest.mark.parametrize(
    ("make", "ours", "one_call"),
    [
        (lambda: NormAct(3), True, True),
        (lambda: NormAct(3, nn.Mish()), True, False),
        (lambda: NormAct(3, nn.Identity()), True, False),
        (lambda: CallsSuper(3), True, False),
        (lambda: ChannelsLast(3), True, False),
        (lambda: Other(3), False, False),
    ],
)
def test_derived_classes(make, ours, one_call, monkeypatch):
    model = prepared(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), make()))
    reference = copy.deepcopy(model)
    kind = type(model[1])
    accelerate(model)
    assert isinstance(model[1], kind)
    assert isinstance(model[1], Layer) is ours
    assert bool(record(model).left_alone) is not ours
    if not ours:
        assert "not understood" in record(model).reason("1")
    assert_same(model, reference)
    calls = count_calls(monkeypatch)
    model(image())
    assert [activation is not None for _, activation in calls] == ([one_call] if ours else [])
    twin = copy.deepcopy(model)
    assert type(twin[1]) is type(model[1])
    assert type(restore(model)[1]) is kind


def test_what_is_left_alone_says_why():
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.LazyBatchNorm2d())
    accelerate(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert [bool(record(model).reason(p)) for p in "01"] == [True, True]


def test_parametrized_layers():
    class Square(nn.Module):
        def forward(self, w):
            return w**2

    model = prepared(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Square())
    reference = copy.deepcopy(model)
    accelerate(model)
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    assert_same(model, reference)
    for network in (model, reference):
        nn.utils.parametrize.remove_parametrizations(network[1], "weight")
    assert type(model[1]) is batchnorm.BatchNorm2d
    assert_same(model, reference)


# -- when it goes wrong --------------------------------------------------------------------------------------


def test_an_example_is_compared_on_copies():
    model = prepared(NETWORKS["basic"][0])
    state = copy.deepcopy(model.state_dict())
    accelerate(model, image())
    assert fused(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_difference_is_an_error_and_changes_nothing(monkeypatch):
    model = prepared(NETWORKS["basic"][0])
    before = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    plain = Layer._forward
    monkeypatch.setattr(Layer, "_forward", lambda self, z, *rest: plain(self, z, *rest) * 1.01)
    with pytest.raises(VerificationError, match="differ"):
        accelerate(model, image())
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == before


def test_an_interruption_changes_nothing(monkeypatch):
    import batchnorm.network.accelerate as module

    model = prepared(NETWORKS["nested"][0])
    before = {n: (type(m), set(vars(m))) for n, m in model.named_modules()}
    plain, calls = module.rewrite, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(module, "rewrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model)
    assert {n: (type(m), set(vars(m))) for n, m in model.named_modules()} == before
