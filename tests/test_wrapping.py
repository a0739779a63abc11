"""RGPSelectiveOptimizer as a torch.optim.Optimizer: schedulers, checkpoints, copies, AMP, hooks."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    INNER,
    cure_step,
    disk,
    from_numpy,
    losses,
    make_batch,
    make_net,
    numpy_topk,
    plain_step,
    same_bits,
    seeded,
    snapshot,
    to_numpy,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as lrs

from rgp_optim import (
    ConsistencyReviser,
    RGPSelectiveOptimizer,
    kl_adv_loss,
    kl_attack,
    pgd_attack,
    rgp_param_groups,
)
from rgp_optim.scores import RULES

SELECT_ALL = dict(update_fraction=0.3)


def wrap(model, make_inner=None, **options):
    make_inner = make_inner or INNER["SGD momentum wd"]
    return RGPSelectiveOptimizer(make_inner(model.parameters()), **{**SELECT_ALL, **options})


def assert_same(model_a, model_b):
    for a, b in zip(snapshot(model_a), snapshot(model_b), strict=True):
        assert same_bits(a, b)


# An optimizer like any other.


def test_it_is_the_inner_optimizer_to_whoever_looks():
    model = make_net()
    opt = wrap(model)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is opt.inner.param_groups
    assert opt.state is opt.inner.state
    assert opt.defaults is opt.inner.defaults
    assert opt.step.__self__ is opt  # schedulers want a bound method
    assert "rgp_update_fraction: 0.3" in repr(opt)
    new_groups = [{**opt.param_groups[0], "lr": 7.0}]
    opt.param_groups = new_groups
    assert opt.inner.param_groups is new_groups
    opt.state = {}
    assert opt.inner.state == {}
    opt.defaults = {"lr": 1.0}
    assert opt.inner.defaults == {"lr": 1.0}
    assert not hasattr(opt, "momentum")
    assert opt._step_supports_amp_scaling is False


def test_an_optimizer_that_has_stepped_already_can_be_wrapped():
    model, other = make_net(), make_net()
    inner, reference = (INNER["AdamW"](m.parameters()) for m in (model, other))
    plain_step(model, inner)
    plain_step(other, reference)
    opt = RGPSelectiveOptimizer(inner, update_fraction=1.0)
    cure_step(model, opt, 1)
    plain_step(other, reference, 1)
    assert_same(model, other)


def test_a_proxy_with_a_dict_of_its_own_shares_the_state():
    """Trainers subclass the optimizer's class on the fly and copy its ``__dict__``."""

    class Proxy:
        def __init__(self, optimizer):
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
            bases = (type(self), type(optimizer))
            self.__class__ = type("Proxied" + type(optimizer).__name__, bases, {})
            self._optimizer = optimizer

        def step(self, closure=None):
            return self._optimizer.step(closure)

    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    proxy = Proxy(opt)
    assert isinstance(proxy, RGPSelectiveOptimizer)
    tracker = proxy.track_updates()
    proxy.param_groups[0]["rgp_update_fraction"] = 0.5
    reference.param_groups[0]["rgp_update_fraction"] = 0.5
    for seed in range(2):
        cure_step(model, proxy, seed)
        cure_step(other, reference, seed)
    assert_same(model, other)
    assert tracker.last()["group0.param0"] == 0.5


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_compiling_around_the_step():
    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    compiled = torch.compile(lambda: opt.step(), backend="eager")
    for seed in range(3):
        loss, nat, adv = losses(model, *make_batch(seed))
        opt.zero_grad()
        opt.backward(loss, natural=nat, adversarial=adv)
        compiled()
        cure_step(other, reference, seed)
    assert_same(model, other)


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=6),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 3),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_every_scheduler_reaches_the_inner_optimizer(make):
    model, other = make_net(), make_net()
    opt = wrap(model, update_fraction=1.0)
    reference = INNER["SGD momentum wd"](other.parameters())
    schedulers = [make(opt), make(reference)]
    for seed in range(5):
        cure_step(model, opt, seed)
        plain_step(other, reference, seed)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
        assert opt.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        assert opt.param_groups[0]["momentum"] == reference.param_groups[0]["momentum"]
    assert_same(model, other)


