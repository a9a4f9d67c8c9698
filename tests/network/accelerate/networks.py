"""Networks as people write them, networks in which something stands in the way, and how two are compared."""

import random

import torch
import torch.nn.functional as F
from torch import nn

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


# how to make it, norms called together with something (in training, eval), norms
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


class DetachedBetween(Branching):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)).detach() + x)


class AddsBools(Branching):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)) + (x > 0))


class AddsItself(Branching):
    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.act(y + y)


class StatisticsReadAfterwards(Branching):
    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return y + self.norm.running_mean.view(1, -1, 1, 1)


class ComputedStatistics(Branching):
    def forward(self, x):
        norm = self.norm
        mean, var = norm.running_mean * 2, norm.running_var + 1
        return self.act(F.batch_norm(self.conv(x), mean, var, norm.weight, norm.bias, self.training))


class AddedIsOverwritten(Branching):
    """SiLU's backward reads what was added."""

    def forward(self, x):
        added = x.detach() * 1
        y = F.silu(self.norm(self.conv(x)) + added)
        added.mul_(2)
        return y


TRAPS = [
    DetachedBetween,
    AddsBools,
    AddsItself,
    StatisticsReadAfterwards,
    ComputedStatistics,
    AddedIsOverwritten,
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
