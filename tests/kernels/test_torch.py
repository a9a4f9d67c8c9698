"""The engine of torch's own batch norm: what it dispatches, that it waits for no device, and what it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.functional import batch_norm
from batchnorm.kernels import select
from batchnorm.kernels import torch as own
from batchnorm.population import Tracking, commit


@pytest.fixture(autouse=True)
def _by_torch() -> Iterator[None]:
    with select.use("torch"):
        yield


class Watch(TorchDispatchMode):
    """Lists what is dispatched, and how: a host synchronization, or a copy between devices, shows here."""

    # what looks at values before it gives a result: on a device the host would wait
    WAITING = frozenset(
        {
            *("lift_fresh", "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
            *("_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave"),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        self.names.append(name)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = torch.device(kwargs.get("device") or args[0].device)
            assert source.device.type == target.type, "a copy between devices"
        by_truth = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if name in self.WAITING or by_truth:
            self.waits.add(name)
        return func(*args, **kwargs)

    @property
    def norms(self) -> list[str]:
        return [name for name in self.names if "batch_norm" in name]


@pytest.mark.parametrize(
    "fault",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t * torch.tensor(3.0),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.masked_select(t > 0),
        lambda t: torch.equal(t, t),
        lambda t: t.unique(),
        lambda t: t.index_put_((t > 0,), torch.zeros_like(t[0])),
    ],
)
def test_the_watch_finds_whoever_waits(fault: Any) -> None:
    t = torch.randn(5)
    with Watch() as watch:
        fault(t)
    assert watch.waits


def test_the_watch_finds_a_copy_between_devices() -> None:
    with Watch(), pytest.raises(AssertionError, match="between devices"):
        torch.ones(3).to("meta")
    with Watch(), pytest.raises(AssertionError, match="between devices"):
        torch.ones(3, device="meta").copy_(torch.ones(3))


LAYERS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "plain average": {"momentum": None},
    "divisor m": {"running_var_correction": 0},
    "propagate": {"on_nonfinite": "propagate"},
    "not affine": {"affine": False},
    "not tracking": {"track_running_stats": False},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_training_step_is_one_batch_norm_and_waits_for_nothing(
    options: dict, dtype: torch.dtype, residual: bool
) -> None:
    layer = batchnorm.BatchNorm2d(5, **options)
    z = torch.randn(4, 5, 6, 6, dtype=dtype, requires_grad=True)
    added = torch.randn(4, 5, 6, 6, dtype=dtype, requires_grad=True) if residual else None
    layer(z, added)  # a count may be made at the first batch
    with Watch() as forward:
        y = layer(z, added)
    with Watch() as backward:
        y.backward(torch.ones_like(y))
    assert forward.norms == ["native_batch_norm"]
    assert backward.norms == ["native_batch_norm_backward"]
    assert not forward.waits | backward.waits
    most = (
        14
        + residual
        + 12 * (options.get("momentum", 0.1) is None)
        + 2 * ("running_var_correction" in options)
    )
    assert len(forward.names) <= most, forward.names


# layer, shape of its input: none of them what the counts were first taken on
SHAPES = {
    "matrix": (lambda: batchnorm.BatchNorm1d(7, activation="relu"), (9, 7)),
    "NCL": (lambda: batchnorm.BatchNorm1d(7, activation="relu"), (2, 7, 11)),
    "NLC": (lambda: batchnorm.BatchNorm1d(7, activation="relu", channel_dim=-1), (2, 11, 7)),
    "channels_last": (lambda: batchnorm.BatchNorm2d(24, activation="relu"), (2, 24, 3, 5)),
    "volume": (lambda: batchnorm.BatchNorm3d(3, activation="relu"), (2, 3, 4, 2, 5)),
    "one channel, one sample": (lambda: batchnorm.BatchNorm2d(1, activation="relu"), (1, 1, 7, 7)),
    "domain": (lambda: _with_domain(), (3, 4, 5, 5)),
    "alone": (lambda: batchnorm.BatchNorm2d(5), (4, 5, 7, 7)),
}


def _with_domain() -> nn.Module:
    layer = batchnorm.BatchNorm2d(4, activation="relu")
    layer.add_domain("other")
    return layer


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_fourteen_operations_whatever_the_shape(case: str, dtype: torch.dtype, residual: bool) -> None:
    make, shape = SHAPES[case]
    layer = make()
    z = torch.randn(shape, dtype=dtype)
    if case == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    z.requires_grad_()
    added = (torch.randn_like(z).requires_grad_(),) if residual else ()
    with batchnorm.domain("other") if case == "domain" else nullcontext():
        layer(z, *added)
        with Watch() as forward:
            y = layer(z, *added)
    with Watch() as backward:
        y.backward(torch.ones_like(y))
    assert forward.norms == ["native_batch_norm"]
    assert backward.norms == ["native_batch_norm_backward"]
    assert not forward.waits | backward.waits
    assert y.stride() == z.stride()
    views = forward.names.count("view")  # rows of channels are a matrix to torch, there and back: no launch
    assert views <= (3 + residual if case == "NLC" else 0), forward.names
    assert len(forward.names) - views <= 14 + residual, forward.names


# shape, order of its axes in memory, channel axis
ORDERS = {
    "matrix, transposed": ((6, 4), (1, 0), 1),
    "(L, N, C)": ((3, 4, 5), (2, 0, 1), 1),
    "(C, N, L)": ((3, 4, 5), (1, 0, 2), 1),
    "image on its side": ((3, 4, 5, 2), (0, 1, 3, 2), 1),
    "image from behind": ((3, 4, 5, 2), (3, 2, 1, 0), 1),
    "channel in the middle": ((3, 2, 4, 5), (0, 1, 2, 3), 2),
    "channel last, from behind": ((3, 2, 5, 4), (3, 2, 1, 0), 3),
    "volume, (D, N, H, C, W)": ((2, 4, 3, 2, 3), (2, 0, 3, 1, 4), 1),
}


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("residual", [None, "as z lies", "otherwise"])
def test_packed_values_are_taken_in_whatever_order_they_lie_and_nothing_is_copied(
    case: str, residual: str | None
) -> None:
    shape, order, axis = ORDERS[case]
    back = [order.index(a) for a in range(len(shape))]

    def lying() -> torch.Tensor:
        return torch.randn([shape[a] for a in order]).permute(back).requires_grad_()

    z = lying()
    added = None if residual is None else lying() if residual == "as z lies" else torch.randn(shape)
    results = []
    for engine in ("torch", "aten"):
        with select.use(engine):
            mean, var = torch.zeros(4), torch.ones(4)
            how = {"training": True, "activation": "relu", "residual": added, "channel_dim": axis}
            if engine == "torch":
                batch_norm(z, mean.clone(), var.clone(), **how)
                with Watch() as watch:
                    y = batch_norm(z, mean, var, **how)
                assert watch.norms == ["native_batch_norm"]
                assert not {"clone", "copy_", "_to_copy"} & {*watch.names}, watch.names
                views = sum(name in ("view", "permute") for name in watch.names)
                assert views <= 4 + 2 * (added is not None)
                assert len(watch.names) - views <= 14 + (added is not None), watch.names
            else:
                y = batch_norm(z, mean, var, **how)
            results.append([y, mean, var, *torch.autograd.grad(y.sin().sum(), z)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert results[0][0].stride() == z.stride()


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_waits_for_nothing_unless_it_may_have_to_raise(training: bool) -> None:
    layer = batchnorm.BatchNorm1d(3, activation="relu", on_single_value="running").train(training)
    z = torch.randn(4, 3, 6, requires_grad=True)
    mask = torch.rand(4, 6) < 0.5
    layer(z, mask=mask)
    with Watch() as watch:
        layer(z, mask=mask).sum().backward()
    assert not watch.waits, watch.names


@pytest.mark.parametrize("graded", [False, True])
def test_inference_is_one_batch_norm_and_waits_for_nothing(graded: bool) -> None:
    layer = batchnorm.BatchNorm2d(5, activation="relu").eval()
    z = torch.randn(4, 5, 6, 6, requires_grad=graded)
    with Watch() as watch, torch.set_grad_enabled(graded):
        layer(z)
    assert watch.norms == ["native_batch_norm"]
    assert not watch.waits
    assert len(watch.names) <= (8 if graded else 3), watch.names


def test_ghost_batches_domains_and_accumulation_wait_for_nothing() -> None:
    layer = batchnorm.BatchNorm2d(3, virtual_batch_size=2)
    layer.add_domain("other")
    z = torch.randn(5, 3, 4, 4)
    with batchnorm.accumulate(layer):
        layer(z)
    with Watch() as watch, batchnorm.domain("other"), batchnorm.accumulate(layer):
        layer(z)
        layer(z)
    assert not watch.waits


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_commit_moves_the_same_for_a_number_and_for_a_tensor(
    unbiased: bool, correction: int, momentum: float | None
) -> None:
    def buffers() -> Tracking:
        return Tracking(
            torch.zeros(3), torch.ones(3), torch.tensor(4), momentum=momentum, correction=correction
        )

    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, float("nan"), 4.0])
    one, other = buffers(), buffers()
    with Watch() as watch:
        commit(one, 5, mean, var, unbiased=unbiased)
    assert not watch.waits
    commit(other, torch.tensor(5), mean, var, unbiased=unbiased)
    wanted = (
        var * 5 / 4 if correction and not unbiased else var * 4 / 5 if unbiased and not correction else var
    )
    weight = 0.3 if momentum else 1 / 5
    for have in (one, other):
        assert int(have.num_batches_tracked) == 5  # type: ignore[arg-type]
        assert float(have.running_var[1]) == 1.0
        if momentum is not None:
            torch.testing.assert_close(have.running_mean[0], torch.tensor(weight * 1.0))
            torch.testing.assert_close(have.running_var[2], 1 - weight + weight * wanted[2])
    for a, b in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_and_gradients_are_those_of_torch_nn() -> None:
    ours, theirs = batchnorm.BatchNorm2d(6), nn.BatchNorm2d(6)
    for channels_last in (False, True):
        z = torch.randn(8, 6, 5, 5) * 3 + 2
        if channels_last:
            z = z.contiguous(memory_format=torch.channels_last)
        leaves = [z.clone().requires_grad_() for _ in range(2)]
        for layer, leaf in zip((ours, theirs), leaves, strict=True):
            layer(leaf).square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=0, atol=0)
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-6, atol=1e-6)


LAYOUTS = {
    "NCHW": ((4, 3, 5, 5), 1),
    "NLC": ((4, 5, 3), -1),
    "NLC, not contiguous": ((4, 5, 3), -1),
    "NCL, channels are neighbours": ((4, 3, 5), 1),
    "channel in the middle": ((4, 5, 3, 6), 2),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu", "tanh", "gelu"])
def test_every_place_of_the_channels_agrees_with_composed_operations(
    case: str, activation: str | None
) -> None:
    shape, dim = LAYOUTS[case]
    z = torch.randn(shape)
    if "neighbours" in case:
        z = torch.randn(shape[0], shape[2], shape[1]).movedim(-1, 1)
    elif "not contiguous" in case:
        z = torch.randn(shape[1], shape[0], shape[2]).movedim(0, 1)
    residual = torch.randn(shape)
    results = []
    for engine in ("torch", "aten"):
        with select.use(engine):
            leaves = [z.clone(memory_format=torch.preserve_format), residual.clone()]
            for leaf in leaves:
                leaf.requires_grad_()
            layer = batchnorm.BatchNorm1d(3, channel_dim=dim, activation=activation)
            layer._dimensions = (len(shape),)
            y = layer(*leaves)
            y.sin().sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves), layer.running_var, layer.weight.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_batch_counts_once(reentrant: bool) -> None:
    layer = batchnorm.BatchNorm2d(3, activation="relu")
    z = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = checkpoint(layer, z, use_reentrant=reentrant)
    mean = layer.running_mean.clone()
    y.sum().backward()
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_mean, mean)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(activation: str | None, training: bool) -> None:
    layer = batchnorm.BatchNorm2d(2, activation=activation, dtype=torch.float64).train(training)
    z = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (z, residual))
    assert torch.autograd.gradgradcheck(layer, (z, residual))


def test_running_statistics_may_move_between_an_inference_and_its_backward() -> None:
    layer = batchnorm.BatchNorm2d(2).eval()
    z = torch.randn(3, 2, 4, 4, requires_grad=True)
    y = layer(z)
    layer.running_var.fill_(100)
    layer.running_mean.fill_(3)
    y.sum().backward()
    torch.testing.assert_close(z.grad, torch.full_like(z, (1 + 1e-5) ** -0.5))


def test_a_compiled_graph_shows_torchs_batch_norm_and_none_of_our_operators() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    layer = batchnorm.BatchNorm2d(3, activation="relu")
    eager = batchnorm.BatchNorm2d(3, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        z = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(compiled(z), eager(z))
    assert sum("batch_norm" in name for name in seen) == 1
    assert not any("batchnorm.training" in name for name in seen)
    for name, buffer in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], buffer)


def test_the_engine_serves_every_device_but_the_cpu_and_says_so() -> None:
    with torch._subclasses.FakeTensorMode():
        z = torch.empty(2, 3, device="cuda")
    before, select.forced = select.forced, None
    try:
        assert select.select(z) is own.engine
        assert select.reason(z).startswith("torch: ")
        assert select.select(torch.empty(2, 3)) is not own.engine
    finally:
        select.forced = before