def test_hooks_of_the_wrapper_and_of_the_inner_optimizer_run():
    model = make_net()
    opt = wrap(model)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    opt.inner.register_step_pre_hook(lambda *_: seen.append("inner pre"))
    opt.inner.register_step_post_hook(lambda *_: seen.append("inner post"))
    opt.register_state_dict_pre_hook(lambda _: seen.append("save"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append(("load", state["note"])))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    cure_step(model, opt)
    opt.load_state_dict(opt.state_dict())
    order = ["pre", "inner pre", "inner post", "post", "save", ("load", 1), "loaded"]
    assert seen == order


def test_a_hook_after_the_inner_step_cannot_move_a_conserved_weight():
    model = make_net()
    opt = wrap(model, update_fraction=0.0)
    start = snapshot(model)

    def disturb(optimizer, args, kwargs):
        with torch.no_grad():
            model.conv.weight.add_(1)

    opt.inner.register_step_post_hook(disturb)
    cure_step(model, opt)
    assert same_bits(model.conv.weight.detach(), start[0])


def test_closure():
    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    calls = []

    def closure():
        calls.append(1)
        loss, nat, adv = losses(model, *make_batch())
        opt.zero_grad()
        opt.backward(loss, natural=nat, adversarial=adv)
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
    assert torch.equal(loss, cure_step(other, reference))
    assert calls == [1]
    assert_same(model, other)


def test_add_param_group():
    model = make_net()
    extra = nn.Parameter(torch.zeros(2, 5))
    opt = wrap(model)
    opt.load_state_dict(opt.state_dict())
    opt.add_param_group({"params": [extra], "rgp_update_fraction": 0.5})
    assert opt.param_groups[1]["rgp_alpha"] == 0.1
    _, nat, adv = losses(model, *make_batch())
    opt.backward(natural=nat + extra.sum(), adversarial=adv + extra.sum())
    opt.step()
    assert (extra != 0).reshape(-1).tolist() == [True] * 5 + [False] * 5
    opt.inner.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})  # behind our back
    cure_step(model, opt)
    assert opt.param_groups[2]["rgp_update_fraction"] == 0.3


def test_replaced_parameters_are_followed():
    """Tools that shard or cast a model put new parameters into the groups."""
    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    cure_step(model, opt)
    cure_step(other, reference)
    opt.state.clear()
    reference.state.clear()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    opt.param_groups[0]["params"] = list(model.parameters())
    cure_step(model, opt, 1)
    cure_step(other, reference, 1)
    assert_same(model, other)


# Checkpoints.


