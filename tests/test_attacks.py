"""Attacks: a plain loop's images, in the ball and the bounds, the model left as it was."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import DEVICE, LowRank, cpu_only, make_batch, make_net, rng_states, seeded, snapshot
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from rgp_optim import kl_attack, pgd_attack

Y = torch.arange(64, device=DEVICE) % 3
X = torch.rand(2, 2, 5, 5, device=DEVICE)


def pgd(model, x, **options):
    return pgd_attack(model, x, Y[: len(x)], **options)


ATTACKS = {"kl": kl_attack, "pgd": pgd, "margin": partial(pgd, loss="margin")}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


@each_attack
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.1, 1.9), (0, 255), None])
@given(share=st.floats(0, 0.5), steps=st.integers(0, 3))
def test_inside_the_ball_and_the_bounds(attack, bounds, share, steps):
    low, high = bounds or (-3.0, 3.0)
    eps = share * (high - low)
    x = low + (high - low) * torch.rand(4, 2, 5, 5, generator=seeded(steps))
    x[0], x[1] = low, high
    x = x.clamp(low, high)
    x_adv = attack(make_net(), x, eps=eps, steps=steps, step_size=eps + 0.01, bounds=bounds)
    assert (x_adv - x).abs().max() <= eps + 1e-6 * max(1, high)
    assert bounds is None or low <= x_adv.min() <= x_adv.max() <= high
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad


@each_attack
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 8 / 255, 0.125, 0.3])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.7, 0.7), None])
def test_inside_the_ball_in_16_bits_and_up_to_its_border(attack, dtype, eps, bounds):
    low, high = bounds or (-1.0, 1.0)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # each number in bounds
    every = every[(every.double() >= low) & (every.double() <= high)]
    x = every[: len(every) // 50 * 50].view(-1, 2, 5, 5)[:: len(every) // 2500]
    net, step = make_net(dtype=dtype), max(eps, 0.01)
    x_adv = attack(net, x, eps=eps, step_size=step, steps=2, bounds=bounds)
    assert x_adv.dtype == dtype
    x_adv = x_adv.double()
    moved = (x_adv - x.double()).abs()
    assert eps - torch.finfo(dtype).eps <= moved.max() <= eps
    assert bounds is None or low <= x_adv.min() <= x_adv.max() <= high


@pytest.mark.parametrize("name", [*ATTACKS, "from x"])
@pytest.mark.parametrize(
    ("bounds", "eps", "step_size", "steps"),
    [
        ((0.0, 1.0), 0.1, 0.03, 2),
        ((-2.0, 2.0), 0.2, None, 9),
        (None, 5e-4, 3e-4, 2),  # the noise at the start leaves the ball
        (None, 5e-4, None, 0),
        ((0.0, 1.0), 0.0, None, 1),
    ],
)
def test_an_attack_is_a_plain_loop(name, bounds, eps, step_size, steps):
    """Every image that the model sees, from draws of a generator or a seed, not torch's own."""
    model, seen = make_net(dtype=torch.float64).eval(), []
    attack = {**ATTACKS, "from x": partial(pgd, random_start=False)}[name]
    x, low, high = make_batch(dtype=torch.float64)[0], *(bounds or (-9.0, 9.0))
    x[0], x[1] = max(low, 0), min(high, 1)  # clipping would remove half of the noise
    before, g = rng_states(), seeded(0)
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    options = dict(bounds=bounds, eps=eps, step_size=step_size, steps=steps)
    found = attack(model, x, generator=0 if steps == 2 else seeded(0), **options)
    assert all(map(torch.equal, before, rng_states()))
    hook.remove()

    def clip(images):
        return torch.min(torch.max(images, x - eps), x + eps).clamp(low, high)

    def goal(images):
        z = model(images).log_softmax(1)
        true = z[torch.arange(len(x)), Y[: len(x)]]
        if name == "kl":
            p = model(x).softmax(1)
            return (p * (p.log() - z)).sum()
        wrong = z.masked_fill(F.one_hot(Y[: len(x)], 3).bool(), -torch.inf).amax(1)
        return (wrong - true if name == "margin" else -true).sum()

    if name == "kl":
        x_adv, step = x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype), eps / 4
    else:
        draw = 2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1
        x_adv, step = clip(x + eps * draw) if name != "from x" else x, 0.003 * eps / (8 / 255)
    visited = [x] if name == "kl" else []
    for _ in range(steps):
        visited.append(x_adv.detach().requires_grad_())
        (gradient,) = torch.autograd.grad(goal(visited[-1]), visited[-1])
        x_adv = clip(x_adv + (step if step_size is None else step_size) * gradient.sign())
    torch.testing.assert_close([*seen, found], [*visited, clip(x_adv)], rtol=0, atol=1e-12)
    assert attack(model, x[:0]).shape == (0, 2, 5, 5)


