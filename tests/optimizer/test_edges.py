"""Around the core: a joined reviser, and stacks that would switch the selection off or spoil it."""

import contextlib
import copy
import itertools
import pickle
import threading
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from common import (
    Run,
    backward,
    cpu_only,
    disk,
    losses,
    make_batch,
    make_net,
    same,
    sgd,
    snapshot,
    wrap,
)
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, _checks, _scores

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm has seen")


# A joined reviser.


def joined(**options):
    model = make_net()
    reviser = ConsistencyReviser(model, rate=0.5, decay=0.9)
    return model, wrap(model, reviser=reviser, **options), reviser


def train_step(model, opt, seed=0):
    x, x_adv, y = make_batch(seed)
    logits, logits_adv = model(x), model(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    consistency = opt.reviser(x, x_adv, logits, logits_adv)
    opt.zero_grad()
    backward(opt, nat + adv + consistency, natural=nat, adversarial=adv)
    opt.step()
    return consistency.item()


def test_a_joined_reviser_counts_steps_and_resumes_with_the_optimizer():
    model, opt, reviser = joined()
    for seed in range(10):
        train_step(model, opt, seed)
    assert reviser.steps == 10
    saved = disk({"model": model.state_dict(), "opt": opt.state_dict()})
    other, again, _ = joined()
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    assert [train_step(model, opt, i) for i in range(5)] == [
        train_step(other, again, i) for i in range(5)
    ]
    assert same(model, other)
    assert same(reviser.model, again.reviser.model)
    with pytest.raises(RuntimeError, match=r"`update\(\)` should be left to the optimizer"):
        reviser.update()
    opt.reviser = None
    reviser.update()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_train_on_alike(way):
    parts = joined()[:2]
    train_step(*parts)
    twin = way(parts)
    for seed in range(4):
        assert train_step(*parts, seed) == train_step(*twin, seed)
    assert twin[1].reviser._student is twin[0]
    assert twin[1].reviser.steps == parts[1].reviser.steps == 5


def test_checkpoints_with_and_without_a_copy():
    model, opt, _ = joined()
    train_step(model, opt)
    state, plain = opt.state_dict(), Run(plain=True)
    plain.step()
    Run().opt.load_state_dict(state)  # a wrapper without a reviser
    with pytest.warns(UserWarning, match="checkpoint has no averaged copy"):
        opt.load_state_dict(plain.opt.state_dict())
    before = [t.clone() for t in opt.state_dict()["state"][0].values() if t is not None]
    state["rgp_reviser"]["model"].pop("head.bias")
    with pytest.raises(ValueError, match=r"head\.bias"):
        opt.load_state_dict(state)
    after = [t for t in opt.state_dict()["state"][0].values() if t is not None]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("how", ["skipped", "raises", "made by a checkpoint tool"])
def test_steps_that_do_not_count(how):
    model, opt, reviser = joined()
    if how == "skipped":
        scaler = torch.amp.GradScaler("cpu")
        loss, nat, adv = losses(model, *make_batch())
        loss = opt.scored(loss * torch.inf, natural=nat, adversarial=adv)
        scaler.scale(loss).backward()
        scaler.step(opt)
    elif how == "raises":
        losses(model, *make_batch())[0].backward()
        with pytest.raises(RuntimeError, match="none were taken"):
            opt.step()
    else:  # torch.distributed.checkpoint fills the state so
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.param_groups[0]["lr"] = 0.0
        opt.step()
    assert reviser.steps == 0


def test_a_copy_that_does_not_fit_is_refused_before_the_step():
    model, opt, reviser = joined()
    train_step(model, opt)
    reviser.rate = 1.0
    loss, nat, adv = losses(model, *make_batch())
    backward(opt, loss, natural=nat, adversarial=adv)
    before = copy.deepcopy(model)
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"a difference at extra\.bias"):
        opt.step()
    del model.extra
    assert same(model, before)
    assert reviser.steps == 1
    opt.step()
    assert reviser.steps == 2


def test_the_last_optimizer_that_takes_a_reviser_updates_it():
    model, first, reviser = joined()
    second = RGPSelectiveOptimizer(torch.optim.SGD(model.head.parameters(), 0.1), reviser=reviser)
    for opt in (first, second):
        loss, nat, adv = losses(model, *make_batch())
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()
    assert reviser.steps == 1
    with pytest.raises(ValueError, match="`reviser` should average the model that is optimized"):
        wrap(make_net(), reviser=reviser)
    with pytest.raises(TypeError, match="`reviser` should be a ConsistencyReviser"):
        wrap(model, reviser=reviser.model)


