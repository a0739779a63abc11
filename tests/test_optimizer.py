"""RGPSelectiveOptimizer: what is scored, selected, updated and conserved."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    INNER,
    cure_step,
    from_numpy,
    losses,
    make_batch,
    make_net,
    numpy_topk,
    plain_step,
    same_bits,
    snapshot,
    to_numpy,
)
from torch import nn

from rgp_optim import RGPSelectiveOptimizer, rgp_param_groups

CONSERVE = ["weights", "gradients", "update"]
SCOPES = ["tensor", "global"]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def all_selected(make_inner, model):
    return make_inner([{"params": list(model.parameters()), "rgp_select": True}])


# Limits: every optimizer of torch.optim, bit for bit.


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_fraction_one_is_the_inner_optimizer(make_inner, conserve):
    wrapped = make_net()
    plain = copy.deepcopy(wrapped)
    inner = all_selected(make_inner, wrapped)
    opt = RGPSelectiveOptimizer(inner, update_fraction=1.0, conserve=conserve)
    reference = make_inner(plain.parameters())
    for seed in range(3):
        cure_step(wrapped, opt, seed)
        plain_step(plain, reference, seed)
    for got, want in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert same_bits(got.detach(), want.detach())


@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_fraction_zero_moves_nothing(make_inner, conserve):
    model = make_net()
    start = snapshot(model)
    inner = all_selected(make_inner, model)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.0, conserve=conserve)
    for seed in range(3):
        cure_step(model, opt, seed)
    assert all(map(same_bits, snapshot(model), start))


@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())
def test_exactly_k_weights_of_each_tensor_can_move(make_inner, conserve):
    """At each step; the mask is another one each time, and momentum pulls on all of them."""
    model = make_net()
    inner = all_selected(make_inner, model)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.3, conserve=conserve)
    tracker = opt.track_updates()
    for seed in range(4):
        before = snapshot(model)
        cure_step(model, opt, seed)
        for now, old, fraction in zip(
            snapshot(model), before, tracker.last().values(), strict=True
        ):
            moved = int((now != old).sum())
            assert moved <= round(0.3 * old.numel()) == round(fraction * old.numel())
            assert moved > 0 or old.dim() == 1


def test_muon_which_takes_matrices_only():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Linear(6, 5, bias=False)
    start = model.weight.detach().clone()
    opt = RGPSelectiveOptimizer(torch.optim.Muon(model.parameters(), lr=0.1), update_fraction=0.5)
    out = model(torch.randn(4, 6)).square().sum()
    opt.backward(natural=out, adversarial=2 * out)
    opt.step()
    assert int((model.weight != start).sum()) == 15


# The twin: the same training written out in numpy, with a sort.


def twin(model, seeds, *, conserve, scope, fraction, alpha, dtype, lr=0.1, momentum=0.9, wd=0.05):
    """SGD with momentum and weight decay over `model`, selection as the paper says it."""
    params = list(model.parameters())
    buffers = [None] * len(params)
    wide = np.float64 if dtype == torch.float64 else np.float32
    masks = []
    for seed in seeds:
        batch = make_batch(seed, dtype)
        loss, nat, adv = losses(model, *batch)
        grads, g_nat, g_adv = (
            [to_numpy(g) for g in torch.autograd.grad(each, params, retain_graph=True)]
            for each in (loss, nat, adv)
        )
        scores = [
            wide(alpha) * np.abs(a) + wide(1 - alpha) * np.abs(b)
            for a, b in zip(g_nat, g_adv, strict=True)
        ]
        chosen = [i for i, p in enumerate(params) if p.dim() >= 2]
        masks = [np.ones(s.shape, bool) for s in scores]
        if scope == "tensor":
            for i in chosen:
                masks[i] = numpy_topk(scores[i], max(1, round(fraction * scores[i].size)))
        else:
            joined = np.concatenate([scores[i].reshape(-1) for i in chosen])
            flat = numpy_topk(joined, max(1, round(fraction * joined.size)))
            for i in chosen:
                masks[i] = flat[: scores[i].size].reshape(scores[i].shape)
                flat = flat[scores[i].size :]
        for i, (p, g, mask) in enumerate(zip(params, grads, masks, strict=True)):
            old = to_numpy(p.detach()).copy()
            d = (g if conserve == "update" else np.where(mask, g, 0)) + wd * old
            buffers[i] = d if buffers[i] is None else momentum * buffers[i] + d
            new = old - lr * buffers[i]
            if conserve != "gradients":
                new = np.where(mask, new, old)
            with torch.no_grad():
                p.copy_(from_numpy(new.astype(wide)))
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("conserve", CONSERVE)
def test_training_equals_the_twin(conserve, scope, fraction, dtype):
    ours = make_net(dtype=dtype).train()
    theirs = copy.deepcopy(ours)
    opt = RGPSelectiveOptimizer(
        sgd(ours, momentum=0.9, weight_decay=0.05),
        update_fraction=fraction,
        alpha=0.3,
        scope=scope,
        conserve=conserve,
    )
    tracker = opt.track_updates()
    for seed in range(3):
        cure_step(ours, opt, seed, dtype)
    masks = twin(
        theirs, range(3), conserve=conserve, scope=scope, fraction=fraction, alpha=0.3, dtype=dtype
    )
    eps = torch.finfo(dtype).eps
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=100 * eps, atol=100 * eps)
    for got, mask in zip(tracker.last().values(), masks, strict=True):
        assert got == pytest.approx(mask.mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", SCOPES)
def test_half_precision_weights_are_scored_in_float32(dtype, scope):
    w = nn.Parameter(torch.ones(100, 3).to(dtype))
    g_nat, g_adv = torch.randn(2, 100, 3).to(dtype)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5, scope=scope)
    opt.backward(natural=(w * g_nat).sum(), adversarial=(w * g_adv).sum())
    opt.step()
    nat, adv = (to_numpy(g.float().abs()) for g in (g_nat, g_adv))
    want = numpy_topk(np.float32(0.1) * nat + np.float32(0.9) * adv, 150)
    moved = to_numpy(w != 1)
    assert not moved[~want].any()
    assert moved[want].mean() > 0.98  # a small step can round away


def test_complex_parameters():
    w = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    c = torch.tensor([[1 + 1j, 5j], [0.5 + 0j, -2 + 0j]])
    loss = (w * c).real.sum()
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5)
    opt.backward(natural=loss, adversarial=loss)
    opt.step()
    assert (w != 0).tolist() == [[False, True], [False, True]]


# What is scored.


def weights(*values):
    return nn.Parameter(torch.tensor([values], dtype=torch.float32))


def test_the_score_ranks_and_the_loss_moves():
    w = weights(0.0, 0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5, alpha=0.25)
    nat = (w * torch.tensor([8.0, 0.0, 4.0, 0.0])).sum()  # scores: 2, 0.75, 1.75, 1.5
    adv = (w * torch.tensor([0.0, -1.0, 1.0, 2.0])).sum()
    opt.backward(w.sum() * 10, natural=nat, adversarial=adv)
    opt.step()
    assert w.tolist() == [[-10.0, 0.0, -10.0, 0.0]]


def test_without_a_loss_the_sum_is_minimised():
    model, twin_model = make_net(), make_net()
    opt = RGPSelectiveOptimizer(sgd(model, momentum=0.9), update_fraction=1.0)
    reference = sgd(twin_model, momentum=0.9)
    for seed in range(2):
        opt.zero_grad()
        reference.zero_grad()
        for part in range(2):  # gradients add up over micro-batches
            batch = make_batch(10 * seed + part)
            _, nat, adv = losses(model, *batch)
            opt.backward(natural=nat, adversarial=adv)
            _, nat, adv = losses(twin_model, *batch)
            (nat + adv).backward()
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        opt.step()
        reference.step()


@pytest.mark.parametrize("total", [True, False], ids=["loss", "no loss"])
def test_backward_is_the_context_managers(total):
    a, b = make_net(), make_net()
    opt_a, opt_b = (RGPSelectiveOptimizer(sgd(m), update_fraction=0.4) for m in (a, b))
    loss, nat, adv = losses(a, *make_batch())
    opt_a.backward(loss if total else None, natural=nat, adversarial=adv)
    loss, nat, adv = losses(b, *make_batch())
    with opt_b.score("adversarial"):
        adv.backward(retain_graph=True)
    with opt_b.score("natural"):
        nat.backward(retain_graph=True)
    (loss if total else nat + adv).backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    opt_a.step()
    opt_b.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("total", ["shared", "none", "apart"])
def test_graphs_are_kept_only_where_another_loss_needs_them(total):
    """What a forward pass saved is let go by the last backward pass that runs through it."""
    saved = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x.clone()
            saved.append(weakref.ref(kept))
            ctx.save_for_backward(kept)
            return x * 1.0

        @staticmethod
        def backward(ctx, g):
            return g + 0 * ctx.saved_tensors[0]

    model = nn.Linear(3, 2)
    opt = RGPSelectiveOptimizer(sgd(model))
    nat, adv = (Saves.apply(model(torch.rand(4, 3))).square().sum() for _ in range(2))
    loss = {
        "shared": lambda: nat + adv,
        "none": lambda: None,
        "apart": lambda: Saves.apply(model(torch.rand(4, 3))).sum(),
    }[total]()
    opt.backward(loss, natural=nat, adversarial=adv)
    gc.collect()
    assert len(saved) >= 2
    assert all(ref() is None for ref in saved)


def test_losses_on_one_graph_of_both_batches():
    model, other = make_net(), make_net()
    opt, reference = (RGPSelectiveOptimizer(sgd(m)) for m in (model, other))
    x, x_adv, y = make_batch()
    for each, wrapper in ((model, opt), (other, reference)):
        logits, logits_adv = each(torch.cat([x, x_adv])).chunk(2)
        nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        if wrapper is opt:
            wrapper.backward(natural=nat, adversarial=adv)
        else:
            wrapper.backward(nat + adv, natural=nat, adversarial=adv)
        wrapper.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_grad_outside_of_scoring_is_an_ordinary_gradient():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.3)
    loss, nat, adv = losses(model, *make_batch())
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    stray = [torch.full_like(p, 3.0) for p in model.parameters()]  # as attack libraries leave it
    for p, g in zip(model.parameters(), stray, strict=True):
        p.grad = g
    with opt.score("natural"):
        nat.backward(retain_graph=True)
    for p, g in zip(model.parameters(), stray, strict=True):
        assert p.grad is g
        assert (g == 3).all()
    model.zero_grad()
    with opt.score("adversarial"):
        adv.backward(retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_stray_gradients_never_reach_a_score():
    w = weights(0.0, 0.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5)
    w.grad = torch.tensor([[100.0, 0.0]])
    with opt.score("natural"):
        (w * torch.tensor([1.0, 2.0])).sum().backward()
    with opt.score("adversarial"):
        (w * torch.tensor([1.0, 2.0])).sum().backward()
    opt.step()  # the mask is the score's, the update that of .grad
    assert w.tolist() == [[0.0, 0.0]]


def test_micro_batches_add_up():
    one, two = make_net().eval(), make_net().eval()  # eval: BatchNorm sees no batch
    opt_one, opt_two = (RGPSelectiveOptimizer(sgd(m), update_fraction=0.4) for m in (one, two))
    x, x_adv, y = make_batch(n=8)
    nat, adv = F.cross_entropy(one(x), y), F.cross_entropy(one(x_adv), y)
    opt_one.backward(nat + adv, natural=nat, adversarial=adv)
    for part in (slice(0, 4), slice(4, 8)):
        nat = F.cross_entropy(two(x[part]), y[part]) / 2
        adv = F.cross_entropy(two(x_adv[part]), y[part]) / 2
        opt_two.backward(nat + adv, natural=nat, adversarial=adv)
    opt_one.step()
    opt_two.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_common_loss_scale_changes_no_mask():
    a, b = make_net(), make_net()
    opt_a, opt_b = (RGPSelectiveOptimizer(sgd(m), update_fraction=0.4) for m in (a, b))
    loss, nat, adv = losses(a, *make_batch())
    opt_a.backward(loss, natural=nat, adversarial=adv)
    loss, nat, adv = losses(b, *make_batch())
    opt_b.backward(loss, natural=1024 * nat, adversarial=1024 * adv)
    opt_a.step()
    opt_b.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize(("alpha", "role"), [(1.0, "natural"), (0.0, "adversarial")])
def test_a_role_that_alpha_leaves_out_need_not_be_scored(alpha, role):
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), alpha=alpha)
    loss, nat, adv = losses(model, *make_batch())
    with opt.score(role):
        (nat if role == "natural" else adv).backward(retain_graph=True)
    loss.backward()
    opt.step()


def test_a_parameter_of_one_loss_only_and_one_without_gradient():
    both, one, none = weights(1.0, 1.0), weights(1.0, 1.0), weights(1.0, 1.0)
    frozen = nn.Parameter(torch.ones(1, 2), requires_grad=False)
    inner = torch.optim.SGD([both, one, none, frozen], lr=1.0, weight_decay=0.5)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5, alpha=0.5)
    c = torch.tensor([1.0, 2.0])
    opt.backward(natural=(both * c).sum(), adversarial=(both * c + one * c).sum())
    opt.step()
    for w in (both, one):
        assert (w != 1).tolist() == [[False, True]]
    for w in (none, frozen):
        assert (w == 1).all()  # left alone, as torch does


def test_a_weight_on_which_no_loss_pulls_is_conserved():
    w = weights(1.0, 1.0, 1.0)
    inner = torch.optim.SGD([w], lr=1.0, weight_decay=0.5)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.9)
    loss = (w * torch.tensor([0.0, 1.0, 0.0])).sum()
    opt.backward(loss, natural=loss, adversarial=loss)
    opt.step()
    assert (w != 1).tolist() == [[False, True, False]]


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(0)
    model = Tied()
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.25)
    start = model.first.weight.detach().clone()
    out = model(torch.randn(3, 4)).square().sum()
    opt.backward(natural=out, adversarial=out)
    opt.step()
    assert int((model.first.weight != start).sum()) == 4


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_memory_format_changes_no_mask(layout):
    plain, other = make_net(), make_net()
    if layout == "channels_last":
        other = other.to(memory_format=torch.channels_last)
    else:
        weight = other.head.weight
        other.head.weight = nn.Parameter(weight.detach().t().contiguous().t())
        assert not other.head.weight.is_contiguous()
    opts = [
        RGPSelectiveOptimizer(sgd(m, momentum=0.9), update_fraction=0.3) for m in (plain, other)
    ]
    for seed in range(3):
        cure_step(plain, opts[0], seed)
        cure_step(other, opts[1], seed)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert torch.equal(p == 0, q == 0)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (1, 1)])
def test_odd_shapes(shape):
    w = nn.Parameter(torch.ones(shape))
    inner = torch.optim.SGD([{"params": [w], "rgp_select": True}], lr=1.0)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.1)
    opt.backward(natural=(2 * w).sum(), adversarial=w.sum())
    opt.step()
    assert (w == -2).all()  # at least one weight is updated, where there is one


# NaN and infinity.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ranks_first(bad):
    w = weights(1.0, 1.0, 1.0, 1.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.25)
    c = torch.tensor([1.0, 2.0, bad, 5.0])
    opt.backward(natural=(w * c).sum(), adversarial=(w * c).sum())
    opt.step()
    assert not torch.isfinite(w[0, 2])  # seen, not hidden
    assert w[0, [0, 1, 3]].tolist() == [1.0, 1.0, 1.0]


def test_a_conserved_weight_stays_finite_whatever_its_gradient():
    w = weights(1.0, 1.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0, momentum=0.9), update_fraction=0.5)
    loss = (w * torch.tensor([float("nan"), 1.0])).sum()
    score = (w * torch.tensor([1.0, 2.0])).sum()
    opt.backward(loss, natural=score, adversarial=score)
    opt.step()
    assert w.tolist() == [[1.0, 0.0]]
    assert torch.isfinite(opt.state[w]["momentum_buffer"]).all()


# Settings of the groups.


def test_biases_and_norms_are_always_updated_by_default():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    cure_step(model, opt)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved - {"conv.bias"} == {"norm.weight", "norm.bias", "head.bias"}
    assert not moved & {"conv.weight", "head.weight"}  # (normalisation cancels conv.bias)


def test_each_group_has_its_own_settings_and_they_can_change():
    a, b, c = (nn.Parameter(torch.zeros(1, 10)) for _ in range(3))
    groups = [
        {"params": [a], "rgp_update_fraction": 0.2},
        {"params": [b], "rgp_alpha": 1.0},
        {"params": [c], "rgp_select": False},
    ]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=1.0), update_fraction=0.5, alpha=0.0)

    def step():
        up = torch.arange(1.0, 11.0)
        loss = sum((w * torch.ones(10)).sum() for w in (a, b, c))
        opt.zero_grad()
        opt.backward(
            loss,
            natural=sum((w * up).sum() for w in (a, b, c)),
            adversarial=sum((w * up.flip(0)).sum() for w in (a, b, c)),
        )
        opt.step()

    step()
    assert (a != 0).nonzero()[:, 1].tolist() == [0, 1]
    assert (b != 0).nonzero()[:, 1].tolist() == [5, 6, 7, 8, 9]
    assert (c != 0).all()
    opt.param_groups[0]["rgp_update_fraction"] = 0.4
    step()
    assert (a != 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_global_scope_pools_the_groups_that_share_a_fraction():
    a, b, c = (nn.Parameter(torch.zeros(1, 4)) for _ in range(3))
    inner = torch.optim.SGD(
        [{"params": [a]}, {"params": [b]}, {"params": [c], "rgp_update_fraction": 0.25}], lr=1.0
    )
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5, scope="global")
    loss = (a * torch.tensor([1.0, 2, 3, 4])).sum() + (b * 3.5).sum() + (c * 9.0).sum()
    opt.backward(natural=loss, adversarial=loss)
    opt.step()
    assert (a != 0).tolist() == [[False, False, False, True]]
    assert (b != 0).tolist() == [[True, True, True, False]]  # ties: the lowest index
    assert (c != 0).tolist() == [[True, False, False, False]]


def test_rgp_param_groups():
    model = make_net()
    groups = rgp_param_groups(model, leave_out=["head"], rgp_update_fraction=0.5, lr=0.2)
    names = [[name for name, _ in group.pop("params")] for group in groups]
    assert names == [
        ["conv.weight"],
        ["conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"],
    ]
    assert groups == [
        {"rgp_select": True, "rgp_update_fraction": 0.5, "lr": 0.2},
        {"rgp_select": False},
    ]
    inner = torch.optim.SGD(rgp_param_groups(model, leave_out=("head",)), lr=0.1)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5)
    tracker = opt.track_updates()
    cure_step(model, opt)
    assert tracker.last() == {"conv.weight": 0.5} | dict.fromkeys(names[1], 1.0)
    assert len(rgp_param_groups(nn.Linear(2, 2, bias=False))) == 1
    alike = nn.ModuleDict({"conv": nn.Linear(2, 2), "conv2": nn.Linear(2, 2)})
    selected, _ = rgp_param_groups(alike, leave_out=["conv"])
    assert [name for name, _ in selected["params"]] == ["conv2.weight"]
    with pytest.raises(ValueError, match=r"`leave_out` should name modules.*The model has conv"):
        rgp_param_groups(model, leave_out=["haed"])
    with pytest.raises(TypeError, match=r"Write \['head'\]"):
        rgp_param_groups(model, leave_out="head")


# Score rules.


def test_the_signed_rule_ranks_by_the_sum_with_its_sign():
    w = weights(0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD([w], lr=1.0), update_fraction=0.34, alpha=0.5, score="signed"
    )
    opt.backward(
        w.sum(),
        natural=(w * torch.tensor([-9.0, 1.0, 0.5])).sum(),
        adversarial=(w * torch.tensor([-9.0, 1.0, 2.0])).sum(),
    )
    opt.step()
    assert w.tolist() == [[0.0, 0.0, -1.0]]  # |sum| would take the first


def test_the_loss_gradient_rule_needs_no_scoring():
    w = weights(0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD([w], lr=1.0), update_fraction=0.34, score="loss_gradient"
    )
    (w * torch.tensor([1.0, -3.0, 2.0])).sum().backward()
    opt.step()
    assert w.tolist() == [[0.0, 3.0, 0.0]]


def test_the_random_rule_is_repeatable_and_changes_with_the_step():
    def run(seed, steps=1, fraction=0.5):
        w, v = (nn.Parameter(torch.zeros(20, 50)) for _ in range(2))
        inner = torch.optim.SGD([w, v], lr=1.0)
        opt = RGPSelectiveOptimizer(inner, update_fraction=fraction, score="random", seed=seed)
        for _ in range(steps):
            opt.zero_grad()
            (w.sum() + v.sum()).backward()
            opt.step()
        return w.detach(), v.detach()

    first, second = run(0), run(0)
    assert torch.equal(first[0], second[0])
    assert int((first[0] != 0).sum()) == 500
    assert int((run(0, fraction=0.999)[0] != 0).sum()) == 999
    assert 0.4 < (first[0] == first[1]).float().mean() < 0.6  # another mask for each parameter
    assert 0.4 < (first[0] == run(1)[0]).float().mean() < 0.6  # ... seed
    twice = run(0, steps=2)[0]  # ... and step
    assert {0.0, -1.0, -2.0} == set(twice.unique().tolist())


def test_a_callable_sees_weight_gradient_and_both_scores():
    w = weights(1.0, 10.0, 100.0)
    seen = []

    def rule(s):
        seen.append((s.gradient.clone(), s.natural.clone(), s.adversarial.clone(), s.alpha, s.step))
        return s.adversarial.abs() / s.weight.abs()

    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.34, score=rule)
    opt.backward(3 * w.sum(), natural=2 * w.sum(), adversarial=w.sum())
    opt.step()
    assert w.tolist() == [[-2.0, 10.0, 100.0]]
    ((gradient, natural, adversarial, alpha, step),) = seen
    assert gradient.tolist() == [[3.0] * 3]
    assert natural.tolist() == [[2.0] * 3]
    assert adversarial.tolist() == [[1.0] * 3]
    assert (alpha, step) == (0.1, 0)


# What was updated.


def test_tracker_last_mean_reset_stop():
    w, b = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([{"params": [("layer.w", w), ("layer.b", b)]}], lr=0.1)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.2)
    tracker = opt.track_updates()
    assert tracker.last() == tracker.mean() == {}

    def step(fraction, with_bias=True):
        opt.param_groups[0]["rgp_update_fraction"] = fraction
        loss = w.square().sum() + (b.sum() if with_bias else 0)
        opt.zero_grad()
        opt.backward(natural=loss, adversarial=loss)
        opt.step()

    step(0.2)
    step(0.4, with_bias=False)
    assert tracker.last() == {"layer.w": 0.4, "layer.b": 0.0}
    assert tracker.mean() == pytest.approx({"layer.w": 0.3, "layer.b": 0.5})
    tracker.reset()
    step(1.0)
    assert tracker.mean() == {"layer.w": 1.0, "layer.b": 1.0}
    tracker.stop()
    step(0.2)
    assert tracker.last() == {"layer.w": 1.0, "layer.b": 1.0}
    assert opt.track_updates().last() == {}


def test_tracker_names_without_named_parameters():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model))
    tracker = opt.track_updates()
    cure_step(model, opt)
    assert list(tracker.last())[:2] == ["group0.param0", "group0.param1"]


# Memory: slots die with their step.


def test_nothing_is_kept_between_steps():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.5)
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    slots = opt._rgp.slots
    held = [weakref.ref(g) for role in slots._taken.values() for g in role.values()]
    assert len(held) == 4
    opt.step()
    gc.collect()
    assert all(ref() is None for ref in held)
    assert slots._taken == {}


def test_a_wrapper_that_is_gone_leaves_nothing_on_the_model():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model))
    cure_step(model, opt)
    held = [weakref.ref(each) for each in (opt, opt.inner, opt._rgp.slots)]
    del opt
    gc.collect()
    assert all(ref() is None for ref in held)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    parameter = weakref.ref(model.conv.weight)
    RGPSelectiveOptimizer(sgd(model))
    del model
    gc.collect()
    assert parameter() is None


def test_an_inner_optimizer_that_fails_leaves_conserved_weights_as_they_were():
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise KeyboardInterrupt

    model = make_net()
    opt = RGPSelectiveOptimizer(
        Breaks(model.parameters(), lr=0.1, weight_decay=0.1), update_fraction=0.3
    )
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        cure_step(model, opt)
    for p, old in zip(model.parameters(), before, strict=True):
        if p.dim() >= 2:
            assert int((p != old).sum()) <= round(0.3 * p.numel())
    with pytest.raises(RuntimeError, match="needs the gradients"):
        opt.step()


# Groups from a model: tied weights, and options that nothing would read.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.again = self.body


@pytest.mark.parametrize(
    ("left", "selected"),
    [
        ("embed", ["body.weight"]),
        ("head", ["body.weight"]),
        ("head.weight", ["body.weight"]),
        ("body", ["embed.weight"]),
        ("again", ["embed.weight"]),
        ("again.bias", ["embed.weight", "body.weight"]),
    ],
)
def test_tied_weights_are_left_out_under_any_of_their_names(left, selected):
    first, second = rgp_param_groups(Tied(), leave_out=[left])
    assert [name for name, _ in first["params"]] == selected
    assert len(first["params"]) + len(second["params"]) == 4  # each tensor once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rgp_select": True}, "`options` should not contain 'rgp_select'. Found .* Allowed are"),
        ({"params": []}, "`options` should not contain 'params'.*`leave_out` decide it"),
        ({"rgp_fraction": 0.5}, "Found `rgp_fraction`. Known are rgp_update_fraction, rgp_alpha"),
        ({"update_fraction": 0.5}, "Found `update_fraction`. Write 'rgp_update_fraction'"),
    ],
)
def test_options_that_a_group_cannot_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rgp_param_groups(make_net(), **options)


def test_param_groups_are_made_from_a_model():
    with pytest.raises(TypeError, match=r"Found `generator`. Pass the model itself"):
        rgp_param_groups(make_net().parameters())
    assert rgp_param_groups(make_net(), alpha=0.9)[0]["alpha"] == 0.9  # of RMSprop


def test_repr_of_a_tracker():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model))
    tracker = opt.track_updates()
    for seed in range(2):
        cure_step(model, opt, seed)
    assert repr(tracker) == "UpdateTracker(steps=2, parameters=6)"
