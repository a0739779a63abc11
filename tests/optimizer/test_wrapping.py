"""RGPSelectiveOptimizer as a torch.optim.Optimizer: schedulers, hooks, copies, closures."""

import copy
import io
import pickle

import pytest
import torch
from common import (
    DEVICE,
    INNER,
    backward,
    cure_step,
    losses,
    make_batch,
    make_net,
    moved,
    plain_step,
    same_bits,
    snapshot,
)
from torch import nn
from torch.optim import lr_scheduler as lrs
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rgp_optim import RGPSelectiveOptimizer, rgp_param_groups


def wrap(model, make_inner=None, **options):
    make_inner = make_inner or INNER["SGD momentum wd"]
    inner = make_inner(model.parameters())
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.3, **options})


def same(model, want):
    want = snapshot(want) if isinstance(want, nn.Module) else want
    return all(map(same_bits, snapshot(model), want))


def scored_batch(model, opt, seed=0):
    loss, nat, adv = losses(model, *make_batch(seed))
    backward(opt, loss, natural=nat, adversarial=adv)


# An optimizer like any other.


def test_it_is_the_inner_optimizer_to_whoever_looks():
    model = make_net()
    opt = wrap(model, scope="global")
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.step.__self__ is opt  # schedulers want a bound method
    assert opt._step_supports_amp_scaling is False
    assert not hasattr(opt, "momentum")
    for shown in ("rgp_update_fraction: 0.3", "SGD", "scope='global'"):
        assert shown in repr(opt)
    for name, new in (
        ("param_groups", [{**opt.param_groups[0], "lr": 7.0}]),
        ("state", {}),
        ("defaults", {"lr": 1.0}),
    ):
        assert getattr(opt, name) is getattr(opt.inner, name)
        setattr(opt, name, new)
        assert getattr(opt.inner, name) is new


def test_an_optimizer_that_has_stepped_already_can_be_wrapped():
    model, other = make_net(), make_net()
    inner, reference = (INNER["AdamW"](m.parameters()) for m in (model, other))
    plain_step(model, inner)
    plain_step(other, reference)
    cure_step(model, RGPSelectiveOptimizer(inner, update_fraction=1.0), 1)
    plain_step(other, reference, 1)
    assert same(model, other)


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
    proxy.param_groups[0]["rgp_update_fraction"] = 0.5
    reference.param_groups[0]["rgp_update_fraction"] = 0.5
    for seed in range(2):
        cure_step(model, proxy, seed)
        cure_step(other, reference, seed)
    assert same(model, other)
    assert proxy.masks()[model.conv.weight].float().mean() == 0.5


def two(optimizer):
    return [lrs.ConstantLR(optimizer, 0.1, 2), lrs.ExponentialLR(optimizer, 0.9)]


SCHEDULERS = {
    lrs.LambdaLR: [lambda t: 0.9**t],
    lrs.MultiplicativeLR: [lambda t: 0.9],
    lrs.StepLR: [2],
    lrs.MultiStepLR: [[1, 3]],
    lrs.ConstantLR: [0.5, 2],
    lrs.LinearLR: [0.5, 1.0, 3],
    lrs.ExponentialLR: [0.9],
    lrs.PolynomialLR: [5],
    lrs.CosineAnnealingLR: [5],
    lrs.CosineAnnealingWarmRestarts: [2],
    lrs.CyclicLR: [0.01, 0.1, 2],
    lrs.OneCycleLR: [0.1, 6],
    lrs.ReduceLROnPlateau: ["min", 0.1, 0],
    torch.optim.swa_utils.SWALR: [0.01, 3],
    lambda optimizer: lrs.SequentialLR(optimizer, two(optimizer), [2]): [],
    lambda optimizer: lrs.ChainedScheduler(two(optimizer)): [],
}


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@pytest.mark.parametrize(("make", "options"), SCHEDULERS.items())
def test_every_scheduler_reaches_the_inner_optimizer(make, options, on):
    model, other = make_net(), make_net()
    opt = wrap(model, update_fraction=1.0)
    reference = INNER["SGD momentum wd"](other.parameters())
    each = opt if on == "wrapper" else opt.inner
    schedulers = [make(each, *options), make(reference, *options)]
    for seed in range(5):
        cure_step(model, opt, seed)
        plain_step(other, reference, seed)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
        for name in ("lr", "momentum"):
            assert opt.param_groups[0][name] == reference.param_groups[0][name]
    assert same(model, other)


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


