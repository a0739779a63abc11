"""ConsistencyReviser: the average against a plain loop, its start, its loss, its checkpoints."""

import contextlib
import copy
import math
import pickle
import threading
import warnings

import pytest
import torch
from common import DEVICE, LowRank, disk, make_batch, make_net, rng_states, seeded, snapshot
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from rgp_optim import ConsistencyReviser, consistency_loss


def trained_net(dtype=torch.float32):
    """A network whose BatchNorm claims to have seen enough batches."""
    model = make_net(dtype=dtype)
    model.norm.num_batches_tracked.fill_(1000)
    return model


@torch.no_grad()
def disturb(*models, seed=0):
    """Change every weight and buffer, alike in all models, as a training step does."""
    for model in models:
        g = seeded(seed)
        for t in tensors(model):
            t.add_(torch.randn(t.shape, generator=g).to(t.dtype) if t.is_floating_point() else 1)


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def same(first, second):
    return all(map(torch.equal, tensors(first), tensors(second)))


def started(model, **options):
    """A reviser past its first update, after which the copy no longer follows the model."""
    reviser = ConsistencyReviser(model, **options)
    reviser.update()
    return reviser


# The average.


@pytest.mark.parametrize(
    ("rate", "decay", "least", "most", "tolerance"),
    [(0.0, 0.9, 0, 0, 0), (1, 0, 20, 20, 0), (0.5, 0.9, 4, 16, 1e-13)],
    ids=["rate 0 never moves", "decay 0 copies", "an average"],
)
def test_the_average_is_a_plain_loops(rate, decay, least, most, tolerance):
    model = make_net(dtype=torch.float64)
    reviser = started(model, rate=rate, decay=decay, seed=3)
    want, moved = [t.clone() for t in tensors(model)], []
    for t in range(20):
        disturb(model, seed=t)
        moved.append(reviser.update())
        for i, now in enumerate(tensors(model)) if moved[-1] else ():
            copied = now.dtype == torch.int64
            want[i] = now.clone() if copied else decay * want[i] + (1 - decay) * now.detach()
    assert least <= sum(moved) <= most
    for got, expected in zip(tensors(reviser.model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("converted", [False, True], ids=["model", "copy only"])
def test_a_constant_target_has_a_closed_form(dtype, converted):
    """In bfloat16 itself, steps of 0.001 of the difference would round away."""
    model = nn.Linear(50, 40).to(torch.float32 if converted else dtype)
    reviser = started(model, rate=1.0, decay=0.999)
    start = reviser.model.to(dtype).weight.detach().double().clone()
    model.weight.data.add_(1.0)
    for _ in range(200):
        reviser.update()
    assert reviser.model.weight.dtype == dtype
    target = model.weight.detach().to(dtype).double()
    want, eps = target + 0.999**200 * (start - target), torch.finfo(dtype).eps
    torch.testing.assert_close(reviser.model.weight.double(), want, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_into_the_copy_are_averaged_on(dtype):
    model = make_net(dtype=dtype)
    reviser, fresh = (started(model, rate=1.0, decay=0.9) for _ in range(2))
    disturb(model)
    reviser.update()
    for each in (reviser, fresh):
        each.model.load_state_dict(make_net(seed=1, dtype=dtype).state_dict())
    for seed in range(3):
        disturb(model, seed=seed)
        reviser.update()
        fresh.update()
    assert same(reviser.model, fresh.model)


def test_a_half_precision_copy_may_move_with_its_model():
    """Its averages in float32, made before, restart on the new device."""
    model = make_net(dtype=torch.bfloat16)
    reviser = started(model, rate=1.0)
    model.to("meta")
    reviser.model.to("meta")
    reviser.update()
    assert all(tensor.is_meta for tensor in reviser.state_dict()["model"].values())


class OwnNorm(nn.Module):
    """A normalisation layer that is not derived from torch's, and a mask of another layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.register_buffer("phase", torch.zeros(4))
        self.drop = nn.Dropout()
        self.drop.register_buffer("mask", torch.tensor([0.0, 1.0, -math.inf, math.inf]))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), OwnNorm()])
def test_running_statistics_are_averaged_and_other_buffers_copied(norm):
    reviser = started(norm, rate=1.0, decay=0.75)
    for buffer in norm.buffers():
        buffer.copy_(buffer.nan_to_num(posinf=0, neginf=0) + 4)
    reviser.update()
    got, now = dict(reviser.model.named_buffers()), dict(norm.named_buffers())
    assert torch.equal(got.pop("running_mean"), torch.ones(4))
    assert torch.equal(got.pop("running_var"), torch.full((4,), 2.0))
    assert got
    assert all(torch.equal(copied, now[other]) for other, copied in got.items())


REPARAMETRISED = {
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("forward_first", [False, True])
@pytest.mark.parametrize("kind", REPARAMETRISED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_reparametrised_weights(kind, forward_first):
    """The copy keeps the property that its layer enforces, and computes its weight anew."""
    torch.manual_seed(0)
    first, second = (REPARAMETRISED[kind](nn.Linear(4, 4)) for _ in range(2))
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(16, 4)
    if forward_first:
        model(x)
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.9)
    assert reviser(x, x, model.eval()(x), model(x)) < 1e-6
    opt = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(30):
        opt.zero_grad()
        (model(x) - 3 * x).square().mean().backward()
        opt.step()
        reviser.update()
    with torch.no_grad():
        reviser.model(x), model.eval()(x)
    for ours, theirs in ((reviser.model[i].weight, model[i].weight) for i in (0, 2)):
        if "spectral_norm" in kind:
            got, want = (torch.linalg.matrix_norm(weight, 2) for weight in (ours, theirs))
            assert got < 1.1 * max(1, want)
        if kind == "orthogonal":
            torch.testing.assert_close(ours @ ours.T, torch.eye(4), atol=1e-5, rtol=0)
        if kind == "pruned":
            assert torch.equal(ours == 0, theirs == 0)
    reviser.decay = 0.0
    reviser.update()
    torch.testing.assert_close(reviser.model(x), model(x))


class Folded(nn.Module):
    """Replaces its two branches by one matrix in eval mode: other parameters, other names."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ParameterList([torch.rand(4, 4), torch.rand(4, 4)])

    def train(self, mode=True):
        if self.training and not mode:
            self.kept, self.both = [*self.branches], nn.Parameter(sum(self.branches))
            del self.branches
        if mode and not self.training:
            self.branches = nn.ParameterList(self.kept)
            del self.both
        return super().train(mode)

    def forward(self, x):
        return x @ (sum(self.branches) if self.training else self.both)


@pytest.mark.parametrize("layer", [LowRank, Folded])
def test_modes_that_act(layer):
    """Weights are averaged in the model's mode; the copy then is in eval mode again."""
    model = nn.Sequential(layer(), nn.Linear(4, 3))
    reviser = started(model, rate=1.0, decay=0.9)
    want = snapshot(model)
    for seed in range(5):
        disturb(model, seed=seed)
        reviser.update()
        assert not any(m.training for m in reviser.model.modules())
        want = [0.9 * w + 0.1 * p for w, p in zip(want, snapshot(model), strict=True)]
    for got, expected in zip(reviser.model.train().parameters(), want, strict=True):
        torch.testing.assert_close(got, expected)
    x = torch.rand(3, 4)
    z = reviser.model(x)
    assert reviser(x, x, z, z) < 1e-6  # a trainer had switched it: eval mode predicts the same


# The start.


@pytest.mark.parametrize("first", ["loss", "update"])
def test_the_copy_follows_the_model_until_the_first_update(first):
    model, (x, x_adv, _) = trained_net().eval(), make_batch()
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.9)
    for seed in range(2):
        disturb(model, seed=seed)
        model.norm.running_var.abs_()
        if first == "loss":
            assert reviser(x, x_adv, model(x), model(x_adv)) < 1e-6
    reviser.update()
    assert same(reviser.model, model)
    start = copy.deepcopy(model)
    disturb(model)
    reviser(x, x_adv, model(x), model(x_adv))
    assert same(reviser.model, start)


def test_nothing_is_shared_and_nothing_learns():
    model = make_net().train()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    reviser = ConsistencyReviser(model)
    theirs = {t.untyped_storage().data_ptr() for t in tensors(model)}
    assert all(t.untyped_storage().data_ptr() not in theirs for t in tensors(reviser.model))
    assert not any(p.requires_grad or p.grad is not None for p in reviser.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in reviser.model.modules())
    assert model.training


class Keeps(nn.Sequential):
    """Keeps something in an attribute."""

    def __init__(self, make):
        super().__init__(nn.Linear(4, 3))
        self.make = make

    def forward(self, x):
        self.kept = self.make(super().forward(x))
        return super().forward(x)


def test_activations_kept_in_an_attribute_are_copied_without_their_graph():
    model, x = Keeps(lambda z: z), torch.rand(2, 4)
    z = model(x)
    reviser = ConsistencyReviser(model)
    assert not reviser.model.kept.requires_grad
    assert reviser(x, x, z, z) < 1e-6


@pytest.mark.parametrize("make", [lambda z: [z], lambda z: threading.Lock()], ids=["list", "lock"])
@pytest.mark.parametrize("name", ["kept", "0.kept"])
def test_a_model_that_refuses_to_be_copied_may_come_with_a_copy(make, name):
    model, ready = (nn.Sequential(Keeps(make)) for _ in range(2))
    model, ready = (model, ready) if name == "0.kept" else (model[0], ready[0])
    x = torch.rand(2, 4)
    z = model(x)
    with pytest.raises(ValueError, match=rf"`model` .*copyable.*Found `{name}: .*`revised=`"):
        ConsistencyReviser(model)
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.5, revised=ready)
    assert reviser.model is ready
    assert reviser(x, x, z, z) < 1e-6
    assert not any(p.requires_grad for p in ready.parameters())


@pytest.mark.parametrize(("count", "warned"), [(0, True), (49, True), (50, False)])
def test_warns_once_of_unfilled_statistics(count, warned, recwarn):
    warnings.simplefilter("always")
    x, x_adv, _ = make_batch()
    model = nn.Sequential(trained_net(), nn.BatchNorm1d(3)).eval()
    model[1].num_batches_tracked.fill_(count)
    reviser, z = ConsistencyReviser(model), model(x)
    for _ in range(3):
        reviser(x, x_adv, z, z)
        reviser.update()
    texts = [str(w.message) for w in recwarn]
    assert len(texts) == warned
    assert all(f"BatchNorm has seen {count} batches (< 50): train on nat" in t for t in texts)
    assert all("natural images" in t for t in texts)


def test_warns_once_of_a_forgotten_update(recwarn):
    warnings.simplefilter("always")
    model, x = nn.Linear(2, 2), torch.rand(1, 2)
    reviser, z = ConsistencyReviser(model), model(x)
    for calls in (99, 99, 250):
        for _ in range(calls):
            reviser(x, x, z, z)
        assert len(recwarn) == (calls == 250)
        reviser.update()
    assert "update()" in str(recwarn.pop(UserWarning).message)


def test_forward_hooks():
    """One that changes the output acts in the copy; one registered later is not the copy's."""
    model, x, early, late = nn.Linear(4, 3), torch.rand(2, 4), [], []
    model.register_forward_hook(lambda module, args, z: 2 * z)
    model.register_forward_hook(lambda module, args, z: early.append(module))
    reviser = ConsistencyReviser(model)
    model.register_forward_hook(lambda module, args, z: late.append(module))
    z = model(x)
    assert reviser(x, x, z, z) < 1e-6
    assert early == [model, reviser.model, reviser.model]
    assert late == [model]


# Unusual modules.


def plain_net():
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)
    layers[1].num_batches_tracked.fill_(1000)
    return nn.Sequential(*layers)


