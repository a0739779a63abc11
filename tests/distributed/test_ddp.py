"""DistributedDataParallel: the weights of one process on the joined batch, on every rank."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch._functorch.config as functorch
import torch.distributed as dist
import torch.nn.functional as F
from common import backward
from parallel import (
    ORDERS,
    accumulate,
    alone,
    assert_close,
    assert_same_bits,
    batch,
    make_opt,
    parts,
    share,
    small,
    take_step,
    train_with,
    values,
    wrapped,
)
from ranks import RankFailed
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rgp_optim import RGPSelectiveOptimizer
from rgp_optim import _distributed as distributed

DDP = {
    "plain": {"bucket_cap_mb": 25},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("ddp", DDP.values(), ids=DDP)
def test_it_is_one_process_on_the_joined_batch(two, four, ddp, scope):
    for ranks, size, orders in ((two, 2, ORDERS), (four, 4, ("loss", "trades"))):
        arguments = {"kind": "ddp", "orders": orders, "ddp": ddp, "scope": scope}
        answers = ranks.run(train_with, size, arguments)
        for order, *per_rank in zip(orders, *answers, strict=True):
            assert_same_bits(per_rank)
            assert_close(per_rank[0], alone(order, 3, scope=scope))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_replicas_are_bit_identical_after_50_steps(two, four, scope):
    for ranks, size in ((two, 2), (four, 4)):
        arguments = {"kind": "ddp", "steps": 50, "dtype": torch.float32, "scope": scope}
        assert_same_bits([each[0] for each in ranks.run(train_with, size, arguments)])


@pytest.mark.parametrize("ddp", [DDP["plain"], DDP["buckets"], DDP["unused"]], ids=str)
@pytest.mark.parametrize("window", ["no_sync", "synced"])
def test_micro_batches(two, window, ddp):
    for order in ("loss", "sum"):
        answers = two.run(accumulate, 2, "ddp", order, window, ddp)
        assert_same_bits(answers)
        assert_close(answers[0], accumulate(0, 1, "alone", order, window))


def train_two_passes(rank, size, by_hand):
    """Both forward passes, then one backward pass per role: DDP reduces in the first only."""
    model = small()
    ddp = DistributedDataParallel(model) if size > 1 else model
    opt = make_opt(model)
    for step in range(3):
        opt.zero_grad()
        with ddp.no_sync() if by_hand else nullcontext():
            _, nat, adv = parts(ddp, *share(rank, size, batch(step)))
            opt.scored(nat, natural=nat).backward()
            opt.scored(adv, adversarial=adv).backward()
        for p in model.parameters() if by_hand else ():
            dist.all_reduce(p.grad.div_(size))
        opt.step()
    return values(model)


def test_two_backward_passes_after_two_forward_passes(two):
    """Right where the training gradient is reduced by hand; else refused at the first step."""
    answers = two.run(train_two_passes, 2, True)
    assert_same_bits(answers)
    assert_close(answers[0], train_two_passes(0, 1, False))
    with pytest.raises(RankFailed, match=r"the ranks differ in the gradient of .*Nothing was ch"):
        two.run(train_two_passes, 2, False)


def half_means(rank, size):
    g = torch.tensor([5e4, 6e4, 1.0], dtype=torch.float16)
    wide = torch.tensor([[float(rank)]]).double()
    half, double = distributed.Ranks().average([g, wide])
    return half.tolist(), double.tolist()


def test_means_do_not_overflow(two):
    """The sum leaves float16; each dtype is reduced by itself."""
    want = torch.tensor([5e4, 6e4, 1.0]).half().tolist(), [[0.5]]
    assert two.run(half_means, 2) == [want] * 2


# How much it takes.


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(rank, size):
    """Of the second step, 62 tensors of which 21 are selected; and of the plain step."""
    counts = []
    for make in (RGPSelectiveOptimizer, lambda inner: inner):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)) for _ in range(20)]
        model = nn.Sequential(*layers, nn.Linear(4, 4))
        assert len(list(model.parameters())) == 62
        called = DistributedDataParallel(model)
        opt = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for _ in range(2):
            loss = called(torch.rand(3, 4)).square().mean()
            opt.zero_grad()
            if isinstance(opt, RGPSelectiveOptimizer):
                loss = opt.scored(loss, natural=loss, adversarial=loss)
            loss.backward()
            with Counts() as counter:
                opt.step()
        counts.append(counter.count)
    return counts


def test_a_step_adds_few_tensor_operations(two):
    for wrapped_step, plain_step in two.run(operations, 2):
        assert wrapped_step - plain_step <= 400


# Compiled models, checkpointed activations.


def train_compiled(rank, size, how):
    found = []
    with functorch.patch(donated_buffer=False):
        for order in ("loss", "sum", "in turn"):
            torch._dynamo.reset()
            model = small()
            if how == "DDP(compile)":
                called = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
            elif how == "compile(DDP)":
                called = torch.compile(DistributedDataParallel(model), backend="aot_eager")
            else:
                called = torch.compile(wrapped("fsdp", model), backend="aot_eager")
            opt = make_opt(model)
            for step in range(3):
                take_step(order, called, opt, share(rank, size, batch(step)))
            found.append(values(model))
    return found


@pytest.mark.parametrize("how", ["DDP(compile)", "compile(DDP)", "compile(fully_shard)"])
def test_compiled_models(two, how):
    answers = two.run(train_compiled, 2, how)
    for order, *per_rank in zip(("loss", "sum", "in turn"), *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 3))


def train_checkpointed(rank, size, kind, reentrant):
    model = small()
    model.reentrant = reentrant
    called, opt = wrapped(kind, model), make_opt(model)
    for step in range(3):
        take_step("loss", called, opt, share(rank, size, batch(step)))
    return values(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_checkpointed_activations(two, kind):
    answers = two.run(train_checkpointed, 2, kind, False)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 3))
    with pytest.raises(RankFailed, match="Set `use_reentrant=False`"):
        two.run(train_checkpointed, 2, kind, True)


# Ranks that differ are told so, in the first step and before anything has changed.


def lop_sided(rank):
    return lambda s: s.adversarial.abs() * (1.0 if rank == 0 else torch.rand_like(s.weight))


def differ(rank, size, how):
    model = small()
    ddp = DistributedDataParallel(model)
    opt = make_opt(model, score="rgp" if how != "rule" else lop_sided(rank))
    data = share(rank, size, batch(99))
    if how == "weights" and rank == 1:
        with torch.no_grad():
            model.head.bias[0] += 1e-7
    before = values(model)
    loss, nat, adv = parts(model if how == "module" else ddp, *data)
    backward(opt, loss, natural=nat, adversarial=adv)
    with pytest.raises(RuntimeError, match=r"the ranks differ in .*Nothing was changed") as caught:
        opt.step()
    assert_same_bits([before, values(model)])
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("module", "the gradient of parameter 0"),
        ("weights", "the weights of parameter 5"),
        ("rule", "the mask of parameter 0"),
    ],
)
def test_ranks_that_differ_are_told_so(two, how, named):
    for message in two.run(differ, 2, how):
        assert named in message


# Parameters that not every rank uses, hooks, outputs without a loss, other optimizers.


class Branches(nn.Module):
    """The second branch is used by some inputs only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, both):
        return self.one(x) + self.two(x) if both else self.one(x)


