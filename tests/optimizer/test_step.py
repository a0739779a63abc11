"""A step: limits, the twin, any gradients, what inner optimizers do to weights, score rules."""

import copy

import numpy as np
import pytest
import torch
from common import (
    DEVICE,
    INNER,
    Run,
    backward,
    from_numpy,
    losses,
    make_batch,
    make_net,
    numpy_masks,
    same,
    same_bits,
    seeded,
    sgd,
    step_on,
    to_numpy,
    train,
    wrap,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

CONSERVE = ["weights", "gradients", "update"]
SCOPES = ["tensor", "global"]


def weights(*values):
    return nn.Parameter(torch.tensor([values], dtype=torch.float32))


# Limits, bit for bit: every optimizer of torch.optim, with all options in torch's table of them.

MATRICES = [(5, 4), (3, 7), (1, 1)]  # Muon takes nothing else
SHAPES = [*MATRICES, (6,), (2, 3, 2, 2)]


def every_inner():
    rows = dict(INNER)
    try:
        from torch.testing._internal.common_optimizers import optim_db
    except ImportError:  # it needs expecttest
        optim_db = []
    for info in optim_db if DEVICE.type == "cpu" else []:  # some options are tensors of the CPU
        cls = info.optim_cls
        for i, row in enumerate(info.optim_inputs_func(device="cpu")):
            if not (info.only_supports_sparse_grads or row.kwargs.get("differentiable")):
                make = lambda p, cls=cls, row=row: cls(p, **copy.deepcopy(row.kwargs))  # noqa: E731
                rows[f"{cls.__name__}-{i}-{row.desc or 'default'}"] = make
    quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torch's
    for name, make in rows.items():
        if not name.startswith("LBFGS"):
            shapes = MATRICES if name.startswith("Muon") else SHAPES
            yield pytest.param(make, shapes, id=name, marks=quiet)


each_inner = pytest.mark.parametrize(("make", "shapes"), list(every_inner()))


def all_selected(make, shapes, **options):
    """The parameters of a quadratic loss, and their optimizer: plain without options."""
    draw = seeded(0)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    groups = [{"params": params, "rgp_select": True}]
    return params, wrap(groups, make, **options) if options else make(params)


def quadratic_step(params, opt, seed, scored=True):
    draw = seeded(seed)
    nat, adv = (
        sum((p - torch.randn(p.shape, generator=draw)).square().sum() for p in params)
        for _ in range(2)
    )
    loss = nat + 0.5 * adv
    opt.zero_grad()
    (opt.scored(loss, natural=nat, adversarial=adv) if scored else loss).backward()
    opt.step()


@pytest.mark.parametrize("conserve", CONSERVE)
@each_inner
def test_fraction_one_is_the_inner_optimizer(make, shapes, conserve):
    params, opt = all_selected(make, shapes, update_fraction=1.0, conserve=conserve)
    others, plain = all_selected(make, shapes)
    for seed in range(4):
        quadratic_step(params, opt, seed)
        quadratic_step(others, plain, seed, scored=False)
        assert same(params, others)
    for p, q in zip(params, others, strict=True):
        assert opt.state[p].keys() == plain.state[q].keys()
        for key, value in plain.state[q].items():
            assert value is None or same_bits(*map(torch.as_tensor, (value, opt.state[p][key])))


@pytest.mark.parametrize("conserve", CONSERVE)
@each_inner
def test_only_the_selected_weights_move(make, shapes, conserve):
    """k of each tensor, others each time, while momentum pulls on all; at fraction 0 none."""
    params, opt = all_selected(make, shapes, update_fraction=0.5, conserve=conserve)
    for seed in range(5):
        opt.update_fraction = 0.5 if seed < 4 else 0.0
        before = [p.detach().clone() for p in params]
        quadratic_step(params, opt, seed)
        for p, old in zip(params, before, strict=True):
            mask = opt.masks()[p]
            assert mask.dtype == torch.bool
            assert int(mask.sum()) == (max(1, round(0.5 * p.numel())) if seed < 4 else 0)
            assert seed == 4 or p.numel() == 1 or not torch.equal(p, old)
            if conserve != "gradients":
                assert same_bits(p.detach()[~mask], old[~mask])


# The twin: the same training written out in NumPy, with a sort.


def group(p, fraction, alpha, select):
    settings = {"rgp_update_fraction": fraction, "rgp_alpha": alpha, "rgp_select": select}
    return {"params": [p], **settings}


def twin_masks(scores, settings, scope):
    """Masks by fraction, alpha, select of each tensor; equal fractions share a global pool."""
    fractions = [
        fraction if (each.ndim >= 2 if select is None else select) else 1.0
        for each, (fraction, _, select) in zip(scores, settings, strict=True)
    ]
    every = list(range(len(scores)))
    pools = [fractions.index(f) for f in fractions] if scope == "global" else every
    return numpy_masks(scores, fractions, pools)


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
    run, theirs = Run(dtype=torch.float64), make_net(dtype=torch.float64).eval()
    settings = [each for each in zip(fractions, (0.1, 0.6), selects, strict=True) for _ in range(3)]
    params, others = list(run.model.eval().parameters()), list(theirs.parameters())
    groups = [group(p, *each) for p, each in zip(params, settings, strict=True)]
    options = dict(lr=0.1, weight_decay=0.05) | ({"momentum": 0.9} if kind == "SGD" else {})
    make = lambda groups: getattr(torch.optim, kind)(groups, **options)  # noqa: E731
    run.opt = opt = wrap(groups, make, scope=scope, conserve=conserve)
    states = [{} for _ in others]
    for t in (1, 2, 3):
        run.step(t)
        grads, g_nat, g_adv = (
            [to_numpy(g) for g in torch.autograd.grad(each, others, retain_graph=True)]
            for each in losses(theirs, *make_batch(t, torch.float64))
        )
        scores = [
            alpha * np.abs(x) + (1.0 - alpha) * np.abs(y)
            for (_, alpha, _), x, y in zip(settings, g_nat, g_adv, strict=True)
        ]
        masks = twin_masks(scores, settings, scope)
        for p, g, mask, state in zip(others, grads, masks, states, strict=True):
            old = to_numpy(p.detach()).copy()
            seen = g if conserve == "update" else np.where(mask, g, 0.0)
            new = twin_step(kind, old, seen, state, t)
            p.data = from_numpy(new if conserve == "gradients" else np.where(mask, new, old))
        for p, mask in zip(params, masks, strict=True):
            assert mask.all() if p not in opt.masks() else (to_numpy(opt.masks()[p]) == mask).all()
    torch.testing.assert_close(params, others, rtol=1e-10, atol=1e-12)


# Any gradients: losses that are linear in the weights have the gradients that are drawn.

FINITE = [0.0, 1.0, -1.0, 2.0, -3.0, 0.5]
VALUES = [*[st.sampled_from(FINITE)] * 2, st.sampled_from([*FINITE, np.inf, np.nan])]  # by role
ANY_SHAPE = st.sampled_from([(2, 3), (1, 1), (4,), (), (0,), (2, 2, 2)])


def transposed(t):
    """The same values in another memory order."""
    dims = list(range(t.dim()))[::-1]
    return t.permute(dims).contiguous().permute(dims)


@pytest.mark.filterwarnings("ignore:No scored loss")
@given(st.data(), st.sampled_from(SCOPES), st.sampled_from(CONSERVE), st.integers(1, 4))
def test_any_gradients(data, scope, conserve, count):
    """SGD with lr 1 moves each selected weight by its gradient, NaN too, and no other.

    A tensor that no loss of its score reaches takes no part: it is updated whole.
    """
    settings, effective, params, gradients, scores = [], [], [], [], []
    losses = [torch.zeros((), requires_grad=True) for _ in range(3)]
    reached = [set(), set()]
    for i in range(count):
        shape = data.draw(ANY_SHAPE)
        n = int(np.prod(shape))
        lists = [st.lists(values, min_size=n, max_size=n) for values in VALUES]
        drawn = [np.array(data.draw(each), np.float32).reshape(shape) for each in lists]
        p = nn.Parameter(torch.full(shape, 10.0))
        p.data = transposed(p.data) if data.draw(st.booleans()) else p.data
        alpha = data.draw(st.floats(0, 1, width=16))
        select = data.draw(st.sampled_from([None, True, False]))
        settings.append((data.draw(st.sampled_from([0.2, 0.5, 0.8])), alpha, select))
        for role in range(3):
            if role == 2 or data.draw(st.booleans()):
                losses[role] = losses[role] + (p * from_numpy(drawn[role])).sum()
                if role < 2 and (p.dim() >= 2 if select is None else select):
                    reached[role].add(i)
            else:
                drawn[role][...] = 0  # the loss does not depend on this parameter
        read = [role for role, share in enumerate((alpha, 1.0 - alpha)) if share]
        used = any(i in reached[role] for role in read)
        effective.append((*settings[-1][:2], select if used else False))
        params.append(p)
        gradients.append(drawn[2])
        shares = zip(drawn, (alpha, 1.0 - alpha), strict=False)
        terms = [np.float32(share) * np.abs(each) for each, share in shares if share]
        scores.append(sum(terms[1:], terms[0]))
    assume(all(reached))  # a loss that reaches no selected weight is refused
    masks = twin_masks(scores, effective, scope)
    groups = [group(p, *each) for p, each in zip(params, settings, strict=True)]
    opt = wrap(groups, sgd(momentum=0.9), scope=scope, conserve=conserve)
    backward(opt, losses[2], natural=losses[0], adversarial=losses[1])
    opt.step()
    for p, g, mask in zip(params, gradients, masks, strict=True):
        np.testing.assert_array_equal(to_numpy(p.detach()), np.where(mask, 10 - g, 10))
        momentum = to_numpy(opt.state[p]["momentum_buffer"])
        np.testing.assert_array_equal(momentum, g if conserve == "update" else np.where(mask, g, 0))


def test_tied_weights_count_once():
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False)] * 2)
    opt = wrap(model, sgd(), update_fraction=0.25)
    step_on(opt, model(torch.randn(3, 4)).square().sum())
    assert [int(mask.sum()) for mask in opt.masks().values()] == [4]


