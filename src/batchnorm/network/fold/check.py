"""Does a folded network give the answers of the one it came from: rounding told from error.

A fold rounds the weights of each folded layer anew. How much of that may be seen in the answers is not a
constant: it is what the given network makes of a change of one unit in the last place of those weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.errors import VerificationError
from batchnorm.network.compare import apart, epsilon, kept
from batchnorm.network.fold.affine import affine_of, fold_into_after, fold_into_before, fold_into_norm
from batchnorm.network.inputs import Forward, copied, each_tensor, own, run
from batchnorm.network.modes import modes

Step = tuple[str, str, str]
"""Way, path of the norm, path of what took it."""

# sums of K products are rounded in up to log2(K) places where a weight is rounded in one, and a norm's four
# vectors meet in one scale and one shift; a wrong fold is off by far more than the network's own noise
_ROOM, _FLOOR = 64, 16
_TELLING = 0.02  # where noise may be larger than this, an error could hide in it
_WAYS = {"before": fold_into_before, "after": fold_into_after, "norm": fold_into_norm}


class Finding(NamedTuple):
    """What a comparison found: right, wrong, or (None) nothing that tells."""

    right: bool | None
    off: float = 0.0
    allowed: float = 0.0
    where: str = ""


def check(
    model: nn.Module, example: Any, result: nn.Module, steps: list[Step], forward: Forward = None
) -> None:
    """Compare the answers of a folded network with those of the given one.

    First the answers themselves; where they tell nothing (no number that rounding reaches, other answers
    each time, precision too coarse), the same fold in float64; then each folded layer's own output.

    Parameters
    ----------
    model : torch.nn.Module
        The given network; a copy of it is run.
    example : Tensor, tuple or dict
        What both are asked.
    result : torch.nn.Module
        The folded copy.
    steps : list of tuple of str
        What was done.

    Raises
    ------
    VerificationError
        They differ by more than rounding, the folded one fails, or nothing can be compared.
    """
    given, state = copied(model), torch.get_rng_state()
    try:
        for inner in (False, True):
            for wide in (False, True):
                try:
                    if wide:
                        found = _compare(
                            *_in_float64(given, steps), _doubled(example), steps, inner, state, forward
                        )
                    else:
                        found = _compare(given, result, example, steps, inner, state, forward)
                except Exception as error:
                    if wide:
                        continue  # code that asks for one dtype
                    raise _fails(error) from error
                if found.right:
                    return
                if found.right is False:
                    raise _differs(found, len(steps))
    finally:
        torch.set_rng_state(state)
    raise VerificationError(
        "fold: nothing in the network's answers can be compared with those of the folded one.",
        why="they hold no numbers, or other ones each time, and no folded layer's output tells more.",
        mend="give an example for which the network gives the same numbers twice.",
    )


def _fails(error: Exception) -> VerificationError:
    return VerificationError(
        f"fold: the folded network fails where the given one does not: {type(error).__name__}: {error}",
        why="some of its code looks at a norm that is now Identity.",
        mend="keep the network as it is, and report it.",
    )


def _differs(found: Finding, norms: int) -> VerificationError:
    return VerificationError(
        f"fold: the folded network does not give the same answers: relative difference {found.off:.3g}, "
        f"allowed {found.allowed:.3g}, at {found.where}.",
        why=f"{norms} norms were folded, and at least one of them should not have been.",
        mend="keep the network as it is, and report it.",
    )


def _compare(
    given: nn.Module,
    result: nn.Module,
    example: Any,
    steps: list[Step],
    inner: bool,
    state: Tensor,
    forward: Forward,
) -> Finding:
    def answers(network: nn.Module, places: list[str]) -> dict[str, Any]:
        # the same state for each run, so that random parts draw the same
        torch.set_rng_state(state)
        seen: list[tuple[str, Any]] = []
        handles = [
            network.get_submodule(place).register_forward_hook(
                lambda layer, args, output, n=n: seen.extend((f"{n}{p}", x) for p, x in kept(output))
            )
            for n, place in enumerate(places)
        ]
        try:
            with torch.no_grad(), modes(network, False):
                seen += [
                    (f"the answer{path}", leaf)
                    for path, leaf in kept(run(network, own(example), "fold", forward))
                ]
        finally:
            for handle in handles:
                handle.remove()
        count: dict[str, int] = {}
        named = {}
        for path, leaf in seen:  # a layer that is called twice has two outputs
            count[path] = count.get(path, 0) + 1
            named[f"{path} #{count[path]}" if count[path] > 1 else path] = leaf
        return named

    pairs = [_places(result, step) for step in steps] if inner else []
    at = [mine for mine, _ in pairs]
    before, again = answers(given, at), answers(given, at)
    after = answers(result, [its for _, its in pairs])
    if list(before) != list(after) and list(before) == list(again):
        return Finding(False, float("inf"), 0.0, "the structure of the answer")
    off = {path: apart(leaf, after[path]) for path, leaf in before.items() if path in after}
    noise = {path: apart(before[path], again[path]) for path in off if path in again}
    floor = {path: _FLOOR * (epsilon(before[path]) or 0.0) for path in noise}
    if any(off[path] > floor[path] for path in noise):
        for seed in range(2):
            shaken = answers(_shaken(given, steps, seed), at)
            for path in noise:
                new = apart(before[path], shaken[path]) if path in shaken else float("inf")
                noise[path] = max(noise[path], new)
    told = None
    for path, shake in noise.items():
        number = epsilon(before[path]) is not None
        allowed = floor[path] + _ROOM * shake
        if off[path] > allowed:
            return Finding(False, off[path], allowed, path)
        if number and allowed <= _TELLING and bool(torch.isfinite(torch.as_tensor(before[path])).any()):
            told = True
    return Finding(told)


def _places(result: nn.Module, step: Step) -> tuple[str, str]:
    """Where what a fold left as it was can be seen: in the given network, and in the folded one."""
    way, norm, taker = step
    if way == "after":
        return taker, taker
    try:
        result.get_submodule(norm)
    except AttributeError:  # a layer and its norm in one place are a layer again
        return norm, norm.rpartition(".")[0]
    return norm, norm


def _shaken(given: nn.Module, steps: list[Step], seed: int) -> nn.Module:
    """A copy in which every value of the layers and norms concerned is off by one unit in the last place."""
    shaken, generator = copied(given), torch.Generator().manual_seed(seed)
    modules = {path: shaken.get_submodule(path) for _, *paths in steps for path in paths}
    tensors = {id(t): t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())}
    for tensor in tensors.values():
        if tensor is not None and tensor.is_floating_point():
            signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
            tensor.data = tensor.data * (1 + torch.finfo(tensor.dtype).eps * signs)
    return shaken


def _in_float64(given: nn.Module, steps: list[Step]) -> tuple[nn.Module, nn.Module]:
    """The same fold of the same network, where rounding plays next to no part."""
    wide = copied(given).double()
    result = copied(wide).eval()
    for way, norm_path, path in steps:
        affine = affine_of(result.get_submodule(norm_path).eval())
        _WAYS[way](result.get_submodule(path), affine)
        above, _, last = norm_path.rpartition(".")
        result.get_submodule(above)._modules[last] = affine.tail.eval()
    return wide, result


def _doubled(tree: Any) -> Any:
    return each_tensor(lambda t: t.double() if t.is_floating_point() else t, tree)
