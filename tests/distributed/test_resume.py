"""Checkpoints: of several processes, from one number of them to another, after a death."""

import os

import numpy as np
import parallel
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import backward
from parallel import assert_joined, batch, fit, make_opt, share, small, train, values, wrap
from ranks import RankFailed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from rgp_optim import ConsistencyReviser


def shuffled():
    """Other weights, so that a resumed run has to load them."""
    model = small()
    for p in model.parameters():
        p.data.add_(0.3)
    return model


# torch.save by each process.


def revised(kind, model, seed):
    """The model as it is called; and what a checkpoint holds."""
    reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=seed)
    called = wrap(kind, model)
    if kind == "fsdp":
        wrap(kind, reviser.model)
    return called, {"model": model, "opt": make_opt(model), "reviser": reviser}


def train_revised(called, state, steps):
    opt, reviser = state["opt"], state["reviser"]
    for step in steps:
        x, x_adv, y = share(batch(step))
        loss, nat, adv = parallel.parts(called, x, x_adv, y)
        loss = loss + reviser(x, x_adv, called(x), called(x_adv))
        opt.zero_grad()
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()
        reviser.update()
    return values(state["model"]) + values(reviser.model)


def resume(kind, folder):
    """Run five steps; run three, save, build everything anew, load, run two."""
    whole = train_revised(*revised(kind, small(), 4), range(5))
    called, state = revised(kind, small(), 4)
    train_revised(called, state, range(3))
    file = folder / f"{kind}{dist.get_rank()}.pt"
    torch.save({name: each.state_dict() for name, each in state.items()}, file)
    called, state = revised(kind, shuffled(), 9)
    loaded = torch.load(file, weights_only=kind != "fsdp")
    for name, each in state.items():
        each.load_state_dict(loaded[name])
    return whole, train_revised(called, state, range(3, 5))


@parallel.DDP_AND_FSDP2
def test_resuming_is_bit_exact(two, tmp_path, kind):
    answers = parallel.run(two, resume, kind, tmp_path)
    parallel.assert_same_bits([uninterrupted for uninterrupted, _ in answers])
    for uninterrupted, resumed in answers:
        assert all(map(np.array_equal, uninterrupted, resumed))


# torch.distributed.checkpoint: any number of processes.


def save_distributed(kind, folder, start):
    """Load the checkpoint of step ``start``, unless that is 0; take two steps; save."""
    model = shuffled() if start else small()
    called, opt = wrap(kind, model), make_opt(model, update_fraction=0.4 if start else 0.45)
    options = {"no_dist": not dist.is_initialized()}
    if start:
        weights, state = get_state_dict(called, opt)
        dcp.load({"model": weights, "opt": state}, checkpoint_id=folder / str(start), **options)
        set_state_dict(called, opt, model_state_dict=weights, optim_state_dict=state)
        assert opt.param_groups[0]["rgp_update_fraction"] == 0.45
    found = fit(called, opt, steps=range(start, start + 2))
    weights, state = get_state_dict(called, opt)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=folder / str(start + 2), **options)
    return found


@parallel.DDP_AND_FSDP2
@pytest.mark.filterwarnings("ignore::UserWarning")  # of dcp in one process
def test_from_two_processes_to_one_and_back(two, tmp_path, kind):
    parallel.run(two, save_distributed, kind, tmp_path, 0)
    save_distributed(kind, tmp_path, 2)
    want = train(kind, steps=6, update_fraction=0.45)
    assert_joined(two, save_distributed, kind, tmp_path, 4, want=want)


def test_from_shards_to_replicas(four, tmp_path):
    parallel.run(four, save_distributed, "fsdp", tmp_path, 0)
    want = train("ddp", steps=4, update_fraction=0.45)
    assert_joined(four, save_distributed, "ddp", tmp_path, 2, want=want)


def train_until_death(kind, folder, dies_at):
    """Save after each step, as a user would: to a new file that replaces the old one."""
    model, rank = small(), dist.get_rank()
    called, opt = wrap(kind, model), make_opt(model)
    file, start = folder / f"rank{rank}.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=kind != "fsdp")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        start = state["step"]
    for step in range(start, 5):
        if step == dies_at and rank == 1:
            opt.inner.register_step_pre_hook(lambda *_: os._exit(1))
        fit(called, opt, steps=[step])
        state = {"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}
        torch.save(state, folder / f"rank{rank}.tmp")
        dist.barrier()  # nobody replaces the old one before all have written
        os.replace(folder / f"rank{rank}.tmp", file)
    return values(model)


@parallel.DDP_AND_FSDP2
def test_a_process_that_dies_in_a_step_leaves_a_checkpoint_that_resumes(two, tmp_path, kind):
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        parallel.run(two, train_until_death, kind, tmp_path, 2)
    assert_joined(two, train_until_death, kind, tmp_path, None, want=train(kind, steps=5))