@pytest.mark.parametrize("score", ["rgp", "random"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW", "Adafactor"])
def test_resuming_is_bit_exact(name, score):
    straight = make_net()
    opt = wrap(straight, INNER[name], score=score)
    scheduler = lrs.StepLR(opt, 2)
    for seed in range(3):
        cure_step(straight, opt, seed)
        scheduler.step()
    saved = disk([straight.state_dict(), opt.state_dict(), scheduler.state_dict()])
    resumed = make_net(seed=5)
    again = wrap(resumed, INNER[name], score=score, update_fraction=0.9)
    again_scheduler = lrs.StepLR(again, 2)
    for target, state in zip((resumed, again, again_scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert again.param_groups[0]["rgp_update_fraction"] == 0.3
    for seed in range(3, 6):
        cure_step(straight, opt, seed)
        cure_step(resumed, again, seed)
        scheduler.step()
        again_scheduler.step()
    assert_same(straight, resumed)
    for a, b in zip(opt.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_a_plain_checkpoint_loads_and_keeps_our_settings():
    model, other = make_net(), make_net()
    reference = INNER["AdamW"](other.parameters())
    plain_step(other, reference)
    opt = wrap(model, INNER["AdamW"])
    opt.param_groups[0]["rgp_alpha"] = 0.6
    opt.load_state_dict(state_dict=reference.state_dict())
    assert opt.param_groups[0]["rgp_alpha"] == 0.6
    assert len(opt.state) == 6
    cure_step(model, opt)


def test_our_checkpoint_loads_into_the_plain_optimizer():
    model = make_net()
    opt = wrap(model, INNER["AdamW"])
    cure_step(model, opt)
    plain = INNER["AdamW"](model.parameters())
    plain.load_state_dict(opt.state_dict())
    plain_step(model, plain)


def test_a_bad_checkpoint_is_refused_before_anything_changes():
    model = make_net()
    opt = wrap(model)
    cure_step(model, opt)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["rgp_update_fraction"] = 1.5
    state["param_groups"][0]["lr"] = 99.0
    with pytest.raises(ValueError, match=r"`rgp_update_fraction` should be in \[0, 1\]"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW"])
def test_distributed_checkpoint_state_dicts(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_net()
    opt = wrap(model, INNER[name])
    cure_step(model, opt)
    saved = disk(get_optimizer_state_dict(model, opt, options=options))
    other = make_net(seed=3)
    fresh = wrap(other, INNER[name], update_fraction=0.9)  # no state yet: the tool makes it step
    before = snapshot(other)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_same_values(before, snapshot(other))
    other.load_state_dict(model.state_dict())
    assert fresh.param_groups[0]["rgp_update_fraction"] == 0.3
    assert fresh.param_groups[0]["rgp_step"] == 1
    cure_step(model, opt, 1)
    cure_step(other, fresh, 1)
    assert_same(model, other)


def assert_same_values(a, b):
    assert all(map(same_bits, a, b))


def test_distributed_checkpoint_of_an_optimizer_that_never_stepped():
    model = make_net()
    opt = wrap(model, INNER["AdamW"])
    before = snapshot(model)
    get_optimizer_state_dict(model, opt)
    assert_same_values(before, snapshot(model))
    assert opt.param_groups[0]["rgp_step"] == 0


# Copies.


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_alike_and_apart(copied, scheduled):
    model = make_net()
    opt = wrap(model)
    if scheduled:
        lrs.StepLR(opt, 2)
    opt.track_updates()
    cure_step(model, opt)
    twin_model, twin_opt = copied((model, opt))
    assert twin_opt.inner is not opt.inner
    assert twin_opt.param_groups[0]["params"][0] is twin_model.conv.weight
    assert twin_opt._rgp.trackers == []
    cure_step(model, opt, 1)
    moved = snapshot(twin_model)
    cure_step(twin_model, twin_opt, 1)
    assert_same(model, twin_model)
    assert not torch.equal(moved[0], snapshot(twin_model)[0])
    lrs.StepLR(twin_opt, 2)
    twin_opt.register_step_post_hook(lambda *_: None)
    cure_step(model, opt, 2)  # unpickling has not disturbed the original


def test_a_copy_in_the_middle_of_a_step():
    model = make_net()
    opt = wrap(model)
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    twin_model, twin_opt = copy.deepcopy((model, opt))
    twin_opt.step()  # torch copies parameters without their gradients
    assert_same(model, twin_model)
    opt.step()
    cure_step(twin_model, twin_opt)


def test_a_model_whose_optimizer_is_wrapped_can_be_saved_and_copied():
    model = make_net()
    wrap(model)
    copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)


# Windows: what was taken for a step dies with it.


def take(opt, model, seed):
    loss, nat, adv = losses(model, *make_batch(seed))
    opt.backward(loss, natural=nat, adversarial=adv)


def take_loss_first(opt, model, seed):
    loss, nat, adv = losses(model, *make_batch(seed))
    loss.backward(retain_graph=True)
    with opt.score("natural"):
        nat.backward(retain_graph=True)
    with opt.score("adversarial"):
        adv.backward(retain_graph=True)


def take_without_a_loss(opt, model, seed):
    _, nat, adv = losses(model, *make_batch(seed))
    opt.backward(natural=nat, adversarial=adv)


@pytest.mark.parametrize("take", [take, take_loss_first, take_without_a_loss])
@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_a_skipped_step_leaves_nothing_behind(clear, take):
    """As a gradient scaler skips; then the gradients are cleared, by the optimizer or the model."""
    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    (opt if clear == "optimizer" else model).zero_grad()
    take(opt, model, 7)  # never stepped
    (opt if clear == "optimizer" else model).zero_grad()
    model.load_state_dict(make_net().state_dict())  # its BatchNorm has seen one batch more
    take(opt, model, 1)
    opt.step()
    take(reference, other, 1)
    reference.step()
    assert_same(model, other)


def test_scores_survive_a_model_zero_grad_that_comes_before_the_training_backward():
    model = make_net()
    opt = wrap(model)
    for seed in range(3):
        loss, nat, adv = losses(model, *make_batch(seed))
        with opt.score("natural"):
            nat.backward(retain_graph=True)
        with opt.score("adversarial"):
            adv.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        opt.step()


@pytest.mark.parametrize("order", ["each", "scores first"])
def test_micro_batches_in_other_orders(order):
    model, other = make_net().eval(), make_net().eval()
    opt, reference = wrap(model), wrap(other)
    parts = [losses(model, *make_batch(seed)) for seed in range(3)]
    if order == "each":
        for loss, nat, adv in parts:
            opt.backward(loss, natural=nat, adversarial=adv)
    else:
        for _, nat, adv in parts:
            with opt.score("natural"):
                nat.backward(retain_graph=True)
            with opt.score("adversarial"):
                adv.backward(retain_graph=True)
        for loss, _, _ in parts:
            loss.backward()
    opt.step()
    sums = [
        sum(each) for each in zip(*(losses(other, *make_batch(s)) for s in range(3)), strict=True)
    ]
    reference.backward(sums[0], natural=sums[1], adversarial=sums[2])
    reference.step()
    for a, b in zip(snapshot(model), snapshot(other), strict=True):
        torch.testing.assert_close(a, b)


def test_an_exception_in_a_scoring_block_restores_grad_and_drops_the_scores():
    model = make_net()
    opt = wrap(model)
    loss, nat, _ = losses(model, *make_batch())
    loss.backward(retain_graph=True)
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), opt.score("natural"):
        nat.backward()
        raise ZeroDivisionError
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    with pytest.raises(RuntimeError, match="gradients of the natural loss"):
        opt.step()
    cure_step(model, opt)


def test_a_gradient_set_to_none_leaves_its_parameter_out_of_the_step():
    model = make_net()
    opt = wrap(model)
    cure_step(model, opt)
    before = snapshot(model)
    loss, nat, adv = losses(model, *make_batch(1))
    opt.zero_grad()
    opt.backward(loss, natural=nat, adversarial=adv)
    model.conv.weight.grad = None
    opt.step()
    assert same_bits(model.conv.weight.detach(), before[0])
    assert not same_bits(model.head.weight.detach(), before[4])


def test_an_exception_drops_what_earlier_micro_batches_gave():
    model = make_net()
    opt = wrap(model)
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    _, nat, _ = losses(model, *make_batch(1))
    with pytest.raises(ZeroDivisionError), opt.score("natural"):
        nat.backward()  # the slot has this batch's gradient in it now
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="gradients of the natural loss"):
        opt.step()


def test_micro_batches_when_every_parameter_is_selected():
    """Then a second pass changes slots in place, and nothing but them."""
    w = nn.Parameter(torch.zeros(1, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.34)
    for c in ([3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [2.0, 0.0, 0.0]):
        loss = (w * torch.tensor(c)).sum()
        opt.backward(loss, natural=loss, adversarial=loss)
    opt.step()
    assert w.tolist() == [[-5.0, 0.0, 0.0]]


def test_a_gradient_that_lives_in_a_bucket_is_copied():
    """As DDP keeps them with gradient_as_bucket_view: the next backward pass overwrites it."""
    w = nn.Parameter(torch.zeros(1, 4))
    bucket = torch.zeros(10)

    def into_bucket(p):
        view = bucket[2:6].view(1, 4)
        if p.grad.data_ptr() != view.data_ptr():
            view.copy_(p.grad)
            p.grad = view

    w.register_post_accumulate_grad_hook(into_bucket)
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5, alpha=1.0)
    with opt.score("natural"):
        (w * torch.tensor([4.0, 3, 2, 1])).sum().backward()
    with opt.score("adversarial"):
        (w * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    w.sum().backward()
    opt.step()
    assert w.tolist() == [[-1.0, -1.0, 0.0, 0.0]]


# Clipping.


def test_clipping_sees_the_whole_gradient():
    model = make_net()
    opt = wrap(model, update_fraction=0.1)
    loss, nat, adv = losses(model, *make_batch())
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    opt.backward(loss, natural=nat, adversarial=adv)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    torch.testing.assert_close(
        norm, torch.linalg.vector_norm(torch.cat([g.flatten() for g in want]))
    )
    opt.step()


# Sparse gradients.


def test_a_sparse_embedding_outside_the_selection():
    embedding = nn.Embedding(6, 4, sparse=True)
    head = nn.Linear(4, 3)
    groups = [
        {"params": list(embedding.parameters()), "rgp_select": False},
        {"params": list(head.parameters())},
    ]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1), update_fraction=0.5)
    start = embedding.weight.detach().clone()
    for _ in range(2):
        nat = head(embedding(torch.tensor([1, 2]))).square().sum()
        adv = head(embedding(torch.tensor([1, 3]))).square().sum()
        opt.zero_grad()
        opt.backward(natural=nat, adversarial=adv)
        opt.step()
    moved = (embedding.weight != start).any(1)
    assert moved.tolist() == [False, True, True, True, False, False]


def test_named_parameters_keep_their_names_through_a_checkpoint():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(rgp_param_groups(model), lr=0.1))
    opt.load_state_dict(disk(opt.state_dict()))
    tracker = opt.track_updates()
    cure_step(model, opt)
    assert set(tracker.last()) == {name for name, _ in model.named_parameters()}


# Refusals: each names the argument, the rule, what was found, and the way out.


def scored_twice(opt, model):
    with opt.score("natural"):
        with opt.score("adversarial"):
            pass


def score_without_backward(opt, model):
    with opt.score("natural"):
        pass


def score_without_second_backward(opt, model):
    _, nat, _ = losses(model, *make_batch())
    with opt.score("natural"):
        nat.backward()
    with opt.score("natural"):  # the slot is in .grad, but nothing was added
        pass


def score_by_autograd_grad(opt, model):
    _, nat, _ = losses(model, *make_batch())
    with opt.score("natural"):
        torch.autograd.grad(nat, list(model.parameters()))


def step_inside(opt, model):
    with opt.score("natural"):
        opt.step()


def zero_grad_inside(opt, model):
    with opt.score("natural"):
        opt.zero_grad()


def step_unscored(opt, model):
    losses(model, *make_batch())[0].backward()
    opt.step()


def step_half_scored(opt, model):
    loss, nat, _ = losses(model, *make_batch())
    with opt.score("natural"):
        nat.backward(retain_graph=True)
    loss.backward()
    opt.step()


def step_after_zero_grad(opt, model):
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    opt.zero_grad()
    losses(model, *make_batch())[0].backward()
    opt.step()


def step_without_a_loss(opt, model):
    _, nat, adv = losses(model, *make_batch())
    with opt.score("natural"):
        nat.backward()
    with opt.score("adversarial"):
        adv.backward()
    opt.step()


def step_after_zero_grad_between(opt, model):
    loss, nat, adv = losses(model, *make_batch())
    with opt.score("natural"):
        nat.backward(retain_graph=True)
    with opt.score("adversarial"):
        adv.backward(retain_graph=True)
    opt.zero_grad()
    loss.backward()
    opt.step()


def step_twice(opt, model):
    cure_step(model, opt)
    opt.step()


def bad_fraction_later(opt, model):
    opt.param_groups[0]["rgp_update_fraction"] = -1
    cure_step(model, opt)


def bad_select(opt, model):
    opt.param_groups[0]["rgp_select"] = "all"
    cure_step(model, opt)


def backward(**kinds):
    def run(opt, model):
        loss, nat, adv = losses(model, *make_batch())
        made = {"loss": loss, "natural": nat, "adversarial": adv}
        made |= {name: change(made[name]) for name, change in kinds.items()}
        opt.backward(made["loss"], natural=made["natural"], adversarial=made["adversarial"])

    return run


def sparse(opt, model):
    w = nn.Parameter(torch.zeros(3, 2))
    opt.add_param_group({"params": [w]})
    loss = F.embedding(torch.tensor([1]), w, sparse=True).sum()
    opt.backward(natural=loss, adversarial=loss)


def sparse_training_gradient(opt, model):
    w = nn.Parameter(torch.zeros(3, 2))
    opt.add_param_group({"params": [w]})
    loss = F.embedding(torch.tensor([1]), w, sparse=True).sum()
    opt.backward(loss, natural=w.sum(), adversarial=w.sum())
    opt.step()


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda o, m: o.score("clean"), ValueError, "`role` should be one of 'natural', 'adv"),
        (scored_twice, RuntimeError, "`adversarial` should be scored outside any other scoring"),
        (score_without_backward, RuntimeError, "no parameter received a gradient. Call `.backw"),
        (score_without_second_backward, RuntimeError, "no parameter received a gradient"),
        (score_by_autograd_grad, RuntimeError, "not `torch.autograd.grad`"),
        (step_inside, RuntimeError, r"`step\(\)` should be called outside scoring blocks"),
        (zero_grad_inside, RuntimeError, r"`zero_grad\(\)` should be called outside scoring"),
        (step_unscored, RuntimeError, "the gradients of the natural loss, and none were taken"),
        (step_half_scored, RuntimeError, "the gradients of the adversarial loss, and none"),
        (step_after_zero_grad, RuntimeError, r"After `zero_grad\(\)` and before `step\(\)`, call"),
        (
            step_after_zero_grad_between,
            RuntimeError,
            r"After `zero_grad\(\)` and before `step\(\)`",
        ),
        (step_without_a_loss, RuntimeError, "are scored, but no parameter has a gradient to step"),
        (step_twice, RuntimeError, "since the last step or zero_grad"),
        (bad_fraction_later, ValueError, "`rgp_update_fraction` should be in .* a param group"),
        (bad_select, TypeError, "`rgp_select` should be None"),
        (backward(loss=lambda t: t.item()), TypeError, "`loss` should be a scalar tensor. Found"),
        (backward(natural=lambda t: t.detach()), ValueError, "`natural` should carry a graph"),
        (backward(adversarial=lambda t: t.repeat(2)), ValueError, "`adversarial` should be a sc"),
        (sparse, TypeError, "`gradient of the natural loss` should be dense.*'rgp_select'"),
        (sparse_training_gradient, TypeError, "`grad` should be dense.*'rgp_select': False"),
    ],
)
def test_refusals_in_use(act, error, message):
    model = make_net()
    opt = wrap(model)
    start = snapshot(model)
    with pytest.raises(error, match=message):
        act(opt, model)
    if act is not step_twice:
        assert_same_values(start, snapshot(model))
    cure_step_after(opt, model, act)