def exported(model):
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(model, (torch.rand(8, 4),), dynamic_shapes=sizes).module()


UNUSUAL = {
    "scripted": lambda net: torch.jit.script(net),
    "a scripted part": lambda net: nn.Sequential(torch.jit.script(net), nn.Linear(3, 3)),
    "traced": lambda net: torch.jit.trace(net, torch.rand(8, 4)),
    "exported": exported,
    "an exported part": lambda net: nn.Sequential(exported(net), nn.Linear(3, 3)),
}


def averages(reviser, model, x):
    """No loss before the first update; then the copy moves by a quarter of the way."""
    z = model(x)
    assert reviser(x, x, z, z) < 1e-3
    reviser.update()
    start = snapshot(reviser.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(4 * p.requires_grad)
    reviser.update()
    for old, p, q in zip(start, reviser.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, old + q.requires_grad)
    return True


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of another category from 2.14 on
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # copy.deepcopy of a graph
def test_scripted_traced_and_exported_models(kind):
    model = UNUSUAL[kind](plain_net().eval())
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.75)
    theirs = {p.data_ptr() for p in model.parameters()}
    ours = list(reviser.model.parameters())
    assert not any(p.data_ptr() in theirs or p.requires_grad or p.grad_fn for p in ours)
    assert all(p.requires_grad for p in model.parameters())
    assert averages(reviser, model, torch.rand(8, 4))
    name = next(n for n, _ in model.named_buffers() if n.endswith("running_mean"))
    for buffer in model.buffers():
        buffer.add_(4)
    before = {n: b.clone() for n, b in reviser.model.named_buffers()}
    reviser.update()
    after = dict(reviser.model.named_buffers())
    assert torch.equal(after[name], before[name] + 1)
    count = name.replace("running_mean", "num_batches_tracked")
    assert torch.equal(after[count], before[count] + 4)