# Kinds of parameters.


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
@pytest.mark.parametrize("select", [None, True])
def test_kinds_of_parameters(make, select):
    """Next to those always updated, complex or with sparse gradients; and a frozen one."""
    w, complex_ = nn.Parameter(make()), nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    table = nn.Parameter(torch.ones(3, 2))
    groups = [{"params": [w, complex_, frozen], "rgp_select": select}]
    groups += [{"params": [table], "rgp_select": False}]
    opt = wrap(groups, sgd(), update_fraction=0.5)
    nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    complex_.grad = torch.ones_like(complex_)
    step_on(opt, (w * torch.arange(4.0, device=w.device).view(2, 2)).sum())
    assert list(opt.masks()) == [w]
    if w.device.type != "meta":
        assert (w != 1).tolist() == [[False, False], [True, True]]
    assert (complex_ == 0).all()
    assert table[:, 0].tolist() == [1.0, 0.0, 1.0]
    assert (frozen == 1).all()


def test_nothing_selected_takes_no_scores():
    """Settings changed between the loss and its backward pass."""
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    opt = wrap([w, b], sgd())
    loss = (w + b).sum()
    loss = opt.scored(loss, natural=loss, adversarial=loss)
    opt.update_fraction = 1.0
    loss.backward()
    opt.step()
    assert b.tolist() == [-1.0, -1.0]
    assert (w == 0.0).all()


