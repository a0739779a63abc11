"""A step: limits, the twin, exact counts, settings of groups, NaN, failures."""

import copy

import numpy as np
import pytest
import torch
from common import (
    INNER,
    backward,
    cure_step,
    from_numpy,
    losses,
    make_batch,
    make_net,
    moved,
    numpy_topk,
    plain_step,
    same_bits,
    seeded,
    snapshot,
    to_numpy,
)
from torch import nn

from rgp_optim import RGPSelectiveOptimizer

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
    for seed in range(4):
        before = snapshot(model)
        cure_step(model, opt, seed)
        masks = [opt.masks()[p] for p in model.parameters()]
        for changed, mask in zip(moved(model, before), masks, strict=True):
            assert int(mask.sum()) == max(1, round(0.3 * mask.numel()))
            assert not (changed & ~mask).any()
            assert changed.any() or mask.dim() == 1


def test_muon_which_takes_matrices_only():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Linear(6, 5, bias=False)
    start = model.weight.detach().clone()
    opt = RGPSelectiveOptimizer(torch.optim.Muon(model.parameters(), lr=0.1), update_fraction=0.5)
    out = model(torch.randn(4, 6)).square().sum()
    backward(opt, natural=out, adversarial=2 * out)
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
    for seed in range(3):
        cure_step(ours, opt, seed, dtype)
    masks = twin(
        theirs, range(3), conserve=conserve, scope=scope, fraction=fraction, alpha=0.3, dtype=dtype
    )
    eps = torch.finfo(dtype).eps
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=100 * eps, atol=100 * eps)
    for p, mask in zip(ours.parameters(), masks, strict=True):
        assert np.array_equal(to_numpy(opt.masks()[p]), mask) if p.dim() >= 2 else mask.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", SCOPES)
def test_half_precision_weights_are_scored_in_float32(dtype, scope):
    w = nn.Parameter(torch.ones(100, 3).to(dtype))
    g_nat, g_adv = torch.randn(2, 100, 3).to(dtype)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5, scope=scope)
    backward(opt, natural=(w * g_nat).sum(), adversarial=(w * g_adv).sum())
    opt.step()
    nat, adv = (to_numpy(g.float().abs()) for g in (g_nat, g_adv))
    want = numpy_topk(np.float32(0.1) * nat + np.float32(0.9) * adv, 150)
    changed = to_numpy(w != 1)
    assert not changed[~want].any()
    assert changed[want].mean() > 0.98  # a small step can round away


# What is scored.


def weights(*values):
    return nn.Parameter(torch.tensor([values], dtype=torch.float32))


def test_the_score_ranks_and_the_loss_moves():
    w = weights(0.0, 0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5, alpha=0.25)
    nat = (w * torch.tensor([8.0, 0.0, 4.0, 0.0])).sum()  # scores: 2, 0.75, 1.75, 1.5
    adv = (w * torch.tensor([0.0, -1.0, 1.0, 2.0])).sum()
    backward(opt, w.sum() * 10, natural=nat, adversarial=adv)
    opt.step()
    assert w.tolist() == [[-10.0, 0.0, -10.0, 0.0]]


def test_a_parameter_of_one_loss_only_and_one_without_gradient():
    both, one, none = weights(1.0, 1.0), weights(1.0, 1.0), weights(1.0, 1.0)
    frozen = nn.Parameter(torch.ones(1, 2), requires_grad=False)
    inner = torch.optim.SGD([both, one, none, frozen], lr=1.0, weight_decay=0.5)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5, alpha=0.5)
    c = torch.tensor([1.0, 2.0])
    backward(opt, natural=(both * c).sum(), adversarial=(both * c + one * c).sum())
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
    backward(opt, loss, natural=loss, adversarial=loss)
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
    backward(opt, natural=out, adversarial=out)
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
    backward(opt, natural=(2 * w).sum(), adversarial=w.sum())
    opt.step()
    assert (w == -2).all()  # at least one weight is updated, where there is one


