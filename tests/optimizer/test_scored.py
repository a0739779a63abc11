"""`scored`: the loss keeps its value and gradient, and its backward pass takes the scores."""

import gc
import threading
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from common import Run, backward, losses, make_batch, make_net, same, sgd, snapshot, wrap
from torch import nn
from torch.utils.checkpoint import checkpoint


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


def late_zero_grad(opt, model, batch, of_model=False):
    loss = scored(opt, model, batch)
    (model if of_model else opt).zero_grad()
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


def one_role_at_a_time(opt, model, batch):
    """The natural graph is freed before the adversarial forward pass."""
    for role, x in zip(("natural", "adversarial"), batch[:2], strict=True):
        loss = F.cross_entropy(model(x), batch[2])
        opt.scored(loss, **{role: loss}).backward()


def one_role_per_call(opt, model, batch):
    nat, adv = both(model, batch)
    opt.scored(opt.scored(nat + adv, natural=nat), adversarial=adv).backward()


OTHER = make_batch(9, torch.float64)


def skipped_step(opt, model, batch, clear=lambda opt, model: opt.zero_grad()):
    plain(opt, model, OTHER)
    clear(opt, model)
    plain(opt, model, batch)


def step_skipped_by_the_model(opt, model, batch):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Earlier scores were dropped")
        skipped_step(opt, model, batch, clear=lambda _, model: model.zero_grad())


def a_batch_skipped_before_its_backward_pass(opt, model, batch):
    scored(opt, model, OTHER, float("nan"))
    plain(opt, model, batch)


def a_backward_pass_that_failed(opt, model, batch):
    nat, adv = both(model, OTHER)
    broken = model.conv.bias.square().sum() * 0.0
    with torch.no_grad():
        model.conv.bias.add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        opt.scored(nat + broken, natural=nat, adversarial=adv).backward()
    opt.zero_grad()
    plain(opt, model, batch)


def a_retained_graph(opt, model, batch):
    loss = scored(opt, model, batch, 0.5)
    loss.backward(retain_graph=True)
    loss.backward()


def saved_tensor_hooks(opt, model, batch):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        loss = scored(opt, model, batch)
    loss.backward()


def a_tensor_factor(opt, model, batch):
    (scored(opt, model, batch) * torch.tensor(1024.0)).backward()
    assert max(g.abs().max() for g in taken(opt)["natural"]) > 1.0  # float16 needs the factor
    for p in model.parameters():
        p.grad /= 1024.0


LOOPS = {
    "torch.autograd.backward": lambda o, m, b: torch.autograd.backward(scored(o, m, b)),
    "checkpointing": lambda o, m, b: plain(o, partial(checkpoint, m, use_reentrant=False), b),
    "late zero_grad": late_zero_grad,
    "late zero_grad of the model": partial(late_zero_grad, of_model=True),
    "micro-batches": micro_batches,
    "micro-batches in one pass": lambda o, m, b: sum(
        scored(o, m, part, weight) for part, weight in halves(b)
    ).backward(),
    "tensor weights": partial(micro_batches, weigh=torch.tensor),
    "new gradients": partial(micro_batches, after=new_gradients),
    "skipped step": skipped_step,
    "to zero": partial(skipped_step, clear=lambda opt, _: opt.zero_grad(set_to_none=False)),
}
LOOPS |= {
    loop.__name__: loop
    for loop in (
        one_gradient_moved_away,
        one_role_at_a_time,
        one_role_per_call,
        step_skipped_by_the_model,
        a_batch_skipped_before_its_backward_pass,
        a_backward_pass_that_failed,
        a_retained_graph,
        saved_tensor_hooks,
        a_tensor_factor,
    )
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_loops(loop):
    """In eval mode: BatchNorm would see the batches apart."""
    models = [make_net(dtype=torch.float64).eval() for _ in range(2)]
    opts = [wrap(model, sgd(0.1, momentum=0.9)) for model in models]
    for seed in range(3):
        for model, opt, run in zip(models, opts, (loop, plain), strict=True):
            if run is not LOOPS["late zero_grad of the model"]:
                opt.zero_grad()
            run(opt, model, make_batch(seed, torch.float64))
            opt.step()
        assert all(map(torch.equal, *(opt.masks().values() for opt in opts)))
        weights = map(snapshot, models)
        torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)  # sums in another order


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
    assert same([p.grad for p in model.parameters()], want)
    assert sorted(taken(opt)) == ["adversarial", "natural"]
    with torch.no_grad():  # no graph, no scores
        loss, nat, adv = losses(model, *make_batch())
        assert opt.scored(loss, natural=nat, adversarial=adv) is loss


