"""Counts what pooling sends: the messages and bytes of a step of ResNet-50's 53 batch norms.

    torchrun --standalone --nproc-per-node 8 -m batchnorm_lab.bench.messages

The layers alone run, on one value a channel: what is sent depends on the channels and the ranks, and on
nothing else. Messages are the backend's own count, bytes what its profiler saw sent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import batchnorm
from batchnorm.distributed.groups import find

BLOCKS = {(64, 256): 3, (128, 512): 4, (256, 1024): 6, (512, 2048): 3}


def channels() -> list[int]:
    """Give the channels of ResNet-50's batch norms, in order."""
    found = [64]
    for (width, out), blocks in BLOCKS.items():
        for block in range(blocks):
            found += [width, width, out] + ([out] if block == 0 else [])
    return found


def main() -> None:
    """Count, and print one line."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    layers: Any = batchnorm.synchronize(nn.ModuleList(nn.BatchNorm1d(c) for c in channels()), "own")
    group = find(layers[0].process_group[0])
    inputs = [torch.randn(1, c, requires_grad=True) for c in channels()]
    told = []
    for _ in range(4):
        before = group._get_sequence_number_for_group()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            outputs = [layer(z) for layer, z in zip(layers, inputs, strict=True)]
            forward = group._get_sequence_number_for_group() - before
            torch.stack([y.sum() for y in outputs]).sum().backward()
        backward = group._get_sequence_number_for_group() - before - forward
        words = [e.input_shapes[0][0] for e in seen.events() if e.name.startswith("gloo:")]
        told.append((forward, backward, 8 * sum(words)))
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(f"{ranks} ranks, {len(layers)} layers, {sum(channels())} channels")
        for step, (forward, backward, sent) in enumerate(told):
            print(f"step {step}: {forward} messages forward, {backward} backward, {sent} bytes sent a rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
