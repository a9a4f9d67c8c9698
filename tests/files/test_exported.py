"""Networks in files: programs are changed layer by layer, and no file gets to run code."""

import zipfile

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import batchnorm
from batchnorm.cli.network import register
from batchnorm.errors import ArgumentError, DataError
from batchnorm.files.opened import open_network
from batchnorm.files.program import raised

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

FACTORIES = """
import torch
from torch import nn

def trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 49, 2),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.eval()

def plain():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "some_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def trained(folder):
    import some_factories

    return some_factories.trained()


def run(*arguments):
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_program_is_folded_and_keeps_its_open_sizes(folder, trained):
    open_batch = [{0: torch.export.Dim.DYNAMIC}]
    torch.export.save(torch.export.export(trained, (X[:2],), dynamic_shapes=open_batch), folder / "in.pt2")
    output = run("fold", "in.pt2", "out.pt2")
    assert "2 folded" in output
    program = torch.export.load(folder / "out.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), trained(X), rtol=1e-5, atol=1e-5)


def test_a_factory_is_folded_to_a_state_dict(folder, trained):
    run("fold", "some_factories:trained", "out.pt")
    state = torch.load(folder / "out.pt", weights_only=True)
    folded = batchnorm.fold(trained)
    folded.load_state_dict(state)
    torch.testing.assert_close(folded(X), trained(X), rtol=1e-5, atol=1e-5)


def test_insert_takes_weights_and_writes_a_program(folder):
    torch.manual_seed(3)
    source = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.save(source.state_dict(), folder / "w.pt")
    output = run("insert", "some_factories:plain", "out.pt2", "--weights", "w.pt", "--shape", "2,5")
    assert "1 inserted" in output
    program = torch.export.load(folder / "out.pt2")
    weights = [v for v in program.state_dict.values() if v.shape == (4, 5)]
    assert len(weights) == 1
    assert torch.equal(weights[0], source[0].weight)
    assert (
        sum("batch_norm" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
        == 1
    )


def test_layers_of_a_program_become_modules():
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.BatchNorm1d(6),
        nn.ConvTranspose1d(6, 4, 3, 2, 1, 1),
    ).eval()
    x = torch.randn(2, 4, 16)
    network = raised(torch.export.export(model, (x,)))
    assert [type(network.get_submodule(str(i))) for i in range(3)] == [
        nn.Conv1d,
        nn.BatchNorm1d,
        nn.ConvTranspose1d,
    ]
    torch.testing.assert_close(network(x), model(x))


class Touch:
    """What a hostile file holds: unpickled, it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_hostile_program_runs_nothing(folder, trained):
    torch.export.save(torch.export.export(trained, (X,)), folder / "in.pt2")
    torch.save(Touch(folder / "touched"), folder / "evil.pt")
    with zipfile.ZipFile(folder / "in.pt2") as good, zipfile.ZipFile(folder / "bad.pt2", "w") as bad:
        replaced = 0
        for name in good.namelist():
            content = good.read(name)
            if "sample_inputs" in name:
                content, replaced = (folder / "evil.pt").read_bytes(), replaced + 1
            bad.writestr(name, content)
    assert replaced
    with pytest.raises(DataError, match="without running code"):
        open_network(str(folder / "bad.pt2"))
    with pytest.raises(DataError, match="without running code"):
        open_network("some_factories:plain", weights=folder / "evil.pt")
    assert not (folder / "touched").exists()


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("some_factories", ArgumentError),
        ("some_factories:missing", ArgumentError),
        ("no_such_module:made", ArgumentError),
        ("some_factories:number", ArgumentError),
        ("nothing_there.pt2", DataError),
    ],
)
def test_bad_sources(folder, source, error):
    with pytest.raises(error):
        open_network(source)


def test_bad_options(folder, trained):
    torch.save(trained.state_dict(), folder / "w.pt")
    with pytest.raises(DataError):
        open_network("some_factories:plain", weights=folder / "w.pt")
    with pytest.raises(ArgumentError):
        open_network("in.pt2", weights=folder / "w.pt")
    with pytest.raises(ArgumentError):
        run("fold", "some_factories:trained", "out.pt2", "--shape", "one")
