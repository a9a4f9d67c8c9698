"""Ways of training: checkpointing, mixed precision, accumulation, hooks, changing sizes, several processes."""

import copy
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo
import torch.multiprocessing as mp
from networks import NETWORKS, Branching, assert_same, image, prepared
from test_accelerated_answers import together, twins
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import accelerate, record

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, reentrant, norm, drop):
        super().__init__()
        self.conv, self.reentrant = nn.Conv2d(3, 4, 1), reentrant
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), norm(4), nn.ReLU(), nn.Dropout(drop))
        self.norm = norm(4)

    def forward(self, x):
        h = self.conv(x)
        h = checkpoint(self.inner, h, use_reentrant=self.reentrant)
        return torch.relu(self.norm(h) + h)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, norm):
    model, plain = twins(lambda: Checkpointed(reentrant, norm, 0.5))
    assert_same(model, plain)
    model.train()
    model(image())
    assert sorted(together(model)) == ["inner.1", "norm"]


def test_checkpointing_around_the_model():
    model, plain = twins(NETWORKS["basic"][0])
    for network in (model, plain):
        x = image().requires_grad_()
        checkpoint(network, x, use_reentrant=False).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(where):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = NETWORKS["basic"][0]()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16) if where == "inside" else nullcontext():
                return self.body(x).float()

    torch.manual_seed(0)
    plain = Inside()
    model, exact = accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    for training in (True, False):
        results = []
        for network in (model, plain, exact.body):
            network.train(training).zero_grad()
            x = image() if network is exact.body else image().float()
            mixed = torch.autocast(
                "cpu", torch.bfloat16, enabled=where == "around" and network is not exact.body
            )
            with mixed:
                out = network(x)
            out.square().mean().backward()
            results.append([out.detach(), *[p.grad for p in network.parameters()]])
        # Both round the same values to bfloat16, a convolution's weight gradient last of all; where a sum lies
        # between two of its numbers the order of additions decides, so they differ by a unit in the last place
        # (2**-8 of a value at most). Which one is wrong by more, the exact values tell: ours may be as far as
        # torch's, and by one rounding of the largest value farther.
        scale = max(float(t.abs().max()) for t in results[2])
        for ours, theirs, right in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            error, torchs = (float((t.double() - right).abs().max()) for t in (ours, theirs))
            assert error <= 2 * torchs + 2**-8 * scale


def test_gradient_accumulation_and_steps():
    model, plain = twins(NETWORKS["basic"][0])
    optimizers = [torch.optim.SGD(network.parameters(), 0.01, momentum=0.9) for network in (model, plain)]
    for step in range(4):
        for network, optimizer in zip((model, plain), optimizers, strict=True):
            network(image(step)).square().mean().backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saved_tensor_hooks():
    model, plain = twins(NETWORKS["basic"][0])
    grads = []
    for network in (model, plain):
        with torch.autograd.graph.save_on_cpu():
            network(image()).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:accelerate. <lambda>")  # one code in ten hooks: Dynamo's limit is eight
def test_every_hook_sees_what_it_saw():
    model, plain = twins(NETWORKS["repvgg"][0])

    def listen(network):
        seen = []
        for path, m in network.named_modules():
            m.register_forward_hook(lambda _, i, o, path=path: seen.append((path, o.detach().clone())))
            m.register_full_backward_hook(lambda _, i, o, path=path: seen.append((path, o[0].clone())))
        return seen

    ours, theirs = listen(model), listen(plain)
    for network in (model, plain):
        network(image().requires_grad_()).sum().backward()
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_changing_sizes_stay_compiled():
    model, plain = twins(NETWORKS["basic"][0])
    before = len(model._compiled_call_impl.compiled.graphs)
    for n, side in [(4, 6), (2, 6), (3, 8), (5, 7), (6, 9), (2, 11), (7, 5), (4, 6), (3, 10), (9, 6)]:
        x = torch.randn(n, 3, side, side).double()
        torch.testing.assert_close(model(x), plain(x))
    assert len(model._compiled_call_impl.compiled.graphs) - before <= 4
    assert len(together(model)) == 4


@torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=2)
def test_the_limit_is_told_once_and_answers_stay_right():
    class Counting(Branching):
        def forward(self, x):
            return self.act(self.norm(self.conv(x))) * self.step

    model, plain = twins(lambda: Counting(3))
    warned = []
    for step in ("a", "b", "c", "d", "e"):
        for network in (model, plain):
            network.step = {"a": 1.0, "b": 2.0, "c": 3.5, "d": 4.5, "e": 7.0}[step]
        with pytest.warns() if step == "c" else nullcontext() as found:
            torch.testing.assert_close(model(image()), plain(image()))
        warned += [str(w.message) for w in found or []]
    (message,) = [w for w in warned if "accelerate" in w]
    assert "torch._dynamo.config.recompile_limit = 2" in message
    assert "raise it" in message
    assert any("recompile_limit" in row.reason for row in record(model))


@dataclass
class Output:
    y: torch.Tensor
    hidden: tuple


