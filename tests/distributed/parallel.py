"""A small model and its training, alone or on several ranks, for all tests of this folder.

A program is a function that returns weights. In a process without a group it is one process on the
joined batches, since `wrap` and `share` then return what they are given.
"""

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import backward
from ranks import RankFailed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rgp_optim import RGPSelectiveOptimizer, kl_adv_loss

ORDERS = ("loss", "sum", "in turn", "joined", "trades")
SCOPES = pytest.mark.parametrize("scope", ["tensor", "global"])
DDP_AND_FSDP2 = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


class Small(nn.Module):
    """No batch statistics, so that the batch can be divided; sizes that do not divide evenly."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5 * 4, 3)
        self.reentrant = reentrant  # None: no checkpoint

    def features(self, x):
        if self.reentrant is None:
            h = self.conv(x)
        else:
            h = checkpoint(self.conv, x.detach().requires_grad_(), use_reentrant=self.reentrant)
        return F.adaptive_avg_pool2d(F.relu(self.norm(h)), 2).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def small(make=Small, dtype=torch.float64):
    torch.manual_seed(7)
    return make().to(dtype)


def batch(step, dtype=torch.float64, n=16):
    g = torch.Generator().manual_seed(step)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=torch.float64)
    x_adv = x + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x.to(dtype), x_adv.to(dtype), torch.randint(0, 3, (n,), generator=g)


def place():
    """Rank and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(data, rank=None, size=None):
    """This rank's part of a batch."""
    rank, size = place() if size is None else (rank, size)
    return [t.chunk(size)[rank] for t in data]


def make_opt(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.4, "alpha": 0.3, **options})


def wrap(kind, model, **options):
    """DDP, or FSDP2: "fsdp" by layer, "root" at once, "kept" without resharding, "hsdp"."""
    if not dist.is_initialized():
        return model
    if kind == "ddp":
        return DistributedDataParallel(model, **options)
    if kind == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if kind == "kept":
        options["reshard_after_forward"] = False
    for layer in model.children() if kind != "root" else ():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def parts(model, x, x_adv, y, trades=False):
    """Total, natural and adversarial loss."""
    logits, logits_adv = model(x), model(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    return kl_adv_loss(logits, logits_adv, y, beta=3.0) if trades else nat + 0.5 * adv, nat, adv


def passes(order, model, opt, data):
    """The backward passes of a step, in one of the orders that people write."""
    x, x_adv, y = data
    if order == "in turn":  # one forward pass per role, each reduced
        for role, images in (("natural", x), ("adversarial", x_adv)):
            loss = F.cross_entropy(model(images), y)
            opt.scored(loss, **{role: loss}).backward()
        return
    if order == "joined":  # one forward pass of both batches
        nat, adv = (F.cross_entropy(z, y) for z in model(torch.cat([x, x_adv])).chunk(2))
        loss = nat + 0.5 * adv
    else:
        loss, nat, adv = parts(model, x, x_adv, y, trades=order == "trades")
    backward(opt, None if order == "sum" else loss, natural=nat, adversarial=adv)


def fit(model, opt, order="loss", steps=range(3), data=None):
    """Weights after some steps, by default on this rank's part of each batch."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        opt.zero_grad()
        passes(order, model, opt, data(step) if data else share(batch(step, dtype)))
        opt.step()
    return values(model)


def train(kind, order="loss", steps=3, make=Small, dtype=torch.float64, wrapping=None, **options):
    model = small(make, dtype)
    called = wrap(kind, model, **(wrapping or {}))
    return fit(called, make_opt(model, **options), order, range(steps))


def accumulate(kind, order, window="synced", wrapping=None, **options):
    """Two micro-batches per step; with ``no_sync`` only the second is reduced."""
    model = small()
    called, opt = wrap(kind, model, **(wrapping or {})), make_opt(model, **options)
    for step in range(3):
        opt.zero_grad()
        for micro in range(2):
            unreduced = window == "no_sync" and micro == 0 and called is not model
            with called.no_sync() if unreduced else nullcontext():
                passes(order, called, opt, share(batch(10 * step + micro)))
        opt.step()
    return values(model)


def values(model):
    """All weights, gathered."""
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [p.detach().double().numpy().copy() for p in whole]


def run(ranks, program, *args, **options):
    """What each rank returns."""
    return ranks.run(_run, program, args, options)


def _run(rank, program, args, options):
    return program(*args, **options)


def assert_refused(ranks, message, program, *args, by=None):
    """The message, on all ranks or on some."""
    with pytest.raises(RankFailed) as failed:
        run(ranks, program, *args)
    texts = re.split(r"^rank \d: ", str(failed.value), flags=re.MULTILINE)
    assert sum(bool(re.search(message, text)) for text in texts) == (by or ranks.size)


def assert_joined(ranks, program, *args, want=None, **options):
    """Bit-identical weights on all ranks, those of one process on the joined batches."""
    answers = run(ranks, program, *args, **options)
    assert_same_bits(answers)
    assert_close(answers[0], program(*args, **options) if want is None else want)


def assert_same_bits(answers):
    for other in answers[1:]:
        assert all(map(np.array_equal, answers[0], other))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