class Widen(nn.Module):
    def forward(self, logits):
        return logits.float()


@each_attack
@pytest.mark.parametrize("kind", ["half", "autocast", "autocast, logits widened"])
@pytest.mark.parametrize("margin", [0.0, 20.0, 60.0])
def test_sure_images_move_in_float16_too(attack, kind, margin):
    """Two classes, z_0 - z_1 = margin + 40 x_0 - 40 x_1; at a margin of 20, p_1 is 2e-9."""
    linear, x = nn.Linear(2, 2), torch.full((1, 2), 0.5)
    linear.weight.data = torch.tensor([[20.0, -20.0], [-20.0, 20.0]])
    linear.bias.data = torch.tensor([margin, 0.0])
    if kind == "half":
        linear, x = linear.half(), x.half()
    model = nn.Sequential(linear, Widen()) if "widened" in kind else linear
    with torch.autocast(DEVICE.type, torch.float16, enabled=kind != "half"):
        x_adv = attack(model, x, eps=0.1, step_size=0.02, steps=10, generator=seeded(0))
    assert ((x_adv - x).abs() > 0.09).all()
    assert x_adv.dtype == x.dtype


@each_attack
@pytest.mark.parametrize("kind", ["half", "autocast", "autocast, logits widened", "and scaled"])
@pytest.mark.parametrize("margin", [18.0, 60.0])
def test_sure_images_move_in_float16_beside_others(attack, kind, margin):
    """A factor for the largest gradient of the batch alone would leave theirs at 0."""
    linear, x = nn.Linear(3, 2), torch.full((2, 3), 0.5)
    linear.weight.data = torch.tensor([[20.0, -20.0, 0.0], [-20.0, 20.0, 0.0]])
    linear.weight.data[0, 2], linear.bias.data = 300.0, torch.tensor([-30.0, 0.0])
    x[:, 2] = torch.tensor([0.1 + margin / 300, 0.1])
    if kind == "half":
        linear, x = linear.half(), x.half()
    model = nn.Sequential(linear, Widen()) if "widened" in kind else linear
    if kind == "and scaled":
        model = nn.Sequential(linear, Scale())
    with torch.autocast(DEVICE.type, torch.float16, enabled=kind != "half"):
        x_adv = attack(model, x, eps=0.02, step_size=0.005, steps=10, generator=seeded(0))
    assert ((x_adv - x)[:, :2].abs() > 0.018).all()


class Scale(nn.Module):
    """Leaves no logit that float16 could hold."""

    def forward(self, logits):
        return logits.float() / 1.1


class Centred(nn.Module):
    """Each row less the mean of the batch, to a power: samples depend on each other."""

    def forward(self, x):
        return (x - x.mean(0)).pow(3)


class CentredGroups(Centred):
    """Two groups of samples, which do not depend on each other."""

    def forward(self, x):
        return torch.cat([super(CentredGroups, self).forward(group) for group in x.chunk(2)])