@pytest.mark.parametrize("kind", ["dict", "dataclass", "generator", "list"])
def test_what_a_forward_may_return(kind):
    class Returning(Branching):
        def forward(self, x):
            y = self.act(self.norm(self.conv(x)))
            if kind == "dict":
                return {"y": y, "hidden": [x, y]}
            if kind == "dataclass":
                return Output(y, (x, y))
            return [y, y + 1]

    class Generating(Branching):
        def forward(self, x):
            yield self.act(self.norm(self.conv(x)))
            yield x

    model, plain = twins(lambda: (Generating if kind == "generator" else Returning)(3))
    ours, theirs = model(image()), plain(image())
    if kind == "dataclass":
        ours, theirs = (o.hidden for o in (ours, theirs))
    if kind == "dict":
        ours, theirs = (o["hidden"] for o in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_generator_computes_no_more_than_it_is_asked_for():
    class Generating(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            scale = yield self.first(x)
            yield self.second(x) * scale

    model, plain = twins(Generating)
    for network in (model, plain):
        next(network(image()))  # and no further: the second norm has seen nothing
    assert int(model.second[1].num_batches_tracked) == 0
    ours, theirs = model(image()), plain(image())
    for given, wanted in ((next(ours), next(theirs)), (ours.send(2.0), theirs.send(2.0))):
        torch.testing.assert_close(given, wanted)
    for given, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(given, wanted)
    assert "accelerate its parts" in record(model).reason("")


@pytest.mark.parametrize("kind", ["dict", "dataclass"])
def test_a_generator_that_is_returned_runs_as_plain_torch_from_the_second_call_on(kind):
    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def later(self, y):
            yield self.second(y)

        def forward(self, x):
            y = self.first(x)
            return {"y": y, "later": self.later(y)} if kind == "dict" else Output(y, self.later(y))

    model, plain = twins(Returning)
    with pytest.warns(UserWarning, match="returns a generator"):
        ours = model(image())
    theirs = plain(image())
    for answer in (ours, theirs):
        (later,) = answer["later"] if kind == "dict" else answer.hidden
        assert later.shape == (4, 3, 6, 6)
    for network in (model, plain):
        network(image())  # what is returned is never asked for anything
    for given, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(given, wanted)
    assert "accelerate its parts" in record(model).reason("")


def test_python_that_depends_on_data_breaks_the_graph_and_parts_are_called_together():
    class Depends(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU())

        def forward(self, x):
            x = self.first(x)
            return self.second(x) if x.sum().item() > 0 else x

    model, plain = twins(Depends)
    assert_same(model, plain)
    assert together(model) == ["first.1", "second.1"]
    # once in each mode and kind of size that was compiled, for the one reason
    (row,) = record(model).of("broke the graph")
    assert "Tensor.item()" in row.reason
    assert f"{row.detail.split()[0]} break" in record(model).of("compiled")[0].detail


def test_a_plain_average_breaks_the_graph_of_torchs_layer_and_is_named():
    model, plain = twins(
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=None), nn.ReLU())
    )
    assert_same(model, plain)
    (row,) = [row for row in record(model).of("broke the graph") if row.path]
    assert row.path == "1"
    assert "momentum=None" in row.reason
    # the way out that the row names
    ours = batchnorm.convert(copy.deepcopy(plain), "batchnorm")
    model = accelerate(copy.deepcopy(ours))
    assert_same(model, ours)
    assert together(model) == ["1"]
    assert not record(model).of("broke the graph")


def test_random_decisions_are_made_at_each_call():
    class Random(Branching):
        def forward(self, x):
            y = self.act(self.norm(self.conv(x)))
            return y * 2 if random.random() < 0.5 else y

    model, plain = twins(lambda: Random(3))
    for seed in range(6):
        random.seed(seed)
        ours = model(image())
        random.seed(seed)
        torch.testing.assert_close(ours, plain(image()))


# -- several processes ---------------------------------------------------------------------------------------
def _ranks(rank, kind, path, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = []
    for fast in (True, False):
        model = prepared(NETWORKS["basic"][0]).float()
        if fast:
            accelerate(model)
        if kind == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        elif kind == "ddp first":
            wrapped = accelerate(nn.parallel.DistributedDataParallel(model)) if fast else None
            wrapped = wrapped or nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model:
                fully_shard(block)
            wrapped = fully_shard(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            wrapped(image(10 * step + rank).float()).square().mean().backward()
            optimizer.step()
        state = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in model.state_dict().items()}
        results.append({k: v.detach().clone() for k, v in state.items()})
    for name, theirs in results[1].items():
        torch.testing.assert_close(results[0][name], theirs, rtol=1e-3, atol=1e-4, msg=name)
    if rank == 0:
        with open(path, "w") as file:
            file.write("done")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp first", "fsdp2"])
def test_two_processes(kind, tmp_path):
    path = tmp_path / "done"
    mp.spawn(_ranks, (kind, str(path), 29500 + random.SystemRandom().randrange(2000)), nprocs=2)
    assert path.read_text() == "done"
