"""Checkpoints: of several processes, from one number of them to another, after a death."""

import os

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


def train_saving(kind, folder, dies_at):
    """Save after each step, as a user would: to a new file that replaces the old one."""
    rank, file = dist.get_rank(), folder / f"rank{dist.get_rank()}.pt"
    model = shuffled() if file.exists() else small()
    reviser = ConsistencyReviser(model, rate=0.5, decay=0.5, seed=9 if file.exists() else 4)
    called = wrap(kind, model)
    if kind == "fsdp":
        wrap(kind, reviser.model)
    opt, start = make_opt(model, reviser=reviser), 0
    parts = {"model": model, "opt": opt}
    if file.exists():
        start, saved = torch.load(file, weights_only=kind != "fsdp")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(start, 5):
        if step == dies_at and rank == 1:
            opt.inner.register_step_pre_hook(lambda *_: os._exit(1))
        x, x_adv, y = share(batch(step))
        loss, nat, adv = parallel.parts(called, x, x_adv, y)
        loss = loss + reviser(x, x_adv, called(x), called(x_adv))
        opt.zero_grad()
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()
        assert reviser.steps == step + 1
        state = step + 1, {name: part.state_dict() for name, part in parts.items()}
        torch.save(state, folder / f"rank{rank}.tmp")
        dist.barrier()  # nobody replaces the old one before all have written
        os.replace(folder / f"rank{rank}.tmp", file)
    return values(model) + values(reviser.model)


@parallel.DDP_AND_FSDP2
def test_a_process_that_dies_in_a_step_leaves_a_checkpoint_that_resumes_bit_exactly(
    two, tmp_path, kind
):
    folders = [tmp_path / name for name in ("whole", "broken")]
    for folder in folders:
        folder.mkdir()
    whole = parallel.run(two, train_saving, kind, folders[0], None)
    with pytest.raises(RankFailed, match="rank 1: the process died"):
        parallel.run(two, train_saving, kind, folders[1], 2)
    parallel.assert_same_bits(whole + parallel.run(two, train_saving, kind, folders[1], None))


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
