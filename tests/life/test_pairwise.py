"""Every pair of options' values, at least once, against the reference in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import reference

OPTIONS = {
    "mask": [None, "some", "input"],
    "virtual_batch_size": [None, 2, 3],
    "domain": [None, "fake"],
    "activation": [None, "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "tanh", "gelu"],
    "residual": [False, True],
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "layout": ["NC", "NCL", "NLC", "NCHW", "channels_last", "NHWC", "NCDHW", "strided"],
    "on_single_value": ["error", "running"],
    "on_nonfinite": ["skip", "propagate", "raise"],
    "momentum": [0.3, None],
    "running_var_correction": [1, 0],
    "affine": [True, False],
    "accumulate": [False, True],
    "phase": ["train", "eval", "frozen"],
}


def pairs_of(row):
    """Pairs of (name, index), names in the order of the options."""
    return set(itertools.combinations([(name, row[name]) for name in OPTIONS if name in row], 2))


def pairwise(options):
    """Rows that hold every pair of values of two options; greedy, so few and always the same."""
    missing = set()
    for a, b in itertools.combinations(options, 2):
        missing |= {((a, i), (b, j)) for i in range(len(options[a])) for j in range(len(options[b]))}
    rows = []
    while missing:
        row = dict(min(missing))
        for name, values in options.items():
            if name not in row:
                gains = [len(pairs_of({**row, name: i}) & missing) for i in range(len(values))]
                row[name] = gains.index(max(gains))
        missing -= pairs_of(row)
        rows.append({name: options[name][row[name]] for name in options})
    return rows


ROWS = pairwise(OPTIONS)


def test_the_rows_hold_every_pair():
    for a, b in itertools.combinations(OPTIONS, 2):
        seen = {(str(row[a]), str(row[b])) for row in ROWS}
        assert len(seen) == len(OPTIONS[a]) * len(OPTIONS[b])
    assert len(ROWS) < 150


def make_input(layout, dtype):
    channels, n = 3, 8
    if layout == "NC":
        return torch.randn(n, channels, dtype=torch.float64).to(dtype), 1, batchnorm.BatchNorm1d
    if layout in ("NCL", "NLC"):
        z = torch.randn(n, channels, 5, dtype=torch.float64).to(dtype)
        return (
            (z, 1, batchnorm.BatchNorm1d)
            if layout == "NCL"
            else (z.mT.contiguous(), -1, batchnorm.BatchNorm1d)
        )
    if layout == "NCDHW":
        return torch.randn(n, channels, 2, 3, 2, dtype=torch.float64).to(dtype), 1, batchnorm.BatchNorm3d
    z = torch.randn(n, channels, 4, 3, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        return z.contiguous(memory_format=torch.channels_last), 1, batchnorm.BatchNorm2d
    if layout == "NHWC":
        return z.permute(0, 2, 3, 1).contiguous(), -1, batchnorm.BatchNorm2d
    if layout == "strided":
        return z.repeat_interleave(2, -1)[..., ::2], 1, batchnorm.BatchNorm2d
    return z, 1, batchnorm.BatchNorm2d


def array(tensor):
    return None if tensor is None else tensor.detach().double().numpy()


def expected(row, layer, z, dy, residual, mask, dim, source):
    """Output, gradients and statistics, from the definition."""
    gamma, beta = array(layer.weight), array(layer.bias)
    run = {"channel_dim": dim, "activation": row["activation"]}
    n = z.shape[0]
    size = row["virtual_batch_size"] if row["phase"] == "train" else None
    parts = -(-n // size) if size and n > size else 1
    splits = [
        np.array_split(a, parts) if a is not None else [None] * parts
        for a in map(array_or_mask, (z, dy, residual, mask))
    ]
    outputs, gradients, told = [], [], []
    for part, dpart, extra, keep in zip(*splits, strict=True):
        given = {**run, "residual": extra, "mask": keep}
        if row["phase"] == "train":
            y, *statistics = reference.forward_training(part, gamma, beta, layer.eps, **given)
            told.append(statistics)
            back = reference.backward_training(dpart, part, gamma, beta, layer.eps, **given)
        else:
            y = reference.forward_inference(part, *source, gamma, beta, layer.eps, **given)
            back = reference.backward_inference(dpart, part, *source, gamma, beta, layer.eps, **given)
        outputs.append(y)
        gradients.append(back)
    dz, dgamma, dbeta, dresidual = zip(*gradients, strict=True)
    if row["accumulate"] and told:
        told = [reference.merge(told)]
    mean, var = source
    for k, (m, mu, sigma2) in enumerate(told, 1):
        sigma2 = sigma2 if row["running_var_correction"] == 0 else reference.unbiased(m, sigma2)
        weight = row["momentum"] or 1 / k
        mean = reference.moving_average(mean, mu, weight)
        var = reference.moving_average(var, sigma2, weight)
    return (
        np.concatenate(outputs),
        [np.concatenate(dz), np.concatenate(dresidual), sum(dgamma), sum(dbeta)],
        (mean, var, len(told)),
    )


def array_or_mask(tensor):
    if tensor is None:
        return None
    return tensor.numpy() if tensor.dtype == torch.bool else array(tensor)


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_options_compose(index):
    row = ROWS[index]
    torch.manual_seed(index)
    z, dim, cls = make_input(row["layout"], row["dtype"])
    keywords = ("activation", "virtual_batch_size", "on_single_value", "on_nonfinite", "momentum")
    layer = cls(
        3,
        affine=row["affine"],
        dtype=row["dtype"],
        channel_dim=dim,
        running_var_correction=row["running_var_correction"],
        **{name: row[name] for name in keywords},
    )
    if row["affine"]:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    holder = layer
    if row["domain"]:
        holder = layer.add_domain(row["domain"])
    holder.running_mean.normal_()
    holder.running_var.uniform_(0.5, 2)
    source = array(holder.running_mean).copy(), array(holder.running_var).copy()
    if row["phase"] == "frozen":
        batchnorm.freeze(layer)
    layer.train(row["phase"] != "eval")

    mask = None
    if row["mask"]:
        axis = dim % z.dim()
        mask = torch.rand([s for a, s in enumerate(z.shape) if a != axis]) > 0.2
        # each part keeps two values, where a sample may have one value only
        mask[:4] = True
        if row["layout"] == "NC":
            mask = torch.tensor([True] * 8 if row["virtual_batch_size"] else [True] * 6 + [False] * 2)
    given = z.clone(memory_format=torch.preserve_format) if row["layout"] != "strided" else z
    if mask is not None:
        given = torch.where(mask.unsqueeze(dim % z.dim()), given, float("nan"))
    given = given.detach().requires_grad_()
    residual = torch.randn(z.shape).to(row["dtype"]).requires_grad_() if row["residual"] else None
    dy = torch.randn(z.shape).to(row["dtype"])

    def step():
        return layer(given, residual, mask, "input" if row["mask"] == "input" else "zero")

    def windowed():
        if not row["accumulate"]:
            return step()
        with batchnorm.accumulate(layer):
            return step()

    if row["domain"]:
        with batchnorm.domain(row["domain"]):
            y = windowed()
    else:
        y = windowed()
    y.backward(dy)

    wanted, gradients, (mean, var, steps) = expected(row, layer, z, dy, residual, mask, dim, source)
    dz = gradients[0]
    if row["mask"] == "input":
        outside = ~np.broadcast_to(np.expand_dims(mask.numpy(), dim % z.dim()), z.shape)
        wanted = np.where(outside, array(given), wanted)
        dz = np.where(outside, array(dy), dz)
    assert y.dtype == row["dtype"]
    assert y.shape == z.shape
    eps = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[row["dtype"]]

    def close(actual, want, scale=1.0):
        np.testing.assert_allclose(array(actual), want, rtol=eps, atol=eps * scale)

    close(y, wanted)
    close(given.grad, dz, 2)
    if residual is not None:
        close(residual.grad, gradients[1], 2)
    if row["affine"]:
        # sums over a channel, of terms rounded one by one
        close(layer.weight.grad, gradients[2], 20)
        close(layer.bias.grad, gradients[3], 20)
    wide = 1e-9 if row["dtype"] == torch.float64 else 1e-5
    np.testing.assert_allclose(array(holder.running_mean), mean, rtol=wide, atol=wide)
    np.testing.assert_allclose(array(holder.running_var), var, rtol=wide, atol=wide)
    assert holder.num_batches_tracked == steps
    if holder is not layer:
        assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))
