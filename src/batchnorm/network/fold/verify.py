"""Does a folded network give the answers of the one it came from (see ``network/compare.py`` for rounding)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.errors import VerificationError
from batchnorm.network.compare import Answers, answers, compared, repeats
from batchnorm.network.fold.affine import affine_of, fold_into_after, fold_into_before, fold_into_norm
from batchnorm.network.inputs import Forward, copied, doubled

Step = tuple[str, str, str]
"""Way, path of the norm, path of what took it."""

_WAYS = {"before": fold_into_before, "after": fold_into_after, "norm": fold_into_norm}


def verify(
    model: nn.Module, example: Any, result: nn.Module, steps: list[Step], forward: Forward = None
) -> None:
    """Compare the answers of a folded network with those of the given one.

    First the answers themselves; where they tell nothing (no number that rounding reaches, other answers
    each time, precision too coarse), the same fold in float64; then each folded layer's own output.

    Parameters
    ----------
    model : torch.nn.Module
        The given network, or a copy of it; it is run.
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
    state = torch.get_rng_state()
    concerned = [path for _, *paths in steps for path in paths]
    try:
        for inner in (False, True):
            pairs = [_places(result, step) for step in steps] if inner else []
            for wide in (False, True):
                try:
                    pair = _in_float64(model, steps) if wide else (model, result)
                    asked = doubled(example) if wide else example

                    def ask(network: nn.Module, x: Any, side: int = 0, pairs: Any = pairs) -> Answers:
                        # the same state for each run, so that random parts draw the same
                        torch.set_rng_state(state)
                        return answers(network, x, "fold", forward, [pair[side] for pair in pairs])

                    again = repeats(pair[0], asked, ask, concerned)
                    found = compared(ask(pair[0], asked), ask(pair[1], asked, 1), again)
                except Exception as error:
                    if wide:
                        continue  # code that asks for one dtype
                    raise VerificationError(
                        "fold: the folded network fails where the given one does not: "
                        f"{type(error).__name__}: {error}",
                        why="some of its code looks at a norm that is now Identity.",
                        mend="keep the network as it is, and report it.",
                    ) from error
                if found.right:
                    return
                if found.right is False:
                    raise VerificationError(
                        f"fold: the folded network does not give the same answers, {found}.",
                        why=f"{len(steps)} norms were folded, and at least one of them should not have been.",
                        mend="keep the network as it is, and report it.",
                    )
    finally:
        torch.set_rng_state(state)
    raise VerificationError(
        "fold: nothing in the network's answers can be compared with those of the folded one.",
        why="they hold no numbers, or other ones each time, and no folded layer's output tells more.",
        mend="give an example for which the network gives the same numbers twice.",
    )


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
