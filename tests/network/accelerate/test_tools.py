"""Whoever follows, exports, copies or transforms an accelerated model is given the plain one."""

import copy
import io
import pickle
import threading

import networks
import pytest
import torch
from networks import NETWORKS, BasicBlock, assert_same, image, prepared
from test_accelerated_answers import called, together, twins
from torch import nn

import batchnorm
from batchnorm import accelerate, record, restore


@pytest.fixture(autouse=True)
def _fresh():
    yield
    torch._dynamo.reset()


# -- copies --------------------------------------------------------------------------------------------------
def test_copies_and_files_hold_the_plain_model_and_say_so():
    model, plain, x = called(NETWORKS["basic"][0])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert twin.__dict__.get("_compiled_call_impl") is None
        torch.testing.assert_close(twin(x), plain(x))
        assert "accelerate it again" in record(twin).reason("")
        torch.testing.assert_close(accelerate(twin)(x), plain(x))
        assert len(together(twin)) == 4
    assert not record(model).left_alone
    model.load_state_dict(plain.state_dict())
    assert_same(model, plain)


def test_share_memory_and_moves_of_dtype():
    model, plain, x = called()
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.float()(x.float()), plain.float()(x.float()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_weight_averaging_begun_before_or_after(when):
    model = prepared(NETWORKS["functional"][0])
    plain = copy.deepcopy(model)
    theirs = torch.optim.swa_utils.AveragedModel(plain, use_buffers=True)
    if when == "after":
        accelerate(model)
        model(image())
        plain(image())
    ours = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    accelerate(model)
    for seed in range(3):
        for network, average in ((model, ours), (plain, theirs)):
            network(image(seed)).sum().backward()
            torch.optim.SGD(network.parameters(), 0.01).step()
            average.update_parameters(network)
    torch.testing.assert_close(ours.eval()(image()), theirs.eval()(image()))


# -- transformations of functions ----------------------------------------------------------------------------
def test_functional_call_and_transformations():
    model, plain, x = called()
    other = {k: v.detach() * 1.5 for k, v in model.named_parameters()}

    def loss(network):
        return lambda p: torch.func.functional_call(network, p, (x,)).square().sum()

    torch.testing.assert_close(loss(model)(other), loss(plain)(other))
    for ours, theirs in zip(
        torch.func.grad(loss(model))(other).values(),
        torch.func.grad(loss(plain))(other).values(),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.func.vmap(lambda one: model(one[None]))(x), torch.func.vmap(lambda one: plain(one[None]))(x)
    )
    tangent = torch.ones_like(x)
    for ours, theirs in zip(
        torch.func.jvp(model, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model(x), plain(x))


def test_double_backward():
    model, plain = twins(NETWORKS["functional"][0])
    results = []
    for network in (model, plain):
        x = image().requires_grad_()
        (g,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_several_threads():
    model, plain, _ = called(NETWORKS["basic"][0])
    other = accelerate(prepared(NETWORKS["functional"][0])).eval()
    wanted = [plain(image(i)) for i in range(8)]
    failures = []

    def work(i):
        try:
            other(image(i))
            torch.testing.assert_close(model(image(i)), wanted[i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- the package's own tools ---------------------------------------------------------------------------------
def test_fold_and_insert_as_of_the_plain_model():
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))  # noqa: E731
    for tool in (batchnorm.fold, batchnorm.insert):
        model, plain, x = called(make)
        ours, theirs = tool(model, x), tool(plain, x)
        assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
        torch.testing.assert_close(ours(x), theirs(x))


def test_convert_and_calibrate_an_accelerated_model():
    model, plain, _ = called(NETWORKS["basic"][0])
    for network in (model, plain):
        batchnorm.convert(network, "batchnorm")
        batchnorm.calibrate(network, [image(1), image(2)])
    assert_same(model, plain)
    restore(model)
    assert isinstance(model[0].bn1, batchnorm.BatchNorm2d)


# -- many models ---------------------------------------------------------------------------------------------
def test_equal_blocks_share_what_is_compiled():
    blocks = nn.Sequential(*[BasicBlock(3, 3) for _ in range(12)]).double()
    for block in blocks:
        accelerate(block)
        block(image())
    assert {len(b._compiled_call_impl.compiled.graphs) for b in blocks} == {1}


def test_equal_blocks_compiled_by_their_user_make_one_graph():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    blocks = [torch.compile(accelerate(BasicBlock(3, 3).double()), backend=backend) for _ in range(12)]
    for block in blocks:
        block(image())
    assert len(graphs) == 1


def test_many_different_models_are_each_compiled():
    for c in range(1, 13):
        model = accelerate(nn.Sequential(nn.Conv2d(3, c, 1), nn.BatchNorm2d(c), nn.ReLU()).double())
        model(image())
        assert together(model) == ["1"]


def test_nothing_of_the_process_is_patched():
    before = dict(vars(nn.Module))
    model, _, x = called()
    model(x)
    assert dict(vars(nn.Module)) == before
    assert networks.torch.is_tensor(x)


# -- tools of other libraries that look at classes, or put hooks on ------------------------------------------------
def test_pruning_and_parametrization_of_an_accelerated_model():
    from torch.nn.utils import parametrizations, prune

    model, plain, x = called()
    for network in (model, plain):
        torch.manual_seed(0)
        prune.l1_unstructured(network.conv, "weight", 0.5)
        prune.random_unstructured(network.bn, "weight", 1)
    assert_same(model, plain)
    for network in (model, plain):
        prune.remove(network.conv, "weight")
        torch.manual_seed(0)
        parametrizations.spectral_norm(network.conv)
        network.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_attribution_by_hooks():
    attribution = pytest.importorskip("captum.attr")
    plain = prepared(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        )
    ).eval()
    model = accelerate(copy.deepcopy(plain))
    model(image())
    for method in (attribution.DeepLift, attribution.GuidedBackprop, attribution.Saliency):
        given = method(model).attribute(image(), target=1)
        torch.testing.assert_close(given, method(plain).attribute(image(), target=1), rtol=1e-9, atol=1e-9)


def test_private_training_refuses_it_as_it_refuses_the_plain_model():
    validators = pytest.importorskip("opacus.validators")
    model, plain, _ = called(training=True)
    errors = [[type(e) for e in validators.ModuleValidator.validate(m, strict=False)] for m in (model, plain)]
    assert errors[0] == errors[1] != []
    fixed = validators.ModuleValidator.fix(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fixed.modules())


def test_another_entry_point_runs_as_written_and_a_part_can_be_accelerated():
    class WithEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = NETWORKS["functional"][0]()

        def encode(self, x):
            return self.body(x)

        def forward(self, x):
            return self.encode(x).mean()

    model, plain = twins(WithEncoder)
    torch.testing.assert_close(model.encode(image()), plain.encode(image()))
    assert not together(model)
    assert "other methods" in record(model).of("accelerated")[0].detail
    model(image())
    assert together(model)
    part = copy.deepcopy(plain)
    accelerate(part.body)
    torch.testing.assert_close(part.encode(image()), plain.encode(image()))
    assert together(part.body)


def test_models_of_one_class_with_other_settings_and_sizes_leave_one_another_alone():
    compiled = []  # kept: each has its own
    for eps, n in ((1e-5, 2), (1e-3, 3), (1e-2, 5)):
        model, plain = twins(
            lambda eps=eps: nn.Sequential(nn.Conv2d(3, 41, 1), nn.BatchNorm2d(41, eps), nn.ReLU())
        )
        x = torch.randn(n, 3, 5, 5).double()
        torch.testing.assert_close(model(x), plain(x))
        assert together(model)
        compiled.append(model._compiled_call_impl.compiled)
    # of a width that no other test has: what is compiled is shared by equal models that are still there
    assert [len(c.graphs) for c in compiled] == [1, 1, 1]


def test_eps_and_momentum_that_change_stay_called_together():
    model, plain, x = called(training=True)
    for value in (1e-4, 1e-3, 1e-2):
        for network in (model, plain):
            network.bn.eps, network.bn.momentum = value, 10 * value
        torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.bn.running_var, plain.bn.running_var)
    assert "bn" in together(model)