def test_global_step_hooks_run_for_the_wrapper_and_for_the_inner_optimizer():
    model, seen = make_net(), []
    opt = wrap(model)
    hook = register_optimizer_step_pre_hook(lambda o, *_: seen.append(type(o).__name__))
    cure_step(model, opt)
    hook.remove()
    assert seen == ["RGPSelectiveOptimizer", "SGD"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", [list, iter, "tensor"])
def test_add_param_group(form, named):
    model, extra = make_net(), nn.Parameter(torch.zeros(2, 5))
    params = list(model.named_parameters()) if named else list(model.parameters())
    opt = RGPSelectiveOptimizer(torch.optim.SGD(params, lr=0.1), update_fraction=0.3)
    opt.load_state_dict(opt.state_dict())
    added = [("extra", extra)] if named else [extra]
    added = added[0] if form == "tensor" else form(added)
    if named and form == "tensor":  # refused by torch as well
        with pytest.raises((TypeError, ValueError)):
            opt.add_param_group({"params": added})
        return
    opt.add_param_group({"params": added, "rgp_update_fraction": 0.5})
    assert opt.param_groups[1]["rgp_alpha"] == 0.1
    assert opt.param_groups[1].get("param_names") == (["extra"] if named else None)
    _, nat, adv = losses(model, *make_batch())
    backward(opt, natural=nat + extra.sum(), adversarial=adv + extra.sum())
    opt.step()
    assert (extra != 0).reshape(-1).tolist() == [True] * 5 + [False] * 5


def test_groups_and_parameters_that_are_set_later():
    """By the inner optimizer, by assignment, or by tools that shard or cast a model."""
    model, other = make_net(), make_net()
    opt, reference = wrap(model), wrap(other)
    opt.inner.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})
    cure_step(model, opt)
    assert opt.param_groups[1]["rgp_update_fraction"] == 0.3
    cure_step(other, reference)
    for each in (opt, reference):
        each.state.clear()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    opt.param_groups = [{**opt.param_groups[0], "params": list(model.parameters())}]
    del opt.param_groups[0]["rgp_alpha"]
    cure_step(model, opt, 1)
    cure_step(other, reference, 1)
    assert same(model, other)


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
        backward(opt, natural=nat, adversarial=adv)
        opt.step()
    moved = (embedding.weight != start).any(1)
    assert moved.tolist() == [False, True, True, True, False, False]


# Attributes, and methods of the inner optimizer.


def test_settings_are_attributes_that_hold_for_all_groups():
    model = make_net()
    opt = wrap(model)
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, 5))]})
    assert (opt.update_fraction, opt.alpha) == (0.3, 0.1)
    opt.update_fraction, opt.alpha = 0.5, 0.7
    assert [g["rgp_update_fraction"] for g in opt.param_groups] == [0.5, 0.5]
    assert [g["rgp_alpha"] for g in opt.param_groups] == [0.7, 0.7]
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2, 5))]})
    assert opt.param_groups[2]["rgp_alpha"] == 0.7
    cure_step(model, opt)
    assert opt.masks()[model.conv.weight].float().mean() == 0.5
    opt.param_groups[1]["rgp_alpha"] = 0.2
    with pytest.raises(ValueError, match="`rgp_alpha` should be the same in all groups"):
        _ = opt.alpha
    for name, value in (("alpha", 2), ("update_fraction", -0.1)):
        with pytest.raises(ValueError, match=rf"`{name}` should be in \[0, 1\]"):
            setattr(opt, name, value)
    for name in ("scope", "conserve", "score", "backend", "process_group", "inner"):
        with pytest.raises(AttributeError):
            setattr(opt, name, getattr(opt, name))


def test_the_inner_optimizers_own_alpha_is_no_setting_of_ours():
    model = make_net()
    opt = RGPSelectiveOptimizer(torch.optim.RMSprop(model.parameters(), alpha=0.9))
    cure_step(model, opt)
    opt.alpha = 0.5
    assert (opt.param_groups[0]["alpha"], opt.param_groups[0]["rgp_alpha"]) == (0.9, 0.5)


