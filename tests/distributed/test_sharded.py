"""FSDP2, HSDP and tensor parallelism: the weights of one process on the joined batch."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import backward
from parallel import (
    ORDERS,
    Small,
    accumulate,
    alone,
    assert_close,
    assert_same_bits,
    batch,
    make_opt,
    parts,
    passes,
    shard,
    share,
    small,
    take_step,
    train_with,
    values,
    wrapped,
)
from ranks import RankFailed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from rgp_optim import optimizer


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("kind", ["fsdp", "root", "kept"])
def test_fsdp2_is_one_process_on_the_joined_batch(two, kind, scope):
    answers = two.run(train_with, 2, {"kind": kind, "orders": ORDERS, "scope": scope})
    for order, *per_rank in zip(ORDERS, *answers, strict=True):
        assert_same_bits(per_rank)
        assert_close(per_rank[0], alone(order, 3, scope=scope))


@pytest.mark.parametrize("kind", ["fsdp", "hsdp"])
def test_four_ranks(four, kind):
    """Then some ranks hold nothing of the smaller tensors."""
    orders = ("loss", "trades")
    for scope in ("tensor", "global"):
        answers = four.run(train_with, 4, {"kind": kind, "orders": orders, "scope": scope})
        for order, *per_rank in zip(orders, *answers, strict=True):
            assert_same_bits(per_rank)
            assert_close(per_rank[0], alone(order, 3, scope=scope))


def gather_little(rank, size, scope):
    """Whole scores of one tensor at a time, as in a model that does not fit."""
    gathered, optimizer.GATHER_LIMIT = optimizer.GATHER_LIMIT, 1
    try:
        return train_with(rank, size, {"kind": "fsdp", "scope": scope})[0]
    finally:
        optimizer.GATHER_LIMIT = gathered


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_scores_are_gathered_a_few_at_a_time(two, scope):
    answers = two.run(gather_little, 2, scope)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 3, scope=scope))


def test_micro_batches(two):
    for order in ("loss", "sum"):
        answers = two.run(accumulate, 2, "fsdp", order, "synced")
        assert_same_bits(answers)
        assert_close(answers[0], accumulate(0, 1, "alone", order, "synced"))


def leave_unreduced(rank, size, how):
    """A micro-batch is not reduced, or not over all ranks, and its sum waits inside FSDP2."""
    model = small()
    called = wrapped("hsdp" if how == "replicas" else "fsdp", model)
    opt = make_opt(model)
    for micro in range(2):
        if how == "replicas":
            called.set_requires_all_reduce(micro == 1)
        else:
            called.set_requires_gradient_sync(micro == 1)
        loss, nat, adv = parts(called, *share(rank, size, batch(micro)))
        if how == "all scored" or micro == 1:
            backward(opt, loss, natural=nat, adversarial=adv)
        else:
            loss.backward()


@pytest.mark.parametrize("how", ["all scored", "the last scored", "replicas"])
def test_gradients_that_are_not_reduced_never_reach_a_score(two, four, how):
    ranks, size = (four, 4) if how == "replicas" else (two, 2)
    message = r"not reduced yet|gradient synchronisation is off"
    with pytest.raises(RankFailed, match=message):
        ranks.run(leave_unreduced, size, how)


def train_mixed(rank, size, rule, scope):
    """The head is left out of the sharding; its gradients are reduced by hand."""
    model = small()
    whole = set(model.head.parameters())
    called = fully_shard(model, ignored_params=whole) if size > 1 else model
    opt = make_opt(model, score=halved if rule == "own" else rule, scope=scope)
    for step in range(3):
        opt.zero_grad()
        passes("loss", called, opt, share(rank, size, batch(step)))
        if size > 1:
            for p in whole:
                dist.all_reduce(p.grad.div_(size))
        opt.step()
    return values(model)


def halved(s):
    return s.adversarial.abs() + 0.5 * s.natural.abs() + 0 * s.weight


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("rule", ["rgp", "own"])
def test_sharded_and_whole_parameters_in_one_model(two, rule, scope):
    answers = two.run(train_mixed, 2, rule, scope)
    assert_same_bits(answers)
    assert_close(answers[0], train_mixed(0, 1, rule, scope))


def train_ruled(rank, size, kind, scope):
    return train_with(rank, size, {"kind": kind, "scope": scope, "score": halved})[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_score_rules(two, kind):
    for scope in ("tensor", "global"):
        answers = two.run(train_ruled, 2, kind, scope)
        assert_same_bits(answers)
        assert_close(answers[0], alone("loss", 3, score=halved, scope=scope))


# Precision, clipping, overflow.


def train_scaled(rank, size, kind):
    """A scaler and clipping; in the second step the loss of rank 1 alone overflows."""
    model = small(torch.float32)
    called, opt = wrapped(kind, model), make_opt(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    found = []
    for step in range(4):
        data = share(rank, size, batch(step, torch.float32))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kind != "fsdp"):
            loss, nat, adv = parts(called, *data)
        if step == 1 and rank == 1:
            loss = loss * torch.inf
        opt.zero_grad()
        scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        before = values(model)
        scaler.step(opt)
        scaler.update()
        found.append((all(map(np.array_equal, before, values(model))), scaler.get_scale()))
    return found, values(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, kind):
    answers = two.run(train_scaled, 2, kind)
    assert_same_bits([weights for _, weights in answers])
    for found, _ in answers:
        assert found == [(False, 1024.0), (True, 512.0), (False, 512.0), (False, 1024.0)]


def share_cached_weights(rank, size):
    """Autocast casts a weight once for both forward passes, in the graph of the first."""
    model = small(torch.float32)
    called, opt = wrapped("fsdp", model), make_opt(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, nat, adv = parts(called, *share(rank, size, batch(0, torch.float32)))
    backward(opt, loss, natural=nat, adversarial=adv)


def test_fsdp2_with_cached_casts_is_refused(two):
    """FSDP2 reduces after the second forward pass's part, before the cast has given its own."""
    with pytest.raises(RankFailed, match="cache_enabled=False"):
        two.run(share_cached_weights, 2)


