"""Two CPU processes under Accelerate, started by torchrun."""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import batchnorm

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
batchnorm.synchronize(model)  # after Accelerator(), before prepare
data = torch.utils.data.DataLoader(torch.randn(32, 3), batch_size=4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for batch in data:
    loss = F.mse_loss(model(batch), batch.sum(1, keepdim=True))
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
assert accelerator.num_processes == 2
layer = accelerator.unwrap_model(model)[1]
with open(f"{sys.argv[1]}/{accelerator.process_index}", "w") as file:
    file.write(str([v.tolist() for v in (layer.running_mean, layer.running_var)]))
accelerator.end_training()
