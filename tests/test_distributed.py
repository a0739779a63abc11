"""Several processes: the weights of one process on the joined batch, and the same on every rank."""

import copy
import pickle
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch
import torch.distributed as dist
import torch.nn.functional as F
from common import numpy_topk
from ranks import RankFailed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rgp_optim import RGPSelectiveOptimizer, kl_adv_loss
from rgp_optim import _distributed as distributed
from rgp_optim._distributed import Wanted

DDP = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "buckets": {"gradient_as_bucket_view": True},
}
ORDERS = ("call", "sum", "in turn", "blocks", "loss first", "joined", "trades")


class Small(nn.Module):
    """No batch statistics, so that the batch can be divided; sizes that do not divide evenly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        self.head = nn.Linear(5 * 4, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def small(dtype=torch.float64):
    torch.manual_seed(7)
    return Small().to(dtype)


def batch(step, dtype=torch.float64, n=16):
    g = torch.Generator().manual_seed(step)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=torch.float64)
    x_adv = x + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x.to(dtype), x_adv.to(dtype), torch.randint(0, 3, (n,), generator=g)


def share(rank, size, tensors):
    return [t.chunk(size)[rank] for t in tensors]


def make_opt(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.4, "alpha": 0.3, **options})


def parts(model, x, x_adv, y, trades=False):
    """Total, natural and adversarial loss."""
    logits, logits_adv = model(x), model(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    if trades:
        return kl_adv_loss(logits, logits_adv, y, beta=3.0), nat, adv
    return nat + 0.5 * adv, nat, adv


def take_step(order, model, opt, data):
    """One step, its passes in one of the orders that people write."""
    x, x_adv, y = data
    opt.zero_grad()
    if order == "in turn":  # each loss with a forward pass of its own
        with opt.score("natural"):
            F.cross_entropy(model(x), y).backward()
        with opt.score("adversarial"):
            F.cross_entropy(model(x_adv), y).backward()
        parts(model, x, x_adv, y)[0].backward()
    elif order == "blocks":  # both forward passes first
        loss, nat, adv = parts(model, x, x_adv, y)
        with opt.score("natural"):
            nat.backward(retain_graph=True)
        with opt.score("adversarial"):
            adv.backward(retain_graph=True)
        loss.backward()
    elif order == "loss first":
        loss, nat, adv = parts(model, x, x_adv, y)
        loss.backward(retain_graph=True)
        with opt.score("adversarial"):
            adv.backward(retain_graph=True)
        with opt.score("natural"):
            nat.backward()
    elif order == "joined":  # one forward pass of both batches
        logits, logits_adv = model(torch.cat([x, x_adv])).chunk(2)
        nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        opt.backward(nat + 0.5 * adv, natural=nat, adversarial=adv)
    elif order == "sum":
        _, nat, adv = parts(model, x, x_adv, y)
        opt.backward(natural=nat, adversarial=adv)
    else:
        loss, nat, adv = parts(model, x, x_adv, y, trades=order == "trades")
        opt.backward(loss, natural=nat, adversarial=adv)
    opt.step()


def values(model):
    return [p.detach().double().numpy().copy() for p in model.parameters()]


def alone(order, steps, dtype=torch.float64, **options):
    """The same training in one process, on the joined batches."""
    model = small(dtype)
    opt = make_opt(model, **options)
    for step in range(steps):
        take_step(order, model, opt, batch(step, dtype))
    return values(model)


def train_ddp(rank, size, orders, ddp_options, steps, dtype, options):
    found = []
    for order in orders:
        model = small(dtype)
        ddp = DistributedDataParallel(model, **ddp_options)
        opt = make_opt(model, **options)
        for step in range(steps):
            take_step(order, ddp, opt, share(rank, size, batch(step, dtype)))
        found.append(values(model))
    return found


def assert_same_bits(per_rank):
    for other in per_rank[1:]:
        assert all(map(np.array_equal, per_rank[0], other))


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("ddp_options", DDP.values(), ids=DDP)
def test_ddp_is_one_process_on_the_joined_batch(two, ddp_options, scope):
    answers = two.run(
        train_ddp,
        2,
        ORDERS,
        ddp_options,
        4,
        torch.float64,
        {"scope": scope, "check_ranks": "always"},
    )
    for order, *per_rank in zip(ORDERS, *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 4, scope=scope))


@pytest.mark.parametrize("ddp_options", DDP.values(), ids=DDP)
def test_ddp_with_four_processes(four, ddp_options):
    orders = ("call", "sum", "trades")
    answers = four.run(train_ddp, 4, orders, ddp_options, 3, torch.float64, {})
    for order, *per_rank in zip(orders, *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 3))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("options", [{"refresh_every": 4}, {"scope": "global"}], ids=str)
def test_replicas_are_bit_identical_after_50_steps(two, four, size, options):
    ranks = {2: two, 4: four}[size]
    answers = ranks.run(train_ddp, size, ("call",), {}, 50, torch.float32, options)
    assert_same_bits([each[0] for each in answers])
    start = [p.detach().double().numpy() for p in small(torch.float32).parameters()]
    assert not any(map(np.array_equal, answers[0][0], start))


def accumulate(rank, size, order, window, ddp_options):
    """Two micro-batches a step; with ``no_sync`` only the second is reduced."""
    model = small()
    ddp = DistributedDataParallel(model, **ddp_options)
    opt = make_opt(model)
    for step in range(3):
        opt.zero_grad()
        for micro in range(2):
            x, x_adv, y = share(rank, size, batch(10 * step + micro))
            with ddp.no_sync() if window == "no_sync" and micro == 0 else nullcontext():
                loss, nat, adv = parts(ddp, x, x_adv, y)
                if order == "sum":
                    opt.backward(natural=nat, adversarial=adv)
                else:
                    opt.backward(loss, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


def accumulate_alone(order):
    model = small()
    opt = make_opt(model)
    for step in range(3):
        opt.zero_grad()
        for micro in range(2):
            loss, nat, adv = parts(model, *batch(10 * step + micro))
            if order == "sum":
                opt.backward(natural=nat, adversarial=adv)
            else:
                opt.backward(loss, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


@pytest.mark.parametrize("ddp_options", [DDP["plain"], DDP["buckets"], DDP["unused"]], ids=str)
@pytest.mark.parametrize("window", ["no_sync", "synced"])
@pytest.mark.parametrize("order", ["call", "sum"])
def test_ddp_micro_batches(two, order, window, ddp_options):
    answers = two.run(accumulate, 2, order, window, ddp_options)
    assert_same_bits(answers)
    assert_close(answers[0], accumulate_alone(order))


def shard(model, layers=True, **options):
    if layers:
        for part in model.children():
            fully_shard(part, **options)
    return fully_shard(model, **options)


def whole(model):
    return [p.full_tensor().detach().double().numpy().copy() for p in model.parameters()]


def train_fsdp(rank, size, orders, mesh_shape, fsdp_options, steps, dtype, options):
    names = ("replicate", "shard") if len(mesh_shape) == 2 else ("shard",)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    found = []
    for order in orders:
        model = shard(small(dtype), mesh=mesh, **fsdp_options)
        opt = make_opt(model, **options)
        for step in range(steps):
            take_step(order, model, opt, share(rank, size, batch(step, dtype)))
        found.append(whole(model))
    return found


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_is_one_process_on_the_joined_batch(two, scope, reshard):
    options = {"reshard_after_forward": reshard}
    answers = two.run(train_fsdp, 2, ORDERS, (2,), options, 4, torch.float64, {"scope": scope})
    for order, *per_rank in zip(ORDERS, *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 4, scope=scope))


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=["fsdp", "hsdp"])
def test_fsdp2_with_four_processes(four, mesh_shape):
    orders = ("call", "sum", "trades")
    for scope in ("tensor", "global"):
        answers = four.run(
            train_fsdp,
            4,
            orders,
            mesh_shape,
            {},
            3,
            torch.float64,
            {"scope": scope, "check_ranks": "always"},
        )
        for order, *per_rank in zip(orders, *answers, strict=True):
            assert_same_bits(per_rank)
            assert_close(per_rank[0], alone(order, 3, scope=scope))


# The selection itself, against Python's sort: ties, zeros, signs, what is not finite, empty pieces.

KINDS = ("ties", "normal", "special", "mixed")


def draw(kind, g, shape):
    if kind == "ties":
        return torch.randint(-3, 4, shape, generator=g).float()
    scores = torch.randn(shape, generator=g)
    if kind == "special":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42])
        at = torch.rand(shape, generator=g) < 0.5
        scores = torch.where(at, odd[torch.randint(0, 6, shape, generator=g)], scores)
    return scores.double() if kind == "mixed" and shape[0] % 2 else scores


def cases(kind):
    g = torch.Generator().manual_seed(KINDS.index(kind))
    for n in range(30):
        shapes = [tuple(torch.randint(1, 9, (2,), generator=g).tolist()) for _ in range(3)]
        shapes.append((2 ** (17 if n == 20 else n % 9) + 1, 1))  # once more than goes together
        pools = [[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 0, 1]][n % 3]
        fractions = [[0.5, 0.3, 0.9, 0.7], [0.4] * 4, [0.01, 0.6, 0.01, 0.6]][n % 3]
        yield [draw(kind, g, shape) for shape in shapes], fractions, pools


def select_pieces(rank, size, kind):
    everyone = distributed.Ranks().ring
    found = []
    for scores, fractions, pools in cases(kind):
        wanted = []
        for score, fraction, pool in zip(scores, fractions, pools, strict=True):
            rows = score.chunk(size)
            mine = rows[rank] if rank < len(rows) else score[:0]
            wanted.append(
                Wanted(None, None, mine, 0.5, fraction, pool, score.numel(), everyone, mine)
            )
        found.append([mask.numpy() for mask in distributed.select(wanted, everyone)])
    return found


def select_whole(rank, size, kind):
    """Each rank has a part of the gradient, and the mean is what is scored."""
    everyone = distributed.Ranks().ring
    found = []
    for scores, fractions, pools in cases(kind):
        wanted = []
        for n, each in enumerate(zip(scores, fractions, pools, strict=True)):
            score, fraction, pool = each
            mine = score * size if rank == n % size else None  # the others' parts are missing
            alpha = [0.0, 1.0, 0.5][n % 3]
            pair = [(None, mine), (mine, None), (mine, mine)][n % 3]
            like = torch.empty_like(score)
            wanted.append(Wanted(*pair, like, alpha, fraction, pool, score.numel(), None))
        found.append([mask.numpy() for mask in distributed.select(wanted, everyone)])
    return found


def expected_masks(scores, fractions, pools):
    masks = {}
    for pool in set(pools):
        mine = [i for i, its in enumerate(pools) if its == pool]
        joined = np.concatenate([scores[i].numpy().reshape(-1) for i in mine])
        mask = numpy_topk(joined, max(1, round(fractions[mine[0]] * joined.size)))
        for i, part in zip(
            mine, np.split(mask, np.cumsum([scores[i].numel() for i in mine])[:-1]), strict=True
        ):
            masks[i] = part.reshape(scores[i].shape)
    return [masks[i] for i in range(len(scores))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_selection_in_pieces_is_that_of_a_sort(two, four, size, kind):
    answers = {2: two, 4: four}[size].run(select_pieces, size, kind)
    for case, *per_rank in zip(cases(kind), *answers, strict=True):
        for i, expected in enumerate(expected_masks(*case)):
            joined = np.concatenate([masks[i] for masks in per_rank])
            np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_selection_of_averaged_gradients_is_that_of_a_sort(two, four, size, kind):
    answers = {2: two, 4: four}[size].run(select_whole, size, kind)
    for case, *per_rank in zip(cases(kind), *answers, strict=True):
        scores, fractions, pools = case
        for i, expected in enumerate(expected_masks([s.abs() for s in scores], fractions, pools)):
            for masks in per_rank:
                np.testing.assert_array_equal(masks[i], expected)


def half_sums(rank, size):
    """Gradients whose sum leaves float16; the mean does not."""
    g_nat = torch.tensor([[5e4, 6e4, 1.0, 2.0]], dtype=torch.float16)
    wanted = [Wanted(g_nat, g_nat, g_nat, 0.5, 0.25, 0, 4, None)]
    return distributed.select(wanted, distributed.Ranks().ring)[0].tolist()


def test_sums_do_not_overflow(two):
    assert two.run(half_sums, 2) == [[[False, True, False, False]]] * 2


def without_reduce_scatter(rank, size, kind):
    """As with an older gloo."""

    def missing(*_, **__):
        raise RuntimeError("ProcessGroupGloo does not support _reduce_scatter_base")

    with patch.object(distributed, "_named", scatterless(missing)):
        return select_whole(rank, size, kind)


def scatterless(missing):
    named = distributed._named
    return lambda name, before: missing if "scatter" in name else named(name, before)


def test_backends_without_reduce_scatter(four):
    for first, second in zip(
        four.run(without_reduce_scatter, 4, "ties"), four.run(select_whole, 4, "ties"), strict=True
    ):
        for masks, expected in zip(first, second, strict=True):
            assert all(map(np.array_equal, masks, expected))


def small_buckets(rank, size, kind):
    with patch.object(distributed, "BUCKET", 50):
        g = torch.Generator().manual_seed(rank)
        sizes = (3, 60, 1, 0, 40, 9, 30)
        tensors = [
            torch.rand(n, generator=g, dtype=t)
            for n in sizes
            for t in (torch.float64, torch.float32)
        ]
        mine = [t.clone() for t in tensors]
        distributed.average_(mine, distributed.Ranks().ring)
        for t in tensors:
            dist.all_reduce(t)
        for a, b in zip(mine, tensors, strict=True):
            torch.testing.assert_close(a, b / size)
        return select_whole(rank, size, kind)


def test_buckets_do_not_matter(two):
    for first, second in zip(
        two.run(small_buckets, 2, "normal"), two.run(select_whole, 2, "normal"), strict=True
    ):
        for masks, expected in zip(first, second, strict=True):
            assert all(map(np.array_equal, masks, expected))


# Compiled models, checkpointed activations, passes that go another way.


def train_compiled(rank, size, how, orders):
    found = []
    with functorch.patch(donated_buffer=False):
        for order in orders:
            torch._dynamo.reset()
            model = small()
            if how == "DDP(compile)":
                called = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
            elif how == "compile(DDP)":
                called = torch.compile(DistributedDataParallel(model), backend="aot_eager")
            else:
                called = torch.compile(shard(model), backend="aot_eager")
            opt = make_opt(model)
            for step in range(3):
                take_step(order, called, opt, share(rank, size, batch(step)))
            found.append(whole(model) if "fully" in how else values(model))
    return found


@pytest.mark.parametrize("how", ["DDP(compile)", "compile(DDP)", "compile(fully_shard)"])
def test_compiled_models(two, how):
    orders = ("call", "sum", "in turn")
    answers = two.run(train_compiled, 2, how, orders)
    for order, *per_rank in zip(orders, *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 3))


class Checkpointed(Small):
    reentrant = False

    def forward(self, x):
        x = x.detach().requires_grad_()
        h = F.relu(self.norm(checkpoint(self.conv, x, use_reentrant=self.reentrant)))
        return self.head(F.adaptive_avg_pool2d(h, 2).flatten(1))


def train_checkpointed(rank, size, reentrant):
    torch.manual_seed(7)
    model = Checkpointed().double()
    model.reentrant = reentrant
    ddp = DistributedDataParallel(model)
    opt = make_opt(model)
    for step in range(3):
        take_step("call", ddp, opt, share(rank, size, batch(step)))
    return values(model)


def test_checkpointed_activations(two):
    answers = two.run(train_checkpointed, 2, False)
    assert_same_bits(answers)
    assert_close(answers[0], alone("call", 3))
    with pytest.raises(RankFailed, match="Set `use_reentrant=False`"):
        two.run(train_checkpointed, 2, True)


def go_past(rank, size):
    model = small()
    ddp = DistributedDataParallel(model)
    opt = make_opt(model)
    _, nat, _ = parts(ddp, *share(rank, size, batch(0)))
    with pytest.raises(RuntimeError, match=r"past `Tensor.backward`.*Call `loss.backward\(\)`"):
        with opt.score("natural"):
            torch.autograd.backward(nat)
    assert all(p.grad is None for p in model.parameters())


def test_passes_that_cannot_be_kept_apart_are_refused(two):
    two.run(go_past, 2)


# Processes that differ are told so.


def forget(rank, size, how, check_ranks="first", good_steps=0):
    """Train right for some steps, then make a mistake; return the weights before and after it."""
    model = small()
    ddp = DistributedDataParallel(model)
    opt = make_opt(
        model, check_ranks=check_ranks, score="rgp" if how != "rule" else lop_sided(rank)
    )
    for step in range(good_steps):
        take_step("call", ddp, opt, share(rank, size, batch(step)))
    x, x_adv, y = share(rank, size, batch(99))
    before = values(model)
    opt.zero_grad()
    called = model if how == "module" else ddp
    loss, nat, adv = parts(called, x, x_adv, y)
    if how == "weights" and rank == 1:
        with torch.no_grad():
            model.head.bias[0] += 1e-7
        before = values(model)
    if how == "setting":
        opt.param_groups[0]["rgp_update_fraction"] = 0.5 + 0.1 * rank
    if how == "role":
        with opt.score("natural"):
            nat.backward(retain_graph=True)
        if rank == 0:
            with opt.score("adversarial"):
                adv.backward(retain_graph=True)
        loss.backward()
    elif how == "two backward passes":
        with opt.score("natural"):
            nat.backward(retain_graph=True)
        with opt.score("adversarial"):
            adv.backward(retain_graph=True)
        nat.backward()
        adv.backward()  # not reduced
    else:
        opt.backward(loss, natural=nat, adversarial=adv)
    try:
        opt.step()
    except RuntimeError as error:
        return str(error), before, values(model)
    return None, before, values(model)


def lop_sided(rank):
    return lambda s: s.adversarial.abs() * (1.0 if rank == 0 else torch.rand_like(s.weight))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("module", "the gradient of"),
        ("two backward passes", "the gradient of"),
        ("weights", "the weights of"),
        ("rule", "the mask of"),
        ("setting", "the rgp_* settings of the param groups"),
        ("role", "the roles that were scored"),
    ],
)
def test_a_forgotten_reduction_is_caught(two, how, named):
    for message, before, after in two.run(forget, 2, how):
        assert "the processes do not agree on" in message
        assert named in message
        assert "Nothing was changed" in message
        assert all(map(np.array_equal, before, after))


def test_ranks_are_compared_in_the_first_steps_or_always_or_never(two):
    assert [each[0] for each in two.run(forget, 2, "module", "first", 3)] == [None, None]
    assert [each[0] for each in two.run(forget, 2, "module", "never", 0)] == [None, None]
    for message, *_ in two.run(forget, 2, "module", "always", 3):
        assert "the gradient of" in message
    for message, *_ in two.run(forget, 2, "module", "first", 2):
        assert "the gradient of" in message


def hsdp_drift(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(small(), mesh=mesh)
    opt = make_opt(model)
    loss, nat, adv = parts(model, *share(rank, size, batch(0)))
    opt.backward(loss, natural=nat, adversarial=adv)
    if rank == 2:  # of the second replica
        model.conv.weight.grad.to_local().add_(1e-9)
    with pytest.raises(RuntimeError, match="the processes do not agree") as caught:
        opt.step()
    return str(caught.value)


def test_replicas_of_shards_are_compared(four):
    """The first and the third process hold the same shard; the others must stop with them."""
    messages = four.run(hsdp_drift, 4)
    for rank, message in enumerate(messages):
        found = "the gradient of group0.param0" if rank % 2 == 0 else "what other processes hold"
        assert found in message


# Score rules.


def halved(s):
    return s.adversarial.abs() + 0.5 * s.natural.abs() + 0 * s.weight


RULES = {"signed": "signed", "loss_gradient": "loss_gradient", "random": "random", "own": halved}


def train_with_rules(rank, size, kind, scope):
    found = []
    for rule in RULES.values():
        model = small()
        called = DistributedDataParallel(model) if kind == "ddp" else shard(model)
        opt = make_opt(model, score=rule, scope=scope, seed=3)
        for step in range(3):
            take_step("call", called, opt, share(rank, size, batch(step)))
        found.append(values(model) if kind == "ddp" else whole(model))
    return found


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_score_rules(two, kind, scope):
    answers = two.run(train_with_rules, 2, kind, scope)
    for rule, *per_rank in zip(RULES.values(), *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone("call", 3, score=rule, scope=scope, seed=3))


# Parameters that not every process uses; masks that are kept; counts; clipping; scalers.


class Branches(nn.Module):
    """The second branch is used by some inputs only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, both):
        return self.one(x) + self.two(x) if both else self.one(x)


