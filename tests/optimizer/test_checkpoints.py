"""Checkpoints: of several processes, from one number of them to another, after a death."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import DEVICE, disk
from ranks import RankFailed, Ranks
from test_distributed import (
    alone,
    assert_close,
    assert_same_bits,
    batch,
    make_opt,
    parts,
    shard,
    share,
    small,
    take_step,
    values,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer

KEPT = Path(__file__).parent / "data" / "checkpoint-0.1.0.pt"


def wrapped(kind, model):
    return {"ddp": DistributedDataParallel, "fsdp": shard, "alone": lambda m: m}[kind](model)


def weights_of(kind, model):
    return whole(model) if kind == "fsdp" else values(model)


def shuffle_(model):
    """Other weights, so that a resumed run has to load them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    return model


# torch.save by each process.


def resume(rank, size, kind, folder, options):
    """Run five steps; run three, save, build everything anew, load, run two."""
    ends = []
    for stop in (5, 3):
        model = small()
        reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=4)
        called = wrapped(kind, model)
        wrapped(kind, reviser.model) if kind == "fsdp" else None
        opt = make_opt(model, **options)
        for step in range(5):
            if step == stop:
                state = {
                    "model": model.state_dict(),
                    "opt": opt.state_dict(),
                    "reviser": reviser.state_dict(),
                }
                torch.save(state, folder / f"{kind}{rank}.pt")
                model = shuffle_(small())
                reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=9)
                called = wrapped(kind, model)
                wrapped(kind, reviser.model) if kind == "fsdp" else None
                opt = make_opt(model, **options)
                state = torch.load(folder / f"{kind}{rank}.pt", weights_only=kind != "fsdp")
                model.load_state_dict(state["model"])
                opt.load_state_dict(state["opt"])
                reviser.load_state_dict(state["reviser"])
            x, x_adv, y = share(rank, size, batch(step))
            loss, nat, adv = parts(called, x, x_adv, y)
            logits = called(x), called(x_adv)
            opt.zero_grad()
            backward(opt, loss + reviser(x, x_adv, *logits), natural=nat, adversarial=adv)
            opt.step()
            reviser.update()
        ends.append(weights_of(kind, model) + weights_of(kind, reviser.model))
    return ends


@pytest.mark.parametrize("options", [{}, {"refresh_every": 4}], ids=str)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resuming_is_bit_exact(two, tmp_path, kind, options):
    answers = two.run(resume, 2, kind, tmp_path, options)
    assert_same_bits([uninterrupted for uninterrupted, _ in answers])
    for uninterrupted, resumed in answers:
        assert all(map(np.array_equal, uninterrupted, resumed))


# torch.distributed.checkpoint: any number of processes.