def test_masks_are_those_of_the_last_step():
    model = make_net()
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(rgp_param_groups(model), lr=0.1), update_fraction=0.3
    )
    assert opt.masks() == {}
    before = snapshot(model)
    cure_step(model, opt)
    masks, names = opt.masks(), {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in masks] == ["conv.weight", "head.weight"]
    changed = dict(zip(model.parameters(), moved(model, before), strict=True))
    for p, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(changed[p] & mask, changed[p])
        assert int(mask.sum()) == round(0.3 * p.numel())
    cure_step(model, opt, 1)
    assert not torch.equal(opt.masks()[model.head.weight], masks[model.head.weight])
    opt.update_fraction = 0.0
    cure_step(model, opt, 2)
    assert not any(mask.any() for mask in opt.masks().values())


class Modes(torch.optim.SGD):
    """As schedule-free optimizers: `train` and `eval` move weights, `second_step` steps."""

    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def sync_lookahead(self):
        self.synced = True

    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(1)


def test_methods_of_the_inner_optimizer_are_found_unless_they_step():
    model = make_net()
    assert not hasattr(wrap(model), "train")
    opt = wrap(model, lambda params: Modes(params, lr=0.1))
    opt.sync_lookahead()
    assert opt.inner.synced
    with pytest.warns(UserWarning, match=r"Modes.eval\(\)"):
        opt.eval()
    assert opt.inner.mode == "eval"
    opt.eval()  # one warning is enough
    opt.train()
    for name in ("second_step", "_private", "mode"):
        assert not hasattr(opt, name)


# Copies.


def through_file(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.load": through_file,
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_copies_go_on_alike_and_apart(copied, scheduled):
    model = make_net()
    opt = wrap(model, scope="global", conserve="update")
    if scheduled:
        lrs.StepLR(opt, 2)
    cure_step(model, opt)
    twin_model, twin = copied((model, opt))
    assert twin.inner is not opt.inner
    assert (twin.scope, twin.conserve, twin.backend) == (opt.scope, opt.conserve, opt.backend)
    assert twin.param_groups[0]["params"][0] is twin_model.conv.weight
    assert all(map(torch.equal, twin.masks().values(), opt.masks().values()))
    cure_step(model, opt, 1)
    before = snapshot(twin_model)
    cure_step(twin_model, twin, 1)
    assert same(model, twin_model)
    assert not same(model, before)
    seen = []
    lrs.StepLR(twin, 2)
    twin.register_step_post_hook(lambda *_: seen.append(1))
    cure_step(model, opt, 2)  # unpickling has not disturbed the original
    assert not seen
    cure_step(twin_model, twin, 2)
    assert seen == [1]


@pytest.mark.parametrize("copied", [lambda pair: pair, *COPIES.values()])
def test_the_inner_optimizer_must_not_step_past_waiting_scores(copied):
    """Nor that of a copy made between backward and step, which has the scores."""
    model = make_net()
    twin_model, twin = copied((model, wrap(model)))
    for _ in range(2):  # the copy, then a copy of it
        scored_batch(twin_model, twin)
        twin_model, twin = copied((twin_model, twin))
        before = snapshot(twin_model)
        with pytest.raises(RuntimeError, match=r"Call step\(\) of the RGPSelectiveOptimizer"):
            twin.inner.step()
        assert same(twin_model, before)
        for p in twin_model.parameters():  # copies of parameters have no gradient
            p.grad = torch.ones_like(p)
        twin.step()
        assert not same(twin_model, before)
        twin.inner.step()  # nothing is scored: the user's own affair


class OwnFormat(torch.optim.SGD):
    def state_dict(self):
        return {"base": super().state_dict(), "note": 3}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["note"]
        super().load_state_dict(state_dict["base"])


class Listed(torch.optim.SGD):
    def state_dict(self):
        return {"all": [super().state_dict()["param_groups"]], "note": 4}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["note"]
        for group in self.param_groups:
            group["lr"] = state_dict["all"][0][0]["lr"]


@pytest.mark.parametrize(("kind", "note"), [(OwnFormat, 3), (Listed, 4)])
def test_checkpoints_in_a_format_of_the_inner_optimizers_own(kind, note):
    first, second = (wrap(make_net(), lambda p, lr=lr: kind(p, lr=lr)) for lr in (0.1, 0.2))
    second.load_state_dict(first.state_dict())
    assert second.inner.loaded == note
    assert second.param_groups[0]["lr"] == 0.1


def test_lazy_parameters_can_be_wrapped_before_the_first_forward():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.rand(5, 7)).square().mean()
    backward(opt, loss, natural=loss, adversarial=loss)
    opt.step()


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_default_device_changes_nothing(scope):
    """Nothing is made there: on "meta" no tensor has numbers."""
    models = [make_net(), make_net()]
    for model, default in zip(models, (DEVICE, torch.device("meta")), strict=True):
        opt, batch = wrap(model, scope=scope), make_batch()
        with default:
            for _ in range(2):
                opt.zero_grad()
                loss, nat, adv = losses(model, *batch)
                backward(opt, loss, natural=nat, adversarial=adv)
                opt.step()
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert same(*models)


