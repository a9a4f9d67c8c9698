"""What is checked before anything is computed, and the errors that say so.

The checks run at every call, so the common case is one pass over a few attributes; the messages are made
only when something is wrong.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from batchnorm.compiling import compiling
from batchnorm.errors import (
    ArgumentError,
    ArgumentTypeError,
    BatchNormError,
    DeviceError,
    DtypeError,
    LayoutError,
    MissingStatisticsError,
    ShapeError,
    TooFewValuesError,
    TraceError,
)
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.written import plain_shape, unwritten

_ALLOWED = {
    "on_single_value": ("error", "running"),
    "on_nonfinite": ("skip", "propagate", "raise"),
    "masked_output": ("zero", "input"),
}


def check_virtual_batch_size(virtual_batch_size: int | None) -> None:
    """Raise `ArgumentError` unless it is None or a positive whole number."""
    if virtual_batch_size is not None and (
        isinstance(virtual_batch_size, bool)
        or not isinstance(virtual_batch_size, int)
        or virtual_batch_size < 1
    ):
        raise ArgumentError(
            f"batch_norm: virtual_batch_size must be a positive whole number, and is {virtual_batch_size!r}.",
            why="it is the number of samples that share their statistics.",
            mend="give the size of a part of the batch, e.g. 32, or None for the whole batch.",
        )


def check_momentum(momentum: float | None) -> None:
    """Raise `ArgumentError` unless ``momentum`` is None or in [0, 1]."""
    if type(momentum) is float and 0 <= momentum <= 1:
        return
    if momentum is not None and (
        isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= momentum <= 1
    ):
        raise ArgumentError(
            f"batch_norm: momentum must be between 0 and 1, and is {momentum!r}.",
            why="it is the weight of the new batch in an average; outside, the average runs away.",
            mend="0.1 is usual; None is the plain average. Keras' 0.99 is written 0.01 here.",
        )


def check_eps(eps: float, training: bool = True) -> None:
    """Raise `ArgumentError` unless ``eps`` is positive; in inference it may be 0, as in torch."""
    try:
        good = eps > 0 or (eps == 0 and not training)
    except TypeError:
        raise ArgumentTypeError(
            f"batch_norm: eps must be a number, and is {eps!r}.", mend="1e-5 is usual."
        ) from None
    if not good:
        raise ArgumentError(
            f"batch_norm: eps must be positive{' during training' if training else ', or 0'}, but got {eps}.",
            why="a channel whose values are all equal has variance 0, and would be divided by 0.",
            mend="1e-5 is usual.",
        )


def no_momentum() -> ArgumentTypeError:
    """Make the error for a function that is asked for the plain average."""
    return ArgumentTypeError(
        "batch_norm: momentum must be a number in training, and is None.",
        why="the plain average needs the number of batches seen, which a function does not keep: each batch would "
        "overwrite the statistics.",
        mend="batchnorm.BatchNorm1d/2d/3d(..., momentum=None) counts; or give 1 / (batches seen) yourself.",
    )


def not_a_tensor(name: str, value: object) -> ArgumentTypeError:
    """Make the error for an argument of another kind."""
    return ArgumentTypeError(
        f"batch_norm: {name} must be a Tensor, and is a {type(value).__name__}.",
        why="as in torch, nothing else is converted: its dtype and device would be a guess.",
        mend="torch.as_tensor(...), on the layer's device.",
    )


def check_activation(activation: str | None) -> None:
    """Raise `ArgumentError` unless the activation has a fused form."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ArgumentError(
            f"batch_norm: unknown activation {activation!r}.",
            why="the activation is part of the kernel, which knows a fixed list.",
            mend=f"one of {', '.join(ACTIVATIONS)}; or None, and apply your own after.",
        )


def check_option(name: str, value: Any) -> None:
    """Raise `ArgumentError` unless an option of the operator or of a layer may have this value; eps is apart."""
    if name in _ALLOWED and value not in _ALLOWED[name]:
        raise ArgumentError(
            f"batch_norm: {name}={value!r} is not known.",
            why="a policy that is not understood would be ignored in silence.",
            mend=f"one of {', '.join(map(repr, _ALLOWED[name]))}.",
        )
    if name == "activation":
        check_activation(value)
    elif name == "momentum":
        check_momentum(value)
    elif name == "virtual_batch_size":
        check_virtual_batch_size(value)
    elif name == "running_var_correction" and value not in (0, 1):
        raise ArgumentError(
            f"batch_norm: running_var_correction must be 1 or 0, and is {value!r}.",
            why="running_var has divisor m - 1 (torch) or m (Keras, flax, ONNX), and no other is in use.",
            mend="1 to exchange statistics with torch, 0 with the others.",
        )
    elif name == "channel_dim" and (isinstance(value, bool) or not isinstance(value, int) or value == 0):
        raise ArgumentError(
            f"batch_norm: channel_dim={value!r} is no channel axis.",
            why="axis 0 is the batch; the channel is one of the others.",
            mend="1, or -1 for the last axis.",
        )