def save_distributed(rank, size, kind, folder, start, steps):
    """Train from step ``start``, loading what is in the folder if that is not 0; save."""
    model = small() if start == 0 else shuffle_(small())
    called = wrapped(kind, model)
    opt = make_opt(model)
    options = StateDictOptions(full_state_dict=False)
    if start:
        state = dict(
            zip(("model", "opt"), get_state_dict(called, opt, options=options), strict=True)
        )
        dcp.load(state, checkpoint_id=folder / str(start), no_dist=kind == "alone")
        set_state_dict(
            called,
            opt,
            model_state_dict=state["model"],
            optim_state_dict=state["opt"],
            options=options,
        )
        assert opt.param_groups[0]["rgp_step"] == start
        assert opt.param_groups[0]["rgp_update_fraction"] == 0.45
    else:
        opt.param_groups[0]["rgp_update_fraction"] = 0.45
    for step in range(start, start + steps):
        take_step("call", called, opt, share(rank, size, batch(step)))
    state = dict(zip(("model", "opt"), get_state_dict(called, opt, options=options), strict=True))
    dcp.save(state, checkpoint_id=folder / str(start + steps), no_dist=kind == "alone")
    return weights_of(kind, model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of dcp in one process
def test_from_two_processes_to_one_and_back(two, tmp_path, kind):
    two.run(save_distributed, 2, kind, tmp_path, 0, 2)
    save_distributed(0, 1, "alone", tmp_path, 2, 2)
    answers = two.run(save_distributed, 2, kind, tmp_path, 4, 2)
    assert_same_bits(answers)
    assert_close(answers[0], alone("call", 6, update_fraction=0.45))


def from_shards_to_replicas(rank, size, folder):
    save_distributed(rank, size, "fsdp", folder, 0, 2)
    return save_distributed(rank, size, "ddp", folder, 2, 2)


def test_from_shards_to_replicas(four, tmp_path):
    answers = four.run(from_shards_to_replicas, 4, tmp_path)
    assert_same_bits(answers)
    assert_close(answers[0], alone("call", 4, update_fraction=0.45))


def other_shards(rank, size, kept):
    """Masks that were kept for shards of another size are selected anew, not misread."""
    model = shard(small())
    opt = make_opt(model, refresh_every=5)
    take_step("call", model, opt, share(rank, size, batch(0)))
    state = opt.state_dict()
    kept = state["rgp_kept"]
    state["rgp_kept"] = {**kept, "masks": {i: bits[:-1] for i, bits in kept["masks"].items()}}
    opt.load_state_dict(state)
    assert opt.needs_scores
    take_step("call", model, opt, share(rank, size, batch(1)))


def test_kept_masks_of_other_shards_are_dropped(two):
    two.run(other_shards, 2, None)


# A process dies.


def train_until_death(rank, size, kind, folder, steps, dies_at):
    """Save after each step, as a user would: to a new file that replaces the old one."""
    model = small()
    called = wrapped(kind, model)
    opt = make_opt(model)
    file = folder / f"rank{rank}.pt"
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=kind != "fsdp")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        start = state["step"]
    for step in range(start, steps):
        if step == dies_at and rank == 1:
            opt.inner.register_step_pre_hook(lambda *_: os._exit(1))
        take_step("call", called, opt, share(rank, size, batch(step)))
        state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}
        torch.save(state, folder / f"rank{rank}.tmp")
        dist.barrier()  # nobody replaces the old one before all have written
        os.replace(folder / f"rank{rank}.tmp", file)
    return weights_of(kind, model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_dies_in_a_step_leaves_a_checkpoint_that_resumes(two, tmp_path, kind):
    mortal = Ranks(2)
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        mortal.run(train_until_death, 2, kind, tmp_path, 5, 2)
    mortal.stop()
    answers = two.run(train_until_death, 2, kind, tmp_path, 5, None)
    assert_same_bits(answers)
    assert_close(answers[0], alone("call", 5))


# One checkpoint of each version is kept.


def kept_run(steps):
    """What the file holds; it must stay as it is."""
    torch.manual_seed(11)
    with torch.device("cpu"):  # where the file was written
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    model.to(DEVICE)
    groups = [
        {"params": [model[0].weight, model[2].weight], "rgp_update_fraction": 0.4},
        {"params": [model[0].bias, model[2].bias], "rgp_select": False},
    ]
    inner = torch.optim.AdamW(groups, lr=0.01)
    opt = RGPSelectiveOptimizer(inner, alpha=0.3, refresh_every=4)
    reviser = ConsistencyReviser(model, rate=0.5, decay=0.9, seed=2)
    for step in range(steps):
        kept_step(model, opt, reviser, step)
    return model, opt, reviser


def kept_step(model, opt, reviser, step):
    g = torch.Generator("cpu").manual_seed(step)
    x = torch.rand(8, 6, generator=g, device="cpu").to(DEVICE)
    y = torch.randint(0, 3, (8,), generator=g, device="cpu").to(DEVICE)
    x_adv = x + 0.1
    logits, logits_adv = model(x), model(x_adv)
    nat = torch.nn.functional.cross_entropy(logits, y)
    adv = torch.nn.functional.cross_entropy(logits_adv, y)
    opt.zero_grad()
    loss = adv + reviser(x, x_adv, logits, logits_adv)
    backward(opt, loss, natural=nat, adversarial=adv)
    opt.step()
    reviser.update()


def write_kept(file):
    """Make the file of a new version: ``python tests/test_checkpoints.py FILE``."""
    model, opt, reviser = kept_run(6)
    state = copy.deepcopy(
        {"model": model.state_dict(), "opt": opt.state_dict(), "reviser": reviser.state_dict()}
    )
    for step in (6, 7):
        kept_step(model, opt, reviser, step)
    state["later"] = [p.detach().clone() for p in model.parameters()]
    torch.save(state, file)


@pytest.mark.parametrize("file", sorted(KEPT.parent.glob("*.pt")), ids=lambda file: file.stem)
def test_a_checkpoint_of_an_earlier_version_loads_and_goes_on(file):
    state = torch.load(file, weights_only=True)
    model, opt, reviser = kept_run(0)
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["opt"])
    reviser.load_state_dict(state["reviser"])
    groups = opt.param_groups
    assert [group["rgp_update_fraction"] for group in groups] == [0.4, 0.7]
    assert [group["rgp_step"] for group in groups] == [6, 6]
    assert not opt.needs_scores  # the masks of the fifth step are kept
    for step in (6, 7):
        kept_step(model, opt, reviser, step)
    for p, later in zip(model.parameters(), state["later"], strict=True):
        torch.testing.assert_close(
            p.detach().cpu(), later, rtol=1e-5, atol=1e-6
        )  # of other machines


def test_a_kept_checkpoint_is_there():
    assert KEPT.exists()


def test_what_is_saved_is_plain():
    """Tensors, numbers, strings and containers: what a safe loader accepts."""
    _, opt, reviser = kept_run(2)
    for state in (opt.state_dict(), reviser.state_dict()):
        disk(state)
    masks = opt.state_dict()["rgp_kept"]["masks"].values()
    assert all(bits.dtype == torch.uint8 for bits in masks)


if __name__ == "__main__":
    import sys

    write_kept(sys.argv[1])