def compile_block(model):
    model[0] = torch.compile(model[0], backend="eager")


COMPILED = {
    "whole": lambda r: setattr(r, "model", torch.compile(r.model, backend="eager")),
    "in place": lambda r: r.model.compile(backend="eager"),
    "a block": lambda r: compile_block(r.model),
    "parallel": lambda r: setattr(r, "model", nn.DataParallel(r.model)),
    "the model's block": lambda r: compile_block(r._student),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_the_copy_may_be_compiled(kind):
    """Its names are the same to the model and in a checkpoint."""
    model = plain_net()
    reviser, fresh = (ConsistencyReviser(model, rate=1.0, decay=0.75) for _ in range(2))
    COMPILED[kind](reviser)
    assert averages(reviser, model.eval(), torch.rand(8, 4))
    fresh.load_state_dict(reviser.state_dict())
    assert same(fresh.model, reviser.model)


def test_a_ready_copy_may_be_compiled():
    model = plain_net()
    ready = torch.compile(copy.deepcopy(model), backend="eager")
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.75, revised=ready)
    assert averages(reviser, model.eval(), torch.rand(8, 4))


class Odd(nn.Linear):
    """Has a method with the name of one of FSDP2's, and keeps a buffer with its graph."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("kept", self.weight.sum(1))

    def reshard(self, plan):
        raise AssertionError


def test_modules_with_methods_and_buffers_of_their_own():
    reviser = started(Odd(), revised=Odd())
    assert not any(p.requires_grad for p in reviser.model.parameters())
    reviser.load_state_dict(reviser.state_dict())


@pytest.mark.parametrize("parts", [(0,), (0, 1)], ids=["a layer", "with statistics"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ready_copy_may_share_frozen_parts(parts, dtype):
    """They cost no memory twice, keep the model's mode, and are not the copy's to change."""
    model, x = plain_net().to(dtype), torch.rand(8, 4).to(dtype)
    for i in parts:
        model[i].requires_grad_(False)
    ready = copy.deepcopy(model, {id(model[i]): model[i] for i in parts})
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.75, revised=ready)
    modes = [m.training for m in model.modules()]
    assert all(modes)
    assert averages(reviser, model.eval(), x)
    reviser(x, x, *[model.train()(x)] * 2)
    assert modes == [m.training for m in model.modules()]
    state = reviser.state_dict()
    shared = {f"{i}.{n}" for i in parts for n, _ in model[i].named_parameters()}
    assert not shared & state["model"].keys()
    for again, twin in (
        copy.deepcopy((model, reviser)),
        pickle.loads(pickle.dumps((model, reviser))),
    ):
        assert all(twin.model[i] is again[i] for i in parts)
        twin.load_state_dict(state)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"`model` .*without shared storage.*Only frozen parts"):
        reviser.update()


def test_weights_of_the_copy_that_are_assigned_to_the_model_are_refused():
    """Averaged with itself, the copy would stand still."""
    model = plain_net()
    reviser = started(model, rate=1.0)
    model.load_state_dict(reviser.model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"`model` .*without shared storage. Found `0.weight`"):
        reviser.update()


class Casts(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("part", "tied"), [("whole", 0), ("whole", 1), ("a layer", 0)])
def test_a_model_that_is_converted_before_its_first_step(dtype, part, tied):
    model = nn.Sequential(Casts(4, 4), Casts(4, 4))
    if tied:
        model[1].weight = model[0].weight
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.75)
    (model if part == "whole" else model[0]).to(dtype)
    assert averages(reviser, model, torch.rand(8, 4))
    assert [p.dtype for p in reviser.model.parameters()] == [p.dtype for p in model.parameters()]
    assert (reviser.model[0].weight is reviser.model[1].weight) == tied
    reviser.model.float()  # from then on it is the user's to convert
    reviser.update()
    assert all(p.dtype == torch.float32 for p in reviser.model.parameters())


def used(reviser, model, x):
    z = model(x)
    reviser(x, x, z, z)


IN_INFERENCE_MODE = {
    "a loss": used,
    "state_dict": lambda reviser, model, x: reviser.state_dict(),
    "load_state_dict": lambda reviser, model, x: reviser.load_state_dict(reviser.state_dict()),
    "update": lambda reviser, model, x: reviser.update(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("action", IN_INFERENCE_MODE)
@pytest.mark.parametrize("made", ["before", "before a conversion", "within"])
def test_what_is_made_in_inference_mode_outlives_it(action, dtype, made):
    model, x = plain_net().to(dtype).eval(), torch.rand(8, 4).to(dtype)
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.75)
    if made == "before a conversion":
        model, x = model.to(torch.float16), x.half()
    with torch.inference_mode():
        if made == "within":
            reviser = ConsistencyReviser(model, rate=1.0, decay=0.75)
        IN_INFERENCE_MODE[action](reviser, model, x)
    assert averages(reviser, model, x) if reviser.steps == 0 else reviser.update()


def test_averages_that_are_first_needed_in_inference_mode_outlive_it():
    reviser = started(plain_net(), rate=1.0)
    reviser.model.bfloat16()
    with torch.inference_mode():
        reviser.state_dict()
    assert reviser.update()


@pytest.mark.parametrize("loaded", ["before, then trained", "before", "after"])
def test_statistics_whose_counter_was_not_saved_are_filled(loaded, recwarn):
    warnings.simplefilter("always")
    old, model, x = plain_net(), plain_net(), torch.rand(8, 4)
    for _ in range(9):
        old(torch.rand(32, 4))
    state = {k: v for k, v in old.state_dict().items() if "num_batches" not in k}
    model[1].num_batches_tracked.zero_()
    reviser = ConsistencyReviser(model)
    model.load_state_dict(state, strict=False)
    if loaded != "after":
        reviser = ConsistencyReviser(model)
    model.train("trained" in loaded)
    z, z_adv = model(x), model(x)
    assert model[1].num_batches_tracked == 2 * ("trained" in loaded)
    reviser(x, x, z, z_adv)
    assert not recwarn


class Observed(nn.Linear):
    """Its buffers get their shape in the first forward pass: resized, assigned, or registered."""

    def __init__(self, *sizes, kind="resized"):
        super().__init__(*sizes)
        self.kind = kind
        self.register_buffer("low", None if kind == "registered" else torch.tensor([]))

    def forward(self, x):
        if self.low is None or self.low.numel() == 0:
            self.low = self.low.resize_(4).zero_() if self.kind == "resized" else torch.zeros(4)
        if self.training:
            self.low.copy_(x.detach().amin(0))
        return super().forward(x - self.low)


@pytest.mark.parametrize("kind", ["resized", "assigned", "registered"])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("first", ["loss", "update", "checkpoint"])
def test_buffers_may_get_their_shape_after_the_copy_is_made(kind, bare, first):
    pairs = []
    for _ in range(2):
        model = Observed(4, 3, kind=kind) if bare else nn.Sequential(Observed(4, 4, kind=kind))
        pairs.append((model, ConsistencyReviser(model, rate=1.0, decay=0.75)))
        model(torch.rand(8, 4))
    (model, reviser), (_, again) = pairs
    if first == "update":
        with torch.inference_mode():
            reviser.update()
    if first == "checkpoint":
        reviser.load_state_dict(again.state_dict())
    assert averages(reviser, model, torch.rand(8, 4)) if first == "loss" else reviser.update()
    assert all(map(torch.equal, reviser.model.buffers(), model.buffers()))
    again.load_state_dict(reviser.state_dict())
    assert same(again.model, reviser.model)


def test_models_that_write_into_their_input():
    class InPlace(nn.Linear):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model, x, x_adv = InPlace(4, 3), torch.rand(2, 4), torch.rand(2, 4)
    before = x.clone(), x_adv.clone()
    z, z_adv = (model(each.clone()) for each in (x, x_adv))
    assert ConsistencyReviser(model)(x, x_adv, z, z_adv) < 1e-6
    assert torch.equal(x, before[0])
    assert torch.equal(x_adv, before[1])


# In an optimizer.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_joined_reviser_is_updated_by_the_optimizer_alone(copied):
    model = make_net()
    reviser = ConsistencyReviser(model, rate=1.0)
    reviser._joined = True
    for each in (reviser, copied((model, reviser))[1]):
        with pytest.raises(
            RuntimeError, match=r"`update\(\)` .*called by the optimizer's `step\(\)`"
        ):
            each.update()
        assert each.steps == 0
        assert each._update()
        assert each.steps == 1
    reviser._joined = False
    assert reviser.update()


@pytest.mark.parametrize("misfit", ["a new layer", "weights of the copy", "none"])
def test_what_an_update_would_refuse_is_found_before_the_step(misfit):
    """In the steps that move the copy, known from seed and step; the check moves nothing."""
    model = make_net()
    reviser, twin = (started(m, rate=0.5, seed=2) for m in (model, make_net()))
    disturb(model)
    if misfit == "a new layer":
        model.head = nn.Linear(16, 5)
    if misfit == "weights of the copy":
        model.load_state_dict(reviser.model.state_dict(), assign=True)
    before, moves = copy.deepcopy(reviser.model), []
    for reviser.steps in range(1, 20):
        moves.append(twin.update())
        refused = moves[-1] and misfit != "none"
        with pytest.raises(ValueError, match="`model`") if refused else contextlib.nullcontext():
            assert reviser._update(only_check=True) == moves[-1]
        assert reviser.steps == len(moves)
        assert same(reviser.model, before)
    assert {*moves} == {True, False}


@pytest.mark.parametrize("bad", [{"rate": 1.5}, {"rate": None}, {"decay": 1.0}, {"decay": "1"}])
def test_numbers_are_checked_when_they_are_assigned(bad):
    reviser = ConsistencyReviser(nn.Linear(1, 1), rate=0.5, decay=0.9)
    ((name, value),) = bad.items()
    with pytest.raises((TypeError, ValueError), match=f"`{name}` should be"):
        setattr(reviser, name, value)
    assert (reviser.rate, reviser.decay) == (0.5, 0.9)


# Draws and decay.


def test_draws_have_the_rate_and_depend_on_seed_and_step_alone():
    model, before = nn.Linear(1, 1), rng_states()
    revisers = [ConsistencyReviser(model, rate=0.2, seed=s) for s in (0, 0, 1)]
    draws = [[r.update() for _ in range(4000)] for r in revisers]
    assert all(map(torch.equal, before, rng_states()))
    assert draws[0] == draws[1] != draws[2]
    assert abs(sum(draws[0]) - 800) < 4 * math.sqrt(4000 * 0.2 * 0.8)
    agree = sum(a == b for a, b in zip(draws[0], draws[2], strict=True))
    assert abs(agree - 4000 * 0.68) < 4 * math.sqrt(4000 * 0.68 * 0.32)
    assert revisers[0].steps == 4000


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({}, 0.999),
        ({"horizon": 0.064, "total_steps": 78_200}, pytest.approx(0.999, abs=1e-6)),  # published
        ({"horizon": 0.1, "total_steps": 400, "rate": 0.5}, pytest.approx(1 - 1 / 20)),
    ],
)
def test_horizon_is_the_time_constant_as_a_fraction_of_the_run(options, decay):
    assert ConsistencyReviser(nn.Linear(1, 1), **options).decay == decay


# The loss.


@pytest.mark.parametrize("statistics", [True, False])
def test_the_loss_is_the_consistency_loss_of_the_copys_logits(statistics):
    """In eval mode, whatever a trainer does, and batch by batch: without statistics they'd mix."""
    model = trained_net(dtype=torch.float64)
    if not statistics:
        model.norm = nn.BatchNorm2d(4, track_running_stats=False).double()
    reviser = started(model, rate=0.0)
    disturb(model)
    x, x_adv, _ = make_batch(dtype=torch.float64)
    x_adv = x_adv + 3.0
    logits, logits_adv = model(x), model(x_adv)
    with torch.no_grad():
        want = consistency_loss(reviser.model(x), reviser.model(x_adv), logits, logits_adv)
    before = copy.deepcopy(reviser.model)
    reviser.model.train()
    loss = reviser(x.requires_grad_(), x_adv, logits, logits_adv)
    assert loss.item() == want.item() > 0
    assert same(reviser.model, before)  # statistics, too
    loss.backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in reviser.model.parameters())