def train_branches(rank, size, steps):
    torch.manual_seed(5)
    model = Branches().double()
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    opt = make_opt(model)
    for step in range(steps):
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
        opt.backward(nat + adv, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


def test_parameters_that_some_processes_do_not_use(two):
    answers = two.run(train_branches, 2, 6)
    assert_same_bits(answers)
    assert_close(answers[0], train_branches(0, 1, 6))


def train_kept(rank, size, kind):
    """Masks kept for three steps, clipped gradients, counts of updates."""
    model = small()
    called = {"ddp": DistributedDataParallel, "fsdp": shard, "alone": lambda m: m}[kind](model)
    opt = make_opt(model, refresh_every=3)
    tracker = opt.track_updates() if rank == 0 or kind == "ddp" else None  # as loggers do
    fractions = []
    for step in range(5):
        loss, nat, adv = parts(called, *share(rank, size, batch(step)))
        opt.zero_grad()
        opt.backward(loss, natural=nat, adversarial=adv)
        nn.utils.clip_grad_norm_(called.parameters(), 0.05)
        opt.step()
        if tracker is not None:
            fractions.append(tracker.last())
    return (
        whole(model) if kind == "fsdp" else values(model),
        fractions,
        tracker.mean() if tracker else None,
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_kept_masks_clipping_and_counts(two, kind):
    answers = two.run(train_kept, 2, kind)
    weights, *counts = train_kept(0, 1, "alone")
    assert_same_bits([each[0] for each in answers])
    assert_close(answers[0][0], weights)
    if kind == "ddp":
        for _, *theirs in answers:
            assert theirs == counts
    else:  # of the shards that one process has
        mean = answers[0][2]
        assert mean.keys() == counts[1].keys()
        assert all(0 <= fraction <= 1 for fraction in mean.values())
        assert mean["group0.param1"] == 1.0  # a bias
        assert 0 < mean["group0.param0"] < 1
        assert answers[1][2] is None


def train_nested(rank, size, kind):
    """Two wrapped optimizers, their scoring blocks one inside the other."""
    model = small()
    called = {"ddp": DistributedDataParallel, "fsdp": shard, "alone": lambda m: m}[kind](model)
    halves = [[*model.conv.parameters(), *model.norm.parameters()], list(model.head.parameters())]
    one, two = (
        RGPSelectiveOptimizer(torch.optim.SGD(half, lr=0.1), update_fraction=0.4, alpha=0.3)
        for half in halves
    )
    for step in range(3):
        loss, nat, adv = parts(called, *share(rank, size, batch(step)))
        one.zero_grad()
        two.zero_grad()
        with one.score("natural"), two.score("natural"):
            nat.backward(retain_graph=True)
        with one.score("adversarial"), two.score("adversarial"):
            adv.backward(retain_graph=True)
        loss.backward()
        one.step()
        two.step()
    return whole(model) if kind == "fsdp" else values(model)


def test_scoring_blocks_of_two_optimizers(two):
    """As one optimizer with both halves, for each tensor is selected in by itself."""
    model = small()
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), update_fraction=0.4, alpha=0.3
    )
    for step in range(3):
        take_step("blocks", model, opt, batch(step))
    assert_close(train_nested(0, 1, "alone"), values(model))
    for kind in ("ddp", "fsdp"):
        answers = two.run(train_nested, 2, kind)
        assert_same_bits(answers)
        assert_close(answers[0], values(model))