def train_branches(rank, size):
    torch.manual_seed(5)
    model = Branches().double()
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    opt = make_opt(model)
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        x = torch.rand(8, 4, generator=g, dtype=torch.float64)
        y = torch.randint(0, 3, (8,), generator=g)
        both = [step % 3 == 0, step % 3 == 1]  # on each rank; in every third step on none
        rows = [(x[:4], y[:4], both[0]), (x[4:], y[4:], both[1])]
        if size > 1:
            rows = [rows[rank]]
        nat = adv = 0.0
        for a, b, use in rows:
            nat = nat + F.cross_entropy(ddp(a, use), b) / len(rows)
            adv = adv + F.cross_entropy(ddp(a + 0.1, use), b) / len(rows)
        opt.zero_grad()
        backward(opt, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


def test_parameters_that_some_ranks_do_not_use(two):
    answers = two.run(train_branches, 2)
    assert_same_bits(answers)
    assert_close(answers[0], train_branches(0, 1))


class TwoHeads(nn.Module):
    """The losses use the first output only."""

    def __init__(self):
        super().__init__()
        self.body, self.used, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.body(x))
        return self.used(h), self.unused(h)


def train_special(rank, size, what, ddp):
    torch.manual_seed(3)
    model = TwoHeads().double() if what == "outputs" else small()
    if what == "hooks":
        for p in model.parameters():
            p.register_hook(lambda g: g * 0.5)
    called = DistributedDataParallel(model, **ddp) if size > 1 else model
    groups = [{"params": list(model.parameters()), "rgp_select": None}]
    if what == "nothing selected":
        groups[0]["rgp_select"] = False
    opt = RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1), update_fraction=0.4)
    for step in range(3):
        if what == "outputs":
            g = torch.Generator().manual_seed(step)
            x = torch.rand(8, 4, generator=g, dtype=torch.float64)
            x, y = share(rank, size, [x, torch.randint(0, 3, (8,), generator=g)])
            nat = F.cross_entropy(called(x)[0], y)
            adv = F.cross_entropy(called(x + 0.1)[0], y)
        else:
            _, nat, adv = parts(called, *share(rank, size, batch(step)))
        opt.zero_grad()
        backward(opt, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


@pytest.mark.parametrize(
    ("what", "ddp"),
    [
        ("hooks", DDP["plain"]),
        ("hooks", DDP["static"]),
        ("outputs", DDP["unused"]),
        ("nothing selected", DDP["plain"]),
    ],
    ids=str,
)
def test_hooks_unused_outputs_and_nothing_to_select_in(two, what, ddp):
    answers = two.run(train_special, 2, what, ddp)
    assert_same_bits(answers)
    assert_close(answers[0], train_special(0, 1, what, {}))


def train_two_optimizers(rank, size, kind, other):
    """Body and head have an optimizer each; the head's may be a plain one."""
    model = small()
    called = wrapped(kind, model)
    body = [*model.conv.parameters(), *model.norm.parameters()]
    first = RGPSelectiveOptimizer(torch.optim.SGD(body, lr=0.1), update_fraction=0.4, alpha=0.3)
    second = torch.optim.SGD(model.head.parameters(), lr=0.1)
    if other == "wrapped":
        second = RGPSelectiveOptimizer(second, update_fraction=0.4, alpha=0.3)
    for step in range(3):
        x, x_adv, y = share(rank, size, batch(step))
        x.requires_grad_()
        loss, nat, adv = parts(called, x, x_adv, y)
        first.zero_grad()
        second.zero_grad()
        both = {"natural": nat, "adversarial": adv}
        want = torch.autograd.grad(loss, x, retain_graph=True)[0]
        if other == "wrapped":
            loss = second.scored(loss, **both)
        first.scored(loss, **both).backward()
        torch.testing.assert_close(x.grad, want)  # images: of the training loss, once
        first.step()
        second.step()
    return values(model)


@pytest.mark.parametrize("other", ["plain", "wrapped"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_optimizers(two, kind, other):
    answers = two.run(train_two_optimizers, 2, kind, other)
    assert_same_bits(answers)
    assert_close(answers[0], train_two_optimizers(0, 1, "alone", other))
    if other == "wrapped":  # as one optimizer: each tensor is selected in by itself
        model = small()
        opt = RGPSelectiveOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), update_fraction=0.4, alpha=0.3
        )
        for step in range(3):
            take_step("loss", model, opt, batch(step))
        assert_close(answers[0], values(model))


# What other ways to divide the work are refused.


def refused(rank, size, what):
    if what == "fsdp1":
        options = {"device_id": torch.device("cpu"), "use_orig_params": True}
        params = list(FullyShardedDataParallel(nn.Linear(3, 2), **options).parameters())
        opt = make_opt(nn.Linear(3, 2))
        with pytest.raises(RuntimeError, match="fully_shard"):
            opt.add_param_group({"params": params})
        assert len(opt.param_groups) == 1
        with pytest.raises(RuntimeError) as caught:
            RGPSelectiveOptimizer(torch.optim.SGD(params, lr=0.1))
    elif what == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

        inner = ZeroRedundancyOptimizer(nn.Linear(3, 2).parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(TypeError) as caught:
            RGPSelectiveOptimizer(inner)
    else:
        group = dist.new_group([0])
        if rank == 0:
            make_opt(small(), process_group=group)
            return "a ProcessGroup that this process belongs to"
        with pytest.raises(TypeError) as caught:
            make_opt(small(), process_group=group)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fsdp1", "`torch.distributed.fsdp.fully_shard` (FSDP2)"),
        ("zero", "use `torch.distributed.fsdp.fully_shard`"),
        ("group", "a ProcessGroup that this process belongs to"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_refused(two, what, words):
    for message in two.run(refused, 2, what):
        assert words in message


def test_a_process_group_needs_initialised_processes():
    with pytest.raises(RuntimeError, match="after `torch"):
        make_opt(small(), process_group=object())


def train_in_pairs(rank, size):
    """Two pairs, each with a model and data of its own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    model = small()
    ddp = DistributedDataParallel(model, process_group=mine)
    opt = make_opt(model, process_group=mine)
    assert copy.deepcopy(opt)._holder.ranks is opt._holder.ranks
    with pytest.raises(TypeError, match="Save `state_dict"):
        pickle.dumps(opt)
    for step in range(3):
        data = batch(step + 100 * (rank // 2))
        take_step("loss", ddp, opt, share(rank % 2, 2, data))
    return values(model)


def test_a_process_group_trains_by_itself(four):
    answers = four.run(train_in_pairs, 4)
    assert_same_bits(answers[:2])
    assert_same_bits(answers[2:])
    assert_close(answers[0], alone("loss", 3))
    assert answers[0][0].tolist() != answers[2][0].tolist()
