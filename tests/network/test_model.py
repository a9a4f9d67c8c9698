"""Every tool says what is wrong with something that is no network it can work on, and how to mend it."""

import inspect

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError
from batchnorm.functional import batch_norm

KERAS = {"moving_mean": [0.0], "moving_variance": [1.0]}
FLAX = {"batch_stats": {"mean": [0.0], "var": [1.0]}}
TOOLS = {
    "accumulate": batchnorm.accumulate,
    "accelerate": batchnorm.accelerate,
    "adapt": lambda model: batchnorm.adapt(model, torch.ones(4, 2)),
    "calibrate": lambda model: batchnorm.calibrate(model, torch.ones(4, 2)),
    "convert": lambda model: batchnorm.convert(model, "torch"),
    "desynchronize": batchnorm.desynchronize,
    "fold": batchnorm.fold,
    "freeze": batchnorm.freeze,
    "insert": batchnorm.insert,
    "load_flax": lambda model: batchnorm.load_flax(model, FLAX),
    "load_keras": lambda model: batchnorm.load_keras(model, KERAS),
    "param_groups": lambda model: batchnorm.param_groups(model, 0.1),
    "record": batchnorm.record,
    "restore": batchnorm.restore,
    "synchronize": batchnorm.synchronize,
    "unfreeze": batchnorm.unfreeze,
}


def net():
    return nn.Sequential(nn.Linear(2, 2), batchnorm.BatchNorm1d(2)).eval()


def strangers():
    with torch.no_grad():
        traced = torch.jit.trace(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), torch.ones(2, 2))
    return {
        "None": (None, "None"),
        "a list": ([net()], "list"),
        "a tuple": ((net(),), "tuple"),
        "a dict": ({"a": net()}, "dict"),
        "a state dict": (net().state_dict(), "Dict"),
        "a class": (nn.BatchNorm1d, "the class BatchNorm1d"),
        "text": ("model.pt", "model.pt"),
        "a number": (3, "int"),
        "a tensor": (torch.ones(2, 2), "Tensor"),
        "an input of parameters": (nn.Parameter(torch.ones(2)), "Tensor|Parameter"),
        "parameters": (nn.ParameterList([nn.Parameter(torch.ones(2))]), "ParameterList"),
        "named parameters": (nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}), "ParameterDict"),
        "a function": (net().forward, "method"),
        "a generator": (net().modules(), "generator"),
        "scripted": (torch.jit.script(nn.Sequential(nn.BatchNorm1d(2))), "scripted"),
        "traced": (traced, "traced"),
        "scripted within": (nn.Sequential(nn.ReLU(), traced), "a part of it"),
        "exported": (torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), "exported"),
    }


STRANGERS = strangers()


def test_every_tool_is_looked_at():
    public = {name for name in batchnorm.__all__ if inspect.isfunction(getattr(batchnorm, name))}
    assert public - {"together", "domain"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("what", STRANGERS)
def test_what_is_no_network_is_refused(tool, what):
    given, named = STRANGERS[what]
    with pytest.raises(ArgumentError, match=f"(?i){tool}: .*({named})") as caught:
        TOOLS[tool](given)
    assert caught.value.mend
    if what == "scripted within":
        assert caught.value.at == "1"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: batchnorm.calibrate(net(), None), "data"),
        (lambda: batchnorm.calibrate(net(), 3), "data"),
        (lambda: batchnorm.calibrate(net(), "train.csv"), "data"),
        (lambda: batchnorm.calibrate(net(), [torch.ones(4, 2)], estimator=None), "estimator"),
        (lambda: batchnorm.calibrate(net(), [torch.ones(4, 2)], estimator=["pooled"]), "estimator"),
        (
            lambda: batchnorm.calibrate(net(), [torch.ones(4, 2)], estimator="moving", momentum="a"),
            "momentum",
        ),
        (lambda: batchnorm.calibrate(net(), [torch.ones(4, 2)], forward="a"), "forward"),
        (lambda: batchnorm.calibrate(net(), [None]), "input of type NoneType"),
        (lambda: batchnorm.adapt(net(), None), "input of type NoneType"),
        (lambda: batchnorm.adapt(net(), torch.ones(4, 2), prior="16"), "prior"),
        (lambda: batchnorm.adapt(net(), torch.ones(4, 2), prior=None), "prior"),
        (lambda: batchnorm.adapt(net(), torch.ones(4, 2), forward=3), "forward"),
        (lambda: batchnorm.convert(net(), None), "to="),
        (lambda: batchnorm.convert(net(), ["sync"]), "to="),
        (lambda: batchnorm.convert(net(), "group", groups=0), "groups"),
        (lambda: batchnorm.convert(net(), "group", groups=2.5), "groups"),
        (lambda: batchnorm.convert(net(), "group", groups="8"), "groups"),
        (lambda: batchnorm.insert(net(), data=5), "data"),
        (lambda: batchnorm.insert(net(), eps="a"), "eps"),
        (lambda: batchnorm.insert(net(), eps=0), "eps"),
        (lambda: batchnorm.insert(net(), momentum=2.0), "momentum"),
        (lambda: batchnorm.insert(net(), momentum=[0.1]), "momentum"),
        (lambda: batchnorm.param_groups(net(), "0.1"), "weight_decay"),
        (lambda: batchnorm.param_groups(net(), None), "weight_decay"),
        (lambda: batchnorm.load_keras(net()[1], KERAS, momentum=None), "momentum"),
        (lambda: batchnorm.load_keras(net()[1], KERAS, epsilon="a"), "epsilon"),
        (lambda: batchnorm.load_flax(net()[1], None), "variables"),
        (lambda: batchnorm.load_flax(net()[1], {"batch_stats": [1]}), "batch_stats"),
        (lambda: batchnorm.domain(None), "domain"),
        (lambda: batchnorm.domain(3), "domain"),
    ],
)
def test_arguments_are_named_in_the_message(call, named):
    with pytest.raises(batchnorm.BatchNormError, match=named):
        call()