def test_a_gradient_set_to_none_leaves_its_parameter_out_of_the_step():
    model = make_net()
    opt = wrap(model)
    before = snapshot(model)
    scored_batch(model, opt)
    model.conv.weight.grad = None
    opt.step()
    assert [bool(m.any()) for m in moved(model, before)][::4] == [False, True]
    assert list(opt.masks()) == [model.head.weight]


def test_clipping_sees_the_whole_gradient():
    model, other = make_net(), make_net()
    scored_batch(model, wrap(model, update_fraction=0.1))
    losses(other, *make_batch())[0].backward()
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.01) for m in (model, other)]
    assert torch.equal(*norms)


# Closures.


class Polyak(torch.optim.Optimizer):
    """The step size comes from the loss that the closure returns."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = 1.0 if closure is None else float(closure())
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * loss * self.param_groups[0]["lr"])


class Needs(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def closure_of(model, opt, calls):
    def closure():
        loss, nat, adv = losses(model, *make_batch())
        opt.zero_grad()
        if isinstance(opt, RGPSelectiveOptimizer):
            loss = opt.scored(loss, natural=nat, adversarial=adv)
        loss.backward()
        calls.append(1)
        return loss

    return closure


@pytest.mark.parametrize("make", [Polyak, lambda p: Needs(p, lr=0.1), INNER["SGD"]])
def test_a_closure_is_evaluated_once_and_its_loss_handed_on(make):
    model, other = make_net(), make_net()
    opt, reference, calls = wrap(model, make, update_fraction=1.0), make(other.parameters()), []
    for _ in range(2):
        with torch.no_grad():
            loss = opt.step(closure_of(model, opt, calls))
        with torch.enable_grad():
            want = closure_of(other, reference, [])()
        reference.step(lambda want=want: want)
        assert torch.equal(loss, want)
    assert calls == [1, 1]
    assert same(model, other)


class Perturbs(torch.optim.SGD):
    """Wants the gradient at other weights."""

    def __init__(self, params, through_data):
        super().__init__(params, lr=0.1)
        self.through_data = through_data

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            (p.data if self.through_data else p).add_(0.1)
        with torch.enable_grad():
            closure()
        return super().step()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_a_closure_is_not_evaluated_at_other_weights(conserve, through_data):
    model = make_net()
    opt = wrap(model, lambda params: Perturbs(params, through_data), conserve=conserve)
    start = snapshot(model)
    with pytest.raises(RuntimeError, match=r"called the closure again.*SAM\(params, lambda"):
        opt.step(closure_of(model, opt, []))
    assert same(model, start)


def test_a_step_that_needs_a_closure():
    model = make_net()
    opt = wrap(model, lambda p: Needs(p, lr=0.1))
    scored_batch(model, opt)
    start, grads = snapshot(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="`closure` should be given"):
        opt.step()
    assert same(model, start)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021) around an optimizer it builds."""

    def __init__(self, params, make, rho=0.05, **options):
        super().__init__(params, {"rho": rho})
        self.base = make(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in params]))
        self.shifts = [0.05 * p.grad / norm for p in params]
        for p, shift in zip(params, self.shifts, strict=True):
            p.add_(shift)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        for p, shift in zip(params, self.shifts, strict=True):
            p.sub_(shift)
        self.base.step()

    def step(self, closure):
        self.first_step()
        closure()
        self.second_step()


def test_sam_goes_around_the_wrapper():
    model = make_net()
    with pytest.raises(TypeError, match=r"take one gradient per step.*SAM\(params, lambda g"):
        RGPSelectiveOptimizer(Sam(model.parameters(), torch.optim.SGD, lr=0.1))
    sam = Sam(
        model.parameters(), lambda g, **k: RGPSelectiveOptimizer(torch.optim.SGD(g, **k)), lr=0.1
    )
    losses(model, *make_batch())[0].backward()
    sam.first_step()
    loss, nat, adv = losses(model, *make_batch())
    backward(sam.base, loss, natural=nat, adversarial=adv)
    sam.second_step()
    for p, mask in sam.base.masks().items():
        assert int(mask.sum()) == round(0.7 * p.numel())


