"""FSDP2, HSDP and tensor parallelism: the weights of one process on the joined batch."""

from functools import partial
from itertools import pairwise, product

import numpy as np
import parallel
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel import Small, assert_joined, batch, fit, make_opt, share, small, train, values, wrap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

UNREDUCED = "not reduced yet|gradient synchronisation is off"


def leave_unreduced(how):
    """A micro-batch is not reduced, or not over all ranks, and its sum waits inside FSDP2."""
    model = small()
    called = wrap("hsdp" if how == "replicas" else "fsdp", model)
    opt = make_opt(model)
    for micro in range(2):
        if how == "replicas":
            called.set_requires_all_reduce(micro == 1)
        else:
            called.set_requires_gradient_sync(micro == 1)
        if how == "all scored" or micro == 1:
            parallel.passes("loss", called, opt, share(batch(micro)))
        else:
            parallel.parts(called, *share(batch(micro)))[0].backward()


def halved(s):
    return s.adversarial.abs() + 0.5 * s.natural.abs() + 0 * s.weight


def train_partly_sharded(score, scope):
    """The head is left out of the sharding; its gradients are reduced by hand."""
    model = small()
    head = set(model.head.parameters())
    called = fully_shard(model, ignored_params=head) if dist.is_initialized() else model
    opt = make_opt(model, score=score, scope=scope)

    def reduce(*_):
        for p in head if dist.is_initialized() else ():
            dist.all_reduce(p.grad.div_(2))

    opt.register_step_pre_hook(reduce)
    return fit(called, opt)


def train_scaled(kind, overflows):
    """A scaler and clipping; in the second step a loss of rank 1 alone overflows."""
    model = small(dtype=torch.float32)
    called, opt = wrap(kind, model), make_opt(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    found = []
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kind != "fsdp"):
            loss, nat, adv = parallel.parts(called, *share(batch(step, torch.float32)))
        if step == 1 and dist.get_rank() == 1:
            if overflows == "training":
                loss = loss * torch.inf
            else:
                adv = adv * torch.inf
        opt.zero_grad()
        scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        before = values(model)
        scaler.step(opt)
        scaler.update()
        found.append((all(map(np.array_equal, before, values(model))), scaler.get_scale()))
    return found, values(model)


@parallel.DDP_AND_FSDP2
@pytest.mark.parametrize("overflows", ["training", "adversarial"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(two, kind, overflows):
    answers = parallel.run(two, train_scaled, kind, overflows)
    parallel.assert_same_bits([weights for _, weights in answers])
    for found, _ in answers:
        assert found == [(False, 1024.0), (True, 512.0), (False, 512.0), (False, 1024.0)]


def share_cached_weights():
    """Autocast casts a weight once for both forward passes, in the graph of the first.

    FSDP2 reduces after the second forward pass's part, before the cast has given its own.
    """
    model = small(dtype=torch.float32)
    called, opt = wrap("fsdp", model), make_opt(model)
    with torch.autocast("cpu", torch.bfloat16):
        parallel.passes("loss", called, opt, share(batch(0, torch.float32)))


@pytest.mark.parametrize(
    ("size", "program", "args", "message"),
    [
        (2, leave_unreduced, ("all scored",), UNREDUCED),
        (2, leave_unreduced, ("the last scored",), UNREDUCED),
        (4, leave_unreduced, ("replicas",), UNREDUCED),
        (2, share_cached_weights, (), "cache_enabled=False"),
    ],
)
def test_gradients_that_are_not_reduced_never_reach_a_score(
    two, four, size, program, args, message
):
    parallel.assert_refused(two if size == 2 else four, message, program, *args)


def train_half(kind, half):
    """The weights before and after each step: in half precision, or under FSDP2's policy."""
    model = small(dtype=torch.float32 if kind == "policy" else half)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    called = wrap("fsdp", model, mp_policy=policy) if kind == "policy" else wrap(kind, model)
    opt = make_opt(model)
    return [values(model)] + [fit(called, opt, steps=[step]) for step in range(5)]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "policy"])
def test_half_precision(two, kind, half):
    answers = parallel.run(two, train_half, kind, half)
    parallel.assert_same_bits([weights[-1] for weights in answers])
    for before, after in (pair for weights in answers for pair in pairwise(weights)):
        moved = [(a != b).mean() for a, b in zip(before, after, strict=True) if a.ndim > 1]
        assert all(0.1 < fraction <= 0.45 for fraction in moved)


