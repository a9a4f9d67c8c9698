"""Ctrl-C at any instant leaves a model as it was, or wholly changed: it is raised before every instruction."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

import batchnorm
from batchnorm.domain import active_domain

OURS = str(Path(batchnorm.__file__).parent)
X = torch.linspace(-2, 3, 24).view(8, 3)


def torch_net():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    )
    net[3].eval()
    net[1].register_forward_hook(lambda module, args, output: None)
    return net


def our_net():
    net = nn.Sequential(
        nn.Linear(3, 4), batchnorm.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), batchnorm.BatchNorm1d(4)
    )
    return batchnorm.freeze(net, statistics=False, affine=True)


def plain_net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()


def in_domain(model):
    with batchnorm.domain("fake"):
        return batchnorm.calibrate(model, [X], progress=False)


def adapted(model):
    with batchnorm.adapt(model, X):
        model(X)


def window(model):
    with batchnorm.accumulate(model):
        for part in X.split(4):
            model(part)


def there(model):
    return batchnorm.convert(model, "frozen")


def from_frozen():
    return batchnorm.convert(torch_net(), "frozen")


def pooling():
    return batchnorm.synchronize(torch_net())


KERAS = {
    name: {
        "gamma": torch.ones(4).numpy(),
        "beta": torch.ones(4).numpy(),
        "moving_mean": torch.ones(4).numpy(),
        "moving_variance": torch.ones(4).numpy(),
    }
    for name in ("1", "4")
}


def begun(model):
    batchnorm.accumulate(model).__enter__()


def used(model):
    batchnorm.adapt(model, X)
    model(X)


# what follows the act is what a `with` block finds: between making it and entering it, and as it is left, Python
# has nobody yet or no longer who could put back
CASES = {
    "calibrate": (torch_net, lambda m: batchnorm.calibrate(m, X.split(4), progress=False)),
    "calibrate a domain": (our_net, in_domain),
    "adapt": (torch_net, adapted, lambda m: batchnorm.adapt(m, X), used),
    "accumulate": (our_net, window, begun),
    "freeze": (our_net, lambda m: batchnorm.freeze(m, affine=True)),
    "unfreeze": (our_net, batchnorm.unfreeze),
    "convert to frozen": (torch_net, there),
    "convert from frozen": (from_frozen, lambda m: batchnorm.convert(m, "torch")),
    "convert to ours": (torch_net, lambda m: batchnorm.convert(m, "batchnorm")),
    "convert to group": (torch_net, lambda m: batchnorm.convert(m, "group", example=X)),
    "synchronize": (torch_net, batchnorm.synchronize),
    "desynchronize": (pooling, batchnorm.desynchronize),
    "load_keras": (our_net, lambda m: batchnorm.load_keras(m, KERAS)),
    "insert": (plain_net, lambda m: batchnorm.insert(m, data=[X], progress=False)),
    "fold": (torch_net, lambda m: batchnorm.fold(m, X)),
}


def look(model):
    """Everything about a model that a tool could leave changed, and what of torch it switches."""
    seen = [
        ("grad", torch.is_grad_enabled()),
        (
            "global hooks",
            len(module_hooks._global_forward_hooks),
            len(module_hooks._global_forward_pre_hooks),
        ),
    ]
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        seen.append((path, id(module), type(module), module.training, list(module.__dict__), list(tensors)))
        for name, value in module.__dict__.items():
            if isinstance(value, (bool, int, float, str, type(None))):
                seen.append((path, name, value))
            elif name.endswith("_hooks") or name.endswith("_with_kwargs"):
                seen.append((path, name, sorted(value.items(), key=str)))
        for name, value in tensors.items():
            if value is not None:
                seen.append((path, name, id(value), value.requires_grad, value.tolist()))
    seen.append(("record", str(batchnorm.record(model))))
    return seen


def interrupted(act, at):
    """Run with KeyboardInterrupt raised before the instruction number ``at`` in this package."""
    count, where = 0, ""

    def step(frame, event, argument):
        nonlocal count, where
        if event == "opcode":
            if count == at:
                where = frame.f_code.co_name
                # once: a tracer that raises is taken away by Python
                raise KeyboardInterrupt
            count += 1
        return step

    def enter(frame, event, argument):
        name = frame.f_code.co_filename
        if not name.startswith(OURS) or "/kernels/" in name or frame.f_code.co_name in ("<genexpr>",):
            return None
        frame.f_trace_opcodes = True
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        act()
    finally:
        sys.settrace(before)
    return count, where


def instants(make, act, some):
    model = make()
    total, _ = interrupted(lambda: act(model), -1)
    step = max(1, total // some)
    return range(0, total, step)


def check(name, some):
    make, act, *handed_over = CASES[name]
    allowed = []
    for whole in (lambda model: None, act, *handed_over):
        torch.manual_seed(0)
        model = make()
        whole(model)
        allowed.append(values(look(model)))
    raised, halves = 0, []
    for at in instants(make, act, some):
        torch.manual_seed(0)
        model = make()
        before = look(model)
        try:
            interrupted(lambda model=model: act(model), at)
        except KeyboardInterrupt as error:
            raised += 1
            after = look(model)
            if after != before and values(after) not in allowed:
                trace = error.__traceback__
                while trace.tb_next.tb_frame.f_code.co_name != "step":
                    trace = trace.tb_next
                halves.append((at, trace.tb_frame.f_code.co_name, trace.tb_lineno))
        assert active_domain() is None
    assert raised > 10
    assert halves == []


def values(seen):
    """What was seen without the identities of objects, to compare two models."""
    return [
        tuple(part for part in row if not (isinstance(part, int) and part > 1 << 32))
        for row in seen
        # the number of a synchronized network is one of the process: each has the next
        if not str(row[1]).endswith("_hooks") and row[1] != "pooled_network"
    ]


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_leaves_all_or_nothing(name):
    check(name, 25)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_anywhere_leaves_all_or_nothing(name):
    check(name, 150)
