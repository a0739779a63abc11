"""The kernels with programs in any order and side by side: what an interpreted grid cannot show."""

import gc
import os
import weakref
from unittest.mock import Mock

import pytest
import torch
from common import losses, make_batch, make_net, same_bits, snapshot

pytest.importorskip("triton")

import triton
import triton.language as tl
from interleaving import SCHEDULES, Anywhere, LockStep, Priorities, SideBySide, Starve
from test_backends import heavy, in_small_parts, special
from triton.runtime.interpreter import InterpretedFunction

from rgp_optim import RGPSelectiveOptimizer, _kernels, _reference, _triton

pytestmark = pytest.mark.skipif(
    not isinstance(_kernels._mask, InterpretedFunction), reason="the kernels are compiled"
)
# A longer search: so many seeds, and each case under every schedule.
SEEDS = range(int(os.environ.get("RGP_INTERLEAVINGS", "1")))


@pytest.fixture(autouse=True)
def many_programs(monkeypatch):
    """Let small inputs take the way of the large ones, and let new memory hold anything."""
    in_small_parts(monkeypatch)
    monkeypatch.setattr(_kernels, "CHUNK", tl.constexpr(64))
    monkeypatch.setattr(_triton, "LIST_LEAST", 40)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(before)


# What is selected from: which way it takes, pairs of gradients, fractions, pools.


def integers(n, high, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, high, (n,), generator=draw).float()


def pair(*shape, seed=0, dtype=torch.float32):
    return heavy(shape, seed, dtype), heavy(shape, seed + 50, dtype)


def last_channels(n, seed):
    g = integers(n * 6 * 9, 60, seed).view(n, 6, 3, 3)
    return g.contiguous(memory_format=torch.channels_last)


def one_pool(way, *pairs, fraction=0.5):
    return way, pairs, [fraction] * len(pairs), [0] * len(pairs)


LISTED, BY_INDEX, ALL = "by the list", "by index", "all that are not 0"
TYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {
    "one tensor": one_pool(LISTED, pair(30, 15), fraction=0.4),
    "ties in the list": one_pool(LISTED, (integers(400, 80), torch.ones(400))),
    "ties by index": one_pool(BY_INDEX, (integers(300, 4), torch.ones(300))),
    "special values": one_pool(BY_INDEX, (special(300, 1), special(300, 2)), fraction=0.3),
    "mostly zeros": one_pool(ALL, (torch.relu(heavy((25, 20), 1) - 2),) * 2, fraction=0.9),
    "mixed dtypes": one_pool(LISTED, *(pair(13, 10, seed=i, dtype=TYPES[i]) for i in range(3))),
    "bfloat16": one_pool(LISTED, pair(20, 16, dtype=torch.bfloat16), fraction=0.1),
    "channels last": one_pool(
        LISTED, *((last_channels(n, n), last_channels(n, 9)) for n in (4, 3))
    ),
    "one is missing": one_pool(LISTED, (None, heavy((200,), 1)), (heavy((250,), 2), None)),
    "the window is too high": one_pool(LISTED, pair(20, 16)),
    "the window is too low": one_pool(LISTED, pair(20, 16), fraction=0.45),
    "several pools": (
        LISTED,
        [pair(n, 1, seed=n) for n in (200, 130, 40, 70, 90, 65)],
        [0.2, 0.5, 0.5, 0.2, 0.0, 0.9],
        [0, 1, 2, 0, 3, 5],
    ),
}
WINDOWS = {
    "the window is too high": lambda group, fraction: (round(fraction * group.size), 1, 2, 1),
    "the window is too low": lambda group, fraction: (
        round(fraction * group.size),
        group.sampled * _kernels.RUN.value - 1,
        group.sampled * _kernels.RUN.value,
        1,
    ),
}
# What the optimizer does: the natural gradient's memory takes the weights, if no one else has it.
# A target that is a gradient that is ranked is not among it, but `Selection` allows it.
ALIASES = ["saved in the natural one", "masked in place, too", "apart"]


def arrange(pairs, aliases):
    """Return gradients, targets, weights and where to save them."""
    nats, advs = (
        [None if g is None else g.clone() for g in each] for each in zip(*pairs, strict=True)
    )
    likes = [a if n is None else n for n, a in zip(nats, advs, strict=True)]
    targets, weights = (
        [torch.empty_like(like).copy_(heavy(like.shape, seed)) for like in likes] for seed in (7, 8)
    )
    saved = [torch.empty_like(like) for like in likes]
    if aliases != "apart":
        saved = [s if n is None else n for n, s in zip(nats, saved, strict=True)]
    if aliases == "masked in place, too":
        targets = [t if a is None else a for a, t in zip(advs, targets, strict=True)]
    return nats, advs, targets, weights, saved


def way(selection):
    """Return how the first pool was decided."""
    state = selection._state
    if state[_kernels.S_BY_LIST.value]:
        return LISTED
    return ALL if state[_kernels.S_LAST.value] == -1 else BY_INDEX