# Inner optimizers that break, rebind, clear.


class Breaks(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise KeyboardInterrupt


def test_an_inner_optimizer_that_fails_leaves_conserved_weights_as_they_were():
    run = Run(lambda params: Breaks(params, lr=0.1, weight_decay=0.1))
    with pytest.raises(KeyboardInterrupt):
        run.step()
    for p, changed in zip(run.model.parameters(), run.moved(), strict=True):
        if p.dim() >= 2:
            assert int(changed.sum()) == round(0.3 * p.numel())
            assert torch.equal(changed, run.opt.masks()[p])
    with pytest.raises(RuntimeError, match="needs the gradients"):
        run.opt.step()


def test_weights_stay_when_masking_fails(monkeypatch):
    run = Run(backend="torch")

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("rgp_optim._reference.zero_and_save_", fail)
    with pytest.raises(MemoryError):
        run.step()
    assert run.stays()


@pytest.mark.parametrize("scope", SCOPES)
def test_devices_of_one_threshold(scope):
    """Tensors on several devices have thresholds of their own, or are refused."""
    params = [nn.Parameter(torch.ones(2, 2, device=d)) for d in ("cpu", "meta")]
    opt = wrap(params, sgd(0.1), update_fraction=0.7, scope=scope, backend="torch")
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


class Rebinds(torch.optim.SGD):
    how = "data"

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            new = p - 0.1 * p.grad - 0.01 * p
            if self.how == "set_":
                p.set_(new)
            else:
                p.data = new if self.how == "data" else new.t().contiguous().t()


@pytest.mark.parametrize("conserve", ["weights", "update"])
@pytest.mark.parametrize("how", ["data", "strides", "set_"])
def test_an_inner_optimizer_that_gives_a_parameter_new_memory(how, conserve):
    w = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
    start = w.detach().clone()
    opt = wrap([w], Rebinds, update_fraction=0.5, conserve=conserve)
    opt.inner.how = how
    step_on(opt, (w * torch.tensor([[1.0, 5.0, 2.0], [6.0, 3.0, 4.0]])).sum())
    assert (w != start).tolist() == [[False, True, False], [True, False, True]]


class Clears(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.zero_grad()


def test_an_inner_optimizer_that_clears_the_gradients():
    run, reference = Run(lambda params: Clears(params, lr=0.1)), Run(sgd(0.1))
    train(2, run, reference)
    assert same(run, reference)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.SGD, torch.optim.AdamW])