def check_both_or_neither(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise `ArgumentError` where only one of the running statistics is given."""
    if (running_mean is None) != (running_var is None):
        raise ArgumentError(
            "batch_norm: running_mean and running_var go together, and only one of them was given.",
            why="inference needs both.",
            mend="give both, or None for both.",
        )


_VECTOR_NAMES = {2: ("weight", "bias"), 4: ("running_mean", "running_var", "weight", "bias")}


def check_tensors(z: Tensor, axis: int, vectors: tuple[Tensor | None, ...], residual: Tensor | None) -> None:
    """Raise unless dtype, lengths and devices fit together."""
    if not z.is_floating_point():
        raise DtypeError(
            f"batch_norm: input must be floating, and is {z.dtype}.",
            why="mean and variance of whole or complex numbers do not fit in their own dtype.",
            mend="input.dequantize(); or batchnorm.fold(model) before it is quantized."
            if z.is_quantized
            else "input.float().",
        )
    if torch._C._get_tracing_state() is not None and not compiling():
        with unwritten():
            return check_tensors(z, axis, vectors, residual)
    shape, device = z.shape[axis : axis + 1], z.device
    for i, vector in enumerate(vectors):
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise not_a_tensor(_VECTOR_NAMES[len(vectors)][i], vector)
        if vector.shape != shape:
            name = _VECTOR_NAMES[len(vectors)][i]
            raise ShapeError(
                f"batch_norm: {name} has shape {tuple(vector.shape)}, and input of shape {tuple(z.shape)} has "
                f"{z.shape[axis]} channels along axis {axis}.",
                why="each channel has one mean, variance, weight and bias.",
                mend=f"give {name} the shape ({z.shape[axis]},); or channel_dim=-1 if the channels come last.",
            )
        if not vector.is_floating_point():
            name = _VECTOR_NAMES[len(vectors)][i]
            raise DtypeError(
                f"batch_norm: {name} must be floating, and is {vector.dtype}.",
                why="a mean, variance, scale or shift is no whole number, and would be cut to one.",
                mend=f"{name}.float().",
            )
        if vector.device != device:
            name = _VECTOR_NAMES[len(vectors)][i]
            raise DeviceError(
                f"batch_norm: input is on {device} and {name} on {vector.device}.",
                why="a kernel reads one device's memory.",
                mend=f"move the layer with .to({str(device)!r}), or the input to {vector.device}.",
            )
    if residual is not None and not isinstance(residual, Tensor):
        raise not_a_tensor("residual", residual)
    if residual is not None and residual.is_nested:
        raise no_dense_layout(residual, "residual")
    if residual is not None and (
        residual.shape != z.shape or residual.dtype != z.dtype or residual.device != device
    ):
        raise _residual_error(z, residual)


def _residual_error(z: Tensor, residual: Tensor) -> BatchNormError:
    if residual.device != z.device:
        return DeviceError(
            f"batch_norm: input is on {z.device} and residual on {residual.device}.",
            why="a kernel reads one device's memory.",
            mend=f"residual.to({str(z.device)!r}).",
        )
    if residual.shape != z.shape:
        return ShapeError(
            f"batch_norm: residual has shape {tuple(residual.shape)}, and input {tuple(z.shape)}.",
            why="they are added value by value, and the residual has a gradient of its own shape.",
            mend="expand or reshape it first.",
        )
    return DtypeError(
        f"batch_norm: residual is {residual.dtype} and input {z.dtype}.",
        why="the sum is rounded once, to input's dtype, and the gradient of each has its own.",
        mend=f"residual.to({z.dtype}).",
    )


def spread_mask(mask: Tensor, z: Tensor, axis: int) -> Tensor:
    """Give the mask a channel axis of size 1, expanded over every other axis of ``z``."""
    if not isinstance(mask, Tensor):
        raise not_a_tensor("mask", mask)
    if mask.is_nested:
        raise no_dense_layout(mask, "mask")
    if mask.dtype != torch.bool:
        raise DtypeError(
            f"batch_norm: mask must be boolean, and is {mask.dtype}.",
            why="a value counts or it does not; a weight would need another formula.",
            mend="mask.bool(), or mask > 0.",
        )
    if mask.device != z.device:
        raise DeviceError(
            f"batch_norm: input is on {z.device} and mask on {mask.device}.",
            why="a kernel reads one device's memory.",
            mend=f"mask.to({str(z.device)!r}).",
        )
    shape = plain_shape(z)
    wanted = [*shape[:axis], *shape[axis + 1 :]]
    if mask.dim() == z.dim() and plain_shape(mask)[axis] == 1:
        mask = mask.squeeze(axis)
    sizes = plain_shape(mask)
    fits = len(sizes) == len(wanted) and all(a in (1, b) for a, b in zip(sizes, wanted, strict=True))
    if not fits:
        raise ShapeError(
            f"batch_norm: mask has shape {tuple(sizes)}, and input {tuple(shape)} without its channel axis "
            f"{tuple(wanted)}.",
            why="a position is masked for every channel at once.",
            mend="drop the channel axis of the mask, or add axes of size 1 where it broadcasts: a mask of samples "
            "is mask[:, None, None] for (N, C, H, W).",
        )
    spread = [*z.shape]
    spread[axis] = 1
    return mask.unsqueeze(axis).expand(spread)


def any_gradient(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors records a gradient."""
    return any(t is not None and t.requires_grad for t in tensors)


def too_few_values(z: Tensor, axis: int) -> TooFewValuesError:
    """Make the error for one value per channel."""
    return TooFewValuesError(
        f"batch_norm: training needs at least 2 values per channel, and input of shape {tuple(z.shape)} has 1. "
        "(Expected more than 1 value per channel when training.)",
        why="a single value equals its own mean, so the output is the bias and no gradient reaches the input.",
        mend='a larger batch; or eval mode; or on_single_value="running".',
    )


def missing_statistics() -> MissingStatisticsError:
    """Make the error for inference without running statistics."""
    return MissingStatisticsError(
        "batch_norm: running_mean and running_var are needed, and at least one of them is None. "
        "(Expected running_mean and running_var to be defined when training=False.)",
        why="the samples at test time are too few for statistics of their own.",
        mend="give both; or training=True to use the batch's.",
    )


def not_written(when: str) -> ArgumentError:
    """Make the error for a training step that no graph of torch's can hold."""
    return ArgumentError(
        f"batch_norm: a training step cannot be traced or exported {when}.",
        why="the graph would hold torch's batch norm, which takes the statistics of each batch by itself.",
        mend="trace or export in eval mode; or outside of accumulate, and after batchnorm.desynchronize(model).",
    )


def no_dense_layout(z: Tensor, name: str = "input") -> LayoutError:
    """Make the error for an input whose values do not lie in strides."""
    laid = "is nested" if z.is_nested else f"has the layout {z.layout}"
    padded = f"torch.nested.to_padded_tensor({name}, 0.0), with a mask of what is no padding"
    return LayoutError(
        f"batch_norm: {name} {laid}, and a dense one is needed.",
        why="mean and variance are those of every value of a channel, stored or not.",
        mend=padded if z.is_nested else f"{name}.to_dense().",
    )


def no_script() -> TraceError:
    """Make the error for ``torch.jit.script``."""
    return TraceError(
        "batch_norm: torch.jit.script cannot read a layer or a function of this package.",
        why="it compiles a part of Python from the source, and the checks and routes here are outside of it.",
        mend="torch.jit.trace(model, example) or torch.export.export(model, (example,)), which record torch's batch "
        'norm; or batchnorm.convert(model, to="torch") first, whose layers script.',
    )


def no_symbol() -> TraceError:
    """Make the error for options that no call of torch's batch norm stands for."""
    return TraceError(
        "batch_norm: a symbolic trace (torch.fx) records torch's batch norm, which has no mask, "
        "virtual_batch_size or running_var_correction=0.",
        why="the graph would compute something else.",
        mend="use a layer, which is recorded as one step; or torch.fx.wrap the function that calls this.",
    )


def inplace_in_training() -> ArgumentError:
    """Make the error for in-place training."""
    return ArgumentError(
        "batch_norm: inplace=True is for inference, and training=True was given.",
        why="the backward needs the input, which would be overwritten.",
        mend="drop one of the two.",
    )


def inplace_with_gradient() -> ArgumentError:
    """Make the error for an in-place call that records a gradient."""
    return ArgumentError(
        "batch_norm: inplace=True where a gradient is recorded.",
        why="the backward needs the input, which would be overwritten.",
        mend="run under torch.no_grad() or torch.inference_mode(), or drop inplace.",
    )


def parts_and_pooling(size: int) -> ArgumentError:
    """Make the error of a layer that is to cut a batch into parts and to pool it over ranks."""
    return ArgumentError(
        f"batch_norm: virtual_batch_size={size!r} together with a process_group.",
        why="one normalizes parts of a batch apart, the other those of all ranks together; and ranks with batches "
        "of different sizes would cut different parts.",
        mend="set one of the two to None.",
    )
