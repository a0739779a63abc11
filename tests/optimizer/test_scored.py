"""`scored`: the loss keeps its value and gradient, and its backward pass takes the scores."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    backward,
    cure_step,
    losses,
    make_batch,
    make_net,
    numpy_topk,
    same_bits,
    snapshot,
    to_numpy,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from rgp_optim import RGPSelectiveOptimizer


def wrap(model, **options):
    params = model.parameters() if isinstance(model, nn.Module) else model
    return RGPSelectiveOptimizer(
        torch.optim.SGD(params, lr=0.1, momentum=0.9), **{"update_fraction": 0.3, **options}
    )


def assert_same(a, b):
    assert all(map(same_bits, snapshot(a), snapshot(b)))


def pair():
    """Two equal models with their optimizers; in eval mode BatchNorm sees no batch."""
    model = make_net().eval()
    other = copy.deepcopy(model)
    return model, wrap(model), other, wrap(other)


def taken(opt):
    """The gradients for the score that wait for a step, by role."""
    return {role: list(gradients.values()) for role, gradients in opt._holder.scores.taken.items()}


# The loss.


@pytest.mark.parametrize("run", [torch.Tensor.backward, torch.autograd.backward])
def test_value_and_training_gradient_are_those_of_the_loss(run):
    model = make_net()
    opt = wrap(model)
    loss, nat, adv = losses(model, *make_batch())
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    scored = opt.scored(loss, natural=nat, adversarial=adv)
    assert torch.equal(scored, loss)
    assert not taken(opt)
    run(scored)
    for p, g in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)
    assert sorted(taken(opt)) == ["adversarial", "natural"]


def test_scores_are_the_gradients_of_both_losses():
    model = make_net(dtype=torch.float64)
    opt = wrap(model, alpha=0.3)
    loss, nat, adv = losses(model, *make_batch(dtype=torch.float64))
    params = list(model.parameters())
    a, b = (torch.autograd.grad(each, params, retain_graph=True) for each in (nat, adv))
    backward(opt, loss, natural=nat, adversarial=adv)
    opt.step()
    for p, mask in opt.masks().items():
        i = next(i for i, q in enumerate(params) if q is p)
        score = 0.3 * np.abs(to_numpy(a[i])) + 0.7 * np.abs(to_numpy(b[i]))
        assert np.array_equal(to_numpy(mask), numpy_topk(score, round(0.3 * p.numel())))


@pytest.mark.parametrize("factor", [1024.0, torch.tensor(1024.0)])
def test_a_factor_reaches_scores_and_gradient_alike(factor):
    """As a gradient scaler multiplies; in float16 a small gradient needs it."""
    model, opt, other, reference = pair()
    loss, nat, adv = losses(model, *make_batch())
    (opt.scored(loss, natural=nat, adversarial=adv) * factor).backward()
    loss, nat, adv = losses(other, *make_batch())
    backward(reference, loss, natural=nat, adversarial=adv)
    for scaled, plain in zip(taken(opt)["natural"], taken(reference)["natural"], strict=True):
        assert torch.equal(scaled, plain * 1024)
    for p in model.parameters():
        p.grad.div_(1024)
    opt.step()
    reference.step()
    assert_same(model, other)


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
    assert_same(model, other)


@pytest.mark.parametrize("hook", ["parameter", "module"])
def test_an_optimizer_that_steps_within_the_backward_pass_moves_nothing(hook):
    """Gradient release: the update would come before the selection."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt = wrap(model)
    if hook == "parameter":
        model[1].weight.register_post_accumulate_grad_hook(lambda _: opt.inner.step())
    else:
        model[0].register_full_backward_hook(lambda *_: opt.inner.step())
    start = snapshot(model)
    loss = model(torch.randn(5, 4, requires_grad=True)).square().mean()
    with pytest.raises(RuntimeError, match=r"Call step\(\) of the RGPSelectiveOptimizer"):
        backward(opt, loss, natural=loss, adversarial=loss)
    assert all(map(same_bits, snapshot(model), start))