def test_a_reviser_may_join_when_natural_training_ends():
    """The copy is that of a loop which calls `update` by hand from then on."""
    runs = [Run(), Run()]
    for run in runs:
        run.step()
    joins, by_hand = (ConsistencyReviser(run.model, rate=0.5, decay=0.9) for run in runs)
    runs[0].opt.reviser = joins
    assert runs[0].opt.reviser is joins
    for seed in range(6):
        for run in runs:
            run.step(seed)
        by_hand.update()
    assert joins.steps == 6
    assert same(joins, by_hand)


def test_a_captured_step_updates_no_reviser(monkeypatch):
    """Its draws would be those of the capture in every replay."""
    model, opt, reviser = joined()
    monkeypatch.setattr(_checks, "capturing", lambda tensor: True)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="`reviser` should be None in a CUDA graph"):
        train_step(model, opt)
    assert same(model, before)
    assert reviser.steps == 0
    opt.reviser = None
    opt.step()
    assert not same(model, before)


# Selection that is off.


class Lomo(torch.optim.SGD):
    def fused_backward(self, loss, lr):
        raise AssertionError


class Horovod(torch.optim.SGD):
    def synchronize(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("make", "message"),
    [(Lomo, r"step in step\(\), not in the backward"), (Horovod, "leave averaging to torch.dist")],
)
def test_optimizers_that_step_or_average_by_another_door_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        wrap(make_net(), partial(make, lr=0.1))


@pytest.mark.parametrize("kind", ["flat", "dummy", "frozen"])
def test_groups_in_which_nothing_can_be_selected_are_refused(kind):
    model = make_net()
    opt = wrap(model)
    if kind == "flat":
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        opt.param_groups[0]["params"] = [nn.Parameter(flat)]
    elif kind == "dummy":
        opt.param_groups[0]["params"] = [torch.ones(1, 1)]
    else:
        for p in (model.conv.weight, model.head.weight):
            p.requires_grad_(False)
    loss, nat, adv = losses(model, *make_batch())
    with pytest.raises(ValueError, match=r"trainable parameter with two or more.*fully_shard"):
        opt.scored(loss, natural=nat, adversarial=adv)
    opt.update_fraction = 1.0  # on purpose
    assert opt.scored(loss, natural=nat, adversarial=adv) is loss


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_weights_that_no_scored_loss_reaches_are_updated_whole(scope):
    body, aux = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)
    opt = wrap([("body", body.weight)], sgd(), update_fraction=0.25, scope=scope)
    opt.param_groups[0]["params"].append(aux.weight)  # without a name
    for seen in (pytest.warns(UserWarning, match=r"No scored loss depends on parameter 1 "), None):
        before = aux.weight.detach().clone()
        opt.zero_grad()
        hidden = body(torch.rand(5, 4) + 0.1)
        nat = hidden.square().sum()
        backward(opt, nat + aux(hidden).square().sum(), natural=nat, adversarial=nat)
        with contextlib.nullcontext() if seen is None else seen:  # once
            opt.step()
        assert (aux.weight != before).all()
        assert [int(mask.sum()) for mask in opt.masks().values()] == [4]  # of body alone


# Graphs that cannot run several times.


class Scales(torch.autograd.Function):
    """Scales what it saved in place, as fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones_like(x))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        saved.data.mul_(2.0)
        return grad * saved


class Nested(torch.autograd.Function):
    """Runs a backward pass inside its own, past the graph."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.layer.weight.sum().backward()
        return grad, None


class Once:
    """Gives each saved tensor out once."""

    def __init__(self):
        self.kept = {}

    def pack(self, tensor):
        self.kept[len(self.kept)] = tensor
        return len(self.kept) - 1


def selective_checkpoint(h):
    """Keeps the products and gives them out once."""
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return checkpoint(lambda h: (h @ torch.eye(3)).tanh(), h, use_reentrant=False, context_fn=kept)