# both layouts raise an internal error of torch's where somebody asks for their sizes
NESTED = torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(1, 2)], layout=torch.jagged)


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: batchnorm.calibrate(net().to("meta"), torch.ones(4, 2)), "meta device"),
        (lambda: batchnorm.adapt(net().to("meta"), torch.ones(4, 2)), "meta device"),
        (lambda: batchnorm.calibrate(nn.ModuleList(net()), torch.ones(4, 2)), "no forward"),
        (lambda: batchnorm.adapt(nn.ModuleList(net()), torch.ones(4, 2)), "no forward"),
        (lambda: batchnorm.adapt(lazy(), torch.ones(4, 2)), "lazy"),
        (lambda: batchnorm.fold(lazy()), "lazy"),
        (
            lambda: batchnorm.load_keras(net(), {"1": {"moving_mean": "a", "moving_variance": [1, 1]}}),
            "no array",
        ),
        (
            lambda: batchnorm.load_keras(
                net(), {"1": {"moving_mean": [[1], [1, 2]], "moving_variance": [1]}}
            ),
            "no array",
        ),
        (lambda: net()[1](None), "input must be a Tensor"),
        (lambda: net()[1]([[1.0, 2.0]]), "input must be a Tensor"),
        (lambda: net()[1](torch.ones(2, 2).numpy()), "input must be a Tensor"),
        (lambda: net()[1](torch.ones(2, 2), residual=3), "residual must be a Tensor"),
        (lambda: net()[1](torch.ones(2, 2), mask=[True, False]), "mask must be a Tensor"),
        (lambda: batchnorm.BatchNorm1d(2, eps="a")(torch.ones(2, 2)), "eps must be a number"),
        (lambda: batchnorm.BatchNorm1d(2, eps=None)(torch.ones(2, 2)), "eps must be a number"),
        (lambda: batchnorm.BatchNorm1d(2, activation=["relu"]), "activation"),
        (lambda: batchnorm.BatchNorm1d(2, activation=nn.ReLU()), "activation"),
        (lambda: batch_norm(None, None, None, training=True), "input must be a Tensor"),
        (lambda: batch_norm(torch.ones(2, 2), [0, 0], [1, 1]), "running_mean must be a Tensor"),
        (lambda: net()[1](NESTED), "input is nested"),
        (lambda: net()[1].eval()(NESTED), "input is nested"),
        (lambda: net()[1](torch.ones(2, 2), residual=NESTED), "residual is nested"),
        (lambda: net()[1](torch.ones(2, 2, 2), mask=NESTED), "mask is nested"),
    ],
)
def test_what_has_no_values_no_forward_or_another_type_is_named(call, named):
    with pytest.raises(batchnorm.BatchNormError, match=named):
        call()
