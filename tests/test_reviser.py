"""ConsistencyReviser: the average against a plain loop, its loss, its draws, its checkpoints."""

import copy
import math
import pickle

import pytest
import torch
from common import DEVICE, disk, make_batch, make_net, rng_states, seeded
from torch import nn

from rgp_optim import ConsistencyReviser


def disturb(model, seed):
    """Change every weight and running statistic, as a training step does."""
    g = seeded(seed)
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            if t.is_floating_point():
                t.add_(torch.randn(t.shape, generator=g).to(t.dtype))
            else:
                t.add_(1)


def tensors(model):
    return [*model.parameters(), *model.buffers()]


# Limits.


def test_rate_zero_never_moves_and_decay_zero_copies():
    model = make_net()
    start = copy.deepcopy(model)
    still, follows = ConsistencyReviser(model, rate=0.0), ConsistencyReviser(model, rate=1, decay=0)
    for seed in range(3):
        disturb(model, seed)
        assert not still.update()
        assert follows.update()
        assert all(map(torch.equal, tensors(follows.model), tensors(model)))
    assert all(map(torch.equal, tensors(still.model), tensors(start)))


def test_nothing_is_shared_and_nothing_learns():
    model = make_net()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.train()
    reviser = ConsistencyReviser(model)
    theirs = {t.untyped_storage().data_ptr() for t in tensors(model)}
    assert all(t.untyped_storage().data_ptr() not in theirs for t in tensors(reviser.model))
    assert not any(p.requires_grad or p.grad is not None for p in reviser.model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in reviser.model.modules())
    assert model.training


