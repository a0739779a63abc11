"""RGPSelectiveOptimizer as a torch.optim.Optimizer: schedulers, hooks, copies, closures."""

import copy
import pickle

import pytest
import torch
from common import DEVICE, INNER, Run, make_net, same, same_bits, sgd, step_on, train, wrap
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rgp_optim import RGPSelectiveOptimizer

CONSERVE = ["weights", "gradients", "update"]


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


# An optimizer like any other.


def test_it_is_the_inner_optimizer_to_whoever_looks():
    opt = Run(scope="global").opt
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.step.__self__ is opt  # schedulers want a bound method
    assert opt._step_supports_amp_scaling is False
    assert not hasattr(opt, "momentum")
    assert opt.masks() == {}
    assert "rgp_update_fraction: 0.3" in repr(opt)
    new_group = {**opt.param_groups[0], "lr": 7.0}
    for name, new in {"param_groups": [new_group], "state": {}, "defaults": {"lr": 1.0}}.items():
        assert getattr(opt, name) is getattr(opt.inner, name)
        setattr(opt, name, new)
        assert getattr(opt.inner, name) is new


def test_an_optimizer_that_has_stepped_already_can_be_wrapped():
    run, plain = (Run("AdamW", plain=True) for _ in range(2))
    train(1, run, plain)
    run.opt = RGPSelectiveOptimizer(run.opt, update_fraction=1.0)
    train(2, run, plain)
    assert same(run, plain)


def test_a_proxy_with_a_dict_of_its_own_shares_the_state():
    """Trainers subclass the optimizer's class on the fly and copy its ``__dict__``."""

    run, reference = Run(), Run()
    step = {"step": lambda _, closure=None, original=run.opt: original.step(closure)}
    proxy = object.__new__(type("Proxied", (RGPSelectiveOptimizer,), step))
    proxy.__dict__ = {k: v for k, v in run.opt.__dict__.items() if k != "step"}
    run.opt = proxy
    for each in (run, reference):
        each.opt.param_groups[0]["rgp_update_fraction"] = 0.5
    train(2, run, reference)
    assert same(run, reference)
    assert run.opt.masks()[run.model.conv.weight].float().mean() == 0.5


def both(optimizer):
    return [lrs.ConstantLR(optimizer, 0.1, 2), lrs.ExponentialLR(optimizer, 0.9)]


SCHEDULERS = {  # one of each way to change a group
    lrs.LambdaLR: [lambda t: 0.9**t],
    lrs.LinearLR: [0.5, 1.0, 3],
    lrs.CosineAnnealingWarmRestarts: [2],
    lrs.CyclicLR: [0.01, 0.1, 2],
    lrs.OneCycleLR: [0.1, 6],
    lrs.ReduceLROnPlateau: ["min", 0.1, 0],
    torch.optim.swa_utils.SWALR: [0.01, 3],
    lambda optimizer: lrs.SequentialLR(optimizer, both(optimizer), [2]): [],
    lambda optimizer: lrs.ChainedScheduler(both(optimizer)): [],
}


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize(("make", "options"), SCHEDULERS.items())
def test_every_scheduler_reaches_the_inner_optimizer(make, options, on):
    run, plain = Run(update_fraction=1.0), Run(plain=True)
    scheduled = run.opt if on == "wrapper" else run.opt.inner
    schedulers = [make(each, *options) for each in (scheduled, plain.opt)]
    metrics = [1.0] if make is lrs.ReduceLROnPlateau else []
    for seed in range(5):
        run.step(seed)
        plain.step(seed)
        for scheduler in schedulers:
            scheduler.step(*metrics)
        for name in ("lr", "momentum"):
            assert run.opt.param_groups[0][name] == plain.opt.param_groups[0][name]
    assert same(run, plain)


