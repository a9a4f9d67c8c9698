"""Weight decay spares every norm and every bias, whichever library they are from."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm


def spared(model):
    groups = batchnorm.param_groups(model, 0.1)
    ids = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


class Rms(nn.Module):
    """No name, no base class and no bias that would tell."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(channels))  # 1 + gain, as Gemma has it

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.gain)


class Standardize(nn.Module):
    """Over a channel axis in the middle."""

    def __init__(self, channels):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        z = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
        return z * self.a[:, None, None] + self.b[:, None, None]


class LayerScale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x):
        return x * self.gamma


class NormFreeBlock(nn.Module):
    """Has norm in its name, a vector of its own, and is a block."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return self.proj(x + self.token)


class SpectralNormLinear(nn.Module):
    """Has norm in its name and a matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.zeros(4))


class OddNorm(nn.Module):
    """Named a norm, and no forward that a trial could run."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, gate, length):
        raise AssertionError("a trial must not be needed")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Rms(4), {"gain"}),
        (Standardize(4), {"a", "b"}),
        (OddNorm(), {"scale"}),
        (LayerScale(4), set()),
        (nn.PReLU(4), set()),
        (NormFreeBlock(), {"proj.bias"}),
        (SpectralNormLinear(), {"bias"}),
        (nn.LayerNorm((2, 3)), {"weight", "bias"}),
        (nn.LSTM(2, 3), {"bias_ih_l0", "bias_hh_l0"}),
        (nn.MultiheadAttention(4, 2), {"in_proj_bias", "out_proj.bias"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norms_are_known_by_what_they_are(module, expected):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), module)
    before = torch.get_rng_state()
    values = {k: v.clone() for k, v in module.state_dict().items()}
    assert spared(net) == {f"1.{name}" for name in expected}
    assert all(torch.equal(v, values[k]) for k, v in module.state_dict().items())
    assert torch.equal(before, torch.get_rng_state())


def test_gamma_is_spared_where_torch_keeps_it_elsewhere():
    class Positive(nn.Module):
        def forward(self, x):
            return x.exp()

    net = nn.Sequential(nn.Linear(4, 4), batchnorm.BatchNorm1d(4), nn.BatchNorm1d(4))
    parametrize.register_parametrization(net[1], "weight", Positive())
    prune.l1_unstructured(net[2], "weight", 0.5)
    assert spared(net) == {
        *("0.bias", "1.bias", "1.parametrizations.weight.original"),
        *("2.bias", "2.weight_orig"),
    }


def test_a_layer_without_shapes_is_refused():
    with pytest.raises(batchnorm.ArgumentError, match="lazy") as caught:
        batchnorm.param_groups(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), 0.1)
    assert caught.value.at == "1"


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2", "mamba2", "qwen3", "vit", "resnet"])
def test_norms_of_transformers_are_spared_and_no_matrix_is(name):
    transformers = pytest.importorskip("transformers")
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    small = {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        **{"vocab_size": 50, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
        **{"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    }
    if name == "mamba2":
        small.update(expand=2, state_size=8, n_groups=1, num_heads=8, head_dim=8)
    if name == "resnet":
        small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = transformers.AutoModel.from_config(kind(**small))
    found = spared(model)
    parameters = dict(model.named_parameters())
    norms = {
        key for key, p in parameters.items() if p.dim() == 1 and "norm" in key.lower() and "weight" in key
    }
    assert norms
    assert norms <= found
    assert {key for key in found if parameters[key].dim() > 1} == set()