def cure_step_after(opt, model, act):
    """Whatever was refused, training goes on once the cause is gone."""
    if act in (bad_fraction_later, bad_select):
        opt.param_groups[0].update(rgp_update_fraction=0.3, rgp_select=None)
    cure_step(model, opt)


P = [nn.Parameter(torch.zeros(2, 2, device=DEVICE))]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD),
            TypeError,
            r"`optimizer` should be an instance, not a class. Found `the class SGD`. Write",
        ),
        (lambda: RGPSelectiveOptimizer(P), TypeError, "`optimizer` should be a torch.optim.Opt"),
        (lambda: RGPSelectiveOptimizer(torch.optim.LBFGS(P)), TypeError, "LBFGS evaluates its"),
        (
            lambda: RGPSelectiveOptimizer(RGPSelectiveOptimizer(torch.optim.SGD(P))),
            TypeError,
            "not be wrapped already",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), update_fraction=30),
            ValueError,
            r"`update_fraction` should be in \[0, 1\]. Found .*= 30`. Conserving 30 % is update_",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), alpha="high"),
            TypeError,
            r"`alpha` should be a number in \[0, 1\]. Found `alpha: str 'high'`",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), scope="layer"),
            ValueError,
            "`scope` should be one of 'tensor', 'global'. Found `scope = 'layer'`",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), conserve="all"),
            ValueError,
            "`conserve` should be one of 'weights', 'gradients', 'update'",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), score="taylor"),
            ValueError,
            "`score` should be one of 'rgp', .* Or pass a callable",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), backend="tpu"),
            ValueError,
            "`backend` should be one of 'auto', 'cpu', 'triton', 'torch'",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), seed=-1),
            ValueError,
            "`seed` should be an integer >= 0",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD([{"params": P, "rgp_alpha": 2}])),
            ValueError,
            r"`rgp_alpha` should be in \[0, 1\]. Found `rgp_alpha = 2`. It is a setting of a p",
        ),
    ],
)
def test_refusals_when_wrapping(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda s: 1.0, TypeError, "`score` should return a tensor. Found `float`"),
        (lambda s: s.natural.sum(), ValueError, "`score` should return the shape and device"),
        (lambda s: s.natural + 0j, TypeError, "`score` should have a real dtype"),
    ],
)
def test_refusals_of_score_rules(rule, error, message):
    model = make_net()
    opt = wrap(model, score=rule)
    start = snapshot(model)
    with pytest.raises(error, match=message):
        cure_step(model, opt)
    assert_same_values(start, snapshot(model))