def test_compiled_and_parallel_models_are_unwrapped():
    model = make_net()
    reviser = started(torch.compile(nn.DataParallel(model), backend="eager"), rate=1, decay=0)
    assert type(reviser.model) is type(model)
    disturb(model)
    assert reviser.update()
    assert same(reviser.model, model)


def shard_and_update(rank):
    """FSDP2 on 2 ranks, uneven shards: as one process, also after a forward has gathered them."""
    for dtype in (torch.float32, torch.bfloat16):
        plain, model = trained_net(dtype), trained_net(dtype)
        want, reviser = (ConsistencyReviser(m, rate=1.0, decay=0.9) for m in (plain, model))
        fully_shard(model)
        with pytest.raises(ValueError, match=r"shard `reviser.model` as the model"):
            reviser.update()
        fully_shard(reviser.model)
        with pytest.raises(ValueError, match=r"`model` .*copyable.*Make the reviser first, then s"):
            ConsistencyReviser(model)
        x = make_batch(dtype=dtype)[0]
        for step in range(5):
            with torch.no_grad():
                for p in [*plain.parameters(), *model.parameters()]:
                    p.add_(0.5)
                out = model.eval()(x)
                model.reshard()
                loss = reviser(x, x, out, out)
                assert (loss < 1e-6) == (step == 0)  # until then the copy follows the model
            assert want.update()
            assert reviser.update()
        state = reviser.state_dict()
        for name, expected in want.state_dict()["model"].items():
            got = state["model"][name]
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            assert torch.equal(got, expected), name
        reviser.load_state_dict(state)


