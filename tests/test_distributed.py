"""Several processes: the weights of one process on the joined batch, and the same on every rank."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import numpy_topk
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

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
        shapes.append((2 ** (n % 18) + 1, 1))  # also larger than what is taken together
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
