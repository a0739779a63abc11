"""Mixed precision: autocast, gradient scalers, weights in half precision, mixed dtypes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    INNER,
    backward,
    cure_step,
    disk,
    losses,
    make_batch,
    make_net,
    numpy_topk,
    seeded,
    snapshot,
    to_numpy,
)
from torch import nn

from rgp_optim import RGPSelectiveOptimizer

POWERS = {"init_scale": 1024.0, "growth_interval": 1000}  # scaling by them rounds nothing


def wrap(model, make=INNER["SGD momentum wd"], **options):
    inner = make(model.parameters())
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.3, "alpha": 0.3, **options})


def assert_same(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def scaled(opt, scaler, loss, nat, adv):
    scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()


# Gradient scalers.


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["SGD momentum wd", "SGD fused", "AdamW", "AdamW fused"])
def test_grad_scaler(name, unscale, conserve):
    """The weights and the state are those of a run without; a skipped step leaves no trace."""
    model, other = make_net(), make_net()
    opt = wrap(model, INNER[name], conserve=conserve)
    reference = wrap(other, INNER[name], conserve=conserve)
    scaler = torch.amp.GradScaler(DEVICE.type, **POWERS)
    for seed in range(4):
        buffers = copy.deepcopy(model.state_dict())
        loss, nat, adv = losses(model, *make_batch(seed))
        overflows = seed == 1
        opt.zero_grad()
        scaled(opt, scaler, loss * torch.inf if overflows else loss, nat, adv)
        if unscale:
            scaler.unscale_(opt)
            if not overflows:
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        before = snapshot(model)
        scaler.step(opt)
        scaler.update()
        if overflows:
            assert all(map(torch.equal, before, snapshot(model)))
            model.load_state_dict(buffers)  # of BatchNorm, which the reference does not see
        else:
            cure_step(other, reference, seed)
    assert scaler.get_scale() == 512.0
    assert_same(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = opt.state[p], reference.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key]))


def test_scaler_and_optimizer_resume_together():
    ends = []
    for stop in (None, 2):
        model = make_net()
        opt = wrap(model)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=2)
        for step in range(4):
            if step == stop:
                state = disk([model.state_dict(), opt.state_dict(), scaler.state_dict()])
                model = make_net(seed=5)
                opt = wrap(model)
                scaler = torch.amp.GradScaler(DEVICE.type)
                for each, its in zip((model, opt, scaler), state, strict=True):
                    each.load_state_dict(its)
            opt.zero_grad()
            scaled(opt, scaler, *losses(model, *make_batch(step)))
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 4096.0
        ends.append(snapshot(model))
    assert all(map(torch.equal, *ends))


# Autocast and half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = make_net()
    opt = wrap(model)
    scaler = torch.amp.GradScaler(DEVICE.type, **POWERS)
    for step in range(3):
        x, x_adv, y = make_batch(step)
        start = snapshot(model)
        with torch.autocast(DEVICE.type, dtype):
            nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x_adv), y)
        params = [p for p in model.parameters() if p.dim() > 1]
        g_nats, g_advs = (
            torch.autograd.grad(each, params, retain_graph=True) for each in (nat, adv)
        )
        opt.zero_grad()
        scaled(opt, scaler, nat + adv, nat, adv)
        scaler.step(opt)
        scaler.update()
        olds = [p for p in start if p.dim() > 1]
        for p, old, g_nat, g_adv in zip(params, olds, g_nats, g_advs, strict=True):
            score = 0.3 * g_nat.abs().float() + (1 - 0.3) * g_adv.abs().float()
            mask = numpy_topk(to_numpy(score), round(0.3 * p.numel()))
            assert np.array_equal(to_numpy(p != old) & ~mask, np.zeros_like(mask))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW", "AdamW fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype, name, conserve, scope):
    """The mask is that of the same gradients in float64; what it leaves out keeps its bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    opt = wrap(model, INNER[name], conserve=conserve, scope=scope)
    for step in range(3):
        g = seeded(step)
        x = torch.rand(8, 6, generator=g).to(dtype)
        y = torch.randint(0, 3, (8,), generator=g)
        nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x + 0.1), y)
        params = [model[0].weight, model[2].weight]
        g_nats, g_advs = (
            torch.autograd.grad(each, params, retain_graph=True) for each in (nat, adv)
        )
        start = [p.detach().clone() for p in params]
        opt.zero_grad()
        backward(opt, nat + adv, natural=nat, adversarial=adv)
        opt.step()
        scores = [
            0.3 * to_numpy(a.abs().double()) + 0.7 * to_numpy(b.abs().double())
            for a, b in zip(g_nats, g_advs, strict=True)
        ]
        joined = np.concatenate([each.reshape(-1) for each in scores])
        if scope == "global":
            both = numpy_topk(joined, round(0.3 * joined.size))
            masks = [both[: params[0].numel()], both[params[0].numel() :]]
        else:
            masks = [numpy_topk(each, round(0.3 * each.size)) for each in scores]
        moved = np.concatenate(
            [to_numpy(p != old).reshape(-1) for p, old in zip(params, start, strict=True)]
        )
        assert moved.any()
        assert not (moved & ~np.concatenate([mask.reshape(-1) for mask in masks])).any()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_tensors_of_several_dtypes(scope):
    """One threshold over float64, float32 and bfloat16 weights."""
    torch.manual_seed(1)
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    weights = [nn.Parameter(torch.ones(5, 6, dtype=dtype)) for dtype in dtypes]
    grads = [(torch.randn(5, 6).to(d), torch.randn(5, 6).to(d)) for d in dtypes]
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(weights, lr=1.0), update_fraction=0.3, alpha=0.5, scope=scope
    )
    nat = sum((w * g).sum().double() for w, (g, _) in zip(weights, grads, strict=True))
    adv = sum((w * g).sum().double() for w, (_, g) in zip(weights, grads, strict=True))
    backward(opt, natural=nat, adversarial=adv)
    opt.step()
    scores = [0.5 * to_numpy(a.double().abs()) + 0.5 * to_numpy(b.double().abs()) for a, b in grads]
    if scope == "global":
        masks = numpy_topk(np.stack(scores), round(0.3 * 90))
    else:
        masks = [numpy_topk(each, 9) for each in scores]
    for w, mask in zip(weights, masks, strict=True):
        assert np.array_equal(to_numpy(w != 1), mask)
