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

from rgp_optim import (
    RGPSelectiveOptimizer,
    rgp_param_groups,
)

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
    proxy.param_groups[0]["rgp_update_fraction"] = 0.5
    reference.param_groups[0]["rgp_update_fraction"] = 0.5
    for seed in range(2):
        cure_step(model, proxy, seed)
        cure_step(other, reference, seed)
    assert_same(model, other)
    assert proxy.masks()[model.conv.weight].float().mean() == 0.5


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
        backward(opt, loss, natural=nat, adversarial=adv)
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
    backward(opt, natural=nat + extra.sum(), adversarial=adv + extra.sum())
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


def assert_same_values(a, b):
    assert all(map(same_bits, a, b))


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
    cure_step(model, opt)
    twin_model, twin_opt = copied((model, opt))
    assert twin_opt.inner is not opt.inner
    assert twin_opt.param_groups[0]["params"][0] is twin_model.conv.weight
    assert all(map(torch.equal, twin_opt.masks().values(), opt.masks().values()))
    cure_step(model, opt, 1)
    moved = snapshot(twin_model)
    cure_step(twin_model, twin_opt, 1)
    assert_same(model, twin_model)
    assert not torch.equal(moved[0], snapshot(twin_model)[0])
    lrs.StepLR(twin_opt, 2)
    twin_opt.register_step_post_hook(lambda *_: None)
    cure_step(model, opt, 2)  # unpickling has not disturbed the original


def test_a_model_whose_optimizer_is_wrapped_can_be_saved_and_copied():
    model = make_net()
    wrap(model)
    copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)


def test_a_gradient_set_to_none_leaves_its_parameter_out_of_the_step():
    model = make_net()
    opt = wrap(model)
    cure_step(model, opt)
    before = snapshot(model)
    loss, nat, adv = losses(model, *make_batch(1))
    opt.zero_grad()
    backward(opt, loss, natural=nat, adversarial=adv)
    model.conv.weight.grad = None
    opt.step()
    assert same_bits(model.conv.weight.detach(), before[0])
    assert not same_bits(model.head.weight.detach(), before[4])


# Clipping.


def test_clipping_sees_the_whole_gradient():
    model = make_net()
    opt = wrap(model, update_fraction=0.1)
    loss, nat, adv = losses(model, *make_batch())
    want = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    backward(opt, loss, natural=nat, adversarial=adv)
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
        backward(opt, natural=nat, adversarial=adv)
        opt.step()
    moved = (embedding.weight != start).any(1)
    assert moved.tolist() == [False, True, True, True, False, False]


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
            "`score` should be one of 'rgp'. .* Or pass a callable",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD(P), backend="tpu"),
            ValueError,
            "`backend` should be one of 'auto', 'cpu', 'triton', 'torch'",
        ),
        (
            lambda: RGPSelectiveOptimizer(torch.optim.SGD([{"params": P, "rgp_alpha": 2}])),
            ValueError,
            r"`rgp_alpha` should be in \[0, 1\]. Found `rgp_alpha = 2`",
        ),
    ],
)
def test_refusals_when_wrapping(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_inner_optimizer_must_not_step_by_itself():
    model = make_net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = RGPSelectiveOptimizer(inner)
    loss, nat, adv = losses(model, *make_batch())
    backward(opt, loss, natural=nat, adversarial=adv)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"Call step\(\) of the RGPSelectiveOptimizer"):
        inner.step()
    assert all(map(same_bits, snapshot(model), before))
    opt.step()
    inner.step()  # nothing is scored: the user's own affair


def test_lazy_parameters_can_be_wrapped_before_the_first_forward():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    opt = RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = torch.rand(5, 7), torch.tensor([0, 1, 2, 0, 1])
    loss = F.cross_entropy(model(x), y)
    backward(opt, loss, natural=loss, adversarial=loss)
    opt.step()


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
    for name in ("scope", "conserve", "backend"):
        with pytest.raises(AttributeError):
            setattr(opt, name, getattr(opt, name))


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


