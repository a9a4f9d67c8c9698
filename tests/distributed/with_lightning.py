"""Two CPU processes under Lightning's trainer; started as a script, for its launcher starts it again."""

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn

from batchnorm.lightning import PooledBatchNorm


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def training_step(self, batch, index):
        assert self.net[1].process_group == ("world",)
        return F.mse_loss(self.net(batch), batch.sum(1, keepdim=True))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


seed_everything(0, verbose=False)
model = Model()
data = torch.utils.data.DataLoader(torch.randn(32, 3), batch_size=4)
trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=1,
    plugins=[PooledBatchNorm()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, data)
assert type(model.net[1]) is nn.BatchNorm1d
with open(f"{sys.argv[1]}/{trainer.global_rank}", "w") as file:
    file.write(str([v.tolist() for v in (model.net[1].running_mean, model.net[1].running_var)]))