# Memory that two tensors share.


class Twins(nn.Module):
    """Autograd gives both parameters one and the same gradient memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return (self.a.unsqueeze(0) + self.b.unsqueeze(0))[0] * x


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_gradients_that_share_memory(conserve):
    """Each parameter is treated as if it were alone."""
    model = Twins()
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), update_fraction=0.5, conserve=conserve
    )
    draw = seeded(1)
    for _ in range(3):
        x = torch.rand(3, 6, 5, generator=draw)
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        opt.backward(model(x[0]).sum(), natural=model(x[1]).sum(), adversarial=model(x[2]).sum())
        opt.step()
        score = to_numpy(0.1 * x[1] + 0.9 * x[2])
        chosen = from_numpy(numpy_topk(score, 15))
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), torch.where(chosen, old - 0.1 * x[0], old))


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_gradients_set_by_hand(conserve):
    """A loop may give one tensor to a score and to the step; the weights still come out right."""
    w = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
    start, g = w.detach().clone(), torch.tensor([[6.0, 1.0, 5.0], [2.0, 4.0, 3.0]])
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD([w], lr=1.0), update_fraction=0.5, conserve=conserve
    )
    for role in ("natural", "adversarial"):
        with opt.score(role):
            w.grad = g
    w.grad = g
    want = torch.where(g > 3.0, start - g, start)
    opt.step()
    torch.testing.assert_close(w.detach(), want)


def test_a_gradient_that_overlaps_itself_can_be_masked():
    w = nn.Parameter(torch.zeros(2, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([w], lr=1.0), update_fraction=0.5)
    for role, scale in (("natural", 1.0), ("adversarial", 2.0)):
        with opt.score(role):
            (w * scale * torch.arange(6.0).view(2, 3)).sum().backward()
    w.grad = torch.ones(()).expand(2, 3)
    opt.step()
    assert w.detach().flatten().tolist() == [0, 0, 0, -1, -1, -1]


# A default device that is not the model's.


@pytest.mark.parametrize("score", RULES)
def test_the_default_device_changes_nothing(score):
    """Nothing is made there: on "meta" no tensor has numbers."""
    ends = []
    for default in (DEVICE, torch.device("meta")):
        model, batches = make_net(), [make_batch(seed) for seed in range(3)]
        opt = RGPSelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            update_fraction=0.4,
            scope="global",
            score=score,
            refresh_every=2,
        )
        generator = seeded(0)
        with default:
            reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=1)
            tracker = opt.track_updates()
            for x, _, y in batches:
                x_adv = kl_attack(model, x, steps=2, generator=generator)
                x_adv = pgd_attack(model, x_adv, y, steps=1, generator=generator)
                logits, logits_adv = model(x), model(x_adv)
                nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
                opt.zero_grad()
                loss = kl_adv_loss(logits, logits_adv, y) + reviser(x, x_adv, logits, logits_adv)
                opt.backward(loss, natural=nat, adversarial=adv)
                opt.step()
                reviser.update()
                reviser.load_state_dict(copy.deepcopy(reviser.state_dict()))
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            counts = tracker.mean()
        ends.append((snapshot(model) + snapshot(reviser.model), counts))
    assert all(map(same_bits, ends[0][0], ends[1][0]))
    assert ends[0][1] == ends[1][1]


# A kept mask, and steps that do not count.


def scored_step(model, opt, seed):
    """A loop that asks `needs_scores`; returns whether it scored."""
    loss, nat, adv = losses(model, *make_batch(seed))
    wanted = opt.needs_scores
    opt.zero_grad()
    if wanted:
        with opt.score("natural"):
            nat.backward(retain_graph=True)
        with opt.score("adversarial"):
            adv.backward(retain_graph=True)
    loss.backward()
    opt.step()
    return wanted


def moved(model, before):
    return [p.detach() != old for p, old in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("step", [scored_step, cure_step])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_refresh_every_keeps_the_masks(step, scope):
    """Steps 0, 3, 6 select; what moves in between is what was selected there."""
    model = make_net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.3, refresh_every=3, scope=scope)
    masks = []
    for seed in range(9):
        assert opt.needs_scores == (seed % 3 == 0)
        before = snapshot(model)
        step(model, opt, seed)
        masks.append(moved(model, before)[0])
    for first in (0, 3, 6):
        assert 0 < masks[first].sum() < masks[first].numel()
        for later in masks[first + 1 : first + 3]:
            assert torch.equal(later, masks[first])
    assert not torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[3], masks[6])


def test_refresh_every_skips_the_scoring_passes():
    """`backward` runs one pass where the masks are kept: a hook on a parameter counts."""
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), refresh_every=2)
    passes = []
    model.conv.weight.register_post_accumulate_grad_hook(lambda p: passes.append(0))
    counts = []
    for seed in range(4):
        passes.clear()
        cure_step(model, opt, seed)
        counts.append(len(passes))
    assert counts == [3, 1, 3, 1]


def test_scores_taken_without_need_are_used():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), refresh_every=4)
    cure_step(model, opt, 0)
    assert not opt.needs_scores
    loss, nat, adv = losses(model, *make_batch(1))
    opt.zero_grad()
    for role, each in (("natural", nat), ("adversarial", adv)):
        with opt.score(role):
            each.backward(retain_graph=True)
    score = 0.1 * opt._rgp.slots.gradients("natural")[model.head.weight].abs()
    score += 0.9 * opt._rgp.slots.gradients("adversarial")[model.head.weight].abs()
    before = snapshot(model)
    loss.backward()
    opt.step()
    k = round(0.7 * score.numel())
    assert (to_numpy(moved(model, before)[-2]) <= numpy_topk(to_numpy(score), k)).all()


def test_new_settings_or_parameters_need_new_scores():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), refresh_every=9)
    cure_step(model, opt)
    assert not opt.needs_scores
    opt.param_groups[0]["rgp_alpha"] = 0.2
    assert opt.needs_scores
    opt.param_groups[0]["rgp_alpha"] = 0.1
    assert not opt.needs_scores
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    assert opt.needs_scores


def test_a_late_parameter_is_conserved_until_the_next_refresh():
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD([a, b], lr=0.1), refresh_every=2, update_fraction=0.5
    )
    tracker = opt.track_updates()
    loss = (a * torch.arange(1.0, 5.0).view(2, 2)).sum()
    opt.backward(loss, natural=loss, adversarial=loss)
    opt.step()
    opt.zero_grad()
    (a.sum() + b.sum()).backward()
    opt.step()
    assert torch.equal(b.detach(), torch.ones(2, 2))
    assert a.detach().flatten().tolist() == pytest.approx([1, 1, 0.6, 0.5])
    assert list(tracker.last().values()) == [0.5, 0.0]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_kept_masks_resume_bit_for_bit(at):
    """Interrupted within a window of three steps, through a file."""

    def build(model):
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return RGPSelectiveOptimizer(inner, update_fraction=0.3, refresh_every=3)

    straight = make_net()
    opt = build(straight)
    saved = None
    for seed in range(7):
        if seed == at:
            saved = disk({"model": straight.state_dict(), "opt": opt.state_dict()})
        cure_step(straight, opt, seed)
    resumed = make_net(seed=5)
    opt = build(resumed)
    resumed.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    for seed in range(at, 7):
        cure_step(resumed, opt, seed)
    assert all(map(same_bits, snapshot(straight), snapshot(resumed)))
    plain = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(saved["opt"])  # what is ours there does no harm


def test_copies_keep_the_masks():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), refresh_every=3)
    cure_step(model, opt)
    both = copy.deepcopy((model, opt))
    assert not both[1].needs_scores
    for each in ((model, opt), both):
        cure_step(*each, 1)
    assert all(map(same_bits, snapshot(model), snapshot(both[0])))


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_refresh_every_is_a_count(n):
    with pytest.raises((TypeError, ValueError), match="`refresh_every` should be an integer >= 1"):
        RGPSelectiveOptimizer(torch.optim.SGD(P), refresh_every=n)


def test_a_step_at_rest_is_not_counted():
    """Checkpointing tools step with all learning rates 0; draws must not depend on it."""
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), score="random")
    tracker = opt.track_updates()
    plain_step(model, opt)
    assert opt.param_groups[0]["rgp_step"] == 0
    assert tracker.last() == {}
    loss = losses(model, *make_batch())[1]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.0))
    with opt.score("natural"):
        loss.backward()
    model(make_batch()[0]).sum().backward()
    opt.step()  # half scored: passed on, and nothing is left for the next window
    assert opt._rgp.slots.empty


def test_the_inner_optimizer_must_not_step_by_itself():
    model = make_net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = RGPSelectiveOptimizer(inner)
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"Call the step\(\) of the RGPSelectiveOptimizer"):
        inner.step()
    assert all(map(same_bits, snapshot(model), before))
    opt.step()
    inner.step()  # nothing is scored: the user's own affair


def test_weights_stay_when_masking_fails(monkeypatch):
    """What was saved by then is not put back: it may not have been saved yet."""
    model = make_net()
    opt = wrap(model, backend="torch")
    loss, nat, adv = losses(model, *make_batch())
    opt.backward(loss, natural=nat, adversarial=adv)
    before = snapshot(model)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("rgp_optim._reference.Selection.apply_", fail)
    with pytest.raises(MemoryError):
        opt.step()
    assert all(map(same_bits, snapshot(model), before))
    assert opt._rgp.slots.empty


def test_lazy_parameters_can_be_wrapped_before_the_first_forward():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.rand(5, 7), torch.tensor([0, 1, 2, 0, 1])
    loss = F.cross_entropy(model(x), y)
    opt.backward(loss, natural=loss, adversarial=loss)
    opt.step()


def test_names_of_two_models_are_told_apart():
    groups = [g for m in (make_net(), make_net()) for g in rgp_param_groups(m)]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1))
    names = list(opt._names().values())
    assert len(set(names)) == len(names) == 12
    assert names[0] == "group0.conv.weight"


def test_repr_names_the_inner_optimizer_and_the_settings():
    shown = repr(RGPSelectiveOptimizer(torch.optim.AdamW(P), scope="global"))
    assert "AdamW" in shown
    assert "scope='global'" in shown


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"update_fraction": 0.2}, ValueError, "`update_fraction`. Write 'rgp_update_fraction'"),
        ({"select": False}, ValueError, "`param_groups` should name its .* Write 'rgp_select'"),
        ({"rgp_fraction": 0.2}, ValueError, "settings that exist. Found `rgp_fraction`. Known are"),
        ({"rgp_step": -1}, ValueError, "`rgp_step` should be an integer >= 0"),
        ({"rgp_step": 1.5}, TypeError, "`rgp_step` should be an integer >= 0"),
        ({"rgp_step": None}, TypeError, "`rgp_step` should be an integer >= 0"),
    ],
)
def test_settings_that_a_group_cannot_have_are_refused_before_anything_moves(wrong, error, message):
    model = make_net()
    with pytest.raises(error, match=message):
        RGPSelectiveOptimizer(torch.optim.SGD([{"params": [*model.parameters()], **wrong}]))
    opt = wrap(model)
    cure_step(model, opt)
    weights, saved = snapshot(model), copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], **wrong})
    bad = copy.deepcopy(saved)
    bad["param_groups"][0] |= wrong
    with pytest.raises(error, match=message):
        opt.load_state_dict(bad)
    assert opt.state_dict()["param_groups"] == saved["param_groups"]
    opt.param_groups[0].update(wrong)
    with pytest.raises(error, match=message):
        cure_step(model, opt)
    assert all(map(same_bits, snapshot(model), weights))


def test_the_inner_optimizers_own_alpha_is_no_setting_of_ours():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.RMSprop(model.parameters(), alpha=0.9))
    cure_step(model, opt)
    assert opt.param_groups[0]["alpha"] == 0.9