# NaN and infinity.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ranks_first(bad):
    w = weights(1.0, 1.0, 1.0, 1.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.25)
    c = torch.tensor([1.0, 2.0, bad, 5.0])
    backward(opt, natural=(w * c).sum(), adversarial=(w * c).sum())
    opt.step()
    assert not torch.isfinite(w[0, 2])  # seen, not hidden
    assert w[0, [0, 1, 3]].tolist() == [1.0, 1.0, 1.0]


def test_a_conserved_weight_stays_finite_whatever_its_gradient():
    w = weights(1.0, 1.0)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0, momentum=0.9), update_fraction=0.5)
    loss = (w * torch.tensor([float("nan"), 1.0])).sum()
    score = (w * torch.tensor([1.0, 2.0])).sum()
    backward(opt, loss, natural=score, adversarial=score)
    opt.step()
    assert w.tolist() == [[1.0, 0.0]]
    assert torch.isfinite(opt.state[w]["momentum_buffer"]).all()


# Settings of the groups.


def test_biases_and_norms_are_always_updated_by_default():
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    cure_step(model, opt)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert changed - {"conv.bias"} == {"norm.weight", "norm.bias", "head.bias"}
    assert not changed & {"conv.weight", "head.weight"}  # (normalisation cancels conv.bias)


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
        backward(
            opt,
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
    backward(opt, natural=loss, adversarial=loss)
    opt.step()
    assert (a != 0).tolist() == [[False, False, False, True]]
    assert (b != 0).tolist() == [[True, True, True, False]]  # ties: the lowest index
    assert (c != 0).tolist() == [[True, False, False, False]]


# Failures.


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


def test_weights_stay_when_masking_fails(monkeypatch):
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), backend="torch")
    loss, nat, adv = losses(model, *make_batch())
    backward(opt, loss, natural=nat, adversarial=adv)
    before = snapshot(model)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("rgp_optim._reference.zero_and_save_", fail)
    with pytest.raises(MemoryError):
        opt.step()
    assert all(map(same_bits, snapshot(model), before))


@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("how", ["data", "set_"])
def test_an_inner_optimizer_that_gives_a_parameter_new_memory(how, conserve):
    class Rebinds(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                new = p - 0.1 * p.grad - 0.01 * p
                if how == "data":
                    p.data = new
                else:
                    p.set_(new)

    w = weights(1.0, 2.0, 3.0, 4.0)
    opt = RGPSelectiveOptimizer(Rebinds([w], lr=0.1), update_fraction=0.5, conserve=conserve)
    loss = (w * torch.tensor([1.0, 4.0, 3.0, 2.0])).sum()
    backward(opt, natural=loss, adversarial=loss)
    opt.step()
    assert (w != torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[False, True, True, False]]


def test_an_inner_optimizer_that_clears_the_gradients():
    class Clears(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad()

    model, other = make_net(), make_net()
    opt = RGPSelectiveOptimizer(Clears(model.parameters(), lr=0.1), update_fraction=0.3)
    reference = RGPSelectiveOptimizer(sgd(other), update_fraction=0.3)
    for seed in range(2):
        cure_step(model, opt, seed)
        cure_step(other, reference, seed)
    assert all(map(same_bits, snapshot(model), snapshot(other)))


@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.SGD, torch.optim.AdamW])
def test_an_unscored_step_with_all_learning_rates_zero_moves_nothing(make):
    """Checkpoint tools make it to fill the state; Rprop would move by its smallest step."""
    model = make_net()
    opt = RGPSelectiveOptimizer(make(model.parameters(), lr=0.0))
    before = snapshot(model)
    plain_step(model, opt)
    assert all(map(same_bits, snapshot(model), before))


def test_complex_parameters_are_always_updated():
    w = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    v = nn.Parameter(torch.zeros(2, 2))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w, v], lr=1.0), update_fraction=0.5)
    loss = w.abs().square().sum() + v.sum()
    backward(opt, natural=loss, adversarial=loss)
    opt.step()
    assert (w != 1).all()
    assert int((v != 0).sum()) == 2


