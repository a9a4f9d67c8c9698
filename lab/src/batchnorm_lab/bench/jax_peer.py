"""JAX: the formula as flax writes it, jitted for these very shapes, on the same thread budget."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from batchnorm_lab.bench.operands import EPS, MOMENTUM, Operands
from batchnorm_lab.bench.shapes import Case

SETTLE_SECONDS = 0.003


def to_jax(tensor: Tensor) -> jax.Array:
    """Copy a torch tensor to a JAX array of the same dtype.

    Parameters
    ----------
    tensor : Tensor
        Any strides; the array is contiguous in the order of the axes.

    Returns
    -------
    jax.Array
        On the CPU.
    """
    if tensor.dtype is torch.bfloat16:
        bits = tensor.detach().contiguous().view(torch.int16).numpy()
        return jnp.asarray(bits.view(jnp.bfloat16.dtype))
    return jnp.asarray(tensor.detach().contiguous().numpy())


class Jax:
    """Batch norm, addition and ReLU in one jitted function; channels last for channels_last input."""

    def __init__(self, case: Case, operands: Operands) -> None:
        self.case = case
        self.training = case.mode == "training"
        self.last = case.layout == "channels_last"

        def place(tensor: Tensor | None) -> jax.Array | None:
            if tensor is None:
                return None
            return to_jax(tensor.movedim(1, -1) if self.last else tensor)

        self.z, self.residual, self.dy = map(place, (operands.z, operands.residual, operands.dy))
        self.weight, self.bias = to_jax(operands.weight), to_jax(operands.bias)
        self.running = (to_jax(operands.running_mean), to_jax(operands.running_var))
        channel_axis = 1 if case.layout == "nchw" or case.layout == "rows" else len(case.shape) - 1
        self.axes = tuple(i for i in range(len(case.shape)) if i != channel_axis)
        self.across = [1] * len(case.shape)
        self.across[channel_axis] = case.shape[operands.channel_dim]
        self.pullback: Any = None
        self.jitted = jax.jit(self.with_pullback if self.training else self.formula)
        self.jitted_backward = jax.jit(lambda pullback, dy: pullback(dy))

    def formula(self, z: Any, weight: Any, bias: Any, residual: Any, running: Any) -> Any:
        wide = z.astype(jnp.float32)
        mean, var = running
        if self.training:
            mean = wide.mean(self.axes)
            var = jnp.maximum((wide * wide).mean(self.axes) - mean * mean, 0.0)
            old_mean, old_var = running
            running = (
                (1 - MOMENTUM) * old_mean + MOMENTUM * mean,
                (1 - MOMENTUM) * old_var + MOMENTUM * var,
            )
        scale = jax.lax.rsqrt(var + EPS) * weight
        y = (wide - mean.reshape(self.across)) * scale.reshape(self.across) + bias.reshape(self.across)
        y = y.astype(z.dtype)
        if residual is not None:
            y = y + residual
        if self.case.form != "plain":
            y = jax.nn.relu(y)
        return y, running

    def with_pullback(self, z: Any, weight: Any, bias: Any, residual: Any, running: Any) -> Any:
        def of_leaves(z: Any, weight: Any, bias: Any, residual: Any) -> Any:
            return self.formula(z, weight, bias, residual, running)

        return jax.vjp(of_leaves, z, weight, bias, residual, has_aux=True)

    def settle(self) -> None:
        """Let the threads of torch's OpenMP team, which spin for a while after a loop, go to sleep."""
        time.sleep(SETTLE_SECONDS)

    def forward(self) -> Any:
        out = self.jitted(self.z, self.weight, self.bias, self.residual, self.running)
        jax.block_until_ready(out)
        if self.training:
            y, self.pullback, _ = out
            return y
        return out[0]

    def backward(self, y: Any) -> Any:
        gradients = jax.block_until_ready(self.jitted_backward(self.pullback, self.dy))
        self.pullback = None
        return tuple(g for g in gradients if g is not None)

    def as_torch(self, value: Any) -> Tensor:
        tensor = torch.from_dlpack(value)
        return tensor.movedim(-1, 1) if self.last and tensor.dim() > 1 else tensor
