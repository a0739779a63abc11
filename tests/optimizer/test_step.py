"""A step: limits, the twin, any gradients, what inner optimizers do to weights, score rules."""

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
    snapshot,
    to_numpy,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from rgp_optim import RGPSelectiveOptimizer

CONSERVE = ["weights", "gradients", "update"]
SCOPES = ["tensor", "global"]
KEYS = ("rgp_update_fraction", "rgp_alpha", "rgp_select")
every_inner = pytest.mark.parametrize("make_inner", INNER.values(), ids=INNER.keys())


def sgd(params, lr=0.1, **options):
    params = params.parameters() if isinstance(params, nn.Module) else params
    return torch.optim.SGD(params, lr=lr, **options)


def all_selected(make_inner, model, **options):
    inner = make_inner([{"params": list(model.parameters()), "rgp_select": True}])
    return RGPSelectiveOptimizer(inner, **options)


def weights(*values):
    return nn.Parameter(torch.tensor([values], dtype=torch.float32))


def same(model, want):
    return all(map(same_bits, snapshot(model), want))


# Limits: every optimizer of torch.optim, bit for bit.


@pytest.mark.parametrize("conserve", CONSERVE)
@every_inner
def test_fraction_one_is_the_inner_optimizer(make_inner, conserve):
    wrapped, plain = make_net(), make_net()
    opt = all_selected(make_inner, wrapped, update_fraction=1.0, conserve=conserve)
    reference = make_inner(plain.parameters())
    for seed in range(3):
        cure_step(wrapped, opt, seed)
        plain_step(plain, reference, seed)
    assert same(wrapped, snapshot(plain))


@pytest.mark.parametrize("conserve", ["weights", "update"])
@every_inner
def test_fraction_zero_moves_nothing(make_inner, conserve):
    model = make_net()
    start = snapshot(model)
    opt = all_selected(make_inner, model, update_fraction=0.0, conserve=conserve)
    for seed in range(3):
        cure_step(model, opt, seed)
    assert same(model, start)


@pytest.mark.parametrize("conserve", ["weights", "update"])
@every_inner
def test_exactly_k_weights_of_each_tensor_can_move(make_inner, conserve):
    """At each step; the mask is another one each time, and momentum pulls on all weights."""
    model = make_net()
    opt = all_selected(make_inner, model, update_fraction=0.5, conserve=conserve)
    for seed in range(3):
        before = snapshot(model)
        cure_step(model, opt, seed)
        for changed, p in zip(moved(model, before), model.parameters(), strict=True):
            mask = opt.masks()[p]
            assert int(mask.sum()) == max(1, round(0.5 * p.numel()))
            assert not (changed & ~mask).any()
            assert changed.any() or p.dim() == 1


def test_muon_which_takes_matrices_only():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Linear(6, 5, bias=False)
    start = snapshot(model)
    opt = RGPSelectiveOptimizer(torch.optim.Muon(model.parameters(), lr=0.1), update_fraction=0.5)
    out = model(torch.randn(4, 6)).square().sum()
    backward(opt, natural=out, adversarial=2 * out)
    opt.step()
    assert int(moved(model, start)[0].sum()) == 15


# The twin: the same training written out in NumPy, with a sort.


def twin_masks(scores, groups, scope):
    """Masks by group settings (fraction, alpha, select); groups with one fraction share a pool."""
    masks = [np.ones(s.shape, bool) for s in scores]
    pools = {}
    for fraction, _, select, members in groups:
        for i in members:
            if scores[i].ndim >= 2 if select is None else select:
                pools.setdefault(fraction if scope == "global" else i, (fraction, []))[1].append(i)
    for fraction, members in pools.values():
        joined = np.concatenate([scores[i].reshape(-1) for i in members])
        flat = numpy_topk(joined, max(1, round(fraction * joined.size)))
        for i, part in zip(
            members, np.split(flat, np.cumsum([scores[i].size for i in members])[:-1]), strict=True
        ):
            masks[i] = part.reshape(scores[i].shape)
    return masks


def twin_step(kind, w, g, state, t, lr=0.1, wd=0.05):
    """One step of SGD with momentum, or of AdamW."""
    if kind == "SGD":
        d = g + wd * w
        state["m"] = d if t == 1 else 0.9 * state["m"] + d
        return w - lr * state["m"]
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    root = np.sqrt(state["v"]) / np.sqrt(1 - 0.999**t)
    return w * (1 - lr * wd) - lr / (1 - 0.9**t) * state["m"] / (root + 1e-8)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("selects", [(None, None), (True, None), (True, False), (None, True)])
