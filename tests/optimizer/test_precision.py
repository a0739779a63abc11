"""Mixed precision: autocast, gradient scalers, weights in half precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, Run, losses, make_batch, numpy_masks, same, to_numpy, wrap
from torch import nn


def scaled(opt, scaler, loss, nat, adv):
    opt.zero_grad()
    scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()


def scaler_of(**options):
    """Scaling by powers of two rounds nothing."""
    return torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, **options)


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["SGD momentum wd", "SGD fused", "AdamW", "AdamW fused"])
def test_grad_scaler(name, unscale, conserve):
    """The weights and the state are those of a run without; a skipped step leaves no trace."""
    run, reference = (Run(name, conserve=conserve) for _ in range(2))
    scaler = scaler_of()
    for seed in range(4):
        overflows, buffers = seed == 1, copy.deepcopy(run.model.state_dict())
        loss, nat, adv = losses(run.model, *make_batch(seed))
        scaled(run.opt, scaler, loss * torch.inf if overflows else loss, nat, adv)
        if unscale:
            scaler.unscale_(run.opt)
            if not overflows:
                nn.utils.clip_grad_norm_(run.model.parameters(), 1e9)
        run.mark()
        scaler.step(run.opt)
        scaler.update()
        if overflows:
            assert run.stays()
            run.model.load_state_dict(buffers)  # of BatchNorm, which the reference does not see
        else:
            reference.step(seed)
    assert scaler.get_scale() == 512.0
    assert same(run, reference)
    for mine, theirs in zip(run.opt.state.values(), reference.opt.state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key]))


def selected(g_nats, g_advs, scope):
    """The masks, from the scores in float64 and Python's sort."""
    pairs = zip(g_nats, g_advs, strict=True)
    scores = [to_numpy(0.3 * a.double().abs() + 0.7 * b.double().abs()) for a, b in pairs]
    return numpy_masks(scores, [0.3, 0.3], [0, 0] if scope == "global" else [0, 1])


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW", "AdamW fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast, dtype, name, conserve, scope):
    """The mask is that of the same gradients in float64; what it leaves out keeps its bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    model.to(torch.float32 if autocast else dtype)
    opt = wrap(model, name, alpha=0.3, conserve=conserve, scope=scope)
    scaler = scaler_of(enabled=autocast)  # weights need no scaler
    params = [model[0].weight, model[2].weight]
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.rand(8, 6).to(params[0].dtype), torch.randint(0, 3, (8,))
        with torch.autocast(DEVICE.type, dtype, enabled=autocast):
            nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x + 0.1), y)
        grads = (torch.autograd.grad(each, params, retain_graph=True) for each in (nat, adv))
        masks, start = selected(*grads, scope), [p.detach().clone() for p in params]
        scaled(opt, scaler, nat + adv, nat, adv)
        scaler.step(opt)
        scaler.update()
        changed = [to_numpy(p != old) for p, old in zip(params, start, strict=True)]
        assert any(each.any() for each in changed)
        assert not any((each & ~mask).any() for each, mask in zip(changed, masks, strict=True))
