import torch, batchnorm, copy
from ranks import run
def f(rank):
    l = batchnorm.BatchNorm1d(3, process_group="world", activation="relu")
    g=torch.Generator().manual_seed(1); x=torch.randn(7,3,generator=g)
    s=[slice(0,5),slice(5,5),slice(5,7)][rank]
    z=x[s].clone().requires_grad_()
    y=l(z); (y**3).sum().backward()
    return y.detach(), z.grad, l.weight.grad, l.running_mean, l.running_var, l.num_batches_tracked
def test_x():
    r=run(f,3)
    l = batchnorm.BatchNorm1d(3, activation="relu")
    g=torch.Generator().manual_seed(1); x=torch.randn(7,3,generator=g).requires_grad_()
    y=l(x); (y**3).sum().backward()
    torch.testing.assert_close(torch.cat([a[0] for a in r]), y.detach())
    torch.testing.assert_close(torch.cat([a[1] for a in r]), x.grad)
    torch.testing.assert_close(sum(a[2] for a in r), l.weight.grad)
    for a in r:
        torch.testing.assert_close(a[3], l.running_mean)
        torch.testing.assert_close(a[4], l.running_var)
        assert a[5]==1
def g(rank, backend):
    torch._dynamo.config.error_on_recompile=False
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3,4), batchnorm.BatchNorm1d(4, process_group="world",activation="relu"), torch.nn.Linear(4,4),batchnorm.BatchNorm1d(4, process_group="world"), torch.nn.Linear(4,4),batchnorm.BatchNorm1d(4, process_group="world"))
    sizes=[[5,0],[0,4],[3,1],[2,6]]
    comp=torch.compile(net, fullgraph=True, backend=backend, dynamic=True)
    out=[]
    from batchnorm.distributed import conversation as c
    calls=[]
    orig=c.Conversation._send
    def send(self, call, *a):
        calls.append(str(call)); return orig(self, call,*a)
    c.Conversation._send=send
    for step,s in enumerate(sizes):
        gen=torch.Generator().manual_seed(step); x=torch.randn(sum(s),3,generator=gen)
        z=x[:s[0]] if rank==0 else x[s[0]:]
        net.zero_grad()
        y=comp(z)
        (y**3).sum().backward()
        out.append((y.detach(), [p.grad for p in net.parameters()]))
    return out, net.state_dict(), calls
import pytest
@pytest.mark.parametrize("backend",["aot_eager","inductor"])
def test_g(backend):
    r=run(g,2,backend,timeout=300,limit=500)
    for c in r: print(c[2])
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3,4), batchnorm.BatchNorm1d(4, activation="relu"), torch.nn.Linear(4,4),batchnorm.BatchNorm1d(4), torch.nn.Linear(4,4),batchnorm.BatchNorm1d(4))
    for step,s in enumerate([[5,0],[0,4],[3,1],[2,6]]):
        gen=torch.Generator().manual_seed(step); x=torch.randn(sum(s),3,generator=gen)
        net.zero_grad(); y=net(x); (y**3).sum().backward()
        torch.testing.assert_close(torch.cat([a[0][step][0] for a in r]), y.detach())
        for i,p in enumerate(net.parameters()):
            torch.testing.assert_close(sum(a[0][step][1][i] for a in r), p.grad, rtol=1e-4,atol=1e-4)
    for a in r:
        for k,v in net.state_dict().items(): torch.testing.assert_close(a[1][k], v)
    assert r[0][2]==r[1][2]