MIXING = [nn.BatchNorm1d(8, track_running_stats=False), Centred(), CentredGroups()]


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("seed", range(5))
def test_samples_may_depend_on_each_other(mixing, seed):
    """Every pixel moves by the sign of the whole gradient, however unequal the rows' are."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), mixing, nn.ReLU(), nn.Linear(8, 3)).double().eval()
    model[3].weight.data *= torch.tensor([[300.0], [10.0], [1.0]])
    x, y = torch.rand(8, 6, dtype=torch.float64), torch.arange(8) % 3
    y[4:] = model(x)[4:].argmax(1)  # their gradients are small
    t = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(t), y, reduction="sum"), t)
    options = dict(eps=0.1, step_size=0.05, steps=1, random_start=False, bounds=None)
    moved = pgd_attack(model, x, y, **options) - x
    largest = gradient.unflatten(0, (2, 4)).abs().amax((1, 2))
    sure = gradient.abs() > 1e-9 * largest.repeat_interleave(4)[:, None]
    assert sure.sum() > 30
    assert torch.equal(moved.sign()[sure], gradient.sign()[sure])


@each_attack
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_images_move_beside_one_without_a_prediction(attack, dtype):
    linear, x = nn.Linear(4, 3).to(dtype), torch.full((3, 4), 0.5, dtype=dtype)
    x[1] = torch.finfo(dtype).max
    x_adv = attack(linear, x, eps=0.1, step_size=0.05, steps=3, bounds=None)
    assert ((x_adv - x).abs()[[0, 2]] > 0.04).any(1).all()


@each_attack
def test_gradients_that_overflow_leave_no_nan_in_an_image(attack):
    class Overflows(nn.Linear):
        def forward(self, x):
            x = x * 1.0
            if x.requires_grad:
                x.register_hook(lambda g: g + torch.tensor([torch.inf, torch.nan, 0.0, 0.0]))
            return super().forward(x)

    x = torch.full((3, 4), 0.5)
    x_adv = attack(Overflows(4, 3), x, eps=0.1, step_size=0.05, steps=5)
    assert torch.isfinite(x_adv).all()
    torch.testing.assert_close(x_adv[:, 0], x[:, 0] + 0.1)


@each_attack
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(attack, fails):
    model, x, seen = make_net().train(), X.clone(), []
    model.norm.eval()  # a mode of its own
    model.head.weight.requires_grad_(False)
    model.conv.weight.grad = stray = torch.full_like(model.conv.weight, 3.0)
    state = {name: t.clone() for name, t in model.state_dict().items()}

    def spy(module, args):
        seen.append(any(m.training for m in model.modules()))
        if fails and len(seen) == 2:
            raise ZeroDivisionError

    model.register_forward_pre_hook(spy)
    if fails:
        with pytest.raises(ZeroDivisionError):
            attack(model, x)
    else:
        attack(model, x)
    assert seen
    assert not any(seen)
    assert [m.training for m in (model, model.conv, model.norm, model.head)] == [1, 1, 0, 1]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.conv.weight.grad is stray
    assert (stray == 3).all()
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * 5
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert x.grad is None


class Scripted(nn.Sequential):
    """The same weights each time, in layers that can be scripted."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))


class Cached(nn.Linear):
    """Stores the weight it computes as long as it is in eval mode; only `eval` begins that."""

    cache = None
    merged = property(lambda self: self.cache is not None)

    def __init__(self):
        super().__init__(4, 4, bias=False)

    def eval(self):
        super().eval()
        self.cache = 2 * self.weight.detach()
        return self

    def train(self, mode=True):
        self.cache = None
        return super().train(mode)

    def forward(self, x):
        return F.linear(x, 2 * self.weight if self.cache is None else self.cache)


@each_attack
@pytest.mark.parametrize("layer", [LowRank, Cached])
@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "one layer in eval"])
@pytest.mark.parametrize("bare", [False, True])
def test_modes_that_act_are_undone_by_calls(attack, layer, frozen, bare):
    """A restored flag alone would leave the layer merged, without gradients."""
    model = layer() if bare else nn.Sequential(layer(), nn.ReLU(), layer(), nn.Linear(4, 3))
    acting = [m for m in model.train().modules() if isinstance(m, layer)]
    if frozen:
        acting[-1].eval()
    before, x = snapshot(model), torch.rand(8, 4)
    attack(model, x, steps=2)
    modes = [True] * (len(acting) - frozen) + [False] * frozen
    assert [m.training for m in acting] == modes
    assert [not m.merged for m in acting] == modes
    torch.testing.assert_close(snapshot(model), before)
    model(x.requires_grad_()).sum().backward()
    assert all(p.grad is not None for m in acting if m.training for p in m.parameters())


class Refuses(nn.Dropout):
    """Its `train` leaves it in eval mode."""

    def train(self, mode=True):
        return super().train(False)


class KeepsOneFrozen(nn.Sequential):
    """Its `train` leaves the first layer in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


@each_attack
@pytest.mark.parametrize("mode", [True, False])
def test_modes_of_modules_with_several_parents_or_a_train_of_their_own(attack, mode):
    shared, refuses = LowRank(), Refuses(0.0)
    first = nn.Sequential(shared, KeepsOneFrozen(nn.Dropout(0.0), nn.Linear(4, 4)), refuses)
    model = nn.Sequential(first, nn.Sequential(shared, nn.Linear(4, 3))).train(mode)
    model[1].train(not mode)
    shared.train(mode)  # against the parent that comes last
    refuses.training = True  # by hand
    before = [m.training for m in model.modules()]
    attack(model, torch.rand(8, 4), steps=1)
    assert [m.training for m in model.modules()] == before
    assert shared.merged == (not mode)


@each_attack
def test_training_goes_on_under_the_same_autocast(attack):
    """Older PyTorch caches an attack's cast weights, without a graph."""
    net = make_net()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        net(attack(net, X)).float().square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@each_attack