def train_changed(kind, scope):
    model = small(lambda: nn.Sequential(Small(), nn.Linear(3, 3)))
    called, opt = wrap(kind, model), make_opt(model[0], scope=scope)
    fit(called, opt, steps=[0])
    opt.add_param_group({"params": model[1].parameters(), "rgp_update_fraction": 0.6})
    return fit(called, opt, steps=[1, 2])


def replace_by_shards(scope):
    """As some trainers do: the optimizer is made first, and gets the shards later."""
    model = small()
    opt = make_opt(model, scope=scope)
    wrap("fsdp", model)
    opt.param_groups[0]["params"] = list(model.parameters())
    return fit(model, opt)


def mask_shards():
    model = small()
    called, opt = wrap("fsdp", model), make_opt(model)
    fit(called, opt, steps=[0])
    assert all(mask.shape == p.to_local().shape for p, mask in opt.masks().items())
    return [int(mask.sum()) for mask in opt.masks().values()]


def test_masks_are_those_of_the_shards(two):
    counts = np.array(parallel.run(two, mask_shards))
    sizes = [p.numel() for p in Small().parameters() if p.dim() > 1]
    assert counts.sum(0).tolist() == [round(0.4 * n) for n in sizes]


def count_passes(kind):
    """Per step, where the first one overflows: in one rank's shard, or in one rank's batch."""
    model, counts, passes = small(lambda: nn.Linear(50, 3, bias=False)), [], []
    called, opt = wrap(kind, model), make_opt(model)
    for step in range(4):
        x = torch.ones(2, 50, dtype=torch.float64)
        if step == 0 and (kind == "fsdp" or dist.get_rank() == 1):
            x[:, 0] = torch.inf
        loss = (called(x) * torch.tensor([[1.0, 0.0, 0.0]])).nan_to_num().sum()
        loss.register_hook(lambda _: passes.append(opt.scoring))
        opt.zero_grad()
        opt.scored(loss, natural=loss, adversarial=loss).backward()
        if step:
            opt.step()
        counts.append(passes.count(True))
        passes.clear()
    return counts


@parallel.DDP_AND_FSDP2
def test_all_ranks_test_their_graphs_in_the_same_steps(two, kind):
    """By itself, a rank would wait for the others' part of the extra pass."""
    assert parallel.run(two, count_passes, kind) == [[4, 4, 2, 2]] * 2


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(50, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(F.relu(self.up(x.flatten(1))))


def train_tensor_parallel(shape, scope):
    """The ranks of a tensor-parallel group see the same batch."""
    model, group, groups = small(Mlp), 0, 1
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        group, groups = mesh["data"].get_local_rank(), shape[0]
        if groups > 1:
            fully_shard(model, mesh=mesh["data"])
    data = lambda step: share(batch(step), group, groups)  # noqa: E731
    return fit(model, make_opt(model, scope=scope), data=data)


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(50, 3))


def train_on_partial_sums(scope):
    """A replicated weight and a sharded batch: each rank has its part of the gradient's sum."""
    model, spread = small(Matrix), lambda x: x
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
        spread = lambda x: distribute_tensor(x, mesh, [Shard(0)])  # noqa: E731
    opt = make_opt(model, scope=scope)
    for step in range(3):
        x, x_adv, _ = (spread(t.flatten(1)) if t.dim() > 1 else t for t in batch(step))
        nat, adv = ((images @ model.weight).square().sum() / 100 for images in (x, x_adv))
        opt.zero_grad()
        opt.scored(nat + adv, natural=nat, adversarial=adv).backward()
        assert not dist.is_initialized() or model.weight.grad.placements[0].is_partial()
        opt.step()
    return values(model)


@parallel.SCOPES
@pytest.mark.parametrize(
    ("size", "program", "args"),
    [
        *((2, train, each) for each in product(["fsdp", "root", "kept"], parallel.ORDERS)),
        # Some of four ranks hold nothing of the smaller tensors.
        *((4, train, each) for each in product(["fsdp", "hsdp"], ["loss", "trades"])),
        *((2, partial(train, score=halved), (kind,)) for kind in ("ddp", "fsdp")),
        *((2, parallel.accumulate, ("fsdp", order)) for order in ("loss", "sum")),
        *((2, train_partly_sharded, (score,)) for score in ("rgp", halved)),
        *((2, train_changed, (kind,)) for kind in ("ddp", "fsdp")),
        (2, replace_by_shards, ()),
        (2, train_tensor_parallel, ((1, 2),)),
        (4, train_tensor_parallel, ((2, 2),)),  # with FSDP2
        (2, train_on_partial_sums, ()),
    ],
)
def test_it_is_one_process_on_the_joined_batch(two, four, size, program, args, scope):
    assert_joined(two if size == 2 else four, program, *args, scope=scope)