def copies(tensors):
    return [None if t is None else t.clone() for t in tensors]


def masked(masks, targets):
    return [torch.where(m, t, torch.zeros_like(t)) for m, t in zip(masks, targets, strict=True)]


ORDERS = [
    (name, schedule)
    for i, name in enumerate(CASES)
    for j, schedule in enumerate(SCHEDULES)
    if len(SEEDS) > 1 or (3 * i + j) % 8 < 3
]


@pytest.mark.parametrize(("name", "schedule"), ORDERS)
def test_any_order_gives_the_same(name, schedule, monkeypatch):
    """Masks, saved weights, masked gradients and what is conserved, bit for bit."""
    expected, pairs, fractions, pools = CASES[name]
    settings = [0.3] * len(pairs), fractions, pools
    if name in WINDOWS:
        monkeypatch.setattr(_triton._Group, "ranks", WINDOWS[name])
    for seed in SEEDS:
        aliases = ALIASES[(SCHEDULES.index(schedule) + list(CASES).index(name) + seed) % 3]
        nats, advs, targets, weights, saved = arrange(pairs, aliases)
        want = _reference.select(copies(nats), copies(advs), *settings).masks()
        zeroed, before = masked(want, targets), copies(weights)
        with SideBySide(schedule, seed):
            selection = _triton.select(nats, advs, *settings)
            selection.apply_(targets, weights, saved)
            assert all(map(same_bits, targets, zeroed))
            assert all(map(same_bits, saved, before))
            for weight in weights:
                weight.add_(1)
            moved = copies(weights)
            selection.conserve_(weights, saved)
            got = selection.masks()
        assert all(map(torch.equal, got, want))
        assert all(map(same_bits, weights, map(torch.where, want, moved, before)))
        assert way(selection) == expected
        if name in WINDOWS:
            low, high, found = (
                selection._state[i.value] for i in (_kernels.S_LO, _kernels.S_HI, _kernels.S_LOW)
            )
            assert not low <= found <= high
        same_tables(selection._plan)


def same_tables(plan):
    """The plan's tables are shared by streams and read by graphs: no kernel may change them."""
    ((key, _),) = _triton._plans.items()
    fresh = _triton._Plan(*key)
    pairs = [(plan.tables, fresh.tables)]
    pairs += [(held, fresh.settings(*asked)) for asked, held in plan._settings.items()]
    for held, new in pairs:
        assert all(map(torch.equal, held.on_device, new.on_device))
    assert all(list(flat) == held.get()[0].tolist() for flat, held in plan._addresses.items())
    _triton._plans.clear()


@pytest.mark.parametrize("name", ["several pools", "ties by index"])
def test_a_replay_finds_nothing_left_behind(name):
    """As a CUDA graph does it: the same launches on the same memory, with other numbers in it."""
    _, pairs, fractions, pools = CASES[name]
    settings = [0.3] * len(pairs), fractions, pools
    nats, advs, targets, weights, saved = arrange(pairs, "saved in the natural one")
    with SideBySide(Anywhere) as programs:
        selection = _triton.select(nats, advs, *settings)
        selection.apply_(targets, weights, saved)
        masks = selection.masks()
        for tensor in (*nats, *advs, *targets, *weights):
            tensor.copy_(heavy(tensor.shape, tensor.numel()))
        want = _reference.select(copies(nats), copies(advs), *settings).masks()
        zeroed = masked(want, targets)
        programs.replay()
    assert all(map(torch.equal, masks, want))
    assert all(map(same_bits, targets, zeroed))
    assert all(map(same_bits, saved, weights))


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_training_in_any_order(conserve, scope):
    """The optimizer says which memory is whose; masks are kept for a second step."""
    models = [make_net().to(memory_format=torch.channels_last) for _ in range(2)]
    with SideBySide(Anywhere) as programs:
        for model, name in zip(models, ("torch", "triton"), strict=True):
            inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            options = dict(scope=scope, conserve=conserve, refresh_every=2, backend=name)
            opt = RGPSelectiveOptimizer(inner, update_fraction=0.4, **options)
            for seed in range(2):
                loss, nat, adv = losses(model, *make_batch(seed))
                opt.zero_grad()
                opt.backward(loss, natural=nat, adversarial=adv)
                opt.step()
    assert programs.switches > 50
    assert all(map(same_bits, snapshot(models[0]), snapshot(models[1])))


# Streams and graphs share a plan.


class Stream:
    """Knows what happened before what is enqueued next."""

    def __init__(self):
        self.before = set()

    def wait_event(self, event):
        self.before |= event.before


class Event:
    def record(self, stream):
        self.before = set(stream.before)