def pass_through(kind, own_graphs=False):
    """A scored backward pass through a graph of a kind; return the model and its optimizer."""
    torch.manual_seed(0)
    layer, x, once = nn.Linear(4, 3), torch.rand(5, 4), Once()
    opt = wrap(layer, sgd())
    if "again" in kind:  # gradients of an earlier micro-batch are added to in place
        layer.weight.grad = torch.zeros(3, 4)
    acts = {"scales": Scales.apply, "nested": lambda h: Nested.apply(h, layer)}
    acts |= {"nested again": acts["nested"], "checkpoint": selective_checkpoint}

    def loss():
        h = layer(x).tanh()
        return acts.get(kind, lambda h: h)(h).square().sum()

    if kind == "hook":
        torch.autograd.graph.register_multi_grad_hook(list(layer.parameters()), lambda g: None)
    hooks = torch.autograd.graph.saved_tensors_hooks(once.pack, once.kept.pop)
    with hooks if kind == "once" else warnings.catch_warnings():
        whole = loss()
        natural, adversarial = (loss(), loss()) if own_graphs else (whole, whole)
        backward(opt, whole, natural=natural, adversarial=adversarial)
    return layer, opt


@pytest.mark.parametrize("kind", ["scales", "nested", "nested again", "hook", "once", "checkpoint"])
def test_a_graph_that_cannot_run_again_is_refused(kind):
    with pytest.raises(RuntimeError, match=r"scored: .*forward passes of their own"):
        pass_through(kind)


def test_a_hook_that_returns_one_buffer_is_refused():
    """The adversarial pass would write over the natural gradient."""
    w, buffer = nn.Parameter(torch.ones(2, 3)), torch.zeros(2, 3)
    w.register_hook(lambda gradient: buffer.copy_(gradient))
    h = w * 1.0
    natural, adversarial = (h * torch.rand(2, 3)).sum(), (h * torch.rand(2, 3)).sum()
    with pytest.raises(RuntimeError, match="two backward passes of the natural loss"):
        backward(
            wrap([w], sgd()),
            natural + adversarial,
            natural=natural,
            adversarial=adversarial,
        )


@pytest.mark.parametrize(("apart", "refused"), [(0.02, True), (0.005, False)])
def test_kernels_that_add_in_any_order_may_differ_by_one_percent(apart, refused):
    w, passes = nn.Parameter(torch.ones(2, 3)), itertools.count()
    opt, h = wrap([w], sgd()), w * 1.0
    h.register_hook(lambda gradient: gradient * (1 + apart * next(passes)))
    said = pytest.raises(RuntimeError, match=r"two backward passes of the natural loss .*2% apart")
    with said if refused else contextlib.nullcontext():
        backward(opt, (h * torch.arange(6.0).view(2, 3)).sum())


def test_a_buffer_that_every_pass_adds_to_is_found():
    w, buffer = nn.Parameter(torch.ones(2, 3)), torch.zeros(2, 3)
    w.register_hook(buffer.add_)  # both passes return the same memory
    with pytest.raises(RuntimeError, match=r"two backward passes of the natural loss"):
        backward(wrap([w], sgd()), w.square().sum())


@pytest.mark.parametrize("kind", ["scales", "once", "checkpoint"])
def test_each_loss_may_have_a_graph_of_its_own(kind):
    layer, opt = pass_through(kind, own_graphs=True)
    opt.step()
    assert opt.masks()[layer.weight].any()
    with mock.patch.object(_scores, "_same", side_effect=AssertionError):  # they were tested
        backward(opt, layer(torch.rand(5, 4)).square().sum())


@pytest.mark.parametrize("factor", [torch.inf, torch.nan, 0.0])
def test_the_test_waits_for_finite_gradients(factor):
    """A scaler's first steps overflow; a row of a Jacobian may have a factor of 0."""
    w = nn.Parameter(torch.ones(2, 3))
    opt = wrap([w], sgd())
    for each in (factor, factor):
        loss = Scales.apply(w).sum()
        (opt.scored(loss, natural=loss, adversarial=loss) * each).backward()
    with pytest.raises(RuntimeError, match="two backward passes of the natural loss"):
        backward(opt, Scales.apply(w).sum())


def test_without_values_nothing_is_tested():
    passes, w = [], nn.Parameter(torch.ones(2, 3, device="meta"))
    w.register_hook(lambda g: passes.append(opt.scoring))
    opt = wrap([w], sgd())
    backward(opt, w.sum())
    assert passes == [True, True, False]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyError])
def test_what_fails_in_a_scoring_pass_is_named(error):
    """Less memory would help the one, a graph for each loss the other."""
    w = nn.Parameter(torch.ones(2, 3))
    loss = w.sum()
    loss.register_hook(mock.Mock(side_effect=error("mine")))
    expected = error if error is torch.OutOfMemoryError else RuntimeError
    with pytest.raises(expected) as caught:
        backward(wrap([w]), 2 * loss)
    assert ("forward passes of their own" in str(caught.value)) == (expected is RuntimeError)
    assert "mine" in str(caught.value)


