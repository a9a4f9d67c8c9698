"""Two CPU workers under Ray Train."""

import os
import sys

import ray
import ray.train
import torch
import torch.nn.functional as F
from ray.train.torch import TorchConfig, TorchTrainer
from torch import nn

import batchnorm


def worker(settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    model = ray.train.torch.prepare_model(batchnorm.synchronize(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank = ray.train.get_context().get_world_rank()
    for step in range(4):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[rank::2]
        loss = F.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer = model.module[1]
    with open(f"{settings['folder']}/{rank}", "w") as file:
        file.write(str([v.tolist() for v in (layer.running_mean, layer.running_var)]))


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=os.environ.get("RAY_TMPDIR"))
TorchTrainer(
    worker,
    train_loop_config={"folder": sys.argv[1]},
    torch_config=TorchConfig(backend="gloo"),
    scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
    run_config=ray.train.RunConfig(storage_path=f"{sys.argv[1]}/ray"),
).fit()
