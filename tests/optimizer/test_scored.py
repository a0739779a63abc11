"""`scored`: the loss keeps its value and gradient, and its backward pass takes the scores."""

import copy
import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    backward,
    cure_step,
    losses,
    make_batch,
    make_net,
    same_bits,
    snapshot,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from rgp_optim import RGPSelectiveOptimizer


def wrap(model, **options):
    params = model.parameters() if isinstance(model, nn.Module) else model
    return RGPSelectiveOptimizer(
        torch.optim.SGD(params, lr=0.1, momentum=0.9), **{"update_fraction": 0.3, **options}
    )


def pair():
    """Two equal models with their optimizers; in eval mode BatchNorm sees no batch."""
    model = make_net(dtype=torch.float64).eval()
    other = copy.deepcopy(model)
    return model, wrap(model), other, wrap(other)


def assert_close(opt, reference):
    """Equal masks, and weights as close as float64 sums in another order."""
    for a, b in zip(opt.masks().values(), reference.masks().values(), strict=True):
        assert torch.equal(a, b)
    for group, other in zip(opt.param_groups, reference.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def taken(opt):
    """The gradients for the score that wait for a step, by role."""
    return {role: list(gradients.values()) for role, gradients in opt._holder.scores.taken.items()}


# Any loop of a public code base is the plain one: same masks, same weights.


def both(model, batch):
    x, x_adv, y = batch
    return F.cross_entropy(model(x), y), F.cross_entropy(model(x_adv), y)


def scored(opt, model, batch, weight=1.0):
    nat, adv = (loss * weight for loss in both(model, batch))
    return opt.scored(nat + adv, natural=nat, adversarial=adv)


def halves(batch):
    for part in (slice(0, 3), slice(3, 8)):
        yield [each[part] for each in batch], (part.stop - part.start) / 8


def plain(opt, model, batch):
    scored(opt, model, batch).backward()


def late_zero_grad(opt, model, batch):
    loss = scored(opt, model, batch)
    opt.zero_grad()
    loss.backward()


def late_zero_grad_of_the_model(opt, model, batch):
    loss = scored(opt, model, batch)
    model.zero_grad()
    loss.backward()


def micro_batches(opt, model, batch, weigh=float, after=lambda model: None):
    for part, weight in halves(batch):
        scored(opt, model, part, weigh(weight)).backward()
        after(model)


def new_gradients(model):
    for p in model.parameters():
        p.grad = p.grad * 1.0


def one_gradient_moved_away(opt, model, batch):
    w, moved = model.conv.weight, []
    micro_batches(opt, model, batch, after=lambda _: (moved.append(w.grad), delattr(w, "grad")))
    w.grad = sum(moved)


def micro_batches_in_one_pass(opt, model, batch):
    sum(scored(opt, model, part, weight) for part, weight in halves(batch)).backward()


def one_role_at_a_time(opt, model, batch):
    """The natural graph is freed before the adversarial forward pass."""
    for role, x in zip(("natural", "adversarial"), batch[:2], strict=True):
        loss = F.cross_entropy(model(x), batch[2])
        opt.scored(loss, **{role: loss}).backward()


def one_role_per_call(opt, model, batch):
    nat, adv = both(model, batch)
    opt.scored(opt.scored(nat + adv, natural=nat), adversarial=adv).backward()


OTHER = make_batch(9, torch.float64)


def a_skipped_step(opt, model, batch, clear=RGPSelectiveOptimizer.zero_grad):
    scored(opt, model, OTHER).backward()
    clear(opt)
    scored(opt, model, batch).backward()


def a_skipped_step_of_a_model(opt, model, batch):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Earlier scores were dropped")
        a_skipped_step(opt, model, batch, clear=lambda _: model.zero_grad())


def a_batch_skipped_before_its_backward_pass(opt, model, batch):
    scored(opt, model, OTHER, float("nan"))
    scored(opt, model, batch).backward()


def a_backward_pass_that_failed(opt, model, batch):
    nat, adv = both(model, OTHER)
    broken = model.conv.bias.square().sum() * 0.0
    with torch.no_grad():
        model.conv.bias.add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        opt.scored(nat + broken, natural=nat, adversarial=adv).backward()
    opt.zero_grad()
    scored(opt, model, batch).backward()


def a_retained_graph(opt, model, batch):
    loss = scored(opt, model, batch, 0.5)
    loss.backward(retain_graph=True)
    loss.backward()


def saved_tensor_hooks(opt, model, batch):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = scored(opt, model, batch)
    loss.backward()


def gradient_scaler(opt, model, batch):
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    scaler.scale(scored(opt, model, batch)).backward()
    assert max(g.abs().max() for g in taken(opt)["natural"]) > 1.0  # float16 needs the factor
    scaler.unscale_(opt)


def a_tensor_factor(opt, model, batch):
    (scored(opt, model, batch) * torch.tensor(64.0)).backward()
    for p in model.parameters():
        p.grad /= 64.0


LOOPS = {
    "torch.autograd.backward": lambda o, m, b: torch.autograd.backward(scored(o, m, b)),
    "tensor weights": partial(micro_batches, weigh=torch.tensor),
    "new gradients": partial(micro_batches, after=new_gradients),
    "to zero": partial(a_skipped_step, clear=lambda opt: opt.zero_grad(set_to_none=False)),
    "checkpointing": lambda o, m, b: scored(
        o, lambda x: checkpoint(m, x, use_reentrant=False), b
    ).backward(),
}
LOOPS |= {
    loop.__name__: loop
    for loop in (
        late_zero_grad,
        late_zero_grad_of_the_model,
        micro_batches,
        one_gradient_moved_away,
        micro_batches_in_one_pass,
        one_role_at_a_time,
        one_role_per_call,
        a_skipped_step,
        a_skipped_step_of_a_model,
        a_batch_skipped_before_its_backward_pass,
        a_backward_pass_that_failed,
        a_retained_graph,
        saved_tensor_hooks,
        gradient_scaler,
        a_tensor_factor,
    )
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_loops(loop):
    model, opt, other, reference = pair()
    for seed in range(3):
        batch = make_batch(seed, torch.float64)
        for each, optimizer, run in ((model, opt, loop), (other, reference, plain)):
            if run is not late_zero_grad_of_the_model:
                optimizer.zero_grad()
            run(optimizer, each, batch)
            optimizer.step()
        assert_close(opt, reference)


# The loss.


def test_value_and_training_gradient_are_those_of_the_loss():
    model = make_net()
    opt = wrap(model)
    loss, nat, adv = losses(model, *make_batch())
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scored = opt.scored(loss, natural=nat, adversarial=adv)
    assert torch.equal(scored, loss)
    assert not taken(opt)
    scored.backward()
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
    assert sorted(taken(opt)) == ["adversarial", "natural"]


def test_losses_of_other_shapes_and_dtypes():
    w = nn.Parameter(torch.zeros(1, 4))
    opt = wrap([w])
    c = torch.arange(4.0)
    loss = (w * c).sum()
    natural, adversarial = (w * c).sum().view(1), (w * c).double().sum()
    opt.scored(loss, natural=natural, adversarial=adversarial).backward()
    opt.step()
    assert (w != 0).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_pass_that_the_score_does_not_read_is_left_out(alpha):
    passes = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, role):
            ctx.role = role
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            passes.append(ctx.role)
            return grad, None

    w = nn.Parameter(torch.randn(3, 3))
    opt = wrap([w], alpha=alpha)
    role, other = ("natural", "adversarial") if alpha else ("adversarial", "natural")
    both = {name: Seen.apply(w.square().sum(), name) for name in (role, other)}
    opt.scored(w.sum(), **both).backward()
    assert passes == [role]
    opt.step()
    opt.zero_grad()
    opt.scored(w.sum(), **{role: w.square().sum()}).backward()
    opt.step()
    opt.update_fraction = 1.0  # nothing is selected: no pass at all
    passes.clear()
    loss = w.sum()
    assert opt.scored(loss, **{role: Seen.apply(w.sum(), role)}) is loss


def test_without_gradient_recording_the_loss_comes_back():
    model = make_net()
    opt = wrap(model)
    with torch.no_grad():
        loss, nat, adv = losses(model, *make_batch())
        assert opt.scored(loss, natural=nat, adversarial=adv) is loss


# The passes touch nothing else.


@pytest.mark.parametrize("inside", ["shared", "apart"])
def test_gradients_of_others_are_the_training_losss(inside):
    """Parameters of another optimizer, images, and hooks on our own parameters."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(0, 3, (6,))
    opt, seen = wrap(body), []
    body.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss = F.cross_entropy(head(body(x)), y)
    want = torch.autograd.grad(loss, [head.weight, x, body.weight], retain_graph=True)
    other = loss if inside == "shared" else F.cross_entropy(head(body(x)), y)
    backward(opt, loss, natural=other * 2, adversarial=other * 3)
    for got, expected in zip((head.weight.grad, x.grad, seen[0]), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert len(seen) == 1


def test_two_optimizers_on_one_graph():
    """Each scores its own parameters; together they are one optimizer of both."""
    model, other = make_net(), make_net()
    first, second = wrap(model.conv), wrap(model.head)
    reference = wrap([*other.conv.parameters(), *other.head.parameters()])
    for seed in range(3):
        for opt in (first, second, reference):
            opt.zero_grad()
        loss, nat, adv = losses(model, *make_batch(seed))
        both = {"natural": nat, "adversarial": adv}
        first.scored(second.scored(loss, **both), **both).backward()
        loss, nat, adv = losses(other, *make_batch(seed))
        backward(reference, loss, natural=nat, adversarial=adv)
        for opt in (first, second, reference):
            opt.step()
    assert all(map(same_bits, snapshot(model), snapshot(other)))


@pytest.mark.parametrize(
    ("own", "message"),
    [(False, r"Call step\(\) of the RGPSelectiveOptimizer"), (True, "within the backward pass")],
    ids=["the inner one's", "the wrapper's"],
)
@pytest.mark.parametrize("hook", ["parameter", "module"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_within_the_backward_pass_moves_nothing(batches, hook, own, message):
    """Gradient release: the update would come before the selection, or before other gradients."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt = wrap(model)
    if batches == 2:  # then every parameter has a gradient already, and scores
        loss = model(torch.randn(5, 4)).square().mean()
        backward(opt, loss, natural=loss, adversarial=loss)
    release = opt.step if own else opt.inner.step
    if hook == "parameter":
        model[1].weight.register_post_accumulate_grad_hook(lambda _: release())
    else:
        model[1].register_full_backward_hook(lambda *_: release())
    start = snapshot(model)
    loss = model(torch.randn(5, 4, requires_grad=True)).square().mean()
    with pytest.raises(RuntimeError, match=message):
        backward(opt, loss, natural=loss, adversarial=loss)
    assert all(map(same_bits, snapshot(model), start))


@pytest.mark.parametrize("shared", [True, False])
def test_graphs_are_freed_by_the_backward_pass(shared):
    """Also that of a scored loss with a forward pass of its own, while the losses live on."""
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
    opt = wrap(model)

    def forward():
        return Saves.apply(model(torch.rand(4, 3))).square().sum()

    nat = forward()
    loss = opt.scored(nat if shared else forward(), natural=nat, adversarial=nat)
    del nat
    loss.backward()
    gc.collect()
    assert len(saved) == (1 if shared else 2)
    assert all(ref() is None for ref in saved)


def test_nothing_is_kept_between_steps():
    model = make_net()
    opt = wrap(model)
    loss, nat, adv = losses(model, *make_batch())
    backward(opt, loss, natural=nat, adversarial=adv)
    held = [weakref.ref(g) for gradients in taken(opt).values() for g in gradients]
    assert len(held) == 4
    opt.step()
    gc.collect()
    assert all(ref() is None for ref in held)
    ours = [weakref.ref(each) for each in (opt, opt.inner, opt._holder)]
    del opt
    gc.collect()
    assert all(ref() is None for ref in ours)


def test_a_score_that_fails_drops_what_earlier_micro_batches_gave():
    """The natural half of its scores was added already."""
    model, opt, _, _ = pair()
    scored(opt, model, OTHER).backward()
    start = snapshot(model)
    nat, other = both(model, OTHER)[0], torch.ones(1, requires_grad=True).sum()
    with pytest.raises(RuntimeError, match="the adversarial loss depends on no parameter"):
        opt.scored(nat, natural=nat, adversarial=other).backward()
    assert not taken(opt)
    with pytest.raises(RuntimeError, match="none were taken since"):
        opt.step()
    assert all(map(same_bits, snapshot(model), start))


# Refusals: each names the argument, the rule and the way out; training goes on afterwards.


def call(**kinds):
    def run(opt, model):
        loss, nat, adv = losses(model, *make_batch())
        made = {"loss": loss, "natural": nat, "adversarial": adv}
        made |= {name: change(made[name]) for name, change in kinds.items()}
        backward(opt, made["loss"], natural=made["natural"], adversarial=made["adversarial"])

    return run


def step_unscored(opt, model):
    losses(model, *make_batch())[0].backward()
    opt.step()


def step_half_scored(opt, model):
    loss, nat, _ = losses(model, *make_batch())
    opt.scored(loss, natural=nat).backward()
    opt.step()


def step_after_zero_grad(opt, model):
    call()(opt, model)
    opt.zero_grad()
    step_unscored(opt, model)


def step_twice(opt, model):
    cure_step(model, opt)
    opt.step()


def step_without_gradients(opt, model):
    call()(opt, model)
    model.zero_grad()
    opt.step()


def scored_twice(opt, model):
    loss, nat, adv = losses(model, *make_batch())
    nat = opt.scored(nat, natural=nat)
    backward(opt, loss, natural=nat, adversarial=adv)


def frozen_graph(opt, model):
    loss, nat, _ = losses(model, *make_batch())
    other = torch.ones(1, requires_grad=True).sum()
    backward(opt, loss, natural=nat, adversarial=other)


def sparse(opt, model):
    w = nn.Parameter(torch.zeros(3, 2))
    opt.add_param_group({"params": [w]})
    loss = F.embedding(torch.tensor([1]), w, sparse=True).sum()
    backward(opt, natural=loss, adversarial=loss)


def sparse_training_gradient(opt, model):
    w = nn.Parameter(torch.zeros(3, 2))
    opt.param_groups[0]["params"].append(w)
    opt.param_groups[0]["param_names"] = [*"abcdef", "table"]
    loss = F.embedding(torch.tensor([1]), w, sparse=True).sum()
    backward(opt, loss, natural=w.sum(), adversarial=w.sum())
    opt.step()


def reentrant(opt, model):
    x, _, y = make_batch()
    x.requires_grad_()
    loss = F.cross_entropy(checkpoint(model, x, use_reentrant=True), y)
    backward(opt, natural=loss, adversarial=loss)


def partly_reentrant(opt, model):
    """The convolution is used inside the checkpoint and outside of it."""
    cure_step(model, opt)  # not only the first pass is looked at
    opt.zero_grad()
    x, _, y = make_batch()
    x.requires_grad_()
    loss = F.cross_entropy(checkpoint(model, x, use_reentrant=True), y)
    loss = loss + model.head(torch.ones(1, 16)).sum()
    backward(opt, natural=loss, adversarial=loss)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (call(loss=lambda t: t.item()), TypeError, "`loss` should be a scalar tensor. Found"),
        (call(natural=lambda t: t.detach()), ValueError, "`natural` should carry a graph"),
        (call(adversarial=lambda t: t.repeat(2)), ValueError, "`adversarial` should be a sc"),
        (
            call(natural=lambda t: None, adversarial=lambda t: None),
            ValueError,
            "`natural` should be given, or `adversarial`",
        ),
        (step_unscored, RuntimeError, "the gradients of the natural loss, and none were taken"),
        (step_half_scored, RuntimeError, "the gradients of the adversarial loss, and none"),
        (step_after_zero_grad, RuntimeError, "Write `loss = opt.scored"),
        (step_twice, RuntimeError, "since the last step or zero_grad"),
        (step_without_gradients, RuntimeError, "are scored, but no parameter has a gradient"),
        (scored_twice, RuntimeError, "A scored loss was given as `natural` or `adversarial`"),
        (frozen_graph, RuntimeError, "the adversarial loss depends on no parameter"),
        (sparse, TypeError, r"`natural gradient of parameter 0 \(group 1\)` should be dense"),
        (
            sparse_training_gradient,
            TypeError,
            "`gradient of table .* dense.*'rgp_select'",
        ),
        (reentrant, RuntimeError, "Set `use_reentrant=False`"),
        (partly_reentrant, RuntimeError, "Set `use_reentrant=False`"),
    ],
)
def test_refusals(act, error, message):
    model = make_net()
    opt = wrap(model)
    start = snapshot(model)
    with pytest.raises(error, match=message):
        act(opt, model)
    if act not in (step_twice, partly_reentrant):
        assert all(map(same_bits, snapshot(model), start))
    if act not in (sparse, sparse_training_gradient):
        cure_step(model, opt)


