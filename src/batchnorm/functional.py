"""Batch normalization as a function of tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import validation, visible
from batchnorm.autograd import normalize_batch, normalize_population
from batchnorm.compiling import by_our_backend, compiling, one_step
from batchnorm.kernels import cpu, select
from batchnorm.kernels.contract import Norm
from batchnorm.layout import channel_axis, values_per_channel
from batchnorm.pooling import is_placed
from batchnorm.population import Tracking, count_empty
from batchnorm.running_update import Sink, Told, counting, tell
from batchnorm.steps import Between
from batchnorm.written import plain_shape, written_down

__all__ = ["batch_norm"]


class Options(NamedTuple):
    """How a batch is normalized; the keyword-only arguments of `batch_norm`, checked."""

    eps: float = 1e-5
    activation: str | None = None
    channel_dim: int = 1
    on_single_value: str = "error"
    on_nonfinite: str = "skip"
    virtual_batch_size: int | None = None
    momentum: float | None = None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    masked_output: str = "zero",
    channel_dim: int = 1,
    on_single_value: str = "error",
    on_nonfinite: str = "skip",
    virtual_batch_size: int | None = None,
    running_var_correction: int = 1,
    inplace: bool = False,
) -> Tensor:
    """Normalize every channel of ``input`` over the batch, then scale and shift it.

    A channel holds ``m = N * prod(S)`` values::

        y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)

    In training, ``mean`` and ``var`` (divisor m) come from ``input``, and the running statistics move
    toward them. In inference they are the running statistics, and nothing is written.

    Parameters
    ----------
    input : Tensor, shape (N, C, *S)
        Pre-activations z, any floating dtype, any strides.
    running_mean, running_var : Tensor, shape (C,), or None
        Population mean [z] and variance [z]**2, the variance with divisor m - 1. Required for inference.
        In training they are moved in place where they are given.
    weight, bias : Tensor, shape (C,), or None
        Learned scale gamma and place beta; 1 and 0 when absent.
    training : bool, default False
        Normalize with the batch's statistics rather than the running ones.
    momentum : float in [0, 1], default 0.1
        Weight of the NEW batch: ``r = (1 - momentum) * r + momentum * batch``. Keras and ONNX give the
        weight of the old value.
    eps : float, default 1e-5
        Added to the variance [z]**2; positive, or 0 in inference.
    activation : str, optional
        ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"hardswish"``, ``"sigmoid"``,
        ``"tanh"`` or ``"gelu"`` (exact), applied in the same pass over memory.
    residual : Tensor, optional
        Added before the activation; shape and dtype of ``input``.
    mask : Tensor of bool, optional
        Shape of ``input`` without the channel axis, or what has as many axes and broadcasts to it: ``(N, L)``
        for ``(N, C, L)``; the channel axis may be there with size 1. Where it is False a value enters no
        statistic and no gradient, and may be NaN.
    masked_output : {"zero", "input"}, default "zero"
        What comes out where ``mask`` is False; under "input" its gradient goes back as it came.
    channel_dim : int, default 1
        The channel axis; -1 for ``(N, L, C)``.
    on_single_value : {"error", "running"}, default "error"
        What to do in training with fewer than two values per channel: raise, or normalize with the running
        statistics and leave them alone. An input without any value passes and moves nothing.
    on_nonfinite : {"skip", "propagate", "raise"}, default "skip"
        What a channel with NaN or inf does to its running statistics: nothing; ruin them (as in torch); or
        raise before anything is written. The output shows the NaN in the first two.
    virtual_batch_size : int, optional
        Split the batch into parts of at most this many samples, as equal as can be, and normalize each
        with its own statistics, in order (ghost batch norm, Hoffer et al. 2017).
    running_var_correction : {1, 0}, default 1
        Divisor of ``running_var``: m - 1 (torch; the paper's inference) or m (Keras, flax, ONNX).
    inplace : bool, default False
        Write the output into ``input``; inference only, and only where no gradient is recorded.

    Returns
    -------
    Tensor
        Of the shape, dtype and memory format of ``input``.

    Raises
    ------
    ShapeError
        ``input`` has fewer than 2 axes, a vector is not of length C, or ``residual`` or ``mask`` does not
        fit.
    DtypeError
        ``input`` is not floating, or ``mask`` not boolean.
    DeviceError
        Tensors on different devices.
    TooFewValuesError
        Training with one value per channel.
    MissingStatisticsError
        Inference without running statistics.
    NonFiniteError
        ``on_nonfinite="raise"`` and a batch with NaN or inf.
    ArgumentError
        Any other argument out of its range; training with ``momentum=None``, for a function counts no batches.

    References
    ----------
    Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2. Hoffer, Hubara and Soudry 2017,
    arXiv:1705.08741, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.functional import batch_norm
    >>> z = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> batch_norm(z, mean, var, training=True, eps=1e-12)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> mean  # moved a tenth of the way to the batch's mean
    tensor([0.2000, 2.0000])
    """
    if training and momentum is None:
        raise validation.no_momentum()
    followed = compiling()
    if (
        on_nonfinite == "skip"
        and on_single_value == "error"
        and masked_output == "zero"
        and channel_dim == 1
        and virtual_batch_size is None
        and mask is None
        and not inplace
        and not followed
        and running_mean is not None
        and running_var is not None
        and select.forced is None
    ):
        # the common call: the core looks at eps, momentum and activation too, and declines what may be wrong
        if training:
            fields = running_mean, running_var, None, momentum, running_var_correction, True
            y = cpu.train_at_once(input, weight, bias, residual, 1, eps, activation, fields)
        else:
            y = cpu.infer_at_once(
                input, running_mean, running_var, weight, bias, residual, 1, eps, activation
            )
        if y is not None:
            return y
    # inference has no use for momentum, but an exported graph holds it, as torch's does; callers pass what they like
    weight_of_new = momentum if training or isinstance(momentum, (int, float)) else None
    switches = training, masked_output, running_var_correction
    policies = on_single_value, on_nonfinite, virtual_batch_size, weight_of_new
    given = (*switches, eps, activation, channel_dim, *policies)
    try:
        # remembered, for the same few settings come at every call, and to check them costs what a small batch does
        options = _checked(*given) if followed else _remembered(*given)
    except TypeError:  # a value that cannot be hashed is a wrong one, and the check says why
        options = _checked(*given)
    if isinstance(input, torch.fx.Proxy):
        if mask is not None or virtual_batch_size is not None or (training and not running_var_correction):
            raise validation.no_symbol()
        norm = Norm(channel_dim, eps, weight, bias, residual, activation)
        return visible.record(input, (running_mean, running_var), norm, training, momentum)
    if not isinstance(input, Tensor):
        raise validation.not_a_tensor("input", input)
    if input.dim() == 1 and input.numel() == 0:
        return input.clone()  # torch lets it pass
    if not training:
        return infer(
            input, running_mean, running_var, weight, bias, residual, mask, masked_output, options, inplace
        )
    if inplace:
        raise validation.inplace_in_training()
    tracking = None
    if running_mean is not None and running_var is not None:
        skip = on_nonfinite == "skip"
        tracking = Tracking(running_mean, running_var, None, momentum, running_var_correction, skip)
    else:
        validation.check_both_or_neither(running_mean, running_var)
    return train(input, weight, bias, residual, mask, masked_output, tracking, tracking, options)


def _checked(training: bool, masked_output: str, running_var_correction: int, *rest: Any) -> Options:
    options = Options(*rest)
    validation.check_eps(options.eps, training)
    for name in ("activation", "on_single_value", "on_nonfinite", "virtual_batch_size"):
        validation.check_option(name, getattr(options, name))
    if training:
        validation.check_momentum(options.momentum)
    validation.check_option("masked_output", masked_output)
    validation.check_option("running_var_correction", running_var_correction)
    return options


_remembered = lru_cache(maxsize=256, typed=True)(_checked)


def infer(
    z: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    masked_output: str,
    options: Options,
    inplace: bool = False,
) -> Tensor:
    """Normalize with population statistics; what `batch_norm` does in inference, options given as one.

    Parameters
    ----------
    z, running_mean, running_var, gamma, beta, residual, mask, masked_output, inplace
        As for `batch_norm`.
    options : Options
        Checked options.

    Returns
    -------
    Tensor
        Of the shape of ``z``.
    """
    if running_mean is None or running_var is None:
        raise validation.missing_statistics()
    if type(z) is not Tensor and is_placed(z):
        if inplace:
            return z.copy_(
                infer(z, running_mean, running_var, gamma, beta, residual, mask, masked_output, options)
            )
        from batchnorm.pooling.placed import infer_shards

        statistics, vectors = (running_mean, running_var), (gamma, beta)
        return infer_shards(infer, z, statistics, vectors, residual, mask, masked_output, options)
    if compiling() and not inplace and by_our_backend():
        rest = (running_mean, running_var, mask, masked_output, options)
        return infer_step(z, gamma, beta, residual, *rest)
    if z.layout is not torch.strided:
        dense, added = _dense(z, residual)
        y = infer(dense, running_mean, running_var, gamma, beta, added, mask, masked_output, options)
        return y.to_mkldnn()
    if z.is_nested:
        raise validation.no_dense_layout(z)
    axis = 1 if options.channel_dim == 1 and z.dim() > 1 else channel_axis(z.dim(), options.channel_dim)
    if mask is None and not inplace and select.forced is None and not compiling():
        with_norm = gamma, beta, residual, axis, options.eps, options.activation
        done = cpu.infer_at_once(z, running_mean, running_var, *with_norm)
        if done is not None:
            return done
    validation.check_tensors(z, axis, (running_mean, running_var, gamma, beta), residual)
    if (
        inplace
        and torch.is_grad_enabled()
        and (z.requires_grad or validation.any_gradient(gamma, beta, residual))
    ):
        raise validation.inplace_with_gradient()
    norm = Norm(axis, options.eps, gamma, beta, residual, options.activation)
    if mask is None:
        return normalize_population(z, norm, running_mean, running_var, None, inplace, options.momentum)
    keep = validation.spread_mask(mask, z, axis)
    y = normalize_population(z, norm, running_mean, running_var, keep, momentum=options.momentum)
    y = y if masked_output == "zero" else torch.where(keep, y, z)
    return z.copy_(y) if inplace else y


def train(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    masked_output: str,
    tracking: Tracking | Sink | None,
    population: Tracking | None,
    options: Options,
    between: Between | None = None,
) -> Tensor:
    """Normalize with the batch's own statistics; what `batch_norm` does in training, options given as one.

    Parameters
    ----------
    z, gamma, beta, residual, mask, masked_output
        As for `batch_norm`.
    tracking : Tracking, callable or None
        Running statistics to move, or what takes (count, mean, var) of each batch.
    population : Tracking or None
        Statistics that serve under ``on_single_value="running"``.
    options : Options
        Checked options.
    between : Between or None
        What pools statistics over ranks.

    Returns
    -------
    Tensor
        Of the shape of ``z``.
    """
    if type(z) is not Tensor and is_placed(z):
        from batchnorm.pooling.placed import train_shards

        pair = (gamma, beta)
        return train_shards(
            train, z, pair, residual, mask, masked_output, tracking, population, options, between
        )
    if z.is_nested:
        raise validation.no_dense_layout(z)
    axis = 1 if options.channel_dim == 1 and z.dim() > 1 else channel_axis(z.dim(), options.channel_dim)
    plain = tracking is None or type(tracking) is Tracking
    if plain and between is None and compiling() and by_our_backend():
        return train_step(z, gamma, beta, residual, mask, masked_output, tracking, population, options)
    if (
        mask is None
        and between is None
        and plain
        and options.virtual_batch_size is None
        and options.on_nonfinite != "raise"
        and (population is None or population is tracking)
        and select.forced is None
        and not compiling()
    ):
        y = cpu.train_at_once(z, gamma, beta, residual, axis, options.eps, options.activation, tracking)
        if y is not None:
            return y
    norm = Norm(axis, options.eps, gamma, beta, residual, options.activation)
    if z.layout is not torch.strided:
        dense, added = _dense(z, residual)
        moved = tracking, population, options, between
        return train(dense, gamma, beta, added, mask, masked_output, *moved).to_mkldnn()
    vectors = (
        (gamma, beta)
        if population is None
        else (population.running_mean, population.running_var, gamma, beta)
    )
    validation.check_tensors(z, axis, vectors, residual)
    tracking = counting(tracking)
    keep = None if mask is None else validation.spread_mask(mask, z, axis)
    refuse = options.on_nonfinite == "raise"
    if written_down():
        if not plain or between is not None:
            raise validation.not_written(
                "inside accumulate" if between is None else "while it pools over ranks"
            )
        refuse = False  # what looks at values and raises is nothing that a graph of torch's can hold
    virtual = options.virtual_batch_size
    if virtual is not None and plain_shape(z)[0] > virtual:
        return _in_parts(z, norm, keep, masked_output, tracking, population, options, between, virtual)
    if refuse or not plain or between is not None:
        tracking = _telling(tracking, refuse, between is not None)
    return _one_batch(z, norm, keep, masked_output, tracking, population, options, between)


def _dense(z: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give tensors of oneDNN's opaque layout as dense ones, and refuse those of another layout."""
    if not z.is_mkldnn:
        raise validation.no_dense_layout(z)
    return z.to_dense(), residual.to_dense() if residual is not None and residual.is_mkldnn else residual


def _one_batch(
    z: Tensor,
    norm: Norm,
    keep: Tensor | None,
    masked_output: str,
    tracking: Tracking | Sink | None,
    population: Tracking | None,
    options: Options,
    between: Between | None,
) -> Tensor:
    if keep is None and between is None:
        m = values_per_channel(plain_shape(z), norm.axis)
        if m >= 2:
            return normalize_batch(z, norm, tracking)
        if m == 1 and options.on_single_value == "error":
            raise validation.too_few_values(z, norm.axis)
        if m == 1 and population is None:
            raise validation.missing_statistics()
        if m == 0 and isinstance(tracking, Tracking):
            count_empty(tracking)
        if population is not None:
            return normalize_population(z, norm, population.running_mean, population.running_var)
        # no value, no statistics: any will do, for there is nothing to normalize
        c = z.shape[norm.axis]
        return normalize_population(z, norm, z.new_zeros(c), z.new_ones(c))
    fallback = None
    if options.on_single_value == "running":
        if population is None:
            raise validation.missing_statistics()
        # copies: the live buffers may move before the backward comes
        fallback = (population.running_mean.clone(), population.running_var.clone())
    y = normalize_batch(z, norm, tracking, keep, fallback, between)
    return y if keep is None or masked_output == "zero" else torch.where(keep, y, z)


def _in_parts(
    z: Tensor,
    norm: Norm,
    keep: Tensor | None,
    masked_output: str,
    tracking: Tracking | Sink | None,
    population: Tracking | None,
    options: Options,
    between: Between | None,
    virtual: int,
) -> Tensor:
    rows = plain_shape(z)[0]
    parts = -(-rows // virtual)
    if options.on_single_value == "error" and keep is None:
        smallest = z[: rows // parts]
        if values_per_channel(plain_shape(smallest), norm.axis) == 1:
            raise validation.too_few_values(smallest, norm.axis)
    # told only when every part has passed, so that an error in a later one leaves no trace
    told: list[Told] = []

    def remember(count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        told.append((count, mean, var))

    refuse = options.on_nonfinite == "raise"
    sink: Tracking | Sink | None = None if tracking is None and not refuse else remember
    if written_down():
        sink = tracking
    nothing = [None] * parts
    outputs = [
        _one_batch(part, norm._replace(residual=r), kept, masked_output, sink, population, options, between)
        for part, r, kept in zip(
            z.tensor_split(parts),
            nothing if norm.residual is None else norm.residual.tensor_split(parts),
            nothing if keep is None else keep.tensor_split(parts),
            strict=True,
        )
    ]
    tell(tracking, told, refuse)
    return torch.cat(outputs)


def _telling(tracking: Tracking | Sink | None, refuse: bool, pooled: bool) -> Sink:
    def sink(count: int | Tensor, mean: Tensor, var: Tensor) -> None:
        tell(tracking, [(count, mean, var)], refuse, pooled)

    return sink


train_step = one_step(train)
"""`train` as one step of a graph of our own backend."""


@one_step
def infer_step(
    z: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mask: Tensor | None,
    masked_output: str,
    options: Options,
) -> Tensor:
    """`infer` as one step of a graph of our own backend."""
    return infer(z, running_mean, running_var, gamma, beta, residual, mask, masked_output, options)


def _refuse_script() -> None:
    raise validation.no_script()


batch_norm.__prepare_scriptable__ = _refuse_script  # type: ignore[attr-defined]