def test_hooks_of_the_wrapper_and_of_the_inner_optimizer_run():
    run, seen = Run(), []
    opt = run.opt
    for name, optimizer in {"wrapper": opt, "inner": opt.inner}.items():
        optimizer.register_step_pre_hook(lambda *_, n=name: seen.append(f"before {n}"))
        optimizer.register_step_post_hook(lambda *_, n=name: seen.append(f"after {n}"))
    opt.register_state_dict_pre_hook(lambda _: seen.append("save"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: seen.append(f"load {state['note']}"))
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    every = register_optimizer_step_pre_hook(lambda o, *_: seen.append(type(o).__name__))
    run.step()
    every.remove()
    opt.load_state_dict(opt.state_dict())
    before = ["RGPSelectiveOptimizer", "before wrapper", "SGD", "before inner"]
    assert seen == [*before, "after inner", "after wrapper", "save", "load 1", "loaded"]


def test_a_hook_after_the_inner_step_cannot_move_a_conserved_weight():
    run = Run(update_fraction=0.0)
    weight = run.model.conv.weight
    run.opt.inner.register_step_post_hook(lambda *_: weight.data.add_(1))
    run.step()
    assert same_bits(weight.detach(), run.start[0])


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", [list, iter, "tensor"])
def test_add_param_group(form, named):
    model, extra = make_net(), parameter(2, 5)
    opt = wrap(list(model.named_parameters() if named else model.parameters()), sgd(0.1))
    opt.load_state_dict(opt.state_dict())
    added = ("extra", extra) if named else extra
    if named and form == "tensor":  # refused by torch as well
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group({"params": added})
        return
    added = added if form == "tensor" else form([added])
    opt.add_param_group({"params": added, "rgp_update_fraction": 0.5})
    assert opt.param_groups[1]["rgp_alpha"] == 0.1
    assert opt.param_groups[1].get("param_names") == (["extra"] if named else None)
    step_on(opt, extra.sum())
    assert (extra != 0).reshape(-1).tolist() == [True] * 5 + [False] * 5


def test_groups_and_parameters_that_are_set_later():
    """By the inner optimizer, by assignment, or by tools that shard or cast a model."""
    run, reference = Run(), Run()
    run.opt.inner.add_param_group({"params": [parameter(2, 2)]})
    train(1, run, reference)
    assert run.opt.param_groups[1]["rgp_update_fraction"] == 0.3
    for each in (run, reference):
        each.opt.state.clear()
    run.model.head.weight = nn.Parameter(run.model.head.weight.detach().clone())
    group = {**run.opt.param_groups[0], "params": list(run.model.parameters())}
    del group["rgp_alpha"]
    run.opt.param_groups = [group]
    train(2, run, reference)
    assert same(run, reference)


# Attributes, and methods of the inner optimizer.


def test_settings_are_attributes_that_hold_for_all_groups():
    run = Run()
    opt = run.opt
    opt.add_param_group({"params": [parameter(2, 5)]})
    assert (opt.update_fraction, opt.alpha) == (0.3, 0.1)
    opt.param_groups[0]["alpha"] = 0.9  # as of RMSprop and ASGD
    opt.update_fraction, opt.alpha = 0.5, 0.7
    assert opt.param_groups[0]["alpha"] == 0.9
    opt.add_param_group({"params": [parameter(2, 5)]})
    assert [g["rgp_update_fraction"] for g in opt.param_groups] == [0.5] * 3
    assert [g["rgp_alpha"] for g in opt.param_groups] == [0.7] * 3
    run.step()
    assert opt.masks()[run.model.conv.weight].float().mean() == 0.5
    opt.param_groups[1]["rgp_alpha"] = 0.2
    with pytest.raises(ValueError, match="`rgp_alpha` should be the same in all groups"):
        _ = opt.alpha
    for name, value in (("alpha", 2), ("update_fraction", -0.1)):
        with pytest.raises(ValueError, match=rf"`{name}` should be in \[0, 1\]"):
            setattr(opt, name, value)
    for name in ("scope", "conserve", "score", "backend", "process_group", "inner"):
        with pytest.raises(AttributeError):
            setattr(opt, name, getattr(opt, name))


def named(name, **members):
    """A class of optimizers with this name."""
    return type(name, (torch.optim.SGD,), members)


def test_methods_of_the_inner_optimizer_are_found_unless_they_step():
    """As of schedule-free optimizers, whose `train` and `eval` move weights."""
    names = ("eval", "train", "sync_lookahead", "second_step", "_private")
    methods = {name: lambda self, name=name: self.calls.append(name) for name in names}
    opt = Run(named("Modes", calls=[], **methods)).opt
    opt.eval()
    opt.train()
    opt.sync_lookahead()
    assert opt.inner.calls == ["eval", "train", "sync_lookahead"]
    for name in ("second_step", "_private", "calls"):
        assert not hasattr(opt, name)
    assert not hasattr(Run().opt, "train")


# Copies.


COPIES = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_copies_go_on_alike_and_apart(copied, scheduled):
    run, seen = Run(scope="global", conserve="update"), []
    if scheduled:
        lrs.StepLR(run.opt, 2)
    run.step()
    twin = copied(run)
    assert twin.opt.inner is not run.opt.inner
    for name in ("scope", "conserve", "backend"):
        assert getattr(twin.opt, name) == getattr(run.opt, name)
    assert twin.opt.param_groups[0]["params"][0] is twin.model.conv.weight
    assert all(map(torch.equal, twin.opt.masks().values(), run.opt.masks().values()))
    twin.mark()
    run.step(1)
    assert twin.stays()
    twin.step(1)
    assert same(run, twin)
    assert not twin.stays()
    lrs.StepLR(twin.opt, 2)
    twin.opt.register_step_post_hook(lambda *_: seen.append(1))
    run.step(2)  # unpickling has not disturbed the original
    assert not seen
    twin.step(2)
    assert seen == [1]


@pytest.mark.parametrize("copied", [lambda run: run, *COPIES])
def test_the_inner_optimizer_must_not_step_past_waiting_scores(copied):
    """Nor that of a copy made between backward and step, which has the scores."""
    twin = copied(Run())
    for _ in range(2):  # the copy, then a copy of it
        twin.backward()
        twin = copied(twin)
        twin.mark()
        with pytest.raises(RuntimeError, match=r"Call step\(\) of the RGPSelectiveOptimizer"):
            twin.opt.inner.step()
        assert twin.stays()
        for p in twin.model.parameters():  # copies of parameters have no gradient
            p.grad = torch.ones_like(p)
        twin.opt.step()
        assert not twin.stays()
        twin.opt.inner.step()  # nothing is scored: the user's own affair


def test_lazy_parameters_can_be_wrapped_before_the_first_forward():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    step_on(wrap(model), model(torch.rand(5, 7)).square().mean())


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_default_device_changes_nothing(scope):
    """Nothing is made there: on "meta" no tensor has numbers."""
    runs = [Run(scope=scope) for _ in range(2)]
    for run, default in zip(runs, (DEVICE, torch.device("meta")), strict=True):
        with default:
            for seed in range(2):
                run.step(seed)
                run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    assert same(*runs)


def test_a_gradient_set_to_none_leaves_its_parameter_out_of_the_step():
    run = Run()
    run.backward()
    run.model.conv.weight.grad = None
    run.opt.step()
    assert [bool(m.any()) for m in run.moved()][::4] == [False, True]
    assert list(run.opt.masks()) == [run.model.head.weight]


# Closures.


class Polyak(torch.optim.SGD):
    """The step size comes from the loss that the closure returns."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = 1.0 if closure is None else float(closure())
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * loss * 0.1)


class Needs(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def closure_of(run, calls):
    def closure():
        calls.append(1)
        return run.backward()

    return closure


@pytest.mark.parametrize("make", [Polyak, Needs, INNER["SGD"]])
def test_a_closure_is_evaluated_once_and_its_loss_handed_on(make):
    run, plain, calls = Run(make, update_fraction=1.0), Run(make, plain=True), []
    for _ in range(2):
        with torch.no_grad():
            loss = run.opt.step(closure_of(run, calls))
        want = plain.backward()
        plain.opt.step(lambda want=want: want)
        assert torch.equal(loss, want)
    assert calls == [1, 1]
    assert same(run, plain)


class Perturbs(torch.optim.SGD):
    """Wants the gradient at other weights."""

    through_data = undoes = False

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            (p.data if self.through_data else p).add_(0.1)
        try:
            with torch.enable_grad():
                closure()
        finally:
            for p in self.param_groups[0]["params"] if self.undoes else ():
                p.sub_(0.1)
        return super().step()


@pytest.mark.parametrize("undoes", [False, True])
@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("conserve", CONSERVE)
def test_a_closure_is_not_evaluated_at_other_weights(conserve, through_data, undoes):
    run = Run(Perturbs, conserve=conserve)
    run.opt.inner.through_data, run.opt.inner.undoes = through_data, undoes
    with pytest.raises(RuntimeError, match=r"called the closure again.*SAM\(params, lambda"):
        run.opt.step(closure_of(run, []))
    assert run.stays()


def test_a_step_that_needs_a_closure():
    run = Run(Needs)
    run.backward()
    grads = [p.grad.clone() for p in run.model.parameters()]
    with pytest.raises(TypeError, match="`closure` should be given"):
        run.opt.step()
    assert run.stays()
    assert same([p.grad for p in run.model.parameters()], grads)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) around an optimizer it builds."""

    def __init__(self, params, make):
        super().__init__(params, {})
        self.base = make(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        params = self.param_groups[0]["params"]
        self.shifts = [0.05 * p.grad / p.grad.norm() for p in params]
        torch._foreach_add_(params, self.shifts)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        torch._foreach_sub_(self.param_groups[0]["params"], self.shifts)
        self.base.step()


def test_sam_goes_around_the_wrapper():
    run = Run(lambda params: Sam(params, wrap), plain=True)
    with pytest.raises(TypeError, match=r"take one gradient per step.*SAM\(params, lambda g"):
        RGPSelectiveOptimizer(run.opt)
    run.backward()
    sam, run.opt = run.opt, run.opt.base
    sam.first_step()
    run.backward()
    sam.second_step()
    for p, mask in run.opt.masks().items():
        assert int(mask.sum()) == round(0.3 * p.numel())


# What cannot work is refused before anything has changed.


class Prepared(torch.optim.SGD):
    """As Accelerate's, which does not call the constructor of its base class."""

    def __init__(self, params):
        self.param_groups = [{"params": params}]


SGD = sgd()


def in_group(**settings):
    return lambda p: SGD([{"params": p, **settings}])


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            lambda p: torch.optim.SGD,
            {},
            TypeError,
            r"not a class.*Write RGPSelectiveOptimizer\(SGD",
        ),
        (
            lambda p: p,
            {},
            TypeError,
            "`optimizer` should be an instance of torch.optim.Opt.* `list`",
        ),
        (lambda p: wrap(p, SGD), {}, TypeError, "not be wrapped already"),
        (torch.optim.LBFGS, {}, TypeError, "evaluate its closure once.*Use a first-order"),
        (named("SGDScheduleFreeClosure"), {}, TypeError, "evaluate its closure once.*Use a first"),
        (named("ZeroRedundancyOptimizer"), {}, TypeError, "whole state.*fully_shard"),
        (Prepared, {}, TypeError, "have step hooks.*Wrap your own optimizer, then prepare"),
        (sgd(differentiable=True), {}, ValueError, "`differentiable` should be False"),
        (SGD, {"update_fraction": 30}, ValueError, r"in \[0, 1\]. Found .*= 30`. Conserving 30 %"),
        (SGD, {"alpha": "high"}, TypeError, r"`alpha` should be a number in \[0, 1\]. .*'high'"),
        (SGD, {"scope": "layer"}, ValueError, "`scope` should be one of 'tensor', 'global'"),
        (SGD, {"conserve": "all"}, ValueError, "`conserve` should be one of 'weights', 'grad"),
        (SGD, {"score": "taylor"}, ValueError, "`score` should be one of 'rgp'.* Or pass a call"),
        (SGD, {"backend": "tpu"}, ValueError, "`backend` should be one of 'auto', 'cpu', 'trit"),
        (in_group(rgp_alpha=2), {}, ValueError, r"`rgp_alpha` should be in \[0, 1\]. .* = 2`"),
        (in_group(update_fraction=0.2), {}, ValueError, "`update_fraction`. Write 'rgp_upd"),
    ],
)
def test_refusals_when_wrapping(make, options, error, message):
    inner = make(list(make_net().parameters()))
    groups = getattr(inner, "param_groups", [])
    keys = [list(group) for group in groups]
    with pytest.raises(error, match=message):
        RGPSelectiveOptimizer(inner, **options)
    assert [list(group) for group in groups] == keys
    assert not getattr(inner, "_optimizer_step_pre_hooks", None)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"select": False}, ValueError, "`param_groups` should name its .* Write 'rgp_select'"),
        ({"rgp_fraction": 0.2}, ValueError, "settings that exist. Found `rgp_fraction`. Known are"),
        ({"rgp_update_fraction": -1}, ValueError, r"in \[0, 1\].*to conserve 30 %, write 0.7"),
        ({"rgp_update_fraction": True}, TypeError, "`rgp_update_fraction` should be a number"),
        ({"rgp_alpha": float("nan")}, ValueError, r"`rgp_alpha` should be in \[0, 1\]"),
        ({"rgp_alpha": torch.tensor(0.5)}, TypeError, "`rgp_alpha` should be a number"),
        ({"rgp_select": 1}, TypeError, "`rgp_select` should be None"),
    ],
)
def test_settings_that_a_group_cannot_have_are_refused_before_anything_moves(wrong, error, message):
    run = Run()
    opt = run.opt
    run.step()
    run.mark()
    saved = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(saved)
    bad["param_groups"][0] |= {"lr": 99.0, **wrong}
    for act in (
        lambda: opt.add_param_group({"params": [parameter(1)], **wrong}),
        lambda: opt.load_state_dict(bad),
    ):
        with pytest.raises(error, match=message):
            act()
        assert opt.state_dict()["param_groups"] == saved["param_groups"]
    opt.param_groups[0].update(wrong)
    with pytest.raises(error, match=message):
        run.step()
    assert run.stays()