def test_the_first_pass_changes_nothing_and_is_the_only_one_tested(monkeypatch):
    passes, run = [], Run()
    run.model.conv.weight.register_hook(lambda g: passes.append(run.opt.scoring))
    counts = []
    for seed in range(3):
        run.step(seed)
        counts.append((passes.count(True), passes.count(False)))
        passes.clear()
    assert counts == [(4, 1), (2, 1), (2, 1)]  # hooks can tell the passes apart
    plain = Run()
    plain.opt._holder.scores._tested = True
    monkeypatch.setattr(_scores, "get_total_norm", lambda *_: torch.zeros(()))
    for seed in range(3):
        plain.step(seed)
    assert same(run, plain)


@pytest.mark.parametrize("steps", [1, 2])
def test_kept_activations_have_the_training_gradient(steps):
    body, head = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
    opt = wrap([*body.parameters(), *head.parameters()], sgd())
    for _ in range(steps):
        opt.zero_grad()
        hidden = body(torch.rand(5, 4).double())
        leaf = hidden.detach().requires_grad_()
        head(leaf).square().sum().backward()
        hidden.retain_grad()
        loss = head(hidden).square().sum()
        opt.zero_grad()
        backward(opt, loss)
        torch.testing.assert_close(hidden.grad, leaf.grad)


@cpu_only("threads share the device's")
def test_two_threads_are_told_so():
    run, inside, done = Run(), threading.Event(), threading.Event()
    loss, nat, adv = losses(run.model, *make_batch())
    nat.register_hook(lambda _: (inside.set(), done.wait(10), None)[2])
    loss = run.opt.scored(loss, natural=nat, adversarial=adv)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    inside.wait(10)
    try:
        with pytest.raises(RuntimeError, match="Two threads run scored backward passes"):
            run.backward(1)
    finally:
        done.set()
        thread.join()


# Scores that are not finite.


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_score_that_is_not_finite_surfaces(value, scaled):
    """Beside a finite training gradient: a scaler skips the step, everybody else sees NaN."""
    w = nn.Parameter(torch.ones(2, 3))
    opt, scaler = wrap([w], sgd()), torch.amp.GradScaler("cpu", enabled=scaled)
    scores = (w * torch.tensor([1.0, 2.0, value])).sum()
    scaler.scale(opt.scored(w.sum(), natural=w.sum(), adversarial=scores)).backward()
    scaler.step(opt)
    assert w.isnan().any() != scaled
    assert (w == 1).all() == scaled


@pytest.mark.parametrize("role", ["natural", "adversarial"])
def test_a_float16_loss_beside_a_wider_one_is_refused(role):
    w = nn.Parameter(torch.ones(2, 3))
    losses = {"natural": w.sum(), "adversarial": w.sum()}
    losses[role] = losses[role].half()
    with pytest.raises(ValueError, match=rf"`{role}` should be torch.float32 .*\.float\(\)"):
        wrap([w]).scored(w.sum(), **losses)


# Other ways in.


@pytest.mark.parametrize("attack", [torch.zeros(()), 0.0])
def test_without_an_attack_the_message_says_what_to_pass(attack):
    loss = make_net().head.weight.sum()
    with pytest.raises((TypeError, ValueError), match=r"`adversarial` .* pass the natural loss"):
        wrap(make_net()).scored(loss, natural=loss, adversarial=attack)


def test_options_belong_to_the_wrapped_instance():
    params = list(make_net().parameters())
    opt = wrap(params)
    for make in (
        lambda: RGPSelectiveOptimizer(params, lr=0.1),
        lambda: type(opt)(params, **opt.defaults),
        lambda: RGPSelectiveOptimizer(torch.optim.SGD(params, lr=0.1), lr=0.1),
    ):
        with pytest.raises(TypeError, match=r"Write RGPSelectiveOptimizer\(torch\.optim\.SGD"):
            make()


def test_settings_of_an_earlier_wrapper_do_not_stay():
    inner = torch.optim.SGD([{"params": make_net().parameters(), "rgp_alpha": 0.4}], lr=0.1)
    RGPSelectiveOptimizer(inner, update_fraction=0.7)
    again = RGPSelectiveOptimizer(inner, update_fraction=0.3, alpha=0.9)
    assert (again.update_fraction, again.alpha) == (0.3, 0.4)  # the group's own value wins


