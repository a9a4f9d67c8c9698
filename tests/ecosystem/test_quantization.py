"""FX graph-mode quantization fuses our layers as it fuses torch's, to the bit, or says why it can't."""

import copy
import warnings

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.errors import ArgumentError, DtypeError

X = torch.linspace(-2, 2, 2 * 3 * 8 * 8).view(2, 3, 8, 8).sin()


@pytest.fixture(autouse=True)
def _torch_ao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it is going to move
        yield


def net(norm, fused=False):
    torch.manual_seed(0)
    first = [norm(8, activation="relu"), nn.Identity()] if fused else [norm(8), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *first, nn.Sequential(nn.Conv2d(8, 8, 3), norm(8))).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


def after_training(model):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (X,))
    prepared(X)
    return convert_fx(prepared)


def aware(model):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (X,))
    names = [type(module).__name__ for module in prepared.modules()]
    assert {"ConvBnReLU2d", "ConvBn2d"} <= set(names)
    prepared(X).sum().backward()
    return convert_fx(prepared.eval())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "activation inside"])
@pytest.mark.parametrize("quantize", [after_training, aware])
def test_both_norms_are_fused_and_the_answers_are_torchs_to_the_bit(quantize, fused):
    ours = net(batchnorm.BatchNorm2d, fused)
    keys, kinds = list(ours.state_dict()), [type(module) for module in ours.modules()]
    expected, got = quantize(net(nn.BatchNorm2d)), quantize(ours)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in got.modules())
    assert torch.equal(expected(X), got(X))
    # the model that was given is as it was
    assert list(ours.state_dict()) == keys
    assert [type(module) for module in ours.modules()] == kinds


@pytest.mark.parametrize(
    "option", [{"virtual_batch_size": 1}, {"channel_dim": -1}, {"running_var_correction": 0}]
)
def test_a_layer_that_torch_has_not_is_refused_with_its_place(option):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(batchnorm.BatchNorm2d(8, **option))).eval()
    with pytest.raises(ArgumentError, match=f"quantization: .*{next(iter(option))}") as caught:
        after_training(model)
    assert caught.value.at == "1.0"


def test_frozen_statistics_are_those_of_eval_mode_and_of_no_training():
    model = batchnorm.freeze(net(batchnorm.BatchNorm2d))
    assert torch.equal(after_training(copy.deepcopy(model))(X), after_training(net(nn.BatchNorm2d))(X))
    with pytest.raises(ArgumentError, match="frozen"):
        aware(model)


def test_a_residual_inside_is_written_down_as_a_sum():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), batchnorm.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), residual=x)

    block = Block().eval()
    # 8 bits of a range of about 4
    torch.testing.assert_close(after_training(block)(X), block(X), atol=0.05, rtol=0.05)


def test_what_eager_quantization_does_not_know_is_an_error_and_no_wrong_number():
    from torch.ao import quantization

    with pytest.raises((AssertionError, NotImplementedError), match="BatchNorm2d"):
        quantization.fuse_modules(net(batchnorm.BatchNorm2d), [["0", "1"]])
    model = nn.Sequential(quantization.QuantStub(), *net(batchnorm.BatchNorm2d))
    model.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(model.eval())
    prepared(X)
    with pytest.raises(DtypeError, match="quint8") as caught:
        quantization.convert(prepared)(X)
    assert "batchnorm.fold" in caught.value.mend