def test_a_sharded_model_is_averaged_as_a_whole_one(two):
    two.run(shard_and_update)


# Checkpoints and copies.


def resumed(pair):
    """Through a file, into a reviser with other settings and another model."""
    model, reviser = pair
    again = make_net(seed=1, dtype=model.conv.weight.dtype)
    twin = ConsistencyReviser(again, rate=0.9, decay=0.5, seed=6)
    twin.load_state_dict(disk(reviser.state_dict()))
    again.load_state_dict(model.state_dict())
    return again, twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "copied", [resumed, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_resumed_and_copied_revisers_go_on_bit_for_bit(copied, dtype):
    """They draw as the first, follow their own model, and do not begin by copying it again."""
    model = make_net(dtype=dtype)
    reviser = ConsistencyReviser(model, rate=0.4, decay=0.9, seed=5)
    for t in range(10):
        disturb(model, seed=t)
        reviser.update()
    again, twin = copied((model, reviser))
    draws = set()
    for t in range(10, 30):
        disturb(model, again, seed=t)
        draws.add((reviser.update(), twin.update()))
    assert draws == {(True, True), (False, False)}
    assert same(reviser.model, twin.model)
    assert reviser.steps == twin.steps == 30
    before = copy.deepcopy(reviser.model)
    disturb(again)
    assert 20 > sum(twin.update() for _ in range(20)) > 0
    assert same(reviser.model, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "`ConsistencyReviser.state_dict"),
        ({"steps": ...}, "`ConsistencyReviser.state_dict"),
        ({"model": dict(nn.Linear(1, 1).named_parameters())}, "the parameters and buffer"),
        ({"decay": 7.0}, "decay"),
        ({"rate": 7.0}, "rate"),
        ({"steps": -1}, "steps"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(changes, message):
    reviser = started(make_net())
    before, other = disk(reviser.state_dict()), started(make_net(seed=1), seed=1).state_dict()
    state = changes and {k: v for k, v in {**other, **changes}.items() if v is not ...}
    with pytest.raises(ValueError, match=message):
        reviser.load_state_dict(state)
    after = reviser.state_dict()
    assert all(torch.equal(t, after["model"][n]) for n, t in before.pop("model").items())
    assert all(after[name] == value for name, value in before.items())


# Refusals.

LINEAR = nn.Linear(2, 2).to(DEVICE)


class Shares(nn.Linear):
    def __deepcopy__(self, memo):
        new = Shares(2, 2)
        new.weight = nn.Parameter(self.weight.detach())
        return new


T, V = TypeError, ValueError
CONTRADICTORY = {"decay": 0.9, "horizon": 0.1, "total_steps": 100}


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (torch.sin, {}, T, "`model` should be a torch.nn.Module"),
        (LINEAR, {"rate": 1.5}, V, r"`rate` should be in \[0, 1\]"),
        (LINEAR, {"rate": lambda t: 0.2}, T, "`rate` should be a number"),
        (LINEAR, {"decay": 1.0}, V, "1 would never move"),
        (LINEAR, {"decay": -0.1}, V, "`decay` should be in"),
        (LINEAR, {"seed": -1}, V, "`seed` should be an integer"),
        (LINEAR, {"horizon": 0.1}, V, "`horizon` should be given with `total_steps`"),
        (LINEAR, {"total_steps": 9}, V, "`horizon` should be given with `total_steps`"),
        (LINEAR, CONTRADICTORY, V, "with .* without `decay`. Found `horizon = 0.1, total_st"),
        (LINEAR, {"horizon": 1.5, "total_steps": 9}, V, r"`horizon` should be in \(0, 1\]"),
        (LINEAR, {"horizon": 0.1, "total_steps": 9, "rate": 0}, V, "span at least one update"),
        (
            LINEAR,
            {"horizon": 0.064, "total_steps": 15},
            V,
            ">= 1. Found `0.064 .*Give 0.334 or more, or `decay`",
        ),
        (Shares(2, 2), {}, V, "`model` .*without shared storage. Found `weight`"),
        (LINEAR, {"revised": LINEAR}, V, "`revised` .*without shared storage"),
        (LINEAR, {"revised": nn.Linear(2, 3)}, V, "`revised` should have the parameters"),
    ],
)
def test_refusals(model, options, error, message):
    with pytest.raises(error, match=message):
        ConsistencyReviser(model, **options)


def test_models_that_return_no_tensor_are_refused():
    model, x, z = nn.Linear(4, 3), torch.rand(2, 4), torch.rand(2, 3)
    model.register_forward_hook(lambda module, args, logits: (logits, logits))
    message = r"`model\(x\)` should be a tensor of logits.* pass logits to `consistency_loss`"
    with pytest.raises(TypeError, match=message):
        ConsistencyReviser(model)(x, x, z, z)


def test_arguments_of_several_batches_are_refused():
    reviser, x, z = ConsistencyReviser(LINEAR), torch.rand(2, 2), torch.rand(2, 3)
    for args in ((x, z, x, z), (x, x, z[:1], z)):
        with pytest.raises(ValueError, match="`x, x_adv, logits` should be of one batch"):
            reviser(*args)


def test_a_changed_model_is_refused_at_update():
    model = make_net()
    reviser = started(model, rate=1.0)
    model.head = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"a difference at head.weight, head.bias.* new reviser"):
        reviser.update()
    assert reviser.steps == 1
    assert not any(m.training for m in reviser.model.modules())