def train_half(rank, size, kind, half):
    """Parameters in half precision, or FSDP2's mixed precision."""
    model = small(half if kind != "policy" else torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    called = shard(model, mp_policy=policy) if kind == "policy" else wrapped(kind, model)
    opt = make_opt(model)
    data = torch.float32 if kind == "policy" else half
    moved = []
    for step in range(5):
        before = values(model)
        take_step("loss", called, opt, share(rank, size, batch(step, data)))
        pairs = zip(before, values(model), model.parameters(), strict=True)
        moved.append([(a != b).mean() for a, b, p in pairs if p.dim() > 1])
    return values(model), moved


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "policy"])
def test_half_precision(two, kind, half):
    answers = two.run(train_half, 2, kind, half)
    assert_same_bits([weights for weights, _ in answers])
    for _, moved in answers:
        assert all(0.1 < fraction <= 0.45 for step in moved for fraction in step)


# The model changes after wrapping.


def train_changed(rank, size, kind):
    model = small()
    extra = nn.Linear(3, 3).double()
    with torch.no_grad():
        extra.weight.copy_(torch.eye(3))
    net = nn.Sequential(model, extra)
    called, opt = wrapped(kind, net), make_opt(model)
    take_step("loss", called, opt, share(rank, size, batch(0)))
    opt.add_param_group({"params": extra.parameters(), "rgp_update_fraction": 0.6})
    for step in (1, 2):
        take_step("loss", called, opt, share(rank, size, batch(step)))
    return values(net)


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
        take_step("loss", model, opt, share(rank, size, batch(step)))
    return values(model)


def test_parameters_that_are_replaced_by_shards(two):
    answers = two.run(replace_by_shards, 2)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 3))


def masks_of_shards(rank, size):
    model = small()
    called, opt = wrapped("fsdp", model), make_opt(model)
    take_step("loss", called, opt, share(rank, size, batch(0)))
    shapes = [(mask.shape, p.to_local().shape) for p, mask in opt.masks().items()]
    assert all(mask == local for mask, local in shapes)
    return [int(mask.sum()) for mask in opt.masks().values()]


def test_masks_are_those_of_the_shards(two):
    counts = np.array(two.run(masks_of_shards, 2))
    sizes = [p.numel() for p in Small().parameters() if p.dim() > 1]
    assert counts.sum(0).tolist() == [round(0.4 * n) for n in sizes]


# Tensor parallelism, by itself and with FSDP2.


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


def train_tensor_parallel(rank, size, shape, scope):
    """All ranks of a tensor-parallel group see the same batch."""
    torch.manual_seed(2)
    model = Mlp().double()
    rows = slice(None)
    if size > 1:
        names = ("data", "tensor") if len(shape) == 2 else ("tensor",)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        if len(shape) == 2:
            fully_shard(model, mesh=mesh["data"])
            rows = slice(4 * (rank // shape[1]), 4 * (rank // shape[1]) + 4)
    opt = make_opt(model, scope=scope)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x = torch.rand(8, 6, generator=g, dtype=torch.float64)[rows]
        y = torch.randint(0, 3, (8,), generator=g)[rows]
        nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x + 0.1), y)
        opt.zero_grad()
        backward(opt, natural=nat, adversarial=adv)
        opt.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().numpy().copy() for p in whole]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_tensor_parallelism(two, scope):
    answers = two.run(train_tensor_parallel, 2, (2,), scope)
    assert_same_bits(answers)
    assert_close(answers[0], train_tensor_parallel(0, 1, (), scope))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_fsdp2_over_tensor_parallelism(four, scope):
    answers = four.run(train_tensor_parallel, 4, (2, 2), scope)
    assert_same_bits(answers)
    assert_close(answers[0], train_tensor_parallel(0, 1, (), scope))