class TwoHeads(nn.Module):
    """The losses use the first output only."""

    def __init__(self):
        super().__init__()
        self.body, self.used, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        h = F.relu(self.body(x))
        return self.used(h), self.unused(h)


def train_special(rank, size, what, order, ddp_options):
    """Hooks on parameters, outputs that no loss uses, nothing to select in."""
    torch.manual_seed(3)
    model = TwoHeads().double() if what == "outputs" else small()
    if what == "hooks":
        for p in model.parameters():
            p.register_hook(lambda g: g * 0.5)
    called = DistributedDataParallel(model, **ddp_options) if size > 1 else model
    options = {"rgp_select": False} if what == "nothing selected" else {}
    groups = [{"params": list(model.parameters()), **options}]
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
        opt.backward(None if order == "sum" else nat + adv, natural=nat, adversarial=adv)
        opt.step()
    return values(model)


@pytest.mark.parametrize("order", ["call", "sum"])
@pytest.mark.parametrize(
    ("what", "ddp_options"),
    [
        ("hooks", DDP["plain"]),
        ("hooks", DDP["static"]),
        ("outputs", DDP["unused"]),
        ("nothing selected", DDP["plain"]),
    ],
    ids=str,
)
def test_hooks_unused_outputs_and_nothing_to_select_in(two, what, order, ddp_options):
    answers = two.run(train_special, 2, what, order, ddp_options)
    assert_same_bits(answers)
    assert_close(answers[0], train_special(0, 1, what, order, {}))


