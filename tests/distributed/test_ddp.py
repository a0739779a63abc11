"""DistributedDataParallel: the weights of one process on the joined batch, on every rank."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial
from itertools import count, product

import parallel
import pytest
import torch
import torch._functorch.config as functorch
import torch.distributed as dist
import torch.nn.functional as F
from parallel import Small, assert_joined, batch, fit, make_opt, share, small, train, values, wrap
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rgp_optim import _distributed as distributed

KINDS = ("ddp", "fsdp")
DDP = {
    "plain": {"bucket_cap_mb": 25},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True},
}


@parallel.SCOPES
@pytest.mark.parametrize("ddp", DDP)
def test_it_is_one_process_on_the_joined_batch(two, four, ddp, scope):
    for ranks, orders in ((two, parallel.ORDERS), (four, ("loss", "trades"))):
        for order in orders:
            assert_joined(ranks, train, "ddp", order, wrapping=DDP[ddp], scope=scope)


@parallel.SCOPES
def test_replicas_are_bit_identical_after_50_steps(two, four, scope):
    options = {"steps": 50, "dtype": torch.float32, "scope": scope}
    for ranks in (two, four):
        parallel.assert_same_bits(parallel.run(ranks, train, "ddp", **options))


def train_two_passes(by_hand):
    """Both forward passes, then one backward pass per role: DDP reduces in the first only."""
    by_hand &= dist.is_initialized()
    model = small()
    ddp, opt = wrap("ddp", model), make_opt(model)
    for step in range(3):
        opt.zero_grad()
        with ddp.no_sync() if by_hand else nullcontext():
            _, nat, adv = parallel.parts(ddp, *share(batch(step)))
            opt.scored(nat, natural=nat).backward()
            opt.scored(adv, adversarial=adv).backward()
        for p in model.parameters() if by_hand else ():
            dist.all_reduce(p.grad.div_(2))
        opt.step()
    return values(model)


def half_means():
    g = torch.tensor([5e4, 6e4, 1.0], dtype=torch.float16)
    wide = torch.tensor([[float(dist.get_rank())]]).double()
    half, double = distributed.Ranks().average([g, wide])
    return half.tolist(), double.tolist()


def test_means_do_not_overflow(two):
    """The sum leaves float16; each dtype is reduced by itself."""
    want = torch.tensor([5e4, 6e4, 1.0]).half().tolist(), [[0.5]]
    assert parallel.run(two, half_means) == [want] * 2


class Counts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def added_operations():
    """Of the second step, against a plain one: 62 tensors, of which 21 are selected in."""
    counts = []
    for selective in (True, False):
        layers = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)) for _ in range(20)]
        model = nn.Sequential(*layers, nn.Linear(4, 4))
        assert len(list(model.parameters())) == 62
        called, opt = wrap("ddp", model), make_opt(model)
        for _ in range(2):
            loss = called(torch.rand(3, 4)).square().mean()
            opt.zero_grad()
            loss = opt.scored(loss, natural=loss, adversarial=loss) if selective else loss
            loss.backward()
            with Counts() as counter:
                (opt if selective else opt.inner).step()
        counts.append(counter.count)
    return counts[0] - counts[1]


def test_a_step_adds_few_tensor_operations(two):
    assert max(parallel.run(two, added_operations)) <= 400


compiled = partial(torch.compile, backend="aot_eager")
COMPILED = {
    "DDP(compile)": lambda model: wrap("ddp", compiled(model)),
    "compile(DDP)": lambda model: compiled(wrap("ddp", model)),
    "compile(fully_shard)": lambda model: compiled(wrap("fsdp", model)),
}


def train_compiled(how, order):
    if not dist.is_initialized():
        return train("ddp", order)
    torch._dynamo.reset()
    model = small()
    with functorch.patch(donated_buffer=False):
        return fit(COMPILED[how](model), make_opt(model), order)


def differ(how):
    """A step is refused, before anything has changed."""
    model, rank = small(), dist.get_rank()
    ddp, opt = wrap("ddp", model), make_opt(model)
    if how == "joined later":
        fit(ddp, opt, steps=[0])
    if how == "module later":  # where all weights are updated, nothing is compared
        opt.update_fraction = 1.0
        fit(ddp, opt, steps=[0])
        opt.update_fraction = 0.4
    if how == "parts":  # as an optimizer around the wrapper that gives each rank its own
        opt = make_opt([model.conv, model.head][rank])
    if how == "fewer":
        opt = make_opt([model, model.head][rank])
    if how == "selected later":
        opt = make_opt(model.conv)
        opt.add_param_group({"params": model.head.parameters(), "rgp_select": False})
    if how == "weights" and rank == 1:
        model.head.bias.data[0] += 1e-7
    if how == "rule":
        opt = make_opt(model, score=lambda s: torch.rand_like(s.weight) if rank == 1 else s.weight)
    before = values(model)
    with ddp.join() if "joined" in how else nullcontext():
        parallel.passes("loss", model if "module" in how else ddp, opt, share(batch(99)))
        opt.param_groups[-1]["rgp_select"] = None
        with pytest.raises(RuntimeError) as caught:
            opt.step()
    parallel.assert_same_bits([before, values(model)])
    raise caught.value


class Branches(Small):
    """The second head is used by bright images only."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(20, 3)

    def forward(self, x):
        h, bright = self.features(x), x.mean((1, 2, 3)) > 5
        return self.head(h) + bright[:, None] * self.second(h) if bright.any() else self.head(h)


