"""See that the batchnorm which this Python has installed normalizes, with its core or ``--without-core``."""

import sys
from pathlib import Path

import torch

import batchnorm
from batchnorm.kernels import cpu

core = cpu.absence is None
assert core == ("--without-core" not in sys.argv), cpu.absence
if core and sys.platform == "linux" and " avx2 " in Path("/proc/cpuinfo").read_text():
    # a compiler that cannot ask the processor gives a core that is right and slow
    assert cpu.info()["isa"] != "baseline", cpu.info()
for layout in (torch.contiguous_format, torch.channels_last):
    z = torch.randn(8, 5, 6, 7, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    layer = batchnorm.BatchNorm2d(5, dtype=torch.float64, activation="relu")
    y = layer(z)
    wide = z.detach()
    variance = wide.var((0, 2, 3), correction=0, keepdim=True)
    wanted = (wide - wide.mean((0, 2, 3), keepdim=True)) / (variance + layer.eps).sqrt()
    torch.testing.assert_close(y, wanted.clamp(min=0), rtol=1e-10, atol=1e-10)
    torch.autograd.gradcheck(lambda z: batchnorm.functional.batch_norm(z, None, None, training=True), z)
net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
net = batchnorm.insert(net, torch.randn(8, 4))
batchnorm.calibrate(net, [torch.randn(32, 4)], progress=False)
batchnorm.fold(net.eval(), torch.randn(8, 4))
print(batchnorm.__version__, "torch", torch.__version__, "with the core" if core else "without the core")
