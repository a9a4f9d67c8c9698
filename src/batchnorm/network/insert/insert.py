"""Put a batch norm between every hidden layer and its nonlinearity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import ArgumentError, DataError, TraceError, VerificationError
from batchnorm.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.network.compare import Answers, Finding, answers, compared, repeats
from batchnorm.network.inputs import (
    Forward,
    batches_of,
    check_forward,
    copied,
    move_to,
    run_each,
    single_device,
)
from batchnorm.network.insert.hidden import Verdict, ends_residual_branch, judge
from batchnorm.network.model import Where, check_number, chooser, to_change
from batchnorm.network.normalized import Normalized
from batchnorm.network.progress import watched
from batchnorm.network.record import Record, write_record
from batchnorm.network.statistics.meter import moments
from batchnorm.network.undo import Undo, hook_after, keep_modules, set_modes, stop_gradients
from batchnorm.network.values.find import Flow, find_flow
from batchnorm.network.values.modules import is_layer
from batchnorm.population import merge
from batchnorm.validation import check_momentum

_TOOL = "insert"
_BY_AXES = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}


def insert(
    model: nn.Module,
    example: Any = None,
    data: Any = None,
    *,
    where: Where = None,
    forward: Forward = None,
    inplace: bool = False,
    zero_init_residual: bool = False,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    progress: bool = True,
) -> nn.Module:
    """Normalize every hidden layer of a network: a copy with batch norms, the given one is untouched.

    Between every hidden Linear, Conv or ConvTranspose layer and its nonlinearity (M2) goes a batch norm of
    the right dimension, and that layer's bias is dropped (M7): ``beta`` does its job. Left alone are output
    layers (M6), also several heads and layers whose result is returned besides being used; layers that a
    norm already follows, directly or past sums, concatenations and pooling; layers called several times in
    a pass, with shared weights, or whose output goes into something that is no nonlinearity and no layer,
    such as the scores of an attention. Where the flow of values can't be seen, nothing is done.
    ``batchnorm.record(result)`` says each of these.

    Parameters
    ----------
    model : torch.nn.Module
        The network, in any mode. It is copied, and looked at in eval and training mode without running its
        training forward on numbers.
    example : Tensor, tuple or dict, optional
        An input: a tensor, a tuple of what ``forward`` requires, or keyword arguments. Without it one is
        made up where the network says enough about itself. With it the number of axes behind each Linear is
        known.
    data : iterable of batches, or one Tensor, optional
        Preserve the network's function: ``gamma = sqrt(var + eps)`` and ``beta = mean + b`` (M5) from the
        mean and variance (divisor m, all values pooled) of each layer over this data, so that the result
        answers in eval mode as the given network did, to rounding. A batch is as ``example``, and what lies
        behind the input in a tuple, a label, is left out. Read once.
    where : str or callable, optional
        Which layers may get a norm: a pattern for names (``"layer4.*"``), or ``where(name, module)``. All by default.
    forward : callable, optional
        ``forward(model, batch)`` calls the network, where ``model(batch)`` is not how it takes one.
    inplace : bool, default False
        True changes the given network itself, which holds on to its modules and Parameters.
    zero_init_residual : bool, default False
        Begin with ``gamma = 0`` in the last inserted norm of each residual branch, so that every block
        begins as its shortcut. Contradicts ``data``.
    eps : float, default 1e-5
        Of the new layers [z]**2.
    momentum : float in [0, 1], or None, default 0.1
        Of the new layers: the weight of the NEW batch (torch); None is the plain average.
    progress : bool, default True
        Show a progress bar over ``data`` when standard error is a terminal.

    Returns
    -------
    torch.nn.Module
        Of the same class, in the same mode, with the same ``forward``. A normalized layer is replaced by a
        :class:`Normalized`, so its state-dict key ``fc.weight`` is now ``fc.layer.weight``, and ``fc.norm.*``
        come to it. An optimizer for the given network does not know the copy's parameters: make a new one.

    Raises
    ------
    TraceError
        Nothing of the flow through the whole network can be seen, and no example is given; or the network
        fails on the example.
    ArgumentError
        ``model`` is no module, has lazy layers, or arguments contradict each other.
    DataError
        ``data`` holds no batch, or gives values that are not finite.
    VerificationError
        The result does not answer as the network did (with ``data``), or does not run on the example.

    Notes
    -----
    Functional activations need no rewriting: the norm stands where the layer stood, and ``F.relu(self.fc(x))``
    finds it in ``self.fc``. Dropout stays behind it. A Linear on (N, L, C) data gets a norm over its last
    axis; without an example that serves (N, C) as well. Without ``data`` gamma is 1, beta 0, and the network
    must be trained, or calibrated, before it is used in eval mode.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.2; Goyal et al. 2017, arXiv:1706.02677, section 5.1,
    for the zero gamma.

    Examples
    --------
    >>> import torch, batchnorm
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> x = torch.randn(64, 8)
    >>> normalized = batchnorm.insert(net, data=[x[:32], x[32:]])
    >>> type(normalized[0].norm).__name__, normalized[0].layer.bias is None
    ('BatchNorm1d', True)
    >>> torch.allclose(normalized.eval()(x), net(x), atol=1e-6)
    True
    """
    given = to_change(model, _TOOL, inplace)
    _check(data, zero_init_residual, eps, momentum)
    check_forward(forward, _TOOL)
    # looked at is a copy: another thread may be serving the given network
    model = copied(given)
    batches, first = _first_batch(data)
    if example is None and first is not None:
        example = first if forward else move_to(first, single_device(model))
    flow = find_flow(model, example, modes_needed=(False, True), forward=forward)
    if not flow.views and any(is_layer(m) for m in model.modules()):
        raise TraceError(
            f"insert: the flow of values through {type(model).__name__} can't be seen: {flow.why}.",
            why="without it nobody can tell a hidden layer from an output layer.",
            mend="pass example=, an input for one run.",
        )
    told = Record(tool=_TOOL)
    verdicts = _verdicts(model, flow, chooser(where, _TOOL), told)
    chosen = {path: verdict for path, layer, verdict in verdicts if verdict.insert}
    moments = None
    if chosen and batches is not None:
        moments = _measure(model, list(chosen), batches, progress, forward)
    for path in [path for path in chosen if moments is not None and path not in moments]:
        del chosen[path]
        kind = type(model.get_submodule(path)).__name__
        told.leave(path, kind, "the data never reaches it in eval mode")
    # a network that begins with a Linear takes any number of axes, so a made-up (N, C) tells nothing
    free = isinstance(flow.example, Tensor) and flow.example.dim() == 2
    exact = example is not None or not free
    result, undo = given if inplace else copied(model), Undo()
    with undo, undo:
        keep_modules(undo, list(result.modules()))
        for path, verdict in chosen.items():
            _put(result, path, verdict, exact, eps, momentum, zero_init_residual, told)
        if moments is not None:
            for path in chosen:
                _preserve(result.get_submodule(path), model.get_submodule(path), *moments[path])
        if chosen and example is not None:
            _verify(model, result, example, forward, same=batches is not None)
        order = {path: place for place, (path, _) in enumerate(model.named_modules())}
        told.rows.sort(key=lambda row: order[row.path])
        return write_record(result, told)


def _check(data: Any, zero_init_residual: bool, eps: float, momentum: float | None) -> None:
    if zero_init_residual and data is not None:
        raise ArgumentError(
            "insert: zero_init_residual=True and data= are both given.",
            why="gamma = 0 silences the residual branches, and data= asks for the network's function to be kept.",
            mend="leave one of them out.",
        )
    check_number(
        _TOOL, "eps", eps, "positive", lambda e: 0 < e < float("inf"), "a constant channel would give 0 / 0."
    )
    check_momentum(momentum)


def _first_batch(data: Any) -> tuple[Iterable[Any] | None, Any]:
    """The batches with the first one looked at."""
    if data is None:
        return None, None
    stream = iter(batches_of(data, _TOOL))
    try:
        first = next(stream)
    except StopIteration:
        raise DataError(
            "insert: data holds no batch.",
            why="the statistics that keep the network's function come from it.",
            mend="give an iterable of batches; a generator that was read once is empty the second time.",
        ) from None
    return itertools.chain([first], stream), first


def _verdicts(
    model: nn.Module, flow: Flow, meant: Callable[[str, nn.Module], bool], told: Record
) -> list[tuple[str, nn.Module, Verdict]]:
    found = []
    for path, layer in model.named_modules():
        if not is_layer(layer):
            continue
        reason = _obstacle(layer, path, flow) if meant(path, layer) else "where= does not mean it"
        verdict = Verdict(False, reason) if reason else judge(flow, layer)
        axes, rank = _axes(layer), len(verdict.shape)
        if verdict.insert and not (2 <= rank <= 5 and axes in (None, rank - 2)):
            verdict = Verdict(
                False, f"its output of shape {verdict.shape} has no batch axis, or too many axes"
            )
        if not verdict.insert:
            told.leave(path, type(layer).__name__, verdict.reason)
        found.append((path, layer, verdict))
    return found


def _obstacle(layer: nn.Module, path: str, flow: Flow) -> str:
    names = flow.names(layer)
    if len(names) > 1:
        return f"shared: registered as {', '.join(names)}"
    shared = flow.shared(layer)
    if shared:
        return f"its {shared}"
    readers = flow.readers_elsewhere(layer)
    if readers:
        return f"its parameters are read by name in the forward of {', '.join(readers)}"
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is not a floating-point tensor"
    if getattr(layer, "_forward_hooks", None):
        return "it has forward hooks, which see its output with the bias"
    if path == "":
        return "an output layer: no layer follows it (M6)"
    return ""


def _axes(layer: nn.Module) -> int | None:
    """Number of axes of space of a convolution; None for a Linear."""
    size = getattr(layer, "kernel_size", None)
    return len(size) if isinstance(size, tuple) else None


def _put(
    result: nn.Module,
    path: str,
    verdict: Verdict,
    exact: bool,
    eps: float,
    momentum: float | None,
    zero_init_residual: bool,
    told: Record,
) -> None:
    """Replace one layer of the copy by itself and a norm, its bias dropped."""
    layer = result.get_submodule(path)
    axes = _axes(layer)
    channels = int(layer.out_features if axes is None else layer.out_channels)  # type: ignore[arg-type]
    rank = len(verdict.shape) if exact else None
    kind = _BY_AXES[max((rank or 3) - 2, 1) if axes is None else axes]
    last = axes is None and rank != 2
    weight = layer.weight
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norm = kind(
        channels, eps, momentum, channel_dim=-1 if last else 1, device=weight.device, dtype=precision
    ).train(layer.training)
    detail = [f"{kind.__name__}({channels}{', channel_dim=-1' if last else ''})"]
    if layer._parameters.get("bias") is not None:
        layer.register_parameter("bias", None)
        detail.append("bias dropped")
    elif getattr(layer, "bias", None) is not None:
        detail.append("bias kept: it is parametrized")
    if zero_init_residual and all(ends_residual_branch(call) for call in verdict.calls):
        nn.init.zeros_(norm.weight)  # type: ignore[arg-type]
        detail.append("gamma 0")
    above, _, name = path.rpartition(".")
    setattr(result.get_submodule(above), name, Normalized(layer, norm))
    told.add(path, type(layer).__name__, "inserted", ", ".join(detail), verdict.reason)


def _measure(
    model: nn.Module, paths: list[str], batches: Iterable[Any], progress: bool, forward: Forward
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Count, mean and sum of squared deviations of each layer's output, pooled over all batches, float64."""
    pooled: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def take(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            fresh = moments(output.detach(), -1 if _axes(layer) is None else 1)
            if int(fresh[0].max()) > 0:
                pooled[path] = merge(*pooled[path], *fresh) if path in pooled else fresh

        return take

    end = Undo(always=True)
    with end, end:
        for path in paths:
            hook_after(end, model.get_submodule(path), hook(path))
        set_modes(end, model, False)
        stop_gradients(end)
        run_each(model, watched(batches, "keeping the function", progress), _TOOL, forward)
    for path, (_, mean, m2) in pooled.items():
        if not bool(torch.isfinite(mean).all() and torch.isfinite(m2).all()):
            raise DataError(
                "insert: the layer's output over the data is not finite.",
                why="its mean and variance would be NaN.",
                at=path,
            )
    return pooled


@torch.no_grad()
def _preserve(pair: nn.Module, original: nn.Module, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Make the norm undo itself on the data: gamma = sqrt(var + eps), beta = mean of z with its bias."""
    norm: Any = pair.norm
    dropped = original._parameters.get("bias")
    kept = dropped is None or getattr(pair.layer, "bias", None) is not None
    without = mean if kept else mean - dropped.detach().to(mean)  # type: ignore[union-attr]
    norm.running_mean.copy_(without)
    norm.running_var.copy_(m2 / count)
    # from what the buffer holds, so that the division cancels to the last bit
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    shift = norm.running_mean.double()
    norm.bias.copy_(shift if kept else shift + dropped.detach().to(mean))  # type: ignore[union-attr]
    norm.num_batches_tracked.fill_(1)


def _verify(model: nn.Module, result: nn.Module, example: Any, forward: Forward, *, same: bool) -> None:
    state = torch.get_rng_state()

    def ask(network: nn.Module, x: Any) -> Answers:
        torch.set_rng_state(state)
        return answers(network, x, _TOOL, forward)

    try:
        before, after = ask(model, example), ask(result, example)
        if same:
            found = compared(before, after, repeats(model, example, ask))
        else:
            shapes = [
                [(place, getattr(x, "shape", None)) for place, x in run.items()] for run in (before, after)
            ]
            found = Finding(shapes[0] == shapes[1], where="the shape of the answer")
    except Exception as error:
        raise VerificationError(
            f"insert: the normalized network fails on the example: {type(error).__name__}: {error}",
            why="a norm of the wrong dimension, or code that looks at a layer's type.",
            mend="report the network; leave it as it is meanwhile.",
        ) from error
    finally:
        torch.set_rng_state(state)
    if found.right is False:
        raise VerificationError(
            f"insert: the normalized network does not answer as the given one, {found}.",
            why="data= promises the same answers, and a norm never changes a shape.",
            mend="report the network; insert without data= and train it meanwhile.",
        )