# The average.


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize("ramp", [False, True])
def test_the_average_is_a_plain_loops(ramp, buffers):
    model = make_net(dtype=torch.float64)
    reviser = ConsistencyReviser(model, rate=0.5, decay=0.9, ramp=ramp, buffers=buffers, seed=3)
    parameters, statistics = list(model.parameters()), list(model.buffers())
    want = [t.clone() for t in [*parameters, *statistics]]
    moved = []
    for t in range(20):
        disturb(model, t)
        moved.append(reviser.update())
        d = min(1 - 1 / (t + 1), 0.9) if ramp else 0.9
        if moved[-1]:
            for i, now in enumerate(tensors(model)):
                whole = now.dtype == torch.int64 or (buffers == "copy" and i >= len(parameters))
                want[i] = now.clone() if whole else d * want[i] + (1 - d) * now.detach()
    assert 3 < sum(moved) < 17
    for got, expected in zip(tensors(reviser.model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert reviser.model.norm.num_batches_tracked.dtype == torch.int64


def test_constant_target_has_a_closed_form():
    model = nn.Linear(2, 1).double()
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.99)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(100):
        reviser.update()
    torch.testing.assert_close(reviser.model.weight, start + (1 - 0.99**100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    """In bfloat16 itself, steps of 0.001 of the difference round away and the average freezes."""
    model = nn.Linear(50, 40).to(dtype)
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.999)
    start = model.weight.detach().double()
    with torch.no_grad():
        model.weight.add_(1.0)
    target = model.weight.detach().double()
    for _ in range(200):
        reviser.update()
    assert reviser.model.weight.dtype == dtype
    want = target + 0.999**200 * (start - target)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(reviser.model.weight.double(), want, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_loaded_into_the_copy_is_averaged_on(dtype):
    model = make_net(dtype=dtype)
    reviser, fresh = (ConsistencyReviser(model, rate=1.0, decay=0.9) for _ in range(2))
    disturb(model, 0)
    reviser.update()
    loaded = make_net(seed=1, dtype=dtype).state_dict()
    reviser.model.load_state_dict(loaded)
    saved = reviser.state_dict()
    assert all(
        torch.equal(t, saved["masters"][name].to(dtype))
        for name, t in loaded.items()
        if t.is_floating_point()
    )
    fresh.model.load_state_dict(loaded)
    for seed in range(3):
        disturb(model, seed)
        reviser.update()
        fresh.update()
    assert all(map(torch.equal, tensors(reviser.model), tensors(fresh.model)))


def test_the_copy_may_change_its_dtype():
    """From float32 to bfloat16 it is averaged aside; back in float32 it is its own average."""
    model = nn.Linear(50, 40)
    reviser = ConsistencyReviser(model, rate=1.0, decay=0.999)
    reviser.update()
    reviser.state_dict()
    reviser.model.bfloat16()
    start = reviser.model.weight.double()
    with torch.no_grad():
        model.weight.add_(1.0)
    target = model.weight.detach().double()
    for _ in range(200):
        reviser.update()
    want = target + 0.999**200 * (start - target)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(reviser.model.weight.double(), want, rtol=eps, atol=eps)
    assert reviser.model.weight.dtype == torch.bfloat16
    reviser.model.float()
    assert reviser.state_dict()["masters"] == {}
    now = reviser.model.weight.double()
    reviser.update()
    want = target + 0.999 * (now - target)
    torch.testing.assert_close(reviser.model.weight.double(), want, rtol=1e-6, atol=1e-6)


def test_horizon_is_the_time_constant_as_a_fraction_of_the_run():
    model = nn.Linear(1, 1)
    published = ConsistencyReviser(model, horizon=0.064, total_steps=78_200)
    assert published.decay == pytest.approx(0.999, abs=1e-6)
    assert ConsistencyReviser(model).decay == 0.999
    short = ConsistencyReviser(model, rate=0.5, horizon=0.1, total_steps=400)
    assert short.decay == pytest.approx(1 - 1 / 20)
    falling = ConsistencyReviser(model, rate=lambda t: 1 - t / 100, horizon=0.1, total_steps=100)
    assert falling.decay == pytest.approx(1 - 1 / 5.05)


def test_repr_names_the_model_and_the_settings():
    reviser = ConsistencyReviser(nn.Linear(1, 1), rate=0.5, decay=0.9)
    reviser.update()
    assert repr(reviser) == (
        "ConsistencyReviser(Linear, rate=0.5, decay=0.9, ramp=False, buffers='average', steps=1)"
    )


# Draws.


def test_draws_have_the_rate_and_are_their_own():
    model = nn.Linear(1, 1)
    before = rng_states()
    reviser, same, other = (ConsistencyReviser(model, rate=0.2, seed=s) for s in (0, 0, 1))
    draws = [[r.update() for _ in range(4000)] for r in (reviser, same, other)]
    assert all(map(torch.equal, before, rng_states()))
    assert draws[0] == draws[1] != draws[2]
    deviation = math.sqrt(4000 * 0.2 * 0.8)
    assert abs(sum(draws[0]) - 800) < 4 * deviation
    assert reviser.steps == 4000


def test_rate_can_follow_a_schedule():
    seen = []

    def rate(step):
        seen.append(step)
        return 1.0 if step < 2 else 0.0

    reviser = ConsistencyReviser(nn.Linear(1, 1), rate=rate)
    seen.clear()
    assert [reviser.update() for _ in range(4)] == [True, True, False, False]
    assert seen == [0, 1, 2, 3]
    reviser.rate = 1.0
    assert reviser.update()


# The loss.


def test_the_loss_is_the_sum_of_two_divergences():
    model = make_net(dtype=torch.float64)
    reviser = ConsistencyReviser(model)
    disturb(model, 1)
    x, x_adv, _ = make_batch(dtype=torch.float64)
    logits, logits_adv = model(x), model(x_adv)
    loss = reviser(x, x_adv, logits, logits_adv)
    want = 0.0
    with torch.no_grad():
        for batch, out in ((x, logits), (x_adv, logits_adv)):
            p = reviser.model(batch).softmax(1)
            want += (p * (p.log() - out.softmax(1).log())).sum() / len(x)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert loss > 0
    x.requires_grad_()
    loss = reviser(x, x_adv, logits, logits_adv)
    loss.backward()
    assert x.grad is None
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in reviser.model.parameters())


def test_the_two_batches_do_not_mix():
    """BatchNorm without running statistics normalises each batch by itself, in eval mode too."""
    model = make_net(dtype=torch.float64)
    model.norm = nn.BatchNorm2d(4, track_running_stats=False).double()
    reviser = ConsistencyReviser(model)
    x, x_adv, _ = make_batch(dtype=torch.float64)
    x_adv = x_adv + 3.0
    assert reviser(x, x_adv, model(x), model(x_adv)).item() == pytest.approx(0, abs=1e-12)


def test_the_loss_is_zero_where_both_agree():
    model = make_net().eval()
    reviser = ConsistencyReviser(model)
    x, x_adv, _ = make_batch()
    assert reviser(x, x_adv, model(x), model(x_adv)).item() == pytest.approx(0, abs=1e-6)


def test_looking_changes_no_statistic_of_the_copy():
    model = make_net().train()
    reviser = ConsistencyReviser(model)
    before = [t.clone() for t in tensors(reviser.model)]
    reviser.model.train()  # as a trainer does to every module that it finds
    x, x_adv, _ = make_batch()
    reviser(x, x_adv, model(x), model(x_adv))
    assert all(map(torch.equal, before, tensors(reviser.model)))
    assert model.norm.num_batches_tracked == 2


def test_compiled_and_parallel_models_are_unwrapped():
    model = make_net()
    reviser = ConsistencyReviser(torch.compile(nn.DataParallel(model), backend="eager"), rate=1)
    assert type(reviser.model) is type(model)
    disturb(model, 0)
    assert reviser.update()


def shard_and_update(rank):
    """FSDP2 on 2 ranks, uneven shards: as one process, also after a forward has gathered them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for dtype in (torch.float32, torch.bfloat16):
        plain, model = make_net(dtype=dtype), make_net(dtype=dtype)
        want, reviser = (ConsistencyReviser(m, rate=1.0, decay=0.9) for m in (plain, model))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"shard `reviser.model` as the model"):
            reviser.update()
        fully_shard(reviser.model, mesh=mesh)
        with pytest.raises(ValueError, match="`model` should be given before `fully_shard`"):
            ConsistencyReviser(model)
        x = make_batch(dtype=dtype)[0]
        for _ in range(5):
            with torch.no_grad():
                out = model.eval()(x)
                model.reshard()
                reviser(x, x, out, out)
                for p in [*plain.parameters(), *model.parameters()]:
                    p.add_(0.5)
            assert want.update()
            assert reviser.update()
        state = reviser.state_dict()
        for name, expected in want.state_dict()["model"].items():
            got = state["model"][name]
            got = got.full_tensor() if hasattr(got, "full_tensor") else got
            assert torch.equal(got, expected), name
        reviser.load_state_dict(state)


def test_a_sharded_model_is_averaged_as_a_whole_one(two):
    two.run(shard_and_update)


# Checkpoints and copies.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(dtype):
    model, again = make_net(dtype=dtype), make_net(seed=1, dtype=dtype)
    reviser = ConsistencyReviser(model, rate=0.4, decay=0.9, seed=5)
    for t in range(10):
        disturb(model, t)
        reviser.update()
    resumed = ConsistencyReviser(again, rate=0.4, decay=0.5, seed=6)
    resumed.load_state_dict(disk(reviser.state_dict()))
    again.load_state_dict(model.state_dict())
    draws = []
    for t in range(10, 30):
        disturb(model, t)
        disturb(again, t)
        draws.append((reviser.update(), resumed.update()))
    assert all(a == b for a, b in draws)
    assert len(set(draws)) == 2
    assert all(map(torch.equal, tensors(reviser.model), tensors(resumed.model)))
    assert reviser.steps == resumed.steps == 30


def test_loading_copies():
    reviser = ConsistencyReviser(make_net(), rate=1.0)
    state = reviser.state_dict()
    other = ConsistencyReviser(make_net(seed=1), rate=1.0)
    other.load_state_dict(state)
    other.update()
    assert not torch.equal(other.model.conv.weight, reviser.model.conv.weight)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_follow_their_own_model(copied):
    model = make_net()
    reviser = ConsistencyReviser(model, rate=0.5, seed=3)
    for _ in range(5):  # copied in the middle of the draws
        reviser.update()
    twin_model, twin = copied((model, reviser))
    for t in range(6):
        disturb(model, t)
        disturb(twin_model, t)
        assert reviser.update() == twin.update()
    assert all(map(torch.equal, tensors(reviser.model), tensors(twin.model)))
    disturb(twin_model, 9)
    before = [t.clone() for t in tensors(reviser.model)]
    for _ in range(20):
        twin.update()
    assert all(map(torch.equal, before, tensors(reviser.model)))


# Refusals.

LINEAR = nn.Linear(2, 2).to(DEVICE)


class Shares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def __deepcopy__(self, memo):
        new = Shares()
        new.weight = nn.Parameter(self.weight.detach())
        return new


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ConsistencyReviser(lambda x: x), TypeError, "`model` should be a torch.nn.Module"),
        (lambda: ConsistencyReviser(LINEAR, rate=1.5), ValueError, r"`rate` should be in \[0, 1\]"),
        (lambda: ConsistencyReviser(LINEAR, rate=lambda t: 2), ValueError, "`rate` should be in"),
        (
            lambda: ConsistencyReviser(
                LINEAR, rate=lambda t: 1 - t / 50, horizon=0.5, total_steps=80
            ),
            ValueError,
            r"`rate` should be in \[0, 1\]. Found `rate = -0.02",
        ),
        (lambda: ConsistencyReviser(LINEAR, decay=1.0), ValueError, "1 would never move"),
        (lambda: ConsistencyReviser(LINEAR, decay=-0.1), ValueError, "`decay` should be in"),
        (
            lambda: ConsistencyReviser(LINEAR, decay=0.9, horizon=0.1, total_steps=100),
            ValueError,
            "`horizon` should be given in place of `decay`. Found `decay = 0.9, horizon = 0.1`",
        ),
        (
            lambda: ConsistencyReviser(LINEAR, horizon=0.1),
            ValueError,
            "`total_steps` should be given with `horizon`.* Pass the steps of the whole run",
        ),
        (
            lambda: ConsistencyReviser(LINEAR, horizon=0.064, total_steps=50),
            ValueError,
            r"total_steps >= 1.* For 50 steps it should be 0.1 or more; or give `decay`",
        ),
        (
            lambda: ConsistencyReviser(LINEAR, total_steps=100),
            ValueError,
            "`horizon` should be given with `total_steps`. Found `horizon = None`",
        ),
        (
            lambda: ConsistencyReviser(LINEAR, decay=0.9, total_steps=100),
            ValueError,
            "`horizon` should be given with `total_steps`",
        ),
        (
            lambda: ConsistencyReviser(LINEAR, horizon=1.5, total_steps=100),
            ValueError,
            r"`horizon` should be in \(0, 1\]. Found `horizon = 1.5`. It is a fraction",
        ),
        (lambda: ConsistencyReviser(LINEAR, buffers="sum"), ValueError, "one of 'average', 'copy'"),
        (lambda: ConsistencyReviser(LINEAR, seed=-1), ValueError, "`seed` should be an integer"),
        (
            lambda: ConsistencyReviser(Shares()),
            ValueError,
            "without shared storage. Found `weight`",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_shapes_that_do_not_match_are_refused():
    model = make_net()
    reviser = ConsistencyReviser(model)
    x, x_adv, _ = make_batch()
    out = model(x)
    with pytest.raises(ValueError, match="`x_adv` should have the shape of `x`"):
        reviser(x, x_adv[:4], out, out)
    with pytest.raises(ValueError, match="`logits_adv` should match `logits`"):
        reviser(x, x_adv, out, out[:, :2])


def test_a_changed_model_is_refused_at_update():
    model = make_net()
    reviser = ConsistencyReviser(model, rate=0.0)  # also where the draw would not move the copy
    before = reviser.state_dict()["generator"]
    model.head = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"a difference at head.weight, head.bias.* new reviser"):
        reviser.update()
    assert reviser.steps == 0
    assert torch.equal(reviser.state_dict()["generator"], before)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    reviser = ConsistencyReviser(make_net())
    before = disk(reviser.state_dict())
    with pytest.raises(
        ValueError, match=r"`state_dict` should be a reviser's. Found `no decay, gen"
    ):
        reviser.load_state_dict({"model": {}})
    wrong = {**reviser.state_dict(), "model": dict(nn.Linear(1, 1).named_parameters())}
    with pytest.raises(ValueError, match="should have the parameters and buffers"):
        reviser.load_state_dict(wrong)
    other = ConsistencyReviser(make_net(seed=1), seed=1).state_dict()
    for key, value, message in (
        ("decay", 7.0, "decay"),
        ("steps", -1, "steps"),
        ("generator", None, "should be the state of a CPU generator"),
        ("generator", torch.zeros(3, dtype=torch.uint8), "should be the state of a CPU generator"),
        ("model", None, "should hold tensors by name. Found `model: NoneType`"),
        ("masters", {"conv.weight": 1}, "should hold tensors by name"),
    ):
        with pytest.raises(ValueError, match=message):
            reviser.load_state_dict({**other, key: value})
    with pytest.raises(ValueError, match="`state_dict` should be a reviser's"):
        reviser.load_state_dict(None)
    after = reviser.state_dict()
    assert before["steps"] == after["steps"]
    assert torch.equal(before["generator"], after["generator"])
    assert all(torch.equal(t, after["model"][n]) for n, t in before["model"].items())
