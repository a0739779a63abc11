"""A small model and one step of it, alone or on several ranks, for all tests of this folder."""

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from common import backward
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rgp_optim import RGPSelectiveOptimizer, kl_adv_loss

ORDERS = ("loss", "sum", "in turn", "joined", "trades")
WEIGHT_CHECK = {"rtol": 0, "atol": 1e-12}


class Small(nn.Module):
    """No batch statistics, so that the batch can be divided; sizes that do not divide evenly."""

    reentrant = None  # or whether the convolution is checkpointed in the reentrant way

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5 * 4, 3)

    def forward(self, x):
        if self.reentrant is None:
            h = self.conv(x)
        else:
            x = x.detach().requires_grad_()
            h = checkpoint(self.conv, x, use_reentrant=self.reentrant)
        h = F.relu(self.norm(h))
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def small(dtype=torch.float64):
    torch.manual_seed(7)
    return Small().to(dtype)


def batch(step, dtype=torch.float64, n=16):
    g = torch.Generator().manual_seed(step)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=torch.float64)
    x_adv = x + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x.to(dtype), x_adv.to(dtype), torch.randint(0, 3, (n,), generator=g)


def share(rank, size, tensors):
    return [t.chunk(size)[rank] for t in tensors]


def make_opt(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.4, "alpha": 0.3, **options})


def parts(model, x, x_adv, y, trades=False):
    """Total, natural and adversarial loss."""
    logits, logits_adv = model(x), model(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    if trades:
        return kl_adv_loss(logits, logits_adv, y, beta=3.0), nat, adv
    return nat + 0.5 * adv, nat, adv


def passes(order, model, opt, data):
    """The backward passes of a step, in one of the orders that people write."""
    x, x_adv, y = data
    if order == "in turn":  # each role with a forward pass of its own, reduced each
        nat = F.cross_entropy(model(x), y)
        opt.scored(nat, natural=nat).backward()
        adv = F.cross_entropy(model(x_adv), y)
        opt.scored(adv, adversarial=adv).backward()
        return
    if order == "joined":  # one forward pass of both batches
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)
        nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        loss = nat + 0.5 * adv
    else:
        loss, nat, adv = parts(model, x, x_adv, y, trades=order == "trades")
    backward(opt, None if order == "sum" else loss, natural=nat, adversarial=adv)


def take_step(order, model, opt, data):
    opt.zero_grad()
    passes(order, model, opt, data)
    opt.step()


def values(model):
    """All weights, gathered."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [p.detach().double().numpy().copy() for p in whole]


def alone(order, steps, dtype=torch.float64, **options):
    """The same training in one process, on the joined batches."""
    model = small(dtype)
    opt = make_opt(model, **options)
    for step in range(steps):
        take_step(order, model, opt, batch(step, dtype))
    return values(model)


def shard(model, layers=True, **options):
    if layers:
        for part in model.children():
            fully_shard(part, **options)
    return fully_shard(model, **options)


def wrapped(kind, model):
    """The model as a trainer gives it: "alone", "ddp", "fsdp" (by layer), "root" or "hsdp"."""
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        return shard(model, mesh=mesh)
    makers = {
        "alone": lambda m: m,
        "ddp": DistributedDataParallel,
        "fsdp": shard,
        "root": lambda m: shard(m, layers=False),
        "kept": lambda m: shard(m, reshard_after_forward=False),
    }
    return makers[kind](model)


def train(rank, size, kind, orders=("loss",), steps=3, dtype=torch.float64, ddp=None, **options):
    """Train once per order; return the weights of each run."""
    found = []
    for order in orders:
        model = small(dtype)
        called = DistributedDataParallel(model, **ddp) if ddp else wrapped(kind, model)
        opt = make_opt(model, **options)
        for step in range(steps):
            take_step(order, called, opt, share(rank, size, batch(step, dtype)))
        found.append(values(model))
    return found


def train_with(rank, size, arguments):
    """`train` for `Ranks.run`, which passes positional arguments only."""
    return train(rank, size, **arguments)


def accumulate(rank, size, kind, order, window, ddp=None):
    """Two micro-batches per step; with ``no_sync`` only the second is reduced."""
    model = small()
    called = DistributedDataParallel(model, **ddp) if ddp is not None else wrapped(kind, model)
    opt = make_opt(model)
    for step in range(3):
        opt.zero_grad()
        for micro in range(2):
            unreduced = window == "no_sync" and micro == 0 and size > 1
            with called.no_sync() if unreduced else nullcontext():
                data = share(rank, size, batch(10 * step + micro))
                passes(order, called, opt, data)
        opt.step()
    return values(model)


def assert_same_bits(per_rank):
    for other in per_rank[1:]:
        assert all(map(np.array_equal, per_rank[0], other))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **WEIGHT_CHECK)