@pytest.mark.parametrize("way", ["autograd.grad", "moved"])
def test_gradients_collected_elsewhere_are_warned_of(way):
    """Their micro-batches look like skipped steps: the scores cannot add up."""
    w = torch.nn.Parameter(torch.zeros(4))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), alpha=0.0)
    opt.param_groups[0]["rgp_select"] = True

    def micro_batches():
        for x in torch.eye(3, 4):
            loss = (w * x).sum()
            scored = opt.scored(loss, adversarial=loss)
            if way == "moved":
                scored.backward()
                w.grad = None
            else:
                torch.autograd.grad(scored, [w])

    with pytest.warns(UserWarning, match="only the last scores count") as seen:
        micro_batches()
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["fraction", "select", "frozen"])
def test_a_parameter_selected_in_after_the_scores_were_taken_is_refused(change):
    a, b = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    groups = [{"params": [a]}, {"params": [b]}]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=1.0), update_fraction=0.5)
    settings = {"fraction": ("rgp_update_fraction", 1.0), "select": ("rgp_select", False)}
    if change == "frozen":
        a.requires_grad_(False)
        a.grad = torch.ones(2, 3)
    else:
        key, value = settings[change]
        before = opt.param_groups[0][key]
        opt.param_groups[0][key] = value
    loss = (a * b).square().sum()
    opt.scored(loss, natural=loss, adversarial=loss).backward()
    if change == "frozen":
        a.requires_grad_()
    else:
        opt.param_groups[0][key] = before
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) is selected in, but was not"):
        opt.step()
    assert torch.equal(a, torch.ones(2, 3))
    assert torch.equal(b, torch.ones(2, 3))


