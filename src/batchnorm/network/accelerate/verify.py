"""Whether an accelerated network gives the answers of the plain one: outputs, gradients and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from batchnorm.errors import VerificationError
from batchnorm.network.compare import GRADIENT, Answers, compared, epsilon, leaves, repeats, tensors_in
from batchnorm.network.inputs import Forward, copied, own, run


def verify(
    model: nn.Module, example: Any, accelerated: Callable[[nn.Module], nn.Module], forward: Forward = None
) -> None:
    """Compare copies of a network, plain and accelerated, in both modes.

    Rounding is told from error as everywhere (``network/compare.py``).

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

        def ask(network: nn.Module, x: Any, training: bool = training) -> Answers:
            return _answers(network, x, training, forward)

        ours = ask(accelerated(copied(model)), example)
        found = compared(ask(copied(model), example), ours, repeats(model, example, ask))
        if found.right is False:
            raise VerificationError(
                f"accelerate: in {'training' if training else 'eval'} mode it gives other answers than the given "
                f"network, {found}.",
                why="it would not compute what you gave.",
                mend="the model is as it was; please report its architecture.",
            )


def _answers(model: nn.Module, example: Any, training: bool, forward: Forward) -> Answers:
    """One pass, the random numbers the same every time."""
    # modes below the model's own stay: what is frozen by eval() is so in training
    if training != model.training:
        model.train(training)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(), torch.set_grad_enabled(True):
        torch.manual_seed(0)
        output = run(model, own(example), "accelerate", forward)
        parts = [
            o.float().square().mean() for o in tensors_in(output) if o.requires_grad and o.is_floating_point()
        ]
        if parts:
            torch.stack(parts).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        # indices and masks may flip on a tie: the floating values beside them decide
        **{f"output{path}": leaf for path, leaf in leaves(output) if epsilon(leaf) is not None},
        **{f"{GRADIENT} of {name}": gradient for name, gradient in gradients.items()},
        **{f"statistics of {name}": buffer.detach().clone() for name, buffer in model.named_buffers()},
    }
