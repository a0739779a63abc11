"""Checkpoints in one process: resuming, plain ones, torch.distributed.checkpoint, other formats."""

import copy

import pytest
import torch
from common import (
    INNER,
    cure_step,
    disk,
    make_net,
    plain_step,
    same_bits,
    snapshot,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as lrs

from rgp_optim import RGPSelectiveOptimizer


def wrap(model, make_inner=INNER["SGD momentum wd"], **options):
    inner = make_inner(model.parameters())
    return RGPSelectiveOptimizer(inner, **{"update_fraction": 0.3, **options})


def assert_same_values(a, b):
    assert all(map(same_bits, a, b))


def assert_same(model_a, model_b):
    assert_same_values(snapshot(model_a), snapshot(model_b))


@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW", "Adafactor"])
def test_resuming_is_bit_exact(name):
    straight = make_net()
    opt = wrap(straight, INNER[name])
    scheduler = lrs.StepLR(opt, 2)
    for seed in range(3):
        cure_step(straight, opt, seed)
        scheduler.step()
    saved = disk([straight.state_dict(), opt.state_dict(), scheduler.state_dict()])
    resumed = make_net(seed=5)
    again = wrap(resumed, INNER[name], update_fraction=0.9)
    again_scheduler = lrs.StepLR(again, 2)
    for target, state in zip((resumed, again, again_scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert again.param_groups[0]["rgp_update_fraction"] == 0.3
    for seed in range(3, 6):
        cure_step(straight, opt, seed)
        cure_step(resumed, again, seed)
        scheduler.step()
        again_scheduler.step()
    assert_same(straight, resumed)
    for a, b in zip(opt.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_a_plain_checkpoint_loads_and_keeps_our_settings():
    model, other = make_net(), make_net()
    reference = INNER["AdamW"](other.parameters())
    plain_step(other, reference)
    opt = wrap(model, INNER["AdamW"])
    opt.param_groups[0]["rgp_alpha"] = 0.6
    opt.load_state_dict(state_dict=reference.state_dict())
    assert opt.param_groups[0]["rgp_alpha"] == 0.6
    assert len(opt.state) == 6
    cure_step(model, opt)


def test_our_checkpoint_loads_into_the_plain_optimizer():
    model = make_net()
    opt = wrap(model, INNER["AdamW"])
    cure_step(model, opt)
    plain = INNER["AdamW"](model.parameters())
    plain.load_state_dict(opt.state_dict())
    plain_step(model, plain)


def test_a_bad_checkpoint_is_refused_before_anything_changes():
    model = make_net()
    opt = wrap(model)
    cure_step(model, opt)
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["rgp_update_fraction"] = 1.5
    state["param_groups"][0]["lr"] = 99.0
    with pytest.raises(ValueError, match=r"`rgp_update_fraction` should be in \[0, 1\]"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("name", ["SGD momentum wd", "AdamW"])
def test_distributed_checkpoint_state_dicts(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_net()
    opt = wrap(model, INNER[name])
    cure_step(model, opt)
    saved = disk(get_optimizer_state_dict(model, opt, options=options))
    other = make_net(seed=3)
    fresh = wrap(other, INNER[name], update_fraction=0.9)  # no state yet: the tool makes it step
    before = snapshot(other)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert_same_values(before, snapshot(other))
    other.load_state_dict(model.state_dict())
    assert fresh.param_groups[0]["rgp_update_fraction"] == 0.3
    cure_step(model, opt, 1)
    cure_step(other, fresh, 1)
    assert_same(model, other)


def test_distributed_checkpoint_of_an_optimizer_that_never_stepped():
    model = make_net()
    opt = wrap(model, INNER["AdamW"])
    before = snapshot(model)
    get_optimizer_state_dict(model, opt)
    assert_same_values(before, snapshot(model))


@pytest.mark.parametrize("nested", [True, False])
def test_formats_of_the_inner_optimizer(nested):
    """Lookahead and others have keys of their own, with the groups elsewhere or not at all."""

    class Lookahead(torch.optim.SGD):
        def state_dict(self):
            base = super().state_dict()
            return {"base": base, "step": 3} if nested else {**base, "step": 3}

        def load_state_dict(self, state_dict):
            self.loaded = state_dict["step"]
            super().load_state_dict(state_dict["base"] if nested else state_dict)

    def make(model):
        return wrap(model, lambda params: Lookahead(params, lr=0.1, momentum=0.9))

    model, other = make_net(), make_net()
    opt, again = make(model), make(other)
    cure_step(model, opt)
    again.load_state_dict(disk(opt.state_dict()))
    other.load_state_dict(model.state_dict())
    assert again.inner.loaded == 3
    cure_step(model, opt, 1)
    cure_step(other, again, 1)
    assert_same(model, other)


def test_unknown_settings_in_a_checkpoint_are_refused():
    model = make_net()
    opt = wrap(model)
    state = opt.state_dict()
    state["param_groups"][0]["rgp_fraction"] = 0.5
    with pytest.raises(ValueError, match="Found `rgp_fraction`"):
        opt.load_state_dict(state)