def brightened(step):
    """The images of rank 0, of rank 1, of none."""
    x, x_adv, y = batch(step)
    bright = [slice(8), slice(8, 16), slice(0)][step % 3]
    x[bright] += 10
    x_adv[bright] += 10
    return share([x, x_adv, y])


class TwoHeads(Small):
    """The losses use the first output only."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(20, 3)

    def forward(self, x):
        h = self.features(x)
        return self.head(h), self.unused(h)


def train_special(what, ddp):
    model = small({"branches": Branches, "outputs": TwoHeads}.get(what, Small))
    for p in model.parameters() if what == "hooks" else ():
        p.register_hook(lambda g: g * 0.5)
    called, opt = wrap("ddp", model, **DDP[ddp]), make_opt(model)
    if what == "outputs":
        called.register_forward_hook(lambda module, args, outputs: outputs[0])
    if what == "nothing selected":
        opt.param_groups[0]["rgp_select"] = False
    return fit(called, opt, steps=range(6), data=brightened if what == "branches" else None)


def train_unreached(where, scope):
    """Every rank trains the second head; a scored loss reaches it on rank 0, or nowhere."""
    model, (rank, size) = small(TwoHeads), parallel.place()
    called, opt = wrap("ddp", model), make_opt(model, scope=scope)
    for step in range(3):
        x, x_adv, y = share(batch(step))
        (z, second), z_adv = called(x), called(x_adv)[0]
        nat, adv, n = F.cross_entropy(z, y), F.cross_entropy(z_adv, y), 16 // 2
        loss = nat + adv + F.cross_entropy(second, y)
        if where == "rank 0" and rank == 0:  # its part of the mean over two ranks
            nat = nat + F.cross_entropy(second[:n], y[:n]) * size / 2
        opt.zero_grad()
        opt.scored(loss, natural=nat, adversarial=adv).backward()
        opt.step()
        assert (model.unused.weight in opt.masks()) == (where == "rank 0")
    return values(model)


@parallel.SCOPES
@pytest.mark.parametrize("where", ["rank 0", "nowhere"])
@pytest.mark.filterwarnings("ignore:No scored loss depends")
def test_what_a_scored_loss_reaches_is_the_same_on_all_ranks(two, where, scope):
    assert_joined(two, train_unreached, where, scope=scope)


def train_two_optimizers(kind, other):
    """Body and head have an optimizer each; the head's may be a plain one."""
    model = small()
    called = wrap(kind, model)
    first, second = make_opt(nn.ModuleList([model.conv, model.norm])), make_opt(model.head)
    if other == "plain":
        second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    for step in range(3):
        x, x_adv, y = share(batch(step))
        loss, nat, adv = parallel.parts(called, x.requires_grad_(), x_adv, y)
        first.zero_grad()
        second.zero_grad()
        want = torch.autograd.grad(loss, x, retain_graph=True)[0]
        for opt in (first, second) if other == "wrapped" else (first,):
            loss = opt.scored(loss, natural=nat, adversarial=adv)
        loss.backward()
        torch.testing.assert_close(x.grad, want)  # images: of the training loss, once
        first.step()
        second.step()
    return values(model)


ACCUMULATED = product(["loss", "sum"], ["no_sync", "synced"], ["plain", "buckets", "unused"])


