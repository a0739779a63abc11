"""Checkpoints: of several processes, from one number of them to another, after a death."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import backward
from parallel import (
    alone,
    assert_close,
    assert_same_bits,
    batch,
    make_opt,
    parts,
    share,
    small,
    take_step,
    values,
    wrapped,
)
from ranks import RankFailed, Ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from rgp_optim import ConsistencyReviser


def shuffle_(model):
    """Other weights, so that a resumed run has to load them."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3)
    return model


# torch.save by each process.


def resume(rank, size, kind, folder):
    """Run five steps; run three, save, build everything anew, load, run two."""
    ends = []
    for stop in (5, 3):
        model = small()
        reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=4)
        called = wrapped(kind, model)
        wrapped(kind, reviser.model) if kind == "fsdp" else None
        opt = make_opt(model)
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
                opt = make_opt(model)
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
        ends.append(values(model) + values(reviser.model))
    return ends


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_resuming_is_bit_exact(two, tmp_path, kind):
    answers = two.run(resume, 2, kind, tmp_path)
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
        assert opt.param_groups[0]["rgp_update_fraction"] == 0.45
    else:
        opt.param_groups[0]["rgp_update_fraction"] = 0.45
    for step in range(start, start + steps):
        take_step("loss", called, opt, share(rank, size, batch(step)))
    state = dict(zip(("model", "opt"), get_state_dict(called, opt, options=options), strict=True))
    dcp.save(state, checkpoint_id=folder / str(start + steps), no_dist=kind == "alone")
    return values(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of dcp in one process
def test_from_two_processes_to_one_and_back(two, tmp_path, kind):
    two.run(save_distributed, 2, kind, tmp_path, 0, 2)
    save_distributed(0, 1, "alone", tmp_path, 2, 2)
    answers = two.run(save_distributed, 2, kind, tmp_path, 4, 2)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 6, update_fraction=0.45))


def from_shards_to_replicas(rank, size, folder):
    save_distributed(rank, size, "fsdp", folder, 0, 2)
    return save_distributed(rank, size, "ddp", folder, 2, 2)


def test_from_shards_to_replicas(four, tmp_path):
    answers = four.run(from_shards_to_replicas, 4, tmp_path)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 4, update_fraction=0.45))


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
        take_step("loss", called, opt, share(rank, size, batch(step)))
        state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}
        torch.save(state, folder / f"rank{rank}.tmp")
        dist.barrier()  # nobody replaces the old one before all have written
        os.replace(folder / f"rank{rank}.tmp", file)
    return values(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_that_dies_in_a_step_leaves_a_checkpoint_that_resumes(two, tmp_path, kind):
    mortal = Ranks(2)
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        mortal.run(train_until_death, 2, kind, tmp_path, 5, 2)
    mortal.stop()
    answers = two.run(train_until_death, 2, kind, tmp_path, 5, None)
    assert_same_bits(answers)
    assert_close(answers[0], alone("loss", 5))
