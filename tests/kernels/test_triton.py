"""Our GPU kernels without a GPU: their values in triton's interpreter, with canaries, and what is launched.

The interpreter cuts float32 to bfloat16 where a GPU rounds, so a bfloat16 result may be one unit off. It takes some
50 ms a program, so shapes are small, and chosen so that every way through `batchnorm.kernels.triton.plan` is met.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guarded import Canaries, canaries
from torch import Tensor

from batchnorm import reference, skips
from batchnorm.kernels import triton
from batchnorm.kernels.contract import Moments, Norm
from batchnorm.kernels.triton.plan import plan
from batchnorm.population import Tracking, commit

pytest.importorskip("triton")
if not triton.interpreted():
    pytest.skip("on a GPU `batchnorm bench --gpu` checks the kernels", allow_module_level=True)

from batchnorm.kernels.triton import engine as module
from batchnorm.kernels.triton import launch

engine = module.engine
# infinity less infinity is meant
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


def _np(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy()


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _last(*shape: int) -> Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


# name -> (z, channel axis); one for each way to go over a tensor
SHAPES = {
    "C = 1, held": (lambda: _rows(33, 1), 1),
    "C = 3, folded, last row not full": (lambda: _rows(601, 3), 1),
    "C = 24, held": (lambda: _rows(50, 24), 1),
    "C = 24, folded": (lambda: _rows(520, 24), 1),
    "C = 37, folded, ragged": (lambda: _rows(515, 37), 1),
    "C = 64": (lambda: _rows(530, 64), 1),
    "7x7, held": (lambda: _rows(5, 3, 7, 7), 1),
    "3x3, rows": (lambda: _rows(40, 2, 3, 3), 1),
    "7x7, rows": (lambda: _rows(140, 1, 7, 7), 1),
    "large planes": (lambda: _rows(17, 2, 23, 23), 1),
    "few large planes": (lambda: _rows(2, 2, 70, 70), 1),
    "channels_last": (lambda: _last(3, 40, 14, 14), 1),
    "(N, L, C)": (lambda: _rows(3, 190, 5), 2),
}
QUICK = ("C = 24, held", "7x7, held", "C = 3, folded, last row not full", "few large planes")
FORMS = [
    (None, False),
    ("relu", False),
    ("relu6", True),
    ("leaky_relu", True),
    ("silu", True),
    ("gelu", False),
]


@pytest.mark.parametrize(
    "shape", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
@pytest.mark.parametrize(
    ("activation", "with_residual"),
    [pytest.param(*form, marks=() if form == ("relu6", True) else pytest.mark.slow) for form in FORMS[:3]],
)
def test_a_step_agrees_with_the_reference(
    shape: str, activation: str | None, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, axis = SHAPES[shape]
    _check_step(make(), axis, activation, with_residual, torch.float32, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "with_residual"), FORMS)
def test_half_precision_is_off_by_one_unit_at_most(
    dtype: torch.dtype, activation: str | None, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ("C = 3, folded, last row not full", "7x7, held"):
        make, axis = SHAPES[shape]
        _check_step(make(), axis, activation, with_residual, dtype, monkeypatch)


@pytest.mark.parametrize("activation", ["hardswish", "sigmoid", "tanh", "gelu", "silu"])
def test_smooth_activations(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _check_step(_rows(40, 5) * 3, 1, activation, False, torch.float32, monkeypatch)


def _check_step(
    z: Tensor,
    axis: int,
    activation: str | None,
    with_residual: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = z.shape[axis]
    z = z.to(dtype)
    gamma, beta = torch.rand(c) + 0.5, torch.randn(c)
    residual = torch.randn(z.shape).to(dtype) if with_residual else None
    dy = torch.randn(z.shape[::-1]).permute(*range(z.dim() - 1, -1, -1)).to(dtype)  # of another memory order
    norm = Norm(axis, 1e-5, gamma, beta, residual, activation)
    after = norm._replace(residual=None, added=with_residual)
    given = (_np(z), _np(gamma), _np(beta), 1e-5)
    how: dict[str, Any] = {"channel_dim": axis, "activation": activation, "residual": _np(residual)}
    y, _, _, var = reference.forward_training(*given, **how)
    wanted = reference.backward_training(_np(dy), *given, **how)
    u, *_ = reference.forward_training(*given, **{**how, "activation": None})
    # where rounding decides the side of a kink, both sides are right
    kinks = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}.get(
        activation or "", ()
    )
    sure = np.ones(u.shape, bool)
    for kink in kinks:
        sure &= np.abs(u - kink) > 1e-5
    with canaries(monkeypatch) as around:
        z, dy, norm = (
            around.around(z),
            around.around(dy),
            norm._replace(
                gamma=around.around(gamma), beta=around.around(beta), residual=around.around(residual)
            ),
        )  # type: ignore[assignment]
        after = after._replace(gamma=norm.gamma, beta=norm.beta)
        found = engine.forward(z, norm, None)
        moments = Moments(found.mean, found.inv_std)
        grads = engine.backward(dy, z, after, moments, found.saved, True, with_residual)
        parts = engine.batch_statistics(z, axis, dtype=torch.float64)
        again, saved = engine.normalize(z, norm, moments, save=True)
        sums = engine.backward_reduce(dy, z, after, moments, saved)
        dz, _ = engine.backward_input(
            dy,
            z,
            after,
            moments,
            saved,
            sums,
            parts.count,
            with_residual,
        )
    unit = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    np.testing.assert_allclose(_np(found.var), var, rtol=2e-6)
    np.testing.assert_allclose(_np(parts.var()), var, rtol=2e-6)
    np.testing.assert_allclose(_np(found.y), y, rtol=unit, atol=unit)
    np.testing.assert_allclose(_np(again), y, rtol=unit, atol=unit)
    m = z.numel() / c
    flips = m - sure.sum() / c  # elements that may have gone to the other side
    np.testing.assert_allclose(_np(grads.sum_dy) / m, wanted[2] / m, atol=1e-5 + 9 * flips / m)
    np.testing.assert_allclose(_np(grads.sum_dy_zhat) / m, wanted[1] / m, atol=1e-5 + 30 * flips / m)
    for have in (grads.dz, dz):
        np.testing.assert_allclose(
            _np(have)[sure], wanted[0][sure], rtol=unit, atol=max(unit, 1e-5) + 30 * flips / m
        )
    if with_residual:
        assert grads.dresidual is not None
        np.testing.assert_allclose(
            _np(grads.dresidual)[sure], wanted[3][sure], rtol=unit, atol=max(unit, 1e-5)
        )
    torch.testing.assert_close(sums[0], grads.sum_dy, rtol=1e-5, atol=1e-4)
    assert grads.dz.stride() == found.y.stride()


@pytest.mark.parametrize(
    "view", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("rows", "planes")), "held"]
)
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("outlier", [False, True])
def test_the_variance_keeps_its_digits_far_from_zero(view: str, mean: float, outlier: bool) -> None:
    shape = {"rows": (2048, 16), "planes": (12, 2, 24, 24), "held": (300, 4)}[view]
    z = torch.randn(shape) + mean
    if outlier:
        z[0] = 0.0  # the first row, which would be the shift
    count, _, m2 = engine.batch_statistics(z, 1, dtype=torch.float64)
    axes = tuple(a for a in range(z.dim()) if a != 1)
    np.testing.assert_allclose(_np(m2) / float(count), _np(z).var(axis=axes), rtol=2e-6)
    found = engine.forward(z, Norm(1, 1e-5), None)
    np.testing.assert_allclose(_np(found.var), _np(z).var(axis=axes), rtol=2e-6)


@pytest.mark.parametrize("shape", [(520, 24), (20, 5)], ids=["swept", "held"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_running_statistics_move_as_population_says(
    shape: tuple[int, int], momentum: float | None, poison: float | None
) -> None:
    def buffers() -> Tracking:
        return Tracking(
            torch.arange(shape[1]).float(), torch.ones(shape[1]), torch.tensor(4), momentum=momentum
        )

    z = torch.randn(shape)
    if poison is not None:
        z[3, 1] = poison
    own, plain = buffers(), buffers()
    found = engine.forward(z, Norm(1, 1e-5, activation="relu"), own)
    commit(plain, shape[0], found.mean, found.var)
    for have, want in zip(own[:3], plain[:3], strict=True):
        torch.testing.assert_close(have, want)
    assert skips.counted(own.running_mean) == skips.counted(plain.running_mean) == (poison is not None)


def test_what_comes_back_with_other_strides_is_read_right() -> None:
    z = _last(3, 24, 14, 14)
    residual, dy = torch.randn(z.shape), torch.randn(()).expand(z.shape)
    norm = Norm(1, 1e-5, None, None, residual, "relu")
    found = engine.forward(z, norm, None)
    after, moments = norm._replace(residual=None, added=True), Moments(found.mean, found.inv_std)
    once = engine.backward(dy, z, after, moments, found.saved, True, True)
    again = engine.backward(dy, z.contiguous(), after, moments, found.saved, True, True)
    assert torch.equal(once.dz, again.dz)
    assert torch.equal(once.dresidual, again.dresidual)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 24, 8, 8), (4, 3, 6, 6)], ids=["swept", "held"])
def test_an_image_with_gaps_keeps_the_order_of_its_axes(shape: tuple[int, ...]) -> None:
    z = _last(*shape)[:, :, ::2]
    found = engine.forward(z, Norm(1, 1e-5, None, None, torch.randn(z.shape), "relu"), None)
    assert found.y.is_contiguous(memory_format=torch.channels_last)
    plain = engine.forward(z.contiguous(), Norm(1, 1e-5), None)
    torch.testing.assert_close(found.var, plain.var)


def test_reruns_give_the_same_bits() -> None:
    z = torch.randn(700, 24)
    first, second = (engine.forward(z, Norm(1, 1e-5), None) for _ in range(2))
    for a, b in zip(first[:4], second[:4], strict=True):
        assert torch.equal(a, b)


class Driver:
    """Takes launches in place of a GPU, and counts them and the bytes of what they are given."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.bytes = 0

    def launch(
        self, kernel: Any, grid: tuple[int, ...], device: Any, arguments: tuple, constants: dict, warps: int
    ) -> None:
        # a compiled kernel is given its constants by place
        assert kernel.arg_names[len(arguments) :] == list(constants)
        assert all(0 < n < 2**31 for n in grid[:1])
        assert all(0 < n < 2**16 for n in grid[1:])
        self.names.append(kernel.fn.__name__)
        if kernel is module.merges.merge_statistics:
            arguments = arguments[1:]  # of z it reads three values a channel
        self.bytes += sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))

    def passes(self, z: Tensor) -> float:
        passed = self.bytes / (z.numel() * z.element_size())
        self.names, self.bytes = [], 0
        return passed


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(module, "launch", fake.launch)
    return fake