def test_losses_of_other_shapes_and_dtypes():
    w, c = nn.Parameter(torch.zeros(1, 4)), torch.arange(4.0)
    opt, loss = wrap([w]), (w * c).sum()
    backward(opt, loss, natural=(w * c).sum().view(1), adversarial=(w * c).double().sum())
    opt.step()
    assert (w != 0).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_pass_that_the_score_does_not_read_is_left_out(alpha):
    w, passes = nn.Parameter(torch.randn(3, 3)), []

    def seen(role):
        loss = w.square().sum()
        loss.register_hook(lambda _: passes.append(role))
        return loss

    opt = wrap([w], alpha=alpha)
    role = "natural" if alpha else "adversarial"
    opt.scored(w.sum(), natural=seen("natural"), adversarial=seen("adversarial")).backward()
    assert passes == [role]
    opt.step()
    opt.zero_grad()
    opt.scored(w.sum(), **{role: w.square().sum()}).backward()
    opt.step()
    opt.update_fraction = 1.0  # nothing is selected: no pass at all
    loss = w.sum()
    assert opt.scored(loss, **{role: seen(role)}) is loss


# The passes touch nothing else.


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_of_others_are_the_training_losss(shared):
    """Parameters of another optimizer, images, and hooks on our own parameters."""
    body, head = nn.Linear(4, 4), nn.Linear(4, 3)
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(0, 3, (6,))
    opt, seen = wrap(body), []
    body.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    loss = F.cross_entropy(head(body(x)), y)
    want = torch.autograd.grad(loss, [head.weight, x, body.weight], retain_graph=True)
    other = loss if shared else F.cross_entropy(head(body(x)), y)
    backward(opt, loss, natural=other * 2, adversarial=other * 3)
    torch.testing.assert_close([head.weight.grad, x.grad, *seen], list(want))


def test_two_optimizers_on_one_graph():
    """Each scores its own parameters; together they are one optimizer of both."""
    model, other = make_net(), make_net()
    first, second = wrap(model.conv), wrap(model.head)
    reference = wrap([*other.conv.parameters(), *other.head.parameters()])
    for seed in range(3):
        for opt in (first, second, reference):
            opt.zero_grad()
        loss, nat, adv = losses(model, *make_batch(seed))
        loss = second.scored(loss, natural=nat, adversarial=adv)
        backward(first, loss, natural=nat, adversarial=adv)
        loss, nat, adv = losses(other, *make_batch(seed))
        backward(reference, loss, natural=nat, adversarial=adv)
        for opt in (first, second, reference):
            opt.step()
    assert same(model, other)