# Gradients that share memory: each parameter is treated as if it were alone.


@pytest.mark.parametrize("conserve", CONSERVE)
def test_gradients_that_share_memory(conserve):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(2)]
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(params, lr=0.1), update_fraction=0.5, conserve=conserve
    )
    draw = seeded(1)
    for _ in range(3):
        x = torch.rand(3, 6, 5, generator=draw)
        before = [p.detach().clone() for p in params]
        opt.zero_grad()
        out = (params[0].unsqueeze(0) + params[1].unsqueeze(0))[0]
        backward(
            opt, (out * x[0]).sum(), natural=(out * x[1]).sum(), adversarial=(out * x[2]).sum()
        )
        params[1].grad = params[0].grad
        opt.step()
        chosen = from_numpy(numpy_topk(to_numpy(0.1 * x[1] + 0.9 * x[2]), 15))
        for p, old in zip(params, before, strict=True):
            torch.testing.assert_close(p.detach(), torch.where(chosen, old - 0.1 * x[0], old))


def test_a_gradient_that_overlaps_itself_can_be_masked():
    w = nn.Parameter(torch.zeros(2, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5)
    loss = (w * torch.arange(6.0).view(2, 3)).sum()
    backward(opt, natural=loss, adversarial=loss)
    w.grad = torch.ones(()).expand(2, 3)
    opt.step()
    assert w.detach().flatten().tolist() == [0, 0, 0, -1, -1, -1]


# Score rules.


def test_a_rule_sees_weight_gradient_and_both_scores():
    w = weights(1.0, 10.0, 100.0)
    seen = []

    def rule(s):
        seen.append((s.gradient.clone(), s.natural.clone(), s.adversarial.clone(), s.alpha))
        assert s.parameter is w
        return s.adversarial.abs() / s.weight.abs()

    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.34, score=rule)
    backward(opt, 3 * w.sum(), natural=2 * w.sum(), adversarial=w.sum())
    opt.step()
    assert w.tolist() == [[-2.0, 10.0, 100.0]]
    ((gradient, natural, adversarial, alpha),) = seen
    assert gradient.tolist() == [[3.0] * 3]
    assert natural.tolist() == [[2.0] * 3]
    assert adversarial.tolist() == [[1.0] * 3]
    assert alpha == 0.1


def test_a_rule_may_rank_by_sign_and_may_need_no_scored_loss():
    w = weights(0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD([w], lr=1.0), update_fraction=0.34, score=lambda s: s.gradient
    )
    (w * torch.tensor([-9.0, 1.0, 2.0])).sum().backward()
    opt.step()
    assert w.tolist() == [[0.0, 0.0, -2.0]]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda s: 1.0, TypeError, "`score` should return a tensor of .* Found `float`"),
        (lambda s: s.natural.sum(), ValueError, "`score` should return the weight's shape"),
        (lambda s: s.natural + 0j, TypeError, "`score` should return a tensor of a real floating"),
        (lambda s: s.natural > 0, TypeError, "`score` should return a tensor of a real floating"),
    ],
)
def test_refusals_of_score_rules(rule, error, message):
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), score=rule)
    start = snapshot(model)
    with pytest.raises(error, match=message):
        cure_step(model, opt)
    assert all(map(same_bits, snapshot(model), start))


@pytest.mark.parametrize("scope", SCOPES)
def test_devices_of_one_threshold(scope):
    """Tensors on several devices have thresholds of their own, or are refused."""
    params = [nn.Parameter(torch.ones(2, 2, device=d)) for d in ("cpu", "meta")]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(params, lr=0.1), scope=scope, backend="torch")
    for p in params:
        p.grad = torch.ones_like(p)
    opt._holder.scores.taken = {r: {p: p.grad for p in params} for r in ("natural", "adversarial")}
    if scope == "global":
        with pytest.raises(ValueError, match="`scope` should be 'tensor' where"):
            opt.step()
    else:
        opt.step()
        assert int(opt.masks()[params[0]].sum()) == 3