@pytest.mark.parametrize(
    ("program", "args"),
    [
        *((parallel.accumulate, ("ddp", *args, DDP[ddp])) for *args, ddp in ACCUMULATED),
        (train_two_passes, (True,)),
        *((train_compiled, each) for each in product(COMPILED, ["loss", "sum", "in turn"])),
        *((train, (kind, "loss", 3, partial(Small, reentrant=False))) for kind in KINDS),
        (train_special, ("branches", "unused")),
        (train_special, ("hooks", "plain")),
        (train_special, ("hooks", "static")),
        (train_special, ("outputs", "unused")),
        (train_special, ("nothing selected", "plain")),
        *((train_two_optimizers, each) for each in product(KINDS, ["plain", "wrapped"])),
    ],
)
def test_every_loop_is_one_process_on_the_joined_batch(two, program, args):
    assert_joined(two, program, *args)


def refused(what):
    linear = nn.Linear(3, 2)
    if what == "fsdp1":
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        sharded, opt = FullyShardedDataParallel(nn.Linear(3, 2), **options), make_opt(linear)
        with pytest.raises(RuntimeError, match="fully_shard"):
            opt.add_param_group({"params": sharded.parameters()})
        assert len(opt.param_groups) == 1
        make_opt(sharded)
    else:
        make_opt(linear, process_group=dist.new_group([0]))


def drift():
    """Rank 0's graph changes from pass to pass; rank 1 has one for each loss, and tests none."""
    model, x, passes = small(lambda: nn.Linear(50, 3)), torch.full((2, 50), 1e-6), count()
    z, opt = wrap("ddp", model)(x.double()), make_opt(model)
    z.register_hook(lambda gradient: gradient * 1e-6 * (1 + next(passes)))
    nat, adv = ((z if dist.get_rank() == 0 else model(x.double())).sum() for _ in range(2))
    opt.scored(z.sum(), natural=nat, adversarial=adv).backward()


DIFFERS = "RuntimeError: .*the ranks differ in .*{}.*Nothing was changed"
REENTRANT = partial(Small, reentrant=True)


@pytest.mark.parametrize(
    ("program", "args", "message", "by"),
    [
        (differ, ("module",), DIFFERS.format("the gradient of parameter 0"), 2),
        (differ, ("module later",), DIFFERS.format("the gradient of parameter 0"), 2),
        (differ, ("weights",), DIFFERS.format("the weights of parameter 5"), 2),
        (differ, ("rule",), DIFFERS.format("the mask of parameter 0"), 2),
        *((differ, (how,), DIFFERS.format("their parameters"), 2) for how in ("parts", "fewer")),
        *((differ, (how,), r"step\(\) within .*join\(\)", 2) for how in ("joined", "joined later")),
        (differ, ("selected later",), "is selected in, but was not", 2),
        (train_two_passes, (False,), DIFFERS.format("the gradient of"), 2),
        *((train, (kind, "loss", 3, REENTRANT), "Set `use_reentrant=False`", 2) for kind in KINDS),
        (drift, (), "two backward passes of the natural loss .*100% apart", 2),
        (refused, ("fsdp1",), r"RuntimeError: .*`torch.distributed.fsdp.fully_shard` \(FSDP2\)", 2),
        (refused, ("group of rank 0",), "TypeError: .*Group that this process belongs to", 1),
    ],
)
def test_what_is_refused(two, program, args, message, by):
    parallel.assert_refused(two, message, program, *args, by=by)


def test_a_process_group_needs_initialised_processes():
    with pytest.raises(TypeError, match=r"Call `torch.distributed.init_process_group` first"):
        make_opt(small(), process_group=object())


def train_in_pairs():
    """Two pairs of ranks train a model each, on their own data."""
    pair, rank = divmod(dist.get_rank(), 2)
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][pair]
    model = small()
    ddp, opt = wrap("ddp", model, process_group=group), make_opt(model, process_group=group)
    assert copy.deepcopy(opt)._holder.scores.ranks is opt._holder.scores.ranks
    with pytest.raises(TypeError, match="Save `state_dict"):
        pickle.dumps(opt)
    return fit(ddp, opt, data=lambda step: share(batch(step + 100 * pair), rank, 2))


def test_a_process_group_trains_by_itself(four):
    answers = parallel.run(four, train_in_pairs)
    parallel.assert_same_bits(answers[:2])
    parallel.assert_same_bits(answers[2:])
    parallel.assert_close(answers[0], train("ddp"))
    assert answers[0][0].tolist() != answers[2][0].tolist()