def test_parameters_that_share_memory_are_refused():
    p = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match="memory of their own"):
        wrap([p, nn.Parameter(p.data)])
    opt = wrap([p])
    with pytest.raises(ValueError, match="memory of their own"):
        opt.add_param_group({"params": [nn.Parameter(p.data.view(3, 2))]})
    wrap([nn.Parameter(torch.ones(12)[i : i + 6].view(2, 3)) for i in (0, 6)])  # two halves


class Kept(torch.optim.SGD):
    """Steps on a float32 copy of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            kept = self.state[p].setdefault("master", p.detach().float().clone())
            p.copy_(kept.sub_(0.1 * p.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_an_optimizer_keeps_twice_are_warned_of_once(dtype):
    w = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    opt = wrap([w], partial(Kept, lr=0.1))
    w.grad = torch.zeros_like(w)
    opt.update_fraction = 1.0  # at first nothing is held back, and nothing is looked at
    opt.step()
    opt.update_fraction = 0.5
    for seen in (pytest.warns(UserWarning, match=r"Kept keeps a copy of the weights"), None):
        opt.zero_grad()
        backward(opt, (w.float() * torch.arange(6.0).view(2, 3)).sum())
        with contextlib.nullcontext() if seen is None else seen:  # once
            opt.step()


def test_an_average_that_is_never_written_back_is_not_warned_of():
    """ASGD's is the weights until it begins to average."""
    w = nn.Parameter(torch.ones(2, 3))
    opt = wrap([w], partial(torch.optim.ASGD, lr=0.1))
    for _ in range(2):
        opt.zero_grad()
        backward(opt, (w * torch.arange(6.0).view(2, 3)).sum())
        opt.step()
        assert torch.equal(opt.state[w]["ax"] == w, opt.masks()[w])


class Quantised(torch.Tensor):
    """Keeps its values in a plain tensor, and lacks an operation."""

    @staticmethod
    def __new__(cls, value, lacks):
        made = torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype)
        made.value, made.lacks = value, lacks
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        (ours, *_) = [a for a in args if isinstance(a, cls)] or [None]
        name = func.overloadpacket.__name__
        if ours is None or name == ours.lacks:
            raise NotImplementedError(f"no {name} of {cls.__name__}")
        out = func(*[a.value if isinstance(a, cls) else a for a in args], **kwargs or {})
        return cls(out, ours.lacks) if name in ("detach", "clone", "alias") else out


@pytest.mark.parametrize("lacks", ["where", "clone"])
def test_weights_that_cannot_be_put_back_are_found_before_the_step(lacks):
    w, other = nn.Parameter(Quantised(torch.ones(2, 3), lacks)), nn.Parameter(torch.ones(2, 3))
    opt = wrap([w, other], sgd(momentum=0.9, foreach=False))
    backward(opt, w.sum() + other.sum())
    with pytest.raises(ValueError, match=r"`conserve` should have weights that can be restored"):
        opt.step()
    assert (w.value == 1).all()
    assert (other == 1).all()
    assert not opt.state
    opt.param_groups[0]["rgp_select"] = False
    opt.step()
    assert (w.value == 0).all()


@pytest.mark.parametrize("apart", [True, False])
def test_rows_of_a_jacobian_add_up(apart):
    """Each row runs every scored node with a factor of 1 or 0, before any `.grad` exists."""
    masks = []
    for rows in (True, False):
        run = Run(update_fraction=0.3)
        _, nat, adv = losses(run.model, *make_batch())
        if apart:
            both = [run.opt.scored(nat, natural=nat), run.opt.scored(adv, adversarial=adv)]
        else:
            both = [run.opt.scored(nat, natural=nat, adversarial=adv), adv]
        params = list(run.model.parameters())
        if rows:
            for a, b in ((1.0, 0.0), (0.0, 1.0)):
                factors = [torch.tensor(a), torch.tensor(b)]
                torch.autograd.grad(both, params, factors, retain_graph=True)
            for p in params:
                p.grad = torch.ones_like(p)
        else:
            sum(both).backward()
        run.opt.step()
        masks.append(list(run.opt.masks().values()))
    assert all(map(torch.equal, *masks))


def test_a_deep_graph_is_walked_in_part():
    """The whole of it, seen from Python, could not be freed: 100,000 nodes end the process."""
    w = nn.Parameter(torch.ones(2, 2))
    loss = w
    for _ in range(100_000):
        loss = loss * 1.0
    opt = wrap([w], sgd())
    backward(opt, loss.sum())
    opt.step()
    del loss
    assert int(opt.masks()[w].sum()) == 1