BIG = [(256, 64, 112, 112), (256, 256, 56, 56), (32, 2048, 7, 7), (256, 960, 7, 7), (256, 24, 56, 56)]


@pytest.mark.parametrize("shape", BIG, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_most_three_launches_a_direction_and_no_pass_too_many(
    driver: Driver, shape: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    z = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=order)
    c = shape[1]
    vectors = [torch.empty(c, device="meta") for _ in range(4)]
    tracking = Tracking(vectors[0], vectors[1], torch.empty((), dtype=torch.long, device="meta"))
    for activation, added, most in (
        (None, False, (3, 5)),
        ("relu", False, (3, 5)),
        ("relu", True, (4.1, 6.2)),
    ):
        norm = Norm(1, 1e-5, vectors[2], vectors[3], z if added else None, activation)
        found = engine.forward(z, norm, tracking)
        assert len(driver.names) <= 3
        assert driver.passes(z) <= most[0] + 0.25
        after, moments = norm._replace(residual=None, added=added), Moments(found.mean, found.inv_std)
        engine.backward(z, z, after, moments, found.saved, True, added)
        assert len(driver.names) <= 3
        assert driver.passes(z) <= most[1] + 0.25
        engine.infer(z, norm, vectors[0], vectors[1])
        assert driver.names == ["normalize"]
        assert driver.passes(z) <= 2.01 + added


def test_the_stand_in_sees_a_launch_and_a_pass_too_many(driver: Driver) -> None:
    z = torch.empty(4096, 64, device="meta")
    found = engine.forward(z, Norm(1, 1e-5), None)
    engine.normalize(z, Norm(1, 1e-5), Moments(found.mean, found.inv_std))
    assert len(driver.names) == 4
    assert driver.passes(z) >= 5


@pytest.mark.parametrize("at", [-1, 1, 6])
def test_canaries_see_a_write_before_between_and_behind(at: int) -> None:
    made = Canaries()
    t = made.around(torch.zeros(3, 2)[:, 0])  # its values are 0, 2 and 4 of its memory
    assert t is not None
    made.check()
    t.as_strided((1,), (1,), t.storage_offset() + at).fill_(1)
    with pytest.raises(AssertionError, match="outside its tensor"):
        made.check()


def test_what_fits_is_read_once_in_one_launch(driver: Driver) -> None:
    z = torch.empty(256, 512, device="meta")
    found = engine.forward(z, Norm(1, 1e-5), None)
    assert driver.names == ["forward"]
    assert driver.passes(z) < 2.1
    engine.backward(z, z, Norm(1, 1e-5), Moments(found.mean, found.inv_std), None, True, False)
    assert driver.names == ["backward"]
    assert driver.passes(z) < 3.1


@pytest.mark.parametrize("kind", ["RC", "NCS"])
def test_a_plan_covers_every_element_once(kind: str) -> None:
    for n in (1, 2, 3, 17, 513, 4096):
        for c in (1, 3, 16, 24, 37, 64, 1000):
            for s in (1,) if kind == "RC" else (1, 9, 49, 196, 3136, 12544):
                p = plan(kind, n, c, s, 2)
                assert p.rows * p.columns >= p.total == n * c * s
                assert p.splits * p.rows_a_program >= p.rows > (p.splits - 1) * p.rows_a_program
                assert p.columns % p.align == 0
                assert not p.ragged or p.total % p.align == 0
                assert p.block_rows * p.block_columns <= 8192
                across = p.inner if p.planes else p.columns
                strips = p.programs // (p.channels if p.planes else 1)
                assert strips * p.block_columns * p.strips >= across
                assert p.parts * p.channels == p.width
                assert p.splits < 2**16


def test_nothing_of_triton_is_imported_with_the_package() -> None:
    import subprocess
    import sys

    code = "import sys, batchnorm; print(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_observers_hear_of_every_launch() -> None:
    heard: list[str] = []
    launch.observers.append(lambda name, grid, arguments, constants: heard.append(name))
    try:
        engine.infer(torch.randn(4, 3), Norm(1, 1e-5), torch.zeros(3), torch.ones(3))
    finally:
        launch.observers.pop()
    assert heard == ["normalize"]