@pytest.mark.parametrize("order", [(0, 4), (4, 0), (0, 1)])
@pytest.mark.parametrize("alone", [False, True])
def test_gradients_that_overlap_in_memory_are_masked_apart(order, alone):
    """The second one's mask must not reach into the first; as with gradients of their own."""
    moved = []
    for shared in (True, False):
        p, q = (torch.nn.Parameter(torch.arange(8.0).view(2, 4)) for _ in range(2))
        groups = [{"params": [p]}, {"params": [q]}]
        if alone:
            groups[0]["rgp_select"] = False
        opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=1.0), update_fraction=0.5)
        weights = torch.arange(1.0, 9.0).view(2, 4)
        loss = (p * weights).sum() + (q * weights.flip(1)).sum()
        opt.scored(loss, natural=loss, adversarial=loss).backward()
        buffer = torch.arange(1.0, 13.0)
        p.grad, q.grad = (buffer[i : i + 8].view(2, 4) for i in order)
        if not shared:
            p.grad, q.grad = p.grad.clone(), q.grad.clone()
        opt.step()
        moved.append((p.detach(), q.detach()))
    for ours, theirs in zip(*moved, strict=True):
        assert torch.equal(ours, theirs)


def test_an_unselected_gradient_that_overlaps_itself_and_a_selected_one_stays():
    """Three weights share one value of the selected gradient, which its mask sets to zero."""
    p, q = torch.nn.Parameter(torch.zeros(2, 4)), torch.nn.Parameter(torch.zeros(3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([p, q], lr=1.0), update_fraction=0.25)
    loss = (p * torch.arange(1.0, 9.0).view(2, 4)).sum()
    opt.scored(loss, natural=loss, adversarial=loss).backward()
    q.grad = p.grad.view(-1)[:1].expand(3)
    opt.step()
    assert q.tolist() == [-1.0, -1.0, -1.0]
    assert p.flatten().tolist() == [0.0] * 6 + [-7.0, -8.0]


def test_masks_are_those_of_a_step_that_failed_half_way():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise KeyError("half-way")

    w = torch.nn.Parameter(torch.ones(2, 4))
    opt = RGPSelectiveOptimizer(Fails([w], lr=1.0), update_fraction=0.5)
    loss = (w * torch.arange(1.0, 9.0).view(2, 4)).sum()
    opt.scored(loss, natural=loss, adversarial=loss).backward()
    with pytest.raises(KeyError, match="half-way"):
        opt.step()
    assert torch.equal(w != 1, opt.masks()[w])
    assert int(opt.masks()[w].sum()) == 4