@pytest.mark.parametrize(
    ("own", "message"),
    [(False, r"Call step\(\) of the RGPSelectiveOptimizer"), (True, "within the backward pass")],
)
@pytest.mark.parametrize("hook", ["parameter", "module"])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_within_the_backward_pass_moves_nothing(batches, hook, own, message):
    """Gradient release: the update would come before the selection, or before other gradients."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    opt, start = wrap(model), snapshot(model)
    if batches == 2:  # then every parameter has a gradient already, and scores
        backward(opt, model(torch.randn(5, 4)).square().mean())
    release = opt.step if own else opt.inner.step
    if hook == "parameter":
        model[1].weight.register_post_accumulate_grad_hook(lambda _: release())
    else:
        model[1].register_full_backward_hook(lambda *_: release())
    with pytest.raises(RuntimeError, match=message):
        backward(opt, model(torch.randn(5, 4, requires_grad=True)).square().mean())
    assert same(model, start)


@pytest.mark.parametrize("shared", [True, False])
def test_graphs_are_freed_by_the_backward_pass(shared):
    """Also that of a scored loss with a forward pass of its own, while the loss lives on."""
    model = nn.Linear(3, 2)
    hidden = [model(torch.rand(4, 3)) for _ in range(1 if shared else 2)]
    held = [weakref.ref(h) for h in hidden]  # the graphs have saved them
    nat, *other = [h.square().sum() for h in hidden]
    loss = wrap(model).scored(*other or [nat], natural=nat, adversarial=nat)
    del hidden, nat, other
    gc.collect()
    assert all(ref() is not None for ref in held)
    loss.backward()
    gc.collect()
    assert all(ref() is None for ref in held)


def test_nothing_is_kept_between_steps():
    run = Run()
    run.backward()
    held = [weakref.ref(g) for gradients in taken(run.opt).values() for g in gradients]
    assert len(held) == 4
    run.opt.step()
    gc.collect()
    assert all(ref() is None for ref in held)
    ours = [weakref.ref(each) for each in (run.opt, run.opt.inner, run.opt._holder)]
    del run.opt
    gc.collect()
    assert all(ref() is None for ref in ours)


def test_a_score_that_fails_drops_what_earlier_micro_batches_gave():
    """The natural half of its scores was added already."""
    run = Run()
    run.backward()
    nat, other = losses(run.model, *make_batch())[1], torch.ones(1, requires_grad=True).sum()
    with pytest.raises(RuntimeError, match="the adversarial loss depends on no parameter"):
        backward(run.opt, nat, natural=nat, adversarial=other)
    assert not taken(run.opt)
    with pytest.raises(RuntimeError, match="none were taken since"):
        run.opt.step()
    assert run.stays()


# Refusals: each names the argument, the rule and the way out; training goes on afterwards.


def call(**kinds):
    def act(run):
        names = ("loss", "natural", "adversarial")
        made = dict(zip(names, losses(run.model, *make_batch()), strict=True))
        made |= {name: change(made[name]) for name, change in kinds.items()}
        run.opt.scored(made.pop("loss"), **made).backward()

    return act


NONE = {"natural": lambda t: None, "adversarial": lambda t: None}
ACTS = {
    "score": Run.backward,
    "score half": call(adversarial=lambda t: None),
    "plain": lambda run: losses(run.model, *make_batch())[0].backward(),
    "zero_grad": lambda run: run.opt.zero_grad(),
    "clear": lambda run: run.model.zero_grad(),
    "step": lambda run: run.opt.step(),
}


def acts(*names):
    def act(run):
        for name in names:
            ACTS[name](run)

    return act


def scored_twice(run):
    loss, nat, adv = losses(run.model, *make_batch())
    backward(run.opt, loss, natural=run.opt.scored(nat, natural=nat), adversarial=adv)


def sparse(run, of_scores=True):
    w = nn.Parameter(torch.zeros(3, 2))
    run.opt.param_groups[0]["params"].append(w)
    run.opt.param_groups[0]["param_names"] = [*"abcdef", "table"]
    loss = F.embedding(torch.tensor([1]), w, sparse=True).sum()
    score = loss if of_scores else w.sum()
    backward(run.opt, loss, natural=score, adversarial=score)
    run.opt.step()


def reentrant(run, partly=False):
    """Partly: a layer is used inside the checkpoint and outside of it."""
    x, _, y = make_batch()
    loss = F.cross_entropy(checkpoint(run.model, x.requires_grad_(), use_reentrant=True), y)
    backward(run.opt, loss + run.model.head(torch.ones(1, 16)).sum() if partly else loss)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (call(loss=lambda t: t.item()), TypeError, "`loss` should be a scalar tensor. Found"),
        (call(natural=lambda t: t.detach()), ValueError, "`natural` should carry a graph"),
        (call(adversarial=lambda t: t.repeat(2)), ValueError, "`adversarial` should be a sc"),
        (call(**NONE), ValueError, "`natural` should be given, or `adversarial`"),
        (acts("plain", "step"), RuntimeError, "gradients of the natural loss, and none were"),
        (acts("score half", "step"), RuntimeError, "gradients of the adversarial loss, and none"),
        (
            acts("score", "zero_grad", "plain", "step"),
            RuntimeError,
            "Give `natural=` in `loss = opt.sc",
        ),
        (acts("score", "clear", "step"), RuntimeError, "are scored, but no parameter has a grad"),
        (scored_twice, RuntimeError, "A scored loss was given as `natural` or `adversarial`"),
        (sparse, TypeError, r"`natural gradient` should be dense"),
        (partial(sparse, of_scores=False), TypeError, "`gradient of table .* dense.*'rgp_select'"),
        (reentrant, RuntimeError, "Set `use_reentrant=False`"),
        (partial(reentrant, partly=True), RuntimeError, "Set `use_reentrant=False`"),
    ],
)
def test_refusals(act, error, message):
    run = Run()
    with pytest.raises(error, match=message):
        act(run)
    assert run.stays()
    if "table" not in message:
        run.step()
        with pytest.raises(RuntimeError, match="since the last step or zero_grad"):
            run.opt.step()


@pytest.mark.parametrize("way", ["autograd.grad", "moved"])
def test_gradients_collected_elsewhere_are_warned_of(way):
    """Their micro-batches look like skipped steps: the scores cannot add up."""
    w = nn.Parameter(torch.zeros(1, 4))
    opt = wrap([w], sgd())

    def micro_batches():
        for x in torch.eye(3, 4):
            loss = (w * x).sum()
            scored = opt.scored(loss, natural=loss, adversarial=loss)
            if way == "moved":
                scored.backward()
                w.grad = None
            else:
                torch.autograd.grad(scored, [w])

    with pytest.warns(UserWarning, match="keep gradients in `.grad` until the step") as seen:
        micro_batches()
    assert len(seen) == 1


@pytest.mark.parametrize("change", ["rgp_update_fraction", "rgp_select", "frozen"])
def test_a_parameter_selected_in_after_the_scores_were_taken_is_refused(change):
    a, b = params = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    opt = wrap([{"params": [p]} for p in params], sgd())

    def leave_out(out):
        a.requires_grad_(change != "frozen" or not out)
        values = {"rgp_update_fraction": 1.0 if out else 0.3, "rgp_select": False if out else None}
        opt.param_groups[0] |= {key: value for key, value in values.items() if key == change}

    leave_out(True)
    backward(opt, (a * b).square().sum())
    a.grad = torch.ones(2, 3)
    leave_out(False)
    with pytest.raises(RuntimeError, match=r"shape \(2, 3\) is selected in, but was not"):
        opt.step()
    assert all((p == 1).all() for p in params)


# What an engine, another thread or one of the two graphs does must not pass without a word.


@pytest.mark.parametrize("left", [[], [nn.Parameter(torch.ones(6))]])
def test_groups_that_an_engine_has_emptied_or_flattened_are_refused(left):
    run = Run()
    for group in run.opt.param_groups:
        group["params"] = list(left)
    with pytest.raises(ValueError, match=r"Engines that flatten or copy .*`fully_shard`"):
        scored(run.opt, run.model, make_batch())
    run.opt.update_fraction = 1.0
    scored(run.opt, run.model, make_batch())


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_another_thread_trains_is_not_looked_at(again):
    """Its gradients change while the first scored pass runs."""
    ours, other = make_net(), nn.Parameter(torch.ones(3))
    other.grad = torch.zeros(3) if again else None

    def meanwhile(gradient):
        worker = threading.Thread(target=lambda: other.square().sum().backward())
        worker.start()
        worker.join()
        return gradient

    opt, (x, x_adv, y) = wrap(ours.parameters(), sgd()), make_batch()
    logits = ours(x)
    logits.register_hook(meanwhile)
    natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(ours(x_adv), y)
    opt.scored(natural + adversarial, natural=natural, adversarial=adversarial).backward()
    opt.step()
    assert opt.masks()


class Doubling(torch.autograd.Function):
    """Gives twice the gradient each time that it runs."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = 1.0
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.factor *= 2.0
        return gradient * ctx.factor


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("role", ["natural", "adversarial"])
def test_either_graph_may_be_one_that_cannot_run_several_times(role, again):
    model, (x, x_adv, y) = make_net(), make_batch()
    opt = wrap(model.parameters(), sgd())
    for _ in range(1 + again):
        logits = {"natural": model(x), "adversarial": model(x_adv)}
        logits[role] = Doubling.apply(logits[role])
        losses = {name: F.cross_entropy(each, y) for name, each in logits.items()}
        with pytest.raises(RuntimeError, match=f"two backward passes of the {role} loss"):
            opt.scored(sum(losses.values()), **losses).backward()


def test_parameters_without_an_address_have_memory_of_their_own(monkeypatch):
    """As on devices that compute later."""
    monkeypatch.setattr(nn.Parameter, "data_ptr", lambda _: 0)
    wrap([nn.Parameter(torch.ones(2, 3)) for _ in range(2)], sgd())


@pytest.mark.parametrize("heads", [("first", "second"), ("second", "first")])
def test_heads_that_take_turns_keep_a_zeroed_gradient(heads):
    """Zeroed in place: the head that rests has a gradient and no score."""
    model = nn.ModuleDict({"body": nn.Linear(4, 3), "first": nn.Linear(3, 2)})
    model["second"] = nn.Linear(3, 5)
    opt = wrap(model.parameters(), sgd())
    for head in heads:
        opt.zero_grad(set_to_none=False)
        loss = model[head](model["body"](torch.ones(2, 4))).square().mean()
        opt.scored(loss, natural=loss, adversarial=loss).backward()
        if head == heads[0]:
            opt.step()
    with pytest.warns(UserWarning, match="No scored loss depends on parameter"):
        opt.step()
    assert set(opt.masks()) == {model["body"].weight, model[heads[1]].weight}
