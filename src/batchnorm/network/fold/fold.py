"""Batch norms vanish into the layers before them or, where that is exact, after them."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.errors import ArgumentError
from batchnorm.network.fold.neighbours import Folding
from batchnorm.network.fold.verify import verify
from batchnorm.network.inputs import Forward, check_forward, copied
from batchnorm.network.model import Where, chooser, to_change
from batchnorm.network.record import write_record
from batchnorm.network.undo import Undo, keep_modules, keep_values
from batchnorm.network.values.find import Flow, batch_norms, find_flow


def fold(
    model: nn.Module,
    example: Any = None,
    *,
    where: Where = None,
    forward: Forward = None,
    inplace: bool = False,
) -> nn.Module:
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
        An input: a tensor, a tuple of what ``forward`` requires, or keyword arguments. Without it one is
        made up where the network says enough about itself. With it, a norm behind a Linear layer is folded
        for the number of axes that the data has.
    where : str or callable, optional
        Which norms may go: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    forward : callable, optional
        ``forward(model, batch)`` calls the network, where ``model(batch)`` is not how it takes one.
    inplace : bool, default False
        True changes the given network itself, which holds on to its modules and Parameters.

    Returns
    -------
    torch.nn.Module
        Of the same class (of a compiled, distributed or averaged model, that of the network inside), in eval
        mode. A folded norm is now an Identity, so that names stay, and one that ``torch.fx`` passes over, so
        that what stood around it can be fused; it is saved as torch's. What ``insert`` made is a plain layer
        again. Dtype, device, memory format and ``requires_grad`` stay.

    Raises
    ------
    ArgumentError
        ``model`` is no module, or is scripted or sharded.
    TraceError
        The network fails on the example.
    VerificationError
        The folded copy does not give the same answers, or nothing in the answers can be compared.

    Notes
    -----
    The answers may be of any structure. More than rounding is what the given network itself does not make of a
    change of one unit in the last place of the same layers. Where the answers hold no number, or others each
    time, the output of each folded layer is compared.

    What a library's ``save_pretrained`` writes is read into a network that has the norms again; of a folded
    network it raises. Save its ``state_dict()``, or save the given network and fold after loading.

    Without an example, a Linear layer followed by a norm over axis 1 is folded for (N, C) data, and the
    :class:`FoldedNorm` in the norm's place refuses other data.

    Looked at is the forward with the attributes that the modules have now. If the forward takes another way by
    an attribute that is set later (``net.return_features = True``), set it before, and fold again.

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
    FoldedAway()
    >>> x = torch.randn(2, 3, 9, 9)
    >>> torch.allclose(folded(x), net(x), atol=1e-5)
    True
    """
    model = to_change(model, "fold", inplace)
    chosen = chooser(where, "fold")
    check_forward(forward, "fold")
    # looked at is a copy: another thread may be serving the given network
    before = copied(model)
    flow = (
        find_flow(before, example, forward=forward, tool="fold") if batch_norms(model) else Flow(before, [])
    )
    result = model if inplace else copied(model)
    undo = Undo()
    with undo, undo:
        if inplace:
            keep_modules(undo, list(model.modules()))
            keep_values(undo, list(model.parameters()))
        work = Folding(flow, result.eval(), chosen, certain=example is not None)
        work.fold_all()
        if work.steps:
            verify(before, flow.example, result, work.steps, forward)
            refuse_to_save(result)
        return write_record(result, work.record())


def refuse_to_save(result: nn.Module) -> None:
    """Let ``save_pretrained`` of a folded network, or of a part that is, raise.

    Parameters
    ----------
    result : torch.nn.Module
        The folded network; changed in place.
    """
    for module in result.modules():
        if hasattr(type(module), "save_pretrained"):
            object.__setattr__(module, "save_pretrained", _no_pretrained)


def _no_pretrained(*args: Any, **named: Any) -> None:
    raise ArgumentError(
        "save_pretrained: batch norms of this network were folded away.",
        why="from_pretrained makes the network with its batch norms again, finds no values for them, and gives "
        "other answers.",
        mend="save the network it was folded from and fold after loading; or torch.save(folded.state_dict(), ...).",
    )
