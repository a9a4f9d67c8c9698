"""Whether an accelerated network gives the answers of the plain one: outputs, gradients and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import VerificationError
from batchnorm.network.compare import tensors_in
from batchnorm.network.inputs import Forward, copied, each_tensor, own, run

_WORSE = 8.0
"""How many times the plain network's own error is allowed. Both round the same sums in another order."""

_ROUNDING = 64.0
"""How many units in the last place, on the scale of the quantity, are allowed beside that."""

_MOVED, _DRAWS = 16.0, 3
"""By how many units in the last place weights and input are moved, and how often, to see what rounding can do.

Some of millions of values lie so near a kink (of ReLU, of a maximum) that rounding decides their side, and a gradient
jumps with the side. Which ones do is chance, so that the plain network's own error alone tells little of it.
"""


class _Answers(NamedTuple):
    """What one pass gives, by name; gradients share one scale, for one may be zero but for rounding."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def verify(
    model: nn.Module, example: Any, accelerated: Callable[[nn.Module], nn.Module], forward: Forward = None
) -> None:
    """Compare copies of a network, plain and accelerated, in both modes.

    Where they are not equal, the plain network in float64 is the arbiter: the accelerated one may be as far from it
    as the plain one is, a few times over, and by the rounding of its dtype on the scale of what is compared. The
    scale of a gradient is the largest of all parameters' gradients. Where that is not enough, the plain network is
    run again with weights and input moved by some units in the last place, and how far it goes then counts too.

    Parameters
    ----------
    model : Module
        Not changed.
    example : Tensor, tuple or dict
        An input.
    accelerated : callable
        Of a copy, gives it accelerated.
    forward : callable, optional
        How the network is called.

    Raises
    ------
    VerificationError
        They differ.
    """
    for training in (True, False):
        plain = _answers(copied(model), example, training, forward)
        ours = _answers(accelerated(copied(model)), example, training, forward)
        arbiter, moved = None, None
        for kind in _Answers._fields:
            wanted, given = getattr(plain, kind), getattr(ours, kind)
            if wanted.keys() != given.keys():
                raise _differ(kind, training, "one has what the other has not")
            for name, expected in wanted.items():
                got = given[name]
                if got.shape != expected.shape or got.dtype != expected.dtype:
                    raise _differ(f"{kind} of {name}", training, f"{got.dtype} {tuple(got.shape)}")
                if torch.equal(got, expected):
                    continue
                arbiter = arbiter or _exact(model, example, training, forward) or plain
                exact = getattr(arbiter, kind).get(name)
                if exact is None or exact.shape != expected.shape:
                    exact = expected
                scale = _largest(getattr(arbiter, kind).values() if kind == "gradients" else [exact])
                if not _too_far(got, [expected], exact, scale):
                    continue
                moved = moved or [_moved(model, example, training, forward, draw) for draw in range(_DRAWS)]
                others = [getattr(one, kind).get(name, expected) for one in moved]
                why = _too_far(got, [expected, *others], exact, scale)
                if why:
                    raise _differ(f"{kind} of {name}", training, why)


def _exact(model: nn.Module, example: Any, training: bool, forward: Forward) -> _Answers | None:
    """The plain network's answers in float64; None where it does not run in float64."""
    try:
        return _answers(copied(model).double(), each_tensor(_double, example), training, forward)
    except Exception:  # a forward of somebody else may raise anything
        return None


def _moved(model: nn.Module, example: Any, training: bool, forward: Forward, seed: int) -> _Answers:
    """The plain network's answers where its weights and its input are moved by some units in the last place."""
    random = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        far = _MOVED * torch.finfo(tensor.dtype).eps * _largest([tensor])
        return tensor + far * (2 * torch.rand(tensor.shape, generator=random) - 1).to(tensor)

    twin = copied(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(moved(parameter))
    return _answers(twin, each_tensor(moved, example), training, forward)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _answers(model: nn.Module, example: Any, training: bool, forward: Forward) -> _Answers:
    """One pass, the random numbers the same every time."""
    # modes below the model's own stay: what is frozen by eval() is so in training
    if training != model.training:
        model.train(training)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(), torch.set_grad_enabled(True):
        torch.manual_seed(0)
        outputs = list(tensors_in(run(model, own(example), "accelerate", forward)))
        parts = [o.float().square().mean() for o in outputs if o.requires_grad and o.is_floating_point()]
        if parts:
            torch.stack(parts).sum().backward()
    return _Answers(
        {f"output {i}": o.detach() for i, o in enumerate(outputs)},
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(
        (float(t.detach().double().abs().nan_to_num(0, 0, 0).max()) for t in tensors if t.numel()),
        default=0.0,
    )


def _too_far(got: Tensor, plain: list[Tensor], exact: Tensor, scale: float) -> str:
    if not got.is_floating_point():
        # indices and masks may flip on a tie: the floating values beside them decide
        return ""
    a, c = got.double(), exact.double()
    finite = plain[0].isfinite()
    if not torch.equal(finite, a.isfinite()):
        return "NaN or inf where the other has none"
    if not bool(finite.any()):
        return ""
    ours = float((a - c)[finite].abs().max())
    theirs = max(float((p.double() - c)[finite].abs().nan_to_num().max()) for p in plain)
    allowed = _WORSE * theirs + _ROUNDING * torch.finfo(got.dtype).eps * scale
    return "" if ours <= allowed else f"{ours:.2g} from the exact values, the plain network {theirs:.2g}"


def _differ(what: str, training: bool, how: str) -> VerificationError:
    return VerificationError(
        f"accelerate: {what} differ from the given network's in {'training' if training else 'eval'} mode: {how}.",
        why="it would not compute what you gave.",
        mend="the model is as it was; please report its architecture.",
    )