def test_without_grad_mode_and_for_inputs_with_a_graph(attack):
    model, x = make_net(), X.clone()
    plain = attack(model, x, generator=0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(attack(model, x.clone(), generator=0), plain)
    assert torch.equal(attack(model, x.requires_grad_(), generator=0), plain)
    assert x.grad is None


class InPlace(nn.Module):
    """Normalises the images that it is given in place, past autograd in one of two ways."""

    def __init__(self, way):
        super().__init__()
        self.net, self.way = make_net(), way

    def forward(self, x):
        with torch.no_grad():
            (x if self.way == "no_grad" else x.data).sub_(0.5).div_(0.25)
        return self.net(x)


@each_attack
@pytest.mark.parametrize("way", ["no_grad", "data"])
def test_a_model_may_write_into_its_input(attack, way):
    """The ball is around the images that were passed, and these stay."""
    model, x = InPlace(way), X.clone()
    x_adv = attack(model, x, steps=3, eps=0.03, step_size=0.03, generator=0)
    assert torch.equal(x, X)
    assert 0.02 < (x_adv - X).abs().max() <= 0.03 + 1e-6
    first = nn.BatchNorm2d(2, affine=False, eps=0).requires_grad_(False)
    first.running_mean.fill_(0.5)
    first.running_var.fill_(0.25**2)
    plain = nn.Sequential(first, model.net)
    assert (attack(plain, x, steps=3, eps=0.03, step_size=0.03, generator=0) == x_adv).all()


def exported(net, x):
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    return torch.export.export(net.eval(), (x,), dynamic_shapes=sizes).module()


DEPLOYED = {
    "scripted": lambda net, x: torch.jit.script(net),
    "frozen": lambda net, x: torch.jit.freeze(torch.jit.script(net.eval())),
    "traced": lambda net, x: torch.jit.trace(net.eval(), x),
    "exported": exported,
}


@each_attack
@pytest.mark.parametrize("kind", DEPLOYED)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of another category from 2.14 on
def test_deployed_models_are_attacked_as_the_original(attack, kind, whole):
    """A frozen module has no mode, an exported one refuses to change it; the others switch."""
    deployed = DEPLOYED[kind](Scripted().to(DEVICE), X)
    model = deployed if whole else nn.Sequential(nn.Dropout(0.5), deployed, nn.Dropout(0.5))
    before = [m.training for m in model.modules() if hasattr(m, "training")]
    x_adv = attack(model, X, steps=2, generator=0)
    torch.testing.assert_close(x_adv, attack(Scripted().to(DEVICE), X, steps=2, generator=0))
    assert (x_adv - X).abs().max() > 0.005
    if kind != "frozen":
        assert [m.training for m in model.modules()] == before
    assert whole or (model.training and model[0].training and model[2].training)


def attack_then_train(rank):
    """Rank 1 of 2 keeps its statistics under attack; the ranks then still share gradients."""
    model = nn.parallel.DistributedDataParallel(make_net(), static_graph=True)
    x = torch.rand(3, 2, 5, 5, generator=seeded(rank))
    model.module.norm.running_mean.fill_(rank)
    compiled = nn.Module()  # what torch.compile returns keeps its model under this name
    compiled._orig_mod = model
    for net in (model, compiled):
        kl_attack(net, x, steps=2)
        pgd_attack(net, x, Y[:3], steps=2)
    assert (model.module.norm.running_mean == rank).all()
    F.cross_entropy(model(x), Y[:3]).backward()
    mine = model.module.head.weight.grad
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both)


def test_a_parallel_model_is_left_as_it_was(two):
    two.run(attack_then_train)


# Refusals.


class Returns(nn.Module):
    """A linear model whose images and logits are changed on their way."""

    def __init__(self, change=lambda z: z, before=lambda x: x, reentrant=False):
        super().__init__()
        self.linear, self.change, self.before = nn.Linear(50, 3, device=DEVICE), change, before
        self.reentrant = reentrant

    def forward(self, x):
        x = self.before(x.flatten(1))
        return self.change(checkpoint(self.linear, x, use_reentrant=self.reentrant))


CUT = {
    "detached images": Returns(before=torch.Tensor.detach),
    "detached logits": Returns(torch.Tensor.detach),
    "no_grad": Returns(torch.no_grad()(lambda z: 2 * z)),
    "numpy": Returns(before=lambda x: torch.tensor(x.tolist())),
    "labels": Returns(lambda z: F.one_hot(z.argmax(1), 3).float()),
}