@pytest.mark.parametrize("fractions", [(0.3, 0.3), (0.1, 0.7)])
def test_training_equals_the_twin(kind, scope, conserve, selects, fractions):
    ours, theirs = (make_net(dtype=torch.float64).eval() for _ in range(2))
    alphas = (0.1, 0.6)
    members = [[0, 1, 2], [3, 4, 5]]  # parameters of the two groups
    groups = list(zip(fractions, alphas, selects, members, strict=True))
    params, others = list(ours.parameters()), list(theirs.parameters())
    ours_groups = [
        {"params": [params[i] for i in m], **dict(zip(KEYS, settings, strict=True))}
        for *settings, m in groups
    ]
    options = dict(lr=0.1, weight_decay=0.05) | ({"momentum": 0.9} if kind == "SGD" else {})
    inner = getattr(torch.optim, kind)(ours_groups, **options)
    opt = RGPSelectiveOptimizer(inner, scope=scope, conserve=conserve)
    states = [{} for _ in others]
    for t in (1, 2, 3):
        cure_step(ours, opt, t, torch.float64)
        grads, g_nat, g_adv = (
            [to_numpy(g) for g in torch.autograd.grad(each, others, retain_graph=True)]
            for each in losses(theirs, *make_batch(t, torch.float64))
        )
        alpha = [a for _, a, _, m in groups for _ in m]
        scores = [
            a * np.abs(x) + (1.0 - a) * np.abs(y)
            for a, x, y in zip(alpha, g_nat, g_adv, strict=True)
        ]
        masks = twin_masks(scores, groups, scope)
        for p, g, mask, state in zip(others, grads, masks, states, strict=True):
            old = to_numpy(p.detach()).copy()
            seen = g if conserve == "update" else np.where(mask, g, 0.0)
            new = twin_step(kind, old, seen, state, t)
            p.data = from_numpy(new if conserve == "gradients" else np.where(mask, new, old))
        for p, mask in zip(params, masks, strict=True):
            assert mask.all() if p not in opt.masks() else (to_numpy(opt.masks()[p]) == mask).all()
    for got, want in zip(params, others, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# Any gradients: losses that are linear in the weights have the gradients that are drawn.

VALUES = st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 0.5])
SHAPES = st.sampled_from([(2, 3), (1, 1), (4,), (), (0,), (2, 2, 2)])


@given(st.data(), st.sampled_from(SCOPES), st.sampled_from(CONSERVE), st.integers(1, 4))
def test_any_gradients(data, scope, conserve, count):
    """SGD with lr 1 moves each selected weight by its gradient, and no other."""
    settings, params, gradients, scores = [], [], [], []
    losses = [torch.zeros((), requires_grad=True) for _ in range(3)]
    reached = [set(), set()]
    for i in range(count):
        shape = data.draw(SHAPES)
        n = int(np.prod(shape))
        draw = st.lists(VALUES, min_size=n, max_size=n)
        drawn = [np.array(data.draw(draw), np.float32).reshape(shape) for _ in range(3)]
        p = nn.Parameter(torch.full(shape, 10.0))
        alpha, select = (
            data.draw(st.floats(0, 1, width=16)),
            data.draw(st.sampled_from([None, True, False])),
        )
        settings.append((data.draw(st.sampled_from([0.2, 0.5, 0.8])), alpha, select))
        for role in range(3):
            if role == 2 or data.draw(st.booleans()):
                losses[role] = losses[role] + (p * from_numpy(drawn[role])).sum()
                if role < 2 and (p.dim() >= 2 if select is None else select):
                    reached[role].add(i)
            else:
                drawn[role][...] = 0  # the loss does not depend on this parameter
        params.append(p)
        gradients.append(drawn[2])
        shares = np.float32(alpha), np.float32(1.0 - alpha)
        scores.append(shares[0] * np.abs(drawn[0]) + shares[1] * np.abs(drawn[1]))
    assume(all(reached))  # a loss that reaches no selected weight is refused
    masks = twin_masks(scores, [(*each, [i]) for i, each in enumerate(settings)], scope)
    groups = [
        {"params": [p], **dict(zip(KEYS, s, strict=True))}
        for p, s in zip(params, settings, strict=True)
    ]
    opt = RGPSelectiveOptimizer(sgd(groups, 1.0), scope=scope, conserve=conserve)
    backward(opt, losses[2], natural=losses[0], adversarial=losses[1])
    opt.step()
    for p, g, mask in zip(params, gradients, masks, strict=True):
        assert np.array_equal(to_numpy(p.detach()), np.where(mask, 10 - g, np.float32(10)))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_memory_format_changes_no_mask(layout):
    plain, other = make_net(), make_net()
    if layout == "channels_last":
        other = other.to(memory_format=torch.channels_last)
    else:
        other.head.weight = nn.Parameter(other.head.weight.detach().t().contiguous().t())
    both = (plain, other)
    opts = [RGPSelectiveOptimizer(sgd(m, momentum=0.9), update_fraction=0.3) for m in both]
    for seed in range(3):
        for model, opt in zip(both, opts, strict=True):
            cure_step(model, opt, seed)
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for a, b in zip(opts[0].masks().values(), opts[1].masks().values(), strict=True):
        assert torch.equal(a, b)


