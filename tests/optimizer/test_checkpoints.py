"""Checkpoints in one process: resuming, plain ones, torch.distributed.checkpoint, other formats."""

import pytest
import torch
from common import DEVICE, Run, disk, losses, make_batch, same, train
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as lrs


@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW", "Adafactor"])
def test_resuming_is_bit_exact(name):
    """With a scheduler and a gradient scaler."""
    straight, resumed = Run(name), Run(name, seed=5, update_fraction=0.9)
    parts = []
    for run in (straight, resumed):
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0, growth_interval=2)
        parts.append([run.model, run.opt, scaler, lrs.StepLR(run.opt, 2)])
    for seed in range(6):
        if seed == 3:
            saved = disk([part.state_dict() for part in parts[0]])
            for part, state in zip(parts[1], saved, strict=True):
                part.load_state_dict(state)
            assert resumed.opt.param_groups[0]["rgp_update_fraction"] == 0.3
        for model, opt, scaler, scheduler in parts if seed >= 3 else parts[:1]:
            loss, nat, adv = losses(model, *make_batch(seed))
            opt.zero_grad()
            scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()
            scaler.step(opt)
            scaler.update()
            scheduler.step()
            assert scaler.get_scale() == 1024.0 * 2 ** ((seed + 1) // 2)
    assert same(straight, resumed)
    for a, b in zip(straight.opt.state.values(), resumed.opt.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_checkpoints_of_plain_optimizers_load_and_ours_load_into_them():
    run, plain = Run("AdamW"), Run("AdamW", plain=True)
    plain.step()
    run.opt.param_groups[0]["rgp_alpha"] = 0.6
    run.opt.load_state_dict(state_dict=plain.opt.state_dict())
    assert run.opt.param_groups[0]["rgp_alpha"] == 0.6  # our settings stay
    assert len(run.opt.state) == 6
    run.step()
    plain.opt.load_state_dict(run.opt.state_dict())
    plain.step()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW"])
def test_distributed_checkpoint_state_dicts(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    run, fresh = Run(name), Run(name, seed=3, update_fraction=0.9)
    get_optimizer_state_dict(run.model, run.opt)  # no state yet: the tool makes it step
    assert run.stays()
    run.step()
    saved = disk(get_optimizer_state_dict(run.model, run.opt, options=options))
    set_optimizer_state_dict(fresh.model, fresh.opt, saved, options=options)
    assert fresh.stays()
    fresh.model.load_state_dict(run.model.state_dict())
    assert fresh.opt.param_groups[0]["rgp_update_fraction"] == 0.3
    train(2, run, fresh)
    assert same(run, fresh)


class Nested(torch.optim.SGD):
    """As Lookahead and others, whose keys are their own: the groups lie elsewhere."""

    def state_dict(self):
        return {"base": super().state_dict(), "note": 3}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["note"]
        super().load_state_dict(state_dict["base"])


class Extended(torch.optim.SGD):
    def state_dict(self):
        return {**super().state_dict(), "note": 3}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict["note"]
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("kind", [Nested, Extended])
def test_formats_of_the_inner_optimizer(kind):
    run, again = (Run(lambda p, lr=lr: kind(p, lr=lr, momentum=0.9)) for lr in (0.1, 0.2))
    run.step()
    again.opt.load_state_dict(disk(run.opt.state_dict()))
    again.model.load_state_dict(run.model.state_dict())
    assert again.opt.inner.loaded == 3
    train(2, run, again)
    assert same(run, again)
