"""Batch norms vanish into the layers before them or, where that is exact, after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, BatchNormError, TraceError, VerificationError
from batchnorm.network.affine import affine_of, fold_into_after, fold_into_before, fold_into_norm
from batchnorm.network.example import call_with, copied
from batchnorm.network.folding import Folding
from batchnorm.network.graph import Flow, batch_norms, find_flow
from batchnorm.network.model import check_model
from batchnorm.network.record import Record, write_record
from batchnorm.network.undo import Undo, keep_modules
from batchnorm.network.verify import difference, precision_of
from batchnorm.network.watching import modes, tensors_in


def fold(model: nn.Module, example: Any = None) -> nn.Module:
    """Fold every batch norm that can be into a neighbouring layer: a copy in eval mode, the given one untouched.

    In eval mode a batch norm is one scale and one shift a channel, and a layer takes both into its weight and
    bias. The scale is ``gamma / sqrt(running_var + eps)``. It is computed in float64, cast back once, and
    checked: the copy must give the answers of the given network on the example, or on a made-up input where
    the network's signature and first layer allow one; else every folded layer is checked alone on random
    numbers.

    Folded are Linear, Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d, grouped and depthwise, with
    or without bias; torch's norms, ours (an activation inside stays, as a module), SyncBatchNorm, frozen
    lookalikes, and subclasses whose own forward is found to be norm and activation. A norm with no layer in
    front goes into the layer behind it where nothing is padded with zeros in between; a norm behind a norm
    goes into that one. Left alone, with the reason in ``batchnorm.record(result)``: norms that normalize by
    the batch at hand or keep several domains; layers whose output is used by others too, or that others
    share; layers and norms with hooks or parametrizations; whatever is not seen to be so.

    Parameters
    ----------
    model : torch.nn.Module
        The network, in any mode.
    example : Tensor, tuple or dict, optional
        An input: a tensor, positional arguments, or keyword arguments. With it, parts that can't be traced
        are seen, and a norm behind a Linear layer is folded for the number of axes that the data has.

    Returns
    -------
    torch.nn.Module
        Of the same class, in eval mode. A folded norm is now ``torch.nn.Identity``, so that names stay; what
        ``insert`` made is a plain layer again. Dtype, device, memory format and ``requires_grad`` stay.

    Raises
    ------
    ArgumentError
        ``model`` is no module, or is scripted.
    TraceError
        The network fails on the example.
    VerificationError
        The folded copy does not give the same answers.

    Notes
    -----
    Without an example, a Linear layer followed by a norm over axis 1 is folded for (N, C) data, and the
    :class:`FoldedNorm` in the norm's place refuses other data.

    The copy is for inference. To train on, keep the given network.

    References
    ----------
    Jacob et al. 2017, arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import torch, batchnorm
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> folded = batchnorm.fold(net)
    >>> folded[1]
    Identity()
    >>> x = torch.randn(2, 3, 9, 9)
    >>> torch.allclose(folded(x), net(x), atol=1e-5)
    True
    """
    check_model(model, "fold")
    if hasattr(model, "_orig_mod"):
        raise ArgumentError(
            "fold: a compiled module would go on running what was compiled.",
            mend="fold the module it was made from (model._orig_mod), then compile.",
        )
    if not batch_norms(model):
        return write_record(copied(model).eval(), Record())
    undo = Undo()
    with undo, undo:
        keep_modules(undo, model.modules())
        flow = _look(model, example)
        result = copied(model).eval()
        work = Folding(model, result, flow, certain=example is not None, alone=flow.result is None)
        work.fold_all()
        if work.steps and flow.result is not None:
            _verify(flow, result, work.steps)
        return write_record(result, work.record())


def _look(model: nn.Module, example: Any) -> Flow:
    try:
        return find_flow(model, example, make_up=True)
    except BatchNormError:
        raise
    except Exception as error:
        raise TraceError(
            f"fold: the network fails on the example: {type(error).__name__}: {error}",
            mend="give an input that the network takes in eval mode.",
        ) from error


def _verify(flow: Flow, result: nn.Module, steps: list[tuple[str, str, str]]) -> None:
    """Compare the answers of the copy with those that the given network gave when it was looked at."""
    state = torch.get_rng_state()

    def answers(network: nn.Module, example: Any) -> list[Tensor]:
        # the state in which the network was run to be looked at, so that random parts draw the same
        torch.set_rng_state(state)
        with torch.no_grad(), modes(network, False):
            return list(tensors_in(call_with(network, example)))

    before = list(tensors_in(flow.result))
    precision, depth = precision_of(before), 1 + len(steps)
    # rounding grows with depth; in half precision a bound that never fails would check nothing
    allowed = 64 * precision * depth if precision < 1e-6 else 4 * precision * depth**0.5
    try:
        off = difference(before, answers(result, flow.example))
        if off <= allowed or difference(before, answers(flow.model, flow.example)) > allowed:
            return  # the second: it does not give the same answer twice by itself, so nothing can be compared
        if off < 1 and _difference_in_float64(flow, steps, answers) <= 1e-3 * off:
            return
    except Exception as error:
        raise VerificationError(
            f"fold: the folded network fails where the given one does not: {type(error).__name__}: {error}",
            why="some of its code looks at a norm that is now Identity.",
            mend="keep the network as it is, and report it.",
        ) from error
    finally:
        torch.set_rng_state(state)
    raise VerificationError(
        f"fold: the folded network does not give the same answers: relative difference {off:.3g}, "
        f"allowed {allowed:.3g}.",
        why=f"{len(steps)} norms were folded, and at least one of them should not have been.",
        mend="keep the network as it is, and report it.",
    )


def _difference_in_float64(
    flow: Flow, steps: list[tuple[str, str, str]], answers: Callable[[nn.Module, Any], list[Tensor]]
) -> float:
    """How far the same fold of the same network is off in float64, where rounding plays no part."""
    ways = {"before": fold_into_before, "after": fold_into_after, "norm": fold_into_norm}
    try:
        wide_model, example = copied(flow.model).eval().double(), _doubled(flow.example)
        wide_result = copied(wide_model)
        for way, norm_path, path in steps:
            affine = affine_of(wide_result.get_submodule(norm_path))
            ways[way](wide_result.get_submodule(path), affine)
            above, _, last = norm_path.rpartition(".")
            wide_result.get_submodule(above)._modules[last] = affine.tail.eval()
        return difference(answers(wide_model, example), answers(wide_result, example))
    except Exception:
        return float("inf")  # code that asks for one dtype: the doubt stays


def _doubled(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, (tuple, list)):
        return [_doubled(item) for item in tree]
    if isinstance(tree, Mapping):
        return {key: _doubled(tree[key]) for key in tree}
    return tree