def test_each_stream_waits_for_all_tables(monkeypatch):
    """Each table is copied on the stream of its first use, which may lag behind the others."""
    first, second, third = (Stream() for _ in range(3))
    now = first
    home = {}

    def copied(values, dtype, device):
        table = Mock()
        now.before.add(table)
        home[table] = now
        return table

    monkeypatch.setattr(_triton, "_copied", copied)
    monkeypatch.setattr(_triton, "_capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    gpu = Mock(type="cuda")
    monkeypatch.setattr(torch, "empty", lambda shape, **_: [Mock()] * shape[0])  # pinned memory
    plan = _triton._Plan((300,), ((1, 1),), (torch.float32,), (0,), gpu)
    one, other = ([[Mock(data_ptr=lambda at=at: at)]] * 5 for at in (16, 32))
    used = set()
    for now, columns, fraction in (
        (first, one, 0.5),
        (second, other, 0.5),
        (third, one, 0.2),
        (first, other, 0.5),
        (second, one, 0.2),
    ):
        tables = [*plan.tables.get(), *plan.settings([0.5], [fraction]).get()]
        tables.append(plan.addresses(*columns))
        assert now.before >= set(tables)
        used |= {(table, now) for table in tables}
    assert len({table for table, _ in used}) == 5 + 2 * 2 + 2
    for table, stream in used:  # its memory is not given to others while the stream reads it
        if stream is not home[table]:
            table.record_stream.assert_any_call(stream)


def test_the_tables_of_a_graph_outlive_other_plans(monkeypatch):
    """A replay reads them, and nobody says when the graph is gone."""
    monkeypatch.setattr(_triton, "_in_graphs", set(), raising=False)

    kept = {n: torch.rand(n) for n in range(1, 11)}

    def tables_of(n, alpha=0.5):
        g = [kept[n]]
        selection = _triton.select(g, g, [alpha], [0.0], [0])
        return [weakref.ref(each) for each in (selection._plan, selection._settings)]

    plan, settings = tables_of(1)
    with monkeypatch.context() as patch:
        patch.setattr(_triton, "_capturing", lambda device: True)
        plan()._staged.append(torch.empty(5, dtype=torch.int64))
        tables_of(1)
        tables_of(1)  # a second capture with the same addresses takes no other staged table
        with pytest.raises(RuntimeError, match="only after an eager step with the same"):
            tables_of(1, alpha=0.25)
        with pytest.raises(RuntimeError, match="only after an eager step with the same"):
            tables_of(2)
    others = [tables_of(1, alpha=0.1 + i / 100) for i in range(30)]
    others += [tables_of(n) for n in range(2, 11)]
    gc.collect()
    assert plan() is not None
    assert settings() is not None
    assert others[0][1]() is others[30][0]() is None


# Does it find anything? A sum by the program that is the last to finish, right and wrong.


@triton.jit
def _sum(values, parts, total, ticket, WRONG: tl.constexpr):
    p = tl.program_id(0)
    n = tl.num_programs(0)
    seen = n + 1
    if WRONG == "an early ticket":
        seen = tl.atomic_add(ticket, 1, sem="acq_rel")
    tl.store(parts + p, tl.load(values + p))
    if WRONG != "no barrier":
        tl.debug_barrier()
    if WRONG == "a relaxed ticket":
        seen = tl.atomic_add(ticket, 1, sem="relaxed")
    elif WRONG == "the last program":
        seen = p
    elif WRONG == "a ticket that is no atomic":
        seen = tl.load(ticket)
        tl.store(ticket, seen + 1)
    elif WRONG != "an early ticket":
        seen = tl.atomic_add(ticket, 1, sem="acq_rel")
    if seen == n - 1:
        i = tl.arange(0, 8)
        tl.store(total, tl.sum(tl.load(parts + i, mask=i < n, other=0)))


SHOWN = ["an early ticket", "the last program", "a ticket that is no atomic"]
HIDDEN = ["no barrier", "a relaxed ticket"]


def summed(schedule, seed, wrong, races):
    values, (total, ticket) = torch.arange(1, 7), torch.zeros(2, 1, dtype=torch.int64)
    parts = torch.zeros(6, dtype=torch.int64)
    with SideBySide(schedule, seed, races):
        _sum[(6,)](values, parts, total, ticket, WRONG=wrong)
    return int(total)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_right_is_called_right(schedule):
    assert all(summed(schedule, seed, "", True) == 21 for seed in range(3))


@pytest.mark.parametrize("wrong", SHOWN)
@pytest.mark.parametrize("schedule", [Anywhere, Starve, Priorities])
def test_schedules_show_what_is_wrong(schedule, wrong):
    assert any(summed(schedule, seed, wrong, False) != 21 for seed in range(40))


@pytest.mark.parametrize("wrong", SHOWN + HIDDEN)
def test_races_show_what_is_wrong(wrong):
    with pytest.raises(Exception, match=r"_sum: .* in line .* of program"):
        summed(LockStep, 0, wrong, True)


def test_one_after_another_shows_nothing():
    """What the interpreter does of its own accord."""

    class InOrder(SCHEDULES[0]):
        def __init__(self, draw, count):
            self.order = list(range(count))

    assert all(summed(InOrder, 0, wrong, False) == 21 for wrong in SHOWN + HIDDEN)