def test_tied_weights_count_once():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False)] * 2)
    opt = RGPSelectiveOptimizer(sgd(model), update_fraction=0.25)
    start = snapshot(model)
    out = model(torch.randn(3, 4)).square().sum()
    backward(opt, natural=out, adversarial=out)
    opt.step()
    assert int(moved(model, start)[0].sum()) == 4


# NaN and infinity; kinds of parameters.


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_ranks_first(bad):
    w = weights(1.0, 1.0, 1.0, 1.0)
    opt = RGPSelectiveOptimizer(sgd([w], 1.0), update_fraction=0.25)
    loss = (w * torch.tensor([1.0, 2.0, bad, 5.0])).sum()
    backward(opt, natural=loss, adversarial=loss)
    opt.step()
    assert w.isfinite().tolist() == [[True, True, False, True]]  # seen, not hidden
    assert w[0, [0, 1, 3]].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("conserve", CONSERVE[:2])
def test_a_conserved_weight_stays_finite_whatever_its_gradient(conserve):
    w = weights(1.0, 1.0)
    opt = RGPSelectiveOptimizer(sgd([w], 1.0, momentum=0.9), update_fraction=0.5, conserve=conserve)
    score = (w * torch.tensor([1.0, 2.0])).sum()
    backward(opt, (w * torch.tensor([float("nan"), 1.0])).sum(), natural=score, adversarial=score)
    opt.step()
    assert w.tolist() == [[1.0, 0.0]]
    assert opt.state[w]["momentum_buffer"].isfinite().all()


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2, 2),
        lambda: torch.ones(2, 2).as_subclass(Tagged),
        lambda: torch.ones(2, 2, device="meta"),
        lambda: torch.ones(4, 2)[::2],
    ],
    ids=["plain", "subclass", "meta", "strided"],
)
def test_kinds_of_parameters(make):
    """Next to a complex one, always updated, and one that is frozen, which stays."""
    w, complex_ = nn.Parameter(make()), nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    opt = RGPSelectiveOptimizer(sgd([w, complex_, frozen], 1.0), update_fraction=0.5)
    loss = (w * torch.arange(4.0, device=w.device).view(2, 2)).sum()
    backward(opt, natural=loss, adversarial=loss)
    complex_.grad = torch.ones_like(complex_)
    opt.step()
    assert list(opt.masks()) == [w]
    if w.device.type != "meta":
        assert (w != 1).tolist() == [[False, False], [True, True]]
    assert (complex_ == 0).all()
    assert (frozen == 1).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_selected_takes_no_scores(frozen):
    """A model without matrices; one whose matrices are frozen; settings changed in between."""
    w, b = nn.Parameter(torch.ones(2, 2), requires_grad=not frozen), nn.Parameter(torch.ones(2))
    opt = RGPSelectiveOptimizer(sgd([w, b], 1.0))
    loss = (w + b).sum()
    loss = opt.scored(loss, natural=loss, adversarial=loss)
    opt.update_fraction = 0.5 if frozen else 1.0
    loss.backward()
    opt.step()
    assert b.tolist() == [-1.0, -1.0]
    assert (w == (1.0 if frozen else 0.0)).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_devices_of_one_threshold(scope):
    """Tensors on several devices have thresholds of their own, or are refused."""
    params = [nn.Parameter(torch.ones(2, 2, device=d)) for d in ("cpu", "meta")]
    opt = RGPSelectiveOptimizer(sgd(params), scope=scope, backend="torch")
    for p in params:
        p.grad = torch.ones_like(p)
    opt._holder.scores.taken = {r: {p: p.grad for p in params} for r in ("natural", "adversarial")}
    if scope == "global":
        with pytest.raises(ValueError, match="`scope` should be 'tensor' where"):
            opt.step()
        assert (params[0] == 1).all()
    else:
        opt.step()
        assert int(opt.masks()[params[0]].sum()) == 3


# Inner optimizers that break, rebind, clear.