def test_an_unscored_step_with_all_learning_rates_zero_moves_nothing(make, sparse):
    """Checkpoint tools make it to fill the state; Rprop would move by its smallest step."""
    run, table = Run(lambda params: make(params, lr=0.0)), nn.Parameter(torch.ones(3, 2))
    if sparse and make is torch.optim.SGD:
        run.opt.add_param_group({"params": [table], "rgp_select": False})
        nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum().backward()
    losses(run.model, *make_batch())[0].backward()
    run.opt.step()
    assert run.stays()
    assert (table == 1).all()


# Gradients that share memory: an expanded one holds one value.


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("selected", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("expanded", [None, 0, 1])
def test_gradients_that_share_memory_are_masked_apart(expanded, selected, conserve):
    ends = []
    for own in (True, False):
        params = [nn.Parameter(torch.zeros(2, 4)) for _ in range(2)]
        groups = [{"params": [p], "rgp_select": s} for p, s in zip(params, selected, strict=True)]
        opt = wrap(groups, sgd(), update_fraction=0.5, conserve=conserve)
        x, buffer = torch.arange(1.0, 9.0).view(2, 4), torch.arange(1.0, 9.0)
        backward(opt, (params[0] * x).sum() + (params[1] * x.flip(1)).sum())
        for i, p in enumerate(params):
            p.grad = buffer[:1].expand(2, 4) if i == expanded else buffer.view(2, 4)
            p.grad = p.grad.clone() if own else p.grad
        opt.step()
        ends.append(params)
    assert same(*ends)
    assert all(p.any() for p in params)


# Score rules.


def test_a_rule_sees_weight_gradient_and_both_scores():
    w, seen = weights(1.0, 10.0, 100.0), []

    def rule(s):
        seen.append([float(t[0, 0]) for t in (s.gradient, s.natural, s.adversarial)])
        assert (s.parameter is w, s.alpha) == (True, 0.1)
        return s.adversarial.abs() / s.weight.abs()

    opt = wrap([w], sgd(), update_fraction=0.34, score=rule)
    backward(opt, 3 * w.sum(), natural=2 * w.sum(), adversarial=w.sum())
    opt.step()
    assert w.tolist() == [[-2.0, 10.0, 100.0]]
    assert seen == [[3.0, 2.0, 1.0]]


def test_a_rule_may_rank_by_sign_and_may_need_no_scored_loss():
    w = weights(0.0, 0.0, 0.0)
    opt = wrap([w], sgd(), update_fraction=0.34, score=lambda s: s.gradient)
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
    run = Run(score=rule)
    with pytest.raises(error, match=message):
        run.step()
    assert run.stays()