def closure_of(model, opt, calls=None):
    def closure():
        loss, nat, adv = losses(model, *make_batch())
        opt.zero_grad()
        if isinstance(opt, RGPSelectiveOptimizer):
            loss = opt.scored(loss, natural=nat, adversarial=adv)
        loss.backward()
        if calls is not None:
            calls.append(1)
        return loss

    return closure


@pytest.mark.parametrize("make", [Polyak, lambda p: torch.optim.SGD(p, lr=0.1)])
def test_a_closure_is_evaluated_once_and_its_loss_handed_on(make):
    model, other = make_net(), make_net()
    opt, reference, calls = wrap(model, make, update_fraction=1.0), make(other.parameters()), []
    for _ in range(2):
        with torch.no_grad():
            loss = opt.step(closure_of(model, opt, calls))
        with torch.enable_grad():
            want = closure_of(other, reference)()
        reference.step(lambda want=want: want)
        assert torch.equal(loss, want)
    assert calls == [1, 1]
    assert_same(model, other)


class Perturbs(torch.optim.SGD):
    """Wants the gradient at other weights."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.1)
        with torch.enable_grad():
            closure()
        return super().step()


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_a_closure_is_not_evaluated_at_other_weights(conserve):
    model = make_net()
    opt = wrap(model, lambda params: Perturbs(params, lr=0.1), conserve=conserve)
    start = snapshot(model)
    with pytest.raises(RuntimeError, match=r"called the closure again.*SAM\(params, lambda"):
        opt.step(closure_of(model, opt))
    assert all(map(same_bits, snapshot(model), start))


class Needs(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def test_a_step_that_needs_a_closure():
    model, other = make_net(), make_net()
    opt, reference = wrap(model, lambda p: Needs(p, lr=0.1)), wrap(other, INNER["SGD"])
    reference.param_groups[0]["lr"] = 0.1
    loss, nat, adv = losses(model, *make_batch())
    backward(opt, loss, natural=nat, adversarial=adv)
    start, grads = snapshot(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match="`closure` should be given"):
        opt.step()
    assert all(map(same_bits, snapshot(model), start))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    model.load_state_dict(other.state_dict())
    opt.step(closure_of(model, opt))
    cure_step(other, reference)
    assert_same(model, other)


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


class StepsLater(torch.optim.SGD):
    pass


StepsLater.__name__ = "AdamWScheduleFreeClosure"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), TypeError, "evaluate its closure once per step"),
        (lambda p: StepsLater(p, lr=0.1), TypeError, "evaluate its closure once per step"),
        (
            lambda p: torch.optim.SGD(p, lr=0.1, differentiable=True),
            ValueError,
            "`differentiable` should be False",
        ),
    ],
)
def test_optimizers_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        RGPSelectiveOptimizer(make(make_net().parameters()))


def test_global_step_hooks_run_for_the_wrapper_and_for_the_inner_optimizer():
    model, seen = make_net(), []
    opt = wrap(model)
    hook = register_optimizer_step_pre_hook(lambda o, *_: seen.append(type(o).__name__))
    cure_step(model, opt)
    hook.remove()
    assert seen == ["RGPSelectiveOptimizer", "SGD"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), "file"])
def test_copies_have_the_scores_and_the_guard(how):
    """Also a copy made between backward and step refuses the inner optimizer's own step."""
    p = nn.Parameter(torch.randn(4, 4))
    opt = RGPSelectiveOptimizer(torch.optim.SGD([p], lr=0.1), update_fraction=0.25)
    backward(opt, natural=p.sin().sum(), adversarial=p.cos().sum())
    if how == "file":
        file = io.BytesIO()
        torch.save(opt, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = how(opt)
    (q,) = other.param_groups[0]["params"]
    with pytest.raises(RuntimeError, match=r"Call step\(\) of the RGPSelectiveOptimizer"):
        other.inner.step()
    assert torch.equal(p, q)
    q.grad = p.grad.clone()
    other.step()
    opt.step()
    assert torch.equal(p, q)