# Windows.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
def test_micro_batches_add_up(weighted, replaced):
    model, opt, other, reference = pair()
    x, x_adv, y = make_batch(n=8)
    for part in (slice(0, 3), slice(3, 8)):
        weight = (part.stop - part.start) / 8
        weight = torch.tensor(weight) if weighted else weight
        nat, adv = (
            F.cross_entropy(model(x[part]), y[part]),
            F.cross_entropy(model(x_adv[part]), y[part]),
        )
        backward(opt, natural=nat * weight, adversarial=adv * weight)
        for p in model.parameters() if replaced else ():
            p.grad = p.grad * 1.0
    nat, adv = F.cross_entropy(other(x), y), F.cross_entropy(other(x_adv), y)
    backward(reference, natural=nat, adversarial=adv)
    opt.step()
    reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for a, b in zip(opt.masks().values(), reference.masks().values(), strict=True):
        assert torch.equal(a, b)


def test_one_role_per_call():
    """A loop that frees the natural graph before the adversarial forward pass."""
    model, opt, other, reference = pair()
    for seed in range(2):
        x, x_adv, y = make_batch(seed)
        opt.zero_grad()
        nat = F.cross_entropy(model(x), y)
        opt.scored(nat, natural=nat).backward()
        adv = F.cross_entropy(model(x_adv), y)
        opt.scored(adv, adversarial=adv).backward()
        opt.step()
        reference.zero_grad()
        nat, adv = F.cross_entropy(other(x), y), F.cross_entropy(other(x_adv), y)
        backward(reference, natural=nat, adversarial=adv)
        reference.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("late", ["optimizer", "model"])
def test_zero_grad_between_the_loss_and_its_backward_pass(late):
    model, opt, other, reference = pair()
    for seed in range(3):
        loss, nat, adv = losses(model, *make_batch(seed))
        loss = opt.scored(loss, natural=nat, adversarial=adv)
        (opt if late == "optimizer" else model).zero_grad()
        loss.backward()
        opt.step()
        cure_step(other, reference, seed)
    assert_same(model, other)


@pytest.mark.parametrize("clear", ["optimizer", "optimizer to zero", "model"])
@pytest.mark.parametrize("skipped", ["step", "backward"])
def test_what_was_skipped_leaves_nothing_behind(skipped, clear):
    """As a gradient scaler skips a step, or a loop a batch with a NaN loss."""
    model, opt, other, reference = pair()
    loss, nat, adv = losses(model, *make_batch(7))
    scored = opt.scored(loss, natural=nat, adversarial=adv)
    if skipped == "step":
        scored.backward()
    if clear == "model":
        model.zero_grad()
    else:
        opt.zero_grad(set_to_none=clear == "optimizer")
    loss, nat, adv = losses(model, *make_batch(1))
    backward(opt, loss, natural=nat, adversarial=adv)
    opt.step()
    cure_step(other, reference, 1)
    assert_same(model, other)


def test_a_retained_graph_scores_again():
    w = nn.Parameter(torch.zeros(1, 3))
    opt = wrap([w])
    loss = (w * torch.tensor([1.0, 3.0, 2.0])).sum()
    scored = opt.scored(loss, natural=loss, adversarial=loss)
    scored.backward(retain_graph=True)
    scored.backward()
    assert taken(opt)["natural"][0].tolist() == [[2.0, 6.0, 4.0]]
    opt.step()
    with pytest.raises(RuntimeError, match="second time"):
        scored.backward()


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


def test_saved_tensor_hooks_and_checkpointing():
    """Activations may go elsewhere, or be computed again."""
    models = [make_net().eval() for _ in range(3)]
    opts = [wrap(model) for model in models]
    x, x_adv, y = make_batch()

    def run(how, model):
        def forward(x):
            return checkpoint(model, x, use_reentrant=False) if how == 2 else model(x)

        nat, adv = F.cross_entropy(forward(x), y), F.cross_entropy(forward(x_adv), y)
        return opts[how].scored(nat + adv, natural=nat, adversarial=adv)

    run(0, models[0]).backward()
    copied = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone())
    with copied:
        loss = run(1, models[1])
    loss.backward()
    run(2, models[2]).backward()
    for opt in opts:
        opt.step()
    assert_same(models[0], models[1])
    assert_same(models[0], models[2])


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
    opt.add_param_group({"params": [w]})
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
        (
            sparse,
            TypeError,
            "`natural gradient of parameter 0 .group 1.` should be dense.*'rgp_select'",
        ),
        (
            sparse_training_gradient,
            TypeError,
            "`gradient of parameter 0 .group 1.` should be dense.*'rgp_select': False",
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