# What cannot work is refused before anything has changed.


def named(name, **members):
    """Make an optimizer of a class with this name."""
    return lambda p: type(name, (torch.optim.SGD,), members)(p, lr=0.1)


class Prepared(torch.optim.SGD):
    """As Accelerate's, which does not call the constructor of its base class."""

    def __init__(self, params):
        self.param_groups = [{"params": params}]


SGD = lambda p, **k: torch.optim.SGD(p, lr=0.1, **k)  # noqa: E731


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            lambda p: torch.optim.SGD,
            {},
            TypeError,
            "not a class.*the class SGD.*Write",
        ),
        (lambda p: p, {}, TypeError, "`optimizer` should be a torch.optim.Opt.* Found `list`"),
        (torch.optim.LBFGS, {}, TypeError, "evaluate its closure once.*Use a first-order"),
        (named("SGDScheduleFreeClosure"), {}, TypeError, "evaluate its closure once.*Use a first"),
        (
            named("Sam", first_step=1, second_step=2),
            {},
            TypeError,
            r"one gradient per step.*SAM\(",
        ),
        (named("ZeroRedundancyOptimizer"), {}, TypeError, "whole state.*fully_shard"),
        (Prepared, {}, TypeError, "have step hooks.*Wrap your own optimizer, then prepare"),
        (lambda p: SGD(p, differentiable=True), {}, ValueError, "`differentiable` should be False"),
        (SGD, {"update_fraction": 30}, ValueError, r"in \[0, 1\]. Found .*= 30`. Conserving 30 %"),
        (SGD, {"alpha": "high"}, TypeError, r"`alpha` should be a number in \[0, 1\]. .*'high'"),
        (SGD, {"scope": "layer"}, ValueError, "`scope` should be one of 'tensor', 'global'"),
        (SGD, {"conserve": "all"}, ValueError, "`conserve` should be one of 'weights', 'grad"),
        (SGD, {"score": "taylor"}, ValueError, "`score` should be one of 'rgp'.* Or pass a call"),
        (SGD, {"backend": "tpu"}, ValueError, "`backend` should be one of 'auto', 'cpu', 'trit"),
        (
            lambda p: SGD([{"params": p, "rgp_alpha": 2}]),
            {},
            ValueError,
            r"`rgp_alpha` should be in \[0, 1\]. Found `rgp_alpha = 2`",
        ),
        (
            lambda p: SGD([{"params": p, "update_fraction": 0.2}]),
            {},
            ValueError,
            "`update_fraction`. Write 'rgp_update_fraction'",
        ),
    ],
)
def test_refusals_when_wrapping(make, options, error, message):
    inner = make(list(make_net().parameters()))
    is_optimizer = isinstance(inner, torch.optim.Optimizer)
    before = [dict(group) for group in inner.param_groups] if is_optimizer else None
    with pytest.raises(error, match=message):
        RGPSelectiveOptimizer(inner, **options)
    if is_optimizer:
        assert [list(g) for g in inner.param_groups] == [list(g) for g in before]
        assert not getattr(inner, "_optimizer_step_pre_hooks", None)


def test_a_wrapper_cannot_be_wrapped():
    opt = wrap(make_net())
    with pytest.raises(TypeError, match="not be wrapped already"):
        RGPSelectiveOptimizer(opt)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"select": False}, ValueError, "`param_groups` should name its .* Write 'rgp_select'"),
        ({"rgp_fraction": 0.2}, ValueError, "settings that exist. Found `rgp_fraction`. Known are"),
        ({"rgp_update_fraction": -1}, ValueError, r"in \[0, 1\].*to conserve 30 %, write 0.7"),
    ],
)
def test_settings_that_a_group_cannot_have_are_refused_before_anything_moves(wrong, error, message):
    model = make_net()
    opt = wrap(model)
    cure_step(model, opt)
    weights, saved = snapshot(model), copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(saved)
    bad["param_groups"][0] |= wrong
    for act in (
        lambda: opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))], **wrong}),
        lambda: opt.load_state_dict(bad),
    ):
        with pytest.raises(error, match=message):
            act()
        assert opt.state_dict()["param_groups"] == saved["param_groups"]
    opt.param_groups[0].update(wrong)
    with pytest.raises(error, match=message):
        cure_step(model, opt)
    assert same(model, weights)
