"""What a user may get wrong on the command line is told in a sentence, before the work and without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from batchnorm.cli import app as command_line
from batchnorm.cli.outputs import check_file, check_folder, whole, write_text
from batchnorm.errors import ArgumentError, BatchNormError, DataError

RUNNER = CliRunner()
APP = command_line.build()

FACTORIES = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()

def wants(width, depth=2, *, kind):
    return nn.Linear(width, depth)

def breaks():
    raise KeyError("no such layer")

def number():
    return 3

constant = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "given_factories.py").write_text(FACTORIES)
    (tmp_path / "not_python.py").write_text("def net(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("given_factories", None)
    return tmp_path


def invoke(*arguments):
    return RUNNER.invoke(APP, [str(a) for a in arguments])


def test_the_version_and_short_help():
    shown = invoke("--version")
    assert shown.exit_code == 0
    assert shown.output.startswith("batchnorm 0.")
    for arguments in (["-h"], ["fold", "-h"], ["info", "-h"]):
        shown = invoke(*arguments)
        assert shown.exit_code == 0
        assert "Usage" in shown.output
    assert "--install-completion" in invoke("-h").output


def test_info_for_programs():
    told = json.loads(invoke("info", "--json").output)
    assert told["versions"]["torch"] == torch.__version__
    assert {"engine", "C++ core", "threads"} <= set(told)


def test_studies_are_listed_and_none_is_run(folder):
    shown = invoke("study", "--list")
    assert shown.exit_code == 0
    assert "faster-learning" in shown.output
    assert not (folder / "batchnorm-study").exists()
    assert invoke("study").exit_code == 2


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("given_factories:wants", "needs arguments: width, kind"),
        ("given_factories:breaks", "raised KeyError"),
        ("given_factories:number", "makes a int"),
        ("given_factories:constant", "is a int"),
        ("given_factories:missing", "cannot be imported"),
        ("not_python:net", "SyntaxError"),
        ("missing.pt2", "is not there"),
    ],
)
def test_a_bad_source_is_named(folder, source, says):
    shown = invoke("fold", source, "out.pt")
    assert isinstance(shown.exception, BatchNormError)
    assert says in str(shown.exception)
    assert not (folder / "out.pt").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {1: torch.ones(2)}, {"0.weight": 3}])
def test_weights_that_are_no_state_dict(folder, content):
    torch.save(content, folder / "w.pt")
    shown = invoke("fold", "given_factories:net", "out.pt", "--weights", "w.pt")
    assert isinstance(shown.exception, DataError), shown.exception


def test_weights_that_are_not_there(folder):
    shown = invoke("fold", "given_factories:net", "out.pt", "--weights", "none.pt")
    assert "none.pt is not there" in str(shown.exception)


@pytest.mark.parametrize(
    "command", ["fold", "demo", "study", "bench", "bench --gpu --dry-run", "study --html"]
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(folder, command, monkeypatch):
    (folder / "file").write_text("here")
    arguments = {
        "fold": ["fold", "module_that_is_not_there:net", "file/out.pt"],
        "demo": ["demo", "--out", "file/demo"],
        "study": ["study", "all", "--quick", "--out", "file/study"],
        "bench": ["bench", "--quick", "--out", "file/rows.csv"],
        "bench --gpu --dry-run": ["bench", "--gpu", "--dry-run", "--folder", "file/gpu"],
        "study --html": ["study", "all", "--quick", "--html", "file/report.html"],
    }[command]
    shown = invoke(*arguments)
    assert isinstance(shown.exception, DataError)
    assert "cannot be written" in str(shown.exception)
    assert (folder / "file").read_text() == "here"


def test_a_check_leaves_nothing_behind_and_what_is_there_as_it_is(tmp_path):
    (tmp_path / "kept").write_text("before")
    check_file(tmp_path / "kept")
    check_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "before"
    with pytest.raises(DataError, match="is a folder"):
        check_file(tmp_path)


def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "first")

    def stopped():
        with whole(path) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing then fails with an error
from batchnorm.cli import main
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.argv = ["batchnorm", "fold", "given_factories:net", sys.argv[1]]
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX")
@pytest.mark.slow
@pytest.mark.parametrize("out", ["out.pt", "out.pt2"])
def test_a_full_disk_leaves_no_part_of_a_file(folder, out):
    done = subprocess.run(
        [sys.executable, "-c", FULL, out],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "given_factories.py",
        "not_python.py",
    ]


def test_a_made_up_input_is_told_and_the_batch_stays_open(folder):
    shown = invoke("fold", "given_factories:net", "out.pt2")
    assert shown.exit_code == 0, shown.exception
    told = " ".join(shown.output.split())
    assert "out.pt2: exported program; without --shape an input of shape (2, 3," in told
    assert "the size of the batch is open" in told
    program = torch.export.load(folder / "out.pt2").module()
    side = int(told.split("(2, 3, ")[1].split(",")[0])
    for batch in (3, 7):
        assert program(torch.randn(batch, 3, side, side)).shape[0] == batch


@pytest.mark.slow
def test_onnx_is_written_as_onnx(folder):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    import given_factories

    torch.manual_seed(0)
    net = given_factories.net()
    nn.init.normal_(net[1].running_mean)
    torch.save(net.state_dict(), folder / "w.pt")
    shown = invoke("fold", "given_factories:net", "out.onnx", "--weights", "w.pt", "--shape", "2,3,8,8")
    assert shown.exit_code == 0, shown.exception
    model = onnx.load(folder / "out.onnx")
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    session = runtime.InferenceSession(folder / "out.onnx")
    x = torch.randn(2, 3, 8, 8)
    answer = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(answer), net(x), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_packages_is_refused_before_the_work(folder, monkeypatch):
    from batchnorm.files import saved

    monkeypatch.setattr(saved.importlib.util, "find_spec", lambda name: None)
    shown = invoke("fold", "module_that_is_not_there:net", "out.onnx")
    assert isinstance(shown.exception, ArgumentError)
    assert "pip install onnx onnxscript" in str(shown.exception)


@pytest.mark.parametrize("shape", ["one", "0,3", "-1,3"])
def test_a_shape_that_is_none(folder, shape):
    shown = invoke("fold", "given_factories:net", "out.pt", f"--shape={shape}")
    assert isinstance(shown.exception, ArgumentError)