class Breaks(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise KeyboardInterrupt


def test_an_inner_optimizer_that_fails_leaves_conserved_weights_as_they_were():
    model = make_net()
    inner = Breaks(model.parameters(), lr=0.1, weight_decay=0.1)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.3)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        cure_step(model, opt)
    for p, changed in zip(model.parameters(), moved(model, before), strict=True):
        assert p.dim() < 2 or 0 < int(changed.sum()) <= round(0.3 * p.numel())
    with pytest.raises(RuntimeError, match="needs the gradients"):
        opt.step()


def test_weights_stay_when_masking_fails(monkeypatch):
    model = make_net()
    opt = RGPSelectiveOptimizer(sgd(model), backend="torch")
    before = snapshot(model)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("rgp_optim._reference.zero_and_save_", fail)
    with pytest.raises(MemoryError):
        cure_step(model, opt)
    assert same(model, before)


class Rebinds(torch.optim.SGD):
    how = "data"

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            new = p - 0.1 * p.grad - 0.01 * p
            if self.how == "data":
                p.data = new
            elif self.how == "strides":
                p.data = new.t().contiguous().t()
            else:
                p.set_(new)


@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("how", ["data", "strides", "set_"])
def test_an_inner_optimizer_that_gives_a_parameter_new_memory(how, conserve):
    w = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
    start = w.detach().clone()
    inner = Rebinds([w], lr=0.1)
    inner.how = how
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5, conserve=conserve)
    loss = (w * torch.tensor([[1.0, 5.0, 2.0], [6.0, 3.0, 4.0]])).sum()
    backward(opt, natural=loss, adversarial=loss)
    opt.step()
    assert (w != start).tolist() == [[False, True, False], [True, False, True]]


class Clears(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.zero_grad()


def test_an_inner_optimizer_that_clears_the_gradients():
    model, other = make_net(), make_net()
    opt = RGPSelectiveOptimizer(Clears(model.parameters(), lr=0.1), update_fraction=0.3)
    reference = RGPSelectiveOptimizer(sgd(other), update_fraction=0.3)
    for seed in range(2):
        cure_step(model, opt, seed)
        cure_step(other, reference, seed)
    assert same(model, snapshot(other))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.SGD, torch.optim.AdamW])
def test_an_unscored_step_with_all_learning_rates_zero_moves_nothing(make, sparse):
    """Checkpoint tools make it to fill the state; Rprop would move by its smallest step."""
    model, table = make_net(), nn.Parameter(torch.ones(3, 2))
    groups = [{"params": list(model.parameters())}]
    if sparse and make is torch.optim.SGD:
        groups += [{"params": [table], "rgp_select": False}]
        nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    opt = RGPSelectiveOptimizer(make(groups, lr=0.0))
    before = snapshot(model)
    losses(model, *make_batch())[0].backward()
    opt.step()
    assert same(model, before)
    assert (table == 1).all()


# Gradients that share memory: each parameter is treated as if it were alone.


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("selected", [(True, True), (True, False), (False, True)])
def test_gradients_that_share_memory(conserve, selected):
    params = [nn.Parameter(torch.zeros(2, 3)) for _ in range(2)]
    groups = [{"params": [p], "rgp_select": s} for p, s in zip(params, selected, strict=True)]
    opt = RGPSelectiveOptimizer(sgd(groups, 1.0), update_fraction=0.5, conserve=conserve)
    x = torch.tensor([[6.0, 1.0, 4.0], [2.0, 5.0, 3.0]])
    loss = sum((p * x).sum() for p in params)
    backward(opt, loss, natural=loss, adversarial=loss)
    params[1].grad = params[0].grad
    opt.step()
    for p, select in zip(params, selected, strict=True):
        assert torch.equal(p.detach(), torch.where(x > 3.0, -x, 0.0) if select else -x)


def test_a_gradient_that_overlaps_itself_can_be_masked():
    w = nn.Parameter(torch.zeros(2, 3))
    opt = RGPSelectiveOptimizer(sgd([w], 1.0), update_fraction=0.5)
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
        seen.append([float(t[0, 0]) for t in (s.gradient, s.natural, s.adversarial)])
        assert (s.parameter is w, s.alpha) == (True, 0.1)
        return s.adversarial.abs() / s.weight.abs()

    opt = RGPSelectiveOptimizer(sgd([w], 1.0), update_fraction=0.34, score=rule)
    backward(opt, 3 * w.sum(), natural=2 * w.sum(), adversarial=w.sum())
    opt.step()
    assert w.tolist() == [[-2.0, 10.0, 100.0]]
    assert seen == [[3.0, 2.0, 1.0]]


def test_a_rule_may_rank_by_sign_and_may_need_no_scored_loss():
    w = weights(0.0, 0.0, 0.0)
    opt = RGPSelectiveOptimizer(sgd([w], 1.0), update_fraction=0.34, score=lambda s: s.gradient)
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
    assert same(model, start)