def train_scaled(rank, size, kind, overflow_at):
    """A scaler; in one step the loss of rank 1 alone overflows."""
    model = small(torch.float32)
    called = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    opt = make_opt(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    found = []
    for step in range(4):
        x, x_adv, y = share(rank, size, batch(step, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            loss, nat, adv = parts(called, x, x_adv, y)
        if step == overflow_at and rank == 1:
            loss = loss * torch.inf
        opt.zero_grad()
        for role, each in (("natural", nat), ("adversarial", adv)):
            with opt.score(role):
                scaler.scale(each).backward(retain_graph=True)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        before = values(model) if kind == "ddp" else whole(model)
        scaler.step(opt)
        scaler.update()
        after = values(model) if kind == "ddp" else whole(model)
        found.append((all(map(np.array_equal, before, after)), scaler.get_scale()))
    return found, after


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, kind):
    answers = two.run(train_scaled, 2, kind, 1)
    assert_same_bits([weights for _, weights in answers])
    for found, _ in answers:
        assert found == [(False, 1024.0), (True, 512.0), (False, 512.0), (False, 1024.0)]


def train_half(rank, size, kind):
    """Parameters in bfloat16, or FSDP2's mixed precision."""
    model = small(torch.bfloat16 if kind != "policy" else torch.float32)
    if kind == "ddp":
        called = DistributedDataParallel(model)
    elif kind == "fsdp":
        called = shard(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        called = shard(model, mp_policy=policy)
    opt = make_opt(model)
    data = torch.float32 if kind == "policy" else torch.bfloat16
    moved = []
    for step in range(5):
        before = values(model) if kind == "ddp" else whole(model)
        take_step("call", called, opt, share(rank, size, batch(step, data)))
        after = values(model) if kind == "ddp" else whole(model)
        pairs = zip(before, after, model.parameters(), strict=True)
        moved.append([(a != b).mean() for a, b, p in pairs if p.dim() > 1])
    return after, moved


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "policy"])
def test_half_precision(two, kind):
    answers = two.run(train_half, 2, kind)
    assert_same_bits([weights for weights, _ in answers])
    for _, moved in answers:
        assert all(0.1 < fraction <= 0.45 for step in moved for fraction in step)


# Sharded and whole parameters in one model.


def train_mixed(rank, size, rule, scope):
    """The head is left out of the sharding; its gradients are reduced by hand."""
    model = small()
    whole_ones = set(model.head.parameters())
    called = fully_shard(model, ignored_params=whole_ones) if size > 1 else model
    opt = make_opt(model, score=rule, scope=scope)
    for step in range(3):
        loss, nat, adv = parts(called, *share(rank, size, batch(step)))
        opt.zero_grad()
        opt.backward(loss, natural=nat, adversarial=adv)
        if size > 1:
            for p in whole_ones:
                dist.all_reduce(p.grad.div_(size))
        opt.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def train_mixed_values(*args):
    return [p.detach().numpy().copy() for p in train_mixed(*args)]


@pytest.mark.parametrize(
    ("rule", "scope"), [("rgp", "tensor"), ("rgp", "global"), (halved, "tensor")]
)
def test_sharded_and_whole_parameters(two, rule, scope):
    answers = two.run(train_mixed_values, 2, rule, scope)
    assert_same_bits(answers)
    assert_close(answers[0], train_mixed_values(0, 1, rule, scope))


def test_one_threshold_over_sharded_and_whole_scores_is_refused(two):
    with pytest.raises(RankFailed, match="Use scope='tensor', or shard all of them alike"):
        two.run(train_mixed_values, 2, halved, "global")


# Accumulation under FSDP2.


def accumulate_fsdp(rank, size, sync, order="call"):
    model = shard(small())
    opt = make_opt(model)
    for step in range(3):
        opt.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(sync or micro == 1)
            x, x_adv, y = share(rank, size, batch(10 * step + micro))
            loss, nat, adv = parts(model, x, x_adv, y)
            opt.backward(None if order == "sum" else loss, natural=nat, adversarial=adv)
        opt.step()
    return whole(model)


@pytest.mark.parametrize("order", ["call", "sum"])
def test_fsdp2_micro_batches(two, order):
    answers = two.run(accumulate_fsdp, 2, True, order)
    assert_same_bits(answers)
    assert_close(answers[0], accumulate_alone(order))


def test_fsdp2_without_gradient_synchronisation_is_refused(two):
    with pytest.raises(RankFailed, match=r"no parameter received a gradient.*sync_each_batch"):
        two.run(accumulate_fsdp, 2, False)


# What is refused.


def refused(rank, size, what):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    if what == "fsdp1":
        for keep in (False, True):
            old = FullyShardedDataParallel(
                nn.Linear(3, 2), device_id=torch.device("cpu"), use_orig_params=keep
            )
            with pytest.raises(RuntimeError) as caught:
                make_opt(old)
            opt = make_opt(model)
            with pytest.raises(RuntimeError, match="fully_shard"):
                opt.add_param_group({"params": list(old.parameters())})
            assert len(opt.param_groups) == 1
        return str(caught.value)
    if what == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

        inner = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(TypeError) as caught:
            RGPSelectiveOptimizer(inner)
        return str(caught.value)
    mesh = init_device_mesh("cpu", (size,))
    if what == "rowwise":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        with pytest.raises(RuntimeError) as caught:
            make_opt(model)
    if what == "partial":
        model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Replicate()]))
        opt = make_opt(model[0], check_ranks="never")
        model[0].bias.grad = torch.zeros(6)
        for role in ("natural", "adversarial"):
            with opt.score(role):
                model[0].weight.grad = DTensor.from_local(torch.ones(6, 4), mesh, [Partial()])
        model[0].weight.grad = DTensor.from_local(torch.ones(6, 4), mesh, [Replicate()])
        with pytest.raises(RuntimeError) as caught:
            opt.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("fsdp1", "`torch.distributed.fsdp.fully_shard` (FSDP2)"),
        ("zero", "shard the model with `torch.distributed.fsdp.fully_shard`"),
        ("rowwise", "no tensor parallelism"),
        ("partial", "not partial sums on each process"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_ways_to_share_out_are_refused(two, what, words):
    for message in two.run(refused, 2, what):
        assert words in message


# Groups of processes.


def train_in_pairs(rank, size, steps):
    """Two pairs, each with a model and data of its own."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    model = small()
    ddp = DistributedDataParallel(model, process_group=mine)
    opt = make_opt(model, process_group=mine)
    assert copy.deepcopy(opt)._rgp.ranks is opt._rgp.ranks
    with pytest.raises(TypeError, match="Save `state_dict"):
        pickle.dumps(opt)
    for step in range(steps):
        data = batch(step + 100 * (rank // 2))
        take_step("call", ddp, opt, share(rank % 2, 2, data))
    return values(model)


def test_a_process_group_trains_by_itself(four):
    answers = four.run(train_in_pairs, 4, 3)
    assert_same_bits(answers[:2])
    assert_same_bits(answers[2:])
    assert_close(answers[0], alone("call", 3))
    assert not np.array_equal(answers[0][0], answers[2][0])


def test_a_group_of_an_iterator_is_added_whole():
    model = small()
    opt = make_opt(model.conv)
    opt.add_param_group({"params": model.norm.parameters()})
    opt.add_param_group({"params": model.head.weight})
    assert [len(group["params"]) for group in opt.param_groups] == [2, 2, 1]


def test_process_group_must_be_one():
    with pytest.raises(RuntimeError, match="after `torch"):
        make_opt(small(), process_group=object())
    with pytest.raises(ValueError, match="`check_ranks` should be one of 'first', 'always'"):
        make_opt(small(), check_ranks="sometimes")


def wrong_group(rank, size):
    group = dist.new_group([0])
    if rank == 0:
        make_opt(small(), process_group=group)
    else:
        with pytest.raises(TypeError, match="a ProcessGroup that this process belongs to"):
            make_opt(small(), process_group=group)


def test_a_group_of_others_is_refused(two):
    two.run(wrong_group, 2)


# The model changes after wrapping.


def train_changed(rank, size, kind):
    model = small()
    extra = nn.Linear(3, 3).double()
    with torch.no_grad():
        extra.weight.copy_(torch.eye(3))
    net = nn.Sequential(model, extra)
    called = {"ddp": DistributedDataParallel, "fsdp": shard, "alone": lambda m: m}[kind](net)
    opt = make_opt(model)
    take_step("call", called, opt, share(rank, size, batch(0)))
    opt.add_param_group({"params": extra.parameters(), "rgp_update_fraction": 0.6})
    for step in (1, 2):
        take_step("call", called, opt, share(rank, size, batch(step)))
    return whole(net) if kind == "fsdp" else values(net)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_group_that_is_added(two, kind):
    answers = two.run(train_changed, 2, kind)
    assert_same_bits(answers)
    assert_close(answers[0], train_changed(0, 1, "alone"))


def replace_by_shards(rank, size):
    """As some trainers do: the optimizer is made first, and gets the shards later."""
    model = small()
    opt = make_opt(model)
    shard(model)
    opt.param_groups[0]["params"] = list(model.parameters())
    for step in range(3):
        take_step("call", model, opt, share(rank, size, batch(step)))
    return whole(model)


def test_parameters_that_are_replaced_by_shards(two):
    answers = two.run(replace_by_shards, 2)
    assert_same_bits(answers)
    assert_close(answers[0], alone("call", 3))


# Others who wait for gradients: another optimizer, images, an attack inside a block.


def train_with_another_optimizer(rank, size, kind, order):
    """The head belongs to a plain optimizer; scoring must not touch its gradients."""
    model = small()
    called = {"ddp": DistributedDataParallel, "fsdp": shard, "alone": lambda m: m}[kind](model)
    mine = [*model.conv.parameters(), *model.norm.parameters()]
    opt = RGPSelectiveOptimizer(torch.optim.SGD(mine, lr=0.1), update_fraction=0.4, alpha=0.3)
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    for step in range(4):
        other.zero_grad()
        take_step(order, called, opt, share(rank, size, batch(step)))
        other.step()
    return whole(model) if kind == "fsdp" else values(model)


def plain_head(order):
    """The head's first step, without any wrapper."""
    model = small()
    x, x_adv, y = batch(0)
    loss, nat, adv = parts(model, x, x_adv, y)
    (nat + adv if order == "sum" else loss).backward()
    with torch.no_grad():
        for p in model.head.parameters():
            p -= 0.1 * p.grad
    return [p.detach().numpy() for p in model.head.parameters()]


@pytest.mark.parametrize("order", ["call", "sum", "blocks", "loss first"])
def test_parameters_of_another_optimizer(two, order):
    reference = train_with_another_optimizer(0, 1, "alone", order)
    for kind in ("ddp", "fsdp"):
        answers = two.run(train_with_another_optimizer, 2, kind, order)
        assert_same_bits(answers)
        assert_close(answers[0], reference)
    model = small()
    opt = RGPSelectiveOptimizer(
        torch.optim.SGD(model.conv.parameters(), lr=0.1), update_fraction=0.4, alpha=0.3
    )
    other = torch.optim.SGD(model.head.parameters(), lr=0.1)
    take_step(order, model, opt, batch(0))
    other.step()
    assert_close(values(model.head), plain_head(order))


def gradients_of_images(rank, size, how):
    model = small()
    called = DistributedDataParallel(model) if size > 1 else model
    opt = make_opt(model)
    x, x_adv, y = share(rank, size, batch(0))
    if how == "attack in a block":
        with opt.score("adversarial"):
            delta = torch.zeros_like(x, requires_grad=True)
            F.cross_entropy(called(x + delta), y).backward(inputs=[delta])
            found = delta.grad.clone()
            F.cross_entropy(called(x + 0.1 * delta.grad.sign()), y).backward()
        assert model.conv.weight.grad is None
        return found.numpy()
    x.requires_grad_()
    _, nat, adv = parts(called, x, x_adv, y)
    opt.backward(None if how == "sum" else nat, natural=nat, adversarial=adv)
    return x.grad.numpy()


@pytest.mark.parametrize("how", ["attack in a block", "sum", "call"])
def test_gradients_of_images(two, how):
    """Once from the training loss, never from a score."""
    model = small()
    x, _, y = batch(0)
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    np.testing.assert_allclose(gradients_of_images(0, 1, how), x.grad.numpy(), atol=1e-15)
    joined = np.concatenate(two.run(gradients_of_images, 2, how))
    np.testing.assert_allclose(joined, 2 * x.grad.numpy(), atol=1e-15)  # each a mean over half


def leave_unreduced(rank, size, how):
    """The training passes of a window are reduced at its end, but not the scoring passes."""
    model = shard(small())
    opt = make_opt(model)
    for micro in range(2):
        loss, nat, adv = parts(model, *share(rank, size, batch(micro)))
        if how == "all scored":
            model.set_requires_gradient_sync(True)
            with opt.score("natural"):
                nat.backward(retain_graph=True)
            with opt.score("adversarial"):
                adv.backward(retain_graph=True)
            model.set_requires_gradient_sync(micro == 1)
            loss.backward()
        else:
            model.set_requires_gradient_sync(micro == 1)
            if micro == 0:
                loss.backward()
            else:
                opt.backward(loss, natural=nat, adversarial=adv)


def leave_half_reduced(rank, size):
    """HSDP: the first micro-batch is reduced over the shards, not over the replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(small(), mesh=mesh)
    opt = make_opt(model)
    for micro in range(2):
        model.set_requires_all_reduce(micro == 1)
        loss, nat, adv = parts(model, *share(rank, size, batch(micro)))
        if micro == 0:
            loss.backward()
        else:
            opt.backward(loss, natural=nat, adversarial=adv)


def test_hsdp_gradients_that_are_not_reduced_yet_never_reach_a_score(four):
    with pytest.raises(RankFailed, match="left gradients that are not reduced yet"):
        four.run(leave_half_reduced, 4)


@pytest.mark.parametrize("how", ["all scored", "the last scored"])
def test_fsdp2_gradients_that_are_not_reduced_yet_never_reach_a_score(two, how):
    with pytest.raises(RankFailed, match="left gradients that are not reduced yet"):
        two.run(leave_unreduced, 2, how)