@each_attack
@pytest.mark.parametrize("model", CUT.values(), ids=CUT.keys())
def test_models_that_cut_the_graph_are_refused(attack, model):
    message = r"`model\(x\)` should depend on the images through autograd.*Remove detach"
    with pytest.raises(ValueError, match=message):
        attack(model, X, steps=1)
    assert model.training


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # checkpoint's own
@each_attack
def test_reentrant_checkpointing_is_refused(attack):
    assert attack(Returns(), X, steps=1).shape == X.shape
    message = "`model` should checkpoint activations with use_reentrant=False"
    with pytest.raises(RuntimeError, match=message):
        attack(Returns(reentrant=True), X, steps=1)


NET = make_net()
CONV, ONE = nn.Conv2d(2, 2, 3).to(DEVICE), nn.Sequential(nn.Flatten(), nn.Linear(50, 1)).to(DEVICE)
LOGITS = r"`model\(x\)` should be a tensor of logits. Found"
RANGE = r"`x` should be in \[0, 1\]"
values_are_read = cpu_only("elsewhere reading values would synchronise")


def read(*row):
    return pytest.param(*row, marks=values_are_read)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.mul(255).byte()}, TypeError, "`x` should have a floating dtype.* x / 255"),
        ({"eps": 8}, ValueError, "`eps` should be at most 1.* write 8 / 255"),
        ({"eps": -1}, ValueError, r"`eps` should be in \[0, inf\)"),
        ({"eps": 5, "bounds": (-2, 2)}, ValueError, "`eps` should be at most 4, the width of `bou"),
        ({"bounds": 1.0}, ValueError, "`bounds` should be .lowest, highest., or None"),
        ({"bounds": (1, 0)}, ValueError, "`bounds` should be .lowest, highest., or None"),
        ({"step_size": 0}, ValueError, r"`step_size` should be in \(0, inf\)"),
        ({"steps": 2.5}, TypeError, "`steps` should be an integer >= 0"),
        ({"generator": -1}, ValueError, "`generator` should be an integer"),
        ({"generator": "1"}, TypeError, "`generator` should be an integer"),
        ({"model": lambda x: x}, TypeError, "be a torch.nn.Module. .*Wrap a function in an nn.Mod"),
        ({"model": X, "x": NET}, TypeError, "The model is the first argument"),
        ({"model": CONV}, ValueError, r"be logits, \[batch, classes\]. Fo"),
        ({"model": ONE, "target": Y[:2] * 0}, ValueError, r"two classes.*`\(2, 1\)`. Turn one"),
        ({"model": Returns(lambda z: (z, z))}, TypeError, LOGITS + " `tuple`. Wrap the model in"),
        ({"model": Returns(lambda z: {"z": z})}, TypeError, LOGITS + " `dict`. Wrap the model in"),
        read({"x": X * 2 - 1}, ValueError, RANGE + ". Found `values from -.*Normalise inside the"),
        read({"x": X * torch.nan}, ValueError, RANGE),
        read({"x": X * 255}, ValueError, "Found `values from .*0 to 255, pass x / 255"),
        read({"x": X * 9 - 5, "bounds": [-2, 2]}, ValueError, r"in \[-2, 2\].*range of `x` as `bo"),
    ],
)
def test_refusals(changed, error, message):
    kwargs = {"model": NET, "x": X, "target": Y[:2], **changed}
    with pytest.raises(error, match=message):
        pgd_attack(**kwargs)
    del kwargs["target"]
    with pytest.raises(error, match=message):
        kl_attack(**kwargs)


def without_logit(label, loss):
    message = (
        rf"`target` should be in \[0, 2\]. Found `labels from {min(label, 1)} to {max(label, 1)}"
    )
    return read({"target": torch.tensor([label, 1]), "loss": loss}, message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": torch.eye(3)[:2], "steps": 0}, r"class indices, int64, \[2\]. Found `\(2, 3\)"),
        ({"target": Y[:3]}, "`target` should be class indices"),
        ({"target": Y[:2].int()}, r"torch.int32`. Write target.long"),
        ({"target": Y[:2].byte()}, r"torch.uint8`. Write target.long"),
        ({"loss": "cw"}, "`loss` should be one of 'cross_entropy', 'margin'.* use 'margin'"),
        *(without_logit(label, "cross_entropy") for label in (-100, -1, 3)),
        *(without_logit(label, "margin") for label in (-100, -1, 3)),
    ],
)
def test_refusals_of_targets_and_losses(changed, message):
    with pytest.raises(ValueError, match=message):
        pgd_attack(**{"model": NET, "x": X, "target": Y[:2], **changed})
