"""Every fast backend against a stable sort: masks that are equal bit for bit, and what is fused."""

import math

import numpy as np
import pytest
import torch
from common import losses, make_batch, make_net, same_bits, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim import RGPSelectiveOptimizer, _cpu, _reference, functional

CUDA = torch.cuda.is_available()
try:
    from rgp_optim import _kernels, _triton
except ImportError:
    _triton = None
BACKENDS = ["cpu", "triton"] if _triton else ["cpu"]
DEVICE = {"cpu": "cpu", "triton": "cuda" if CUDA else "cpu"}  # without a GPU: the interpreter
FRACTIONS = [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module", autouse=True)
def on_device():
    """Make tensors on the CPU; those of a backend's are sent to its device."""


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def in_small_parts(patch):
    """Compiled kernels keep their sizes."""
    for name, value in {"SMALL": 16, "SMALLER": 4, "CHUNK": 40, "GRAIN": 24}.items():
        patch.setattr(_cpu, name, value)
    if _triton and not CUDA:
        constants = {"BLOCK": 32, "MASK_BLOCK": 32, "SLOW": 32, "CHUNK": 15 * 32, "SAMPLE": 64}
        constants |= {"TURN": 64, "STEP": 32}
        for name, value in constants.items():
            patch.setattr(_kernels, name, _kernels.tl.constexpr(value))
        patch.setattr(_triton, "LIST_LEAST", 4)
        patch.setattr(_triton, "_plans", type(_triton._plans)(8))


@pytest.fixture
def small_parts(monkeypatch):
    """Let small inputs take the way of the large ones, in many parts."""
    in_small_parts(monkeypatch)


def on(device, tensor):
    """Return the tensor on a device, with its strides and its place in memory."""
    if tensor is None or device == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((size,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def heavy(shape, seed=0, dtype=torch.float32):
    """Gradients whose scale differs by channel, over several orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=draw, dtype=torch.float64)
    return (torch.randn(shape, generator=draw, dtype=torch.float64) * (2 * rows).exp()).to(dtype)


def special(n, seed=0):
    """Few distinct values, many of them 0, infinite or NaN with different bits."""
    values = np.array([0, 0, -0.0, 1, 2, -2, 1e-45, math.inf, math.nan], np.float32)
    found = np.random.default_rng(seed).choice(values, n)
    bits = found.view(np.int32)
    nans = np.flatnonzero(np.isnan(found))
    bits[nans[::2]] |= 0x123
    bits[nans[1::3]] |= -(2**31)
    return torch.from_numpy(found)


def misaligned(n):
    return torch.randn(n + 1)[1:]


def fused_otherwise(n):
    """Two scores at the threshold that are equal, unless product and sum are rounded at once."""
    draw = np.random.default_rng(0)
    a, b = draw.uniform(1, 2, (2, 200000)).astype(np.float32)
    first = a * np.float32(0.1)
    score = first + b * np.float32(0.9)
    fused = (first.astype(np.float64) + b.astype(np.float64) * np.float32(0.9)).astype(np.float32)
    order = np.argsort(score, kind="stable")
    same = np.flatnonzero((np.diff(score[order]) == 0) & (fused[order[:-1]] < fused[order[1:]]))
    i, j = order[same[0]], order[same[0] + 1]
    pair = [torch.tensor([g[i], g[j]]) for g in (a, b)]
    rest = torch.cat([torch.rand(n // 2) * 0.1, 3 + torch.rand(n - n // 2)])
    return tuple(torch.cat([rest[: n // 2], g, rest[n // 2 :]]) for g in pair)


def neighbours(n, seed):
    """Floats a few units in the last place above 1."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(64, (n,), generator=draw, dtype=torch.int32) + 0x3F800000).view(
        torch.float32
    )


CASES = {
    "two that a fused multiply-add tells apart": [fused_otherwise(0), fused_otherwise(40000)],
    "one element": [(torch.tensor([3.0]), torch.tensor([0.0]))],
    "a scalar": [(torch.tensor(2.0), torch.tensor(1.0))],
    "nothing": [(torch.zeros(0), torch.zeros(0)), (torch.zeros(2, 0), torch.zeros(2, 0))],
    "small": [(heavy((n, 1), n), heavy((n, 1), n + 1)) for n in (1, 2, 7, 8, 9, 63, 64, 65)],
    "thousands": [(heavy((n, 1), n), heavy((n, 1), n + 1)) for n in (1025, 5000, 8191, 8192)],
    "few special values": [(special(n, n), special(n, n + 1)) for n in (20, 900, 3000)],
    "a layer": [(heavy((64, 32, 3, 3), 1), heavy((64, 32, 3, 3), 2))],
    "layers": [(heavy((n, 40, 3), n), heavy((n, 40, 3), n + 1)) for n in (300, 1, 150, 1000)],
    "float64": [(heavy((300, 100), 1, torch.float64), heavy((300, 100), 2, torch.float64))],
    "bfloat16": [(heavy((300, 100), 1, torch.bfloat16), heavy((300, 100), 2, torch.bfloat16))],
    "float16": [(heavy((300, 100), 1).clamp(-9, 9).half(), heavy((300, 100), 2).half())],
    "mixed dtypes": [
        (heavy((90, 100), i, t), heavy((90, 100), i + 5, t))
        for i, t in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ],
    "with float64": [
        (heavy((90, 100), i, t), heavy((90, 100), i + 5, t))
        for i, t in enumerate((torch.float32, torch.float64))
    ],
    "mostly zeros": [(torch.relu(heavy((300, 100), 1) - 3), torch.relu(heavy((300, 100), 2) - 3))],
    "all zeros": [(torch.zeros(30000), torch.zeros(30000))],
    "all equal": [(torch.ones(30000), torch.ones(30000))],
    "two values": [(torch.arange(30000) % 2 + 1.0, torch.ones(30000))],
    "neighbours and ties, few": [
        (torch.tensor([5, 5, 12], dtype=torch.int32).view(torch.float32), torch.zeros(3)),
        *((neighbours(n, n), torch.zeros(n)) for n in (100, 3000)),
        (torch.arange(1, 4001, dtype=torch.int32).view(torch.float32), torch.zeros(4000)),
    ],
    "a spike in a continuum": [
        (torch.where(torch.arange(40000) % 5 < 2, 1.0, torch.randn(40000)), torch.zeros(40000))
    ],
    "special values": [(special(30000, 1), special(30000, 2))],
    "only NaN": [(torch.full((20000,), math.nan), torch.ones(20000))],
    "subnormal": [(heavy((300, 100), 1) * 1e-42, heavy((300, 100), 2) * 1e-42)],
    "neighbouring floats": [
        tuple(
            (
                0x3F800000
                + torch.randint(3000, (40000,), generator=torch.Generator().manual_seed(seed))
            )
            .to(torch.int32)
            .view(torch.float32)
            for seed in (1, 1)
        )
    ],
    "sorted": [(torch.linspace(0, 1, 40000), torch.linspace(0, 1, 40000))],
    "misses the sample": [(torch.zeros(40000).index_fill(0, torch.arange(17, 40000, 8), 1.0),) * 2],
    "misaligned": [(misaligned(30001), misaligned(30001))],
    "channels last": [
        tuple(
            heavy((64, 32, 3, 3), i).round().contiguous(memory_format=torch.channels_last)
            for i in (1, 2)
        )
    ],
    "transposed": [(heavy((200, 150), 1).round().t(), heavy((150, 200), 2))],
    "both transposed": [tuple(heavy((170, 130), i).mul(4).round().t() for i in (1, 2))],
    "strided": [(torch.randn(300, 200)[::2, ::2], torch.randn(300, 200)[1::2, ::2])],
    "expanded": [(torch.ones(1, 300).expand(100, 300), torch.randn(100, 300))],
    "one is missing": [(None, heavy((300, 100), 2)), (heavy((300, 90), 2), None)],
}


def compare(pairs, alpha, fraction, scope, backend):
    g_nats, g_advs = zip(*pairs, strict=True)
    settings = dict(alpha=alpha, update_fraction=fraction, scope=scope)
    want = functional.rgp_topk_masks(g_nats, g_advs, **settings, backend="torch")
    g_nats, g_advs = ([on(DEVICE[backend], g) for g in column] for column in (g_nats, g_advs))
    got = functional.rgp_topk_masks(g_nats, g_advs, **settings, backend=backend)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.equal(g.cpu(), w)


def runs(pairs, backend):
    """Not every backend takes every dtype."""
    some = [g for pair in pairs for g in pair if g is not None]
    return functional._PROVIDERS[backend].obstacle([on(DEVICE[backend], g) for g in some]) is None


# Where a term that is left out could matter; the interpreter takes seconds for each case.
ONE_TERM = ("a scalar", "nothing", "layers", "mixed dtypes", "special values", "one is missing")


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_masks_are_those_of_a_stable_sort(name, alpha, scope, backend):
    if runs(CASES[name], backend):
        fractions = FRACTIONS
        if backend == "triton" and not CUDA:  # interpreted
            if alpha != 0.1 and (scope == "global" or name not in ONE_TERM):
                return
            fractions = [0.5] if alpha != 0.1 else [0.9] if scope == "global" else [1e-6, 0.5]
        for fraction in fractions:
            compare(CASES[name], alpha, fraction, scope, backend)


@pytest.mark.parametrize("name", CASES)
def test_masks_in_many_parts(name, backend, small_parts):
    pairs = [
        tuple(None if g is None else g.reshape(-1)[:700] for g in pair) for pair in CASES[name]
    ]
    pairs = pairs if backend == "cpu" else pairs[:2]
    if not runs(pairs, backend):
        return
    for fraction in (0.1, 0.5, 0.9) if backend == "cpu" else (0.4,):
        for scope in ("tensor", "global"):
            compare(pairs, 0.3, fraction, scope, backend)


@pytest.mark.skipif("triton" not in BACKENDS or CUDA, reason="it is what compiled kernels do")
@pytest.mark.parametrize("name", ["layers", "few special values", "mixed dtypes", "all equal"])
def test_sums_of_four_at_once(name, small_parts, monkeypatch):
    """As the compiled kernels add; the interpreter takes its time for it."""
    monkeypatch.setattr(_kernels, "JOINT", _kernels.tl.constexpr(True))
    pairs = [(a.flatten()[:700], b.flatten()[:700]) for a, b in CASES[name]]
    compare(pairs, 0.3, 0.4, "tensor", "triton")


def test_the_kernels_leave_pools_over_several_devices_to_torch():
    kind = functional._Provider("_triton", "sys", frozenset({"cpu", "meta"}))
    tensors = [torch.ones(2), torch.ones(2, device="meta")]
    assert kind.obstacle(tensors[:1]) is kind.obstacle(tensors[1:]) is None
    assert kind.obstacle(tensors) == "one threshold for tensors on cpu and meta"


def test_many_tiny_tensors(backend, small_parts):
    """None has a whole run to sample."""
    tiny = [(heavy((4,), i), heavy((4,), i + 99)) for i in range(30)]
    compare([*tiny, (heavy((64,), 1), heavy((64,), 2))], 0.1, 0.5, "global", backend)
    compare(tiny, 0.1, 0.5, "global", backend)


@pytest.mark.parametrize("size", ["sampled", "small", "none"])
def test_the_default_device_changes_nothing(size, backend, small_parts):
    """Tables, samples and masks are made where they belong: on "meta" no tensor has numbers."""
    large = (600, 110) if CUDA and backend == "triton" else (60, 11)
    shape = large if size == "sampled" else (5, 3)
    pairs = [(heavy(shape, i), heavy(shape, i + 3)) for i in range(2)]
    settings = dict(alpha=0.3, update_fraction=0.0 if size == "none" else 0.35, scope="global")
    want = functional.rgp_topk_masks(*zip(*pairs, strict=True), **settings, backend="torch")
    pairs = [[on(DEVICE[backend], g) for g in pair] for pair in pairs]
    with torch.device("meta"):
        got = functional.rgp_topk_masks(*zip(*pairs, strict=True), **settings, backend=backend)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g.cpu(), w)


GRADIENTS = hnp.arrays(
    np.float32,
    st.integers(0, 300),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, math.inf, math.nan]),
        st.floats(-4, 4, width=16),
    ),
)


@given(data=st.data())
@settings(max_examples=60)
def test_any_gradients_on_the_cpu(data):
    any_gradients("cpu", data)


@pytest.mark.skipif(not _triton, reason="Triton is not installed")
@given(data=st.data())
@settings(max_examples=60 if CUDA else 15)
def test_any_gradients_by_the_kernels(data):
    any_gradients("triton", data)


def any_gradients(which, data):
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        pairs = []
        for g in data.draw(st.lists(GRADIENTS, min_size=1, max_size=3 if which == "cpu" else 2)):
            other = data.draw(st.permutations(range(g.size))) if g.size < 50 else range(g.size)
            pairs.append((torch.from_numpy(g), torch.from_numpy(g[list(other)] * 0.5)))
        fraction = data.draw(st.one_of(st.sampled_from(FRACTIONS), st.floats(0, 1)))
        alpha = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        for scope in ("tensor", "global"):
            compare(pairs, alpha, fraction, scope, which)


@given(data=st.data())
@settings(max_examples=60 if CUDA else 20)
def test_any_bits_that_lie_together(data):
    """Where the last digits decide; alpha 1 leaves the bits as they are."""
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        least = data.draw(st.sampled_from([0, 1, 0x7FFFF0, 0x3F800000, 0x7F7FFFE0]))
        size, width = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 80))
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
        bits = torch.randint(least, least + width, (size,), generator=draw, dtype=torch.int32)
        g = bits.clamp(max=0x7F800000).view(torch.float32)  # up to infinity
        for backend in BACKENDS:
            compare([(g, torch.zeros(size))], 1.0, data.draw(st.floats(0, 1)), "tensor", backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_scores_of_any_sign(dtype, scope, backend):
    """What a score rule of one's own may return: negative ones, -0, NaN of both signs."""
    scores = [heavy((200, 101), 3, dtype), special(20001).to(dtype), -special(9000).to(dtype).abs()]
    if not runs([(score, score) for score in scores], backend):
        return
    scores = [on(DEVICE[backend], score) for score in scores]
    for fraction in (0.1, 0.5, 0.95):
        pools = [0, 0, 0] if scope == "global" else [0, 1, 2]
        got = functional.topk_masks(scores, [fraction] * 3, pools, backend)
        want = functional.topk_masks(scores, [fraction] * 3, pools, "torch")
        assert all(map(torch.equal, got, want))


def test_pools_are_selected_apart(backend):
    pairs = [(heavy((300, 50), i), heavy((300, 50), i + 9)) for i in range(5)]
    g_nats, g_advs = (
        [on(DEVICE[backend], g) for g in column] for column in zip(*pairs, strict=True)
    )
    fractions, pools = [0.2, 0.5, 0.2, 0.9, 0.5], [0, 1, 0, 3, 1]
    alphas = [0.1, 0.2, 0.3, 0.4, 0.5]
    got = functional.select(g_nats, g_advs, alphas, fractions, pools, backend).masks()
    want = _reference.select(g_nats, g_advs, alphas, fractions, pools).masks()
    assert all(map(torch.equal, got, want))
    assert sum(int(got[i].sum()) for i in (0, 2)) == round(0.2 * 30000)


# What a step does with a selection.

LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_masking_and_conserving_keep_every_bit(dtype, layout, backend):
    """Infinity and NaN are masked to 0; what is conserved has its bits back."""
    shape = (8, 40, 9, 9)
    lay = LAYOUTS[layout]
    g = lay(heavy(shape, 1).to(dtype))
    target, weight = lay(heavy(shape, 2).to(dtype)), lay(heavy(shape, 3).to(dtype))
    if not runs([(g, g)], backend):
        return
    g, target, weight = (on(DEVICE[backend], t) for t in (g, target, weight))
    target[0, 0, 0] = math.nan
    weight[1, 1, 1] = -0.0
    weight[2, 2, 2] = math.nan
    selection = functional.select([g], [g], [0.5], [0.3], [0], backend)
    (mask,) = selection.masks()
    before, old = target.clone(), weight.clone()
    saved = torch.empty_like(weight)
    selection.apply_([target], [weight], [saved])
    assert same_bits(target, torch.where(mask, before, torch.zeros_like(before)))
    assert same_bits(saved, old)
    weight += 1
    moved = weight.clone()
    selection.conserve_([weight], [saved])
    assert same_bits(weight, torch.where(mask, moved, old))


def test_apply_leaves_out_what_is_missing(backend):
    device = DEVICE[backend]
    g = [heavy((30, 40), i).to(device) for i in range(3)]
    selection = functional.select(g, g, [0.5] * 3, [0.5] * 3, [0, 1, 2], backend)
    ones, zeros = torch.ones(30, 40, device=device), torch.zeros(30, 40, device=device)
    targets = [ones.clone(), None, ones.clone()]
    weights = [None, ones.clone(), ones.clone()]
    saved = [None, zeros.clone(), zeros.clone()]
    selection.apply_(targets, weights, saved)
    assert [int(t.sum()) for t in targets if t is not None] == [600, 600]
    assert torch.equal(saved[1], weights[1])
    weights[2] += 1
    selection.conserve_(weights, saved)
    assert int(weights[2].sum()) == 1200 + 600


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_what_is_ranked_may_be_what_is_masked(layout, backend):
    """The target can be the adversarial gradient itself, and the natural one takes the weights."""
    lay = LAYOUTS[layout]
    nat, adv = (on(DEVICE[backend], lay(heavy((40, 90, 5, 2), i))) for i in (1, 2))
    weight = torch.randn_like(nat)
    before = adv.clone()
    want = _reference.select([nat.clone()], [adv.clone()], [0.1], [0.5], [0]).masks()[0]
    selection = functional.select([nat], [adv], [0.1], [0.5], [0], backend)
    selection.apply_([adv], [weight], [nat])
    assert torch.equal(adv, torch.where(want, before, torch.zeros_like(before)))
    assert torch.equal(nat, weight)
    selection.apply_([before], [None], [None])  # kept for another step
    assert torch.equal(before, adv)


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_training_is_the_same_with_every_backend(conserve, scope, backend):
    """Bit for bit, also with masks that are kept for a second step and in channels_last."""
    models = [make_net().cpu().to(memory_format=torch.channels_last) for _ in range(2)]
    for model, name in zip(models, ("torch", backend), strict=True):
        model.to(DEVICE[backend])
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        options = dict(scope=scope, conserve=conserve, refresh_every=2, backend=name)
        opt = RGPSelectiveOptimizer(inner, update_fraction=0.4, **options)
        for seed in range(3):
            batch = (t.to(DEVICE[backend]) for t in make_batch(seed))
            loss, nat, adv = losses(model, *batch)
            opt.zero_grad()
            opt.backward(loss, natural=nat, adversarial=adv)
            opt.step()
    assert all(map(same_bits, snapshot(models[0]), snapshot(models[1])))


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_step_is_the_step(backend):
    """What works on memory is left out of the trace: masks, masking and conserving, too."""
    models = [make_net() for _ in range(2)]
    counts = []
    for model, compiled in zip(models, (True, False), strict=True):
        model.to(DEVICE[backend])
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = RGPSelectiveOptimizer(inner, update_fraction=0.4, backend=backend)
        tracker = opt.track_updates()
        step = torch.compile(lambda opt=opt: opt.step(), backend="eager") if compiled else opt.step
        for seed in range(2):
            batch = (t.to(DEVICE[backend]) for t in make_batch(seed))
            loss, nat, adv = losses(model, *batch)
            opt.zero_grad()
            opt.backward(loss, natural=nat, adversarial=adv)
            step()
        counts.append(tracker.mean())
    torch._dynamo.reset()
    assert all(map(same_bits, snapshot(models[0]), snapshot(models[1])))
    assert counts[0] == counts[1]


@pytest.mark.skipif("triton" not in BACKENDS or CUDA, reason="looks into the interpreter")
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_kernels_seldom_need_the_slow_way(keep, monkeypatch):
    """The window of the sample holds the threshold, and its bin is short enough for the list."""

    def slow(*_):
        raise AssertionError("the window missed")

    monkeypatch.setattr(_kernels, "_pool_fields", slow)
    for seed in range(3):
        shape = (64, 64 + 16 * seed, 3, 3)
        compare([(heavy(shape, seed), heavy(shape, seed + 9))], 0.1, keep, "tensor", "triton")
    with pytest.raises(Exception, match="the window missed"):  # it is taken where all are equal
        compare(CASES["all equal"], 0.1, 0.5, "tensor", "triton")


# The CPU's own ways.


def test_a_bracket_that_missed_costs_time_only(monkeypatch):
    pairs = [*CASES["special values"], (heavy((300, 100), 1), heavy((300, 100), 2))]
    plainly = []
    original = _cpu._Pool._select_plainly
    monkeypatch.setattr(
        _cpu._Pool, "_select_plainly", lambda self: (plainly.append(1), original(self))
    )
    compare(pairs[1:], 0.1, 0.5, "tensor", "cpu")
    assert not plainly
    for bracket in [(1, 2), (0x7F000000, 0x7F000001), (5, 4)]:
        monkeypatch.setattr(_cpu._Pool, "_bracket", lambda self, bracket=bracket: bracket)
        for fraction in (0.1, 0.5, 0.9):
            compare(pairs, 0.1, fraction, "tensor", "cpu")
    assert plainly


def test_the_bracket_seldom_misses_where_scale_follows_the_channels(monkeypatch):
    """A regular stride would miss in a third of such tensors."""
    missed = []
    original = _cpu._Pool._select_plainly
    monkeypatch.setattr(
        _cpu._Pool, "_select_plainly", lambda self: (missed.append(1), original(self))
    )
    for seed in range(60):
        shape = (64, 32 + seed, 3, 3)
        columns = torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)).exp()
        g = heavy(shape, seed) * columns
        functional.rgp_topk_masks([g], [g], alpha=0.1, update_fraction=0.5, backend="cpu")
    assert len(missed) <= 1


def test_the_sample_is_spread_evenly_but_not_regularly():
    runs = _cpu._runs(10000, 0.1).numpy()
    assert len(runs) == len(set(runs)) == 1000
    assert 0 <= runs.min() < 10
    assert 9990 <= runs.max() < 10000
    assert np.bincount(runs // 100).max() <= 11  # as many in each part
    assert len(set(np.diff(runs))) > 10


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, monkeypatch):
    monkeypatch.setattr(_cpu, "THREADED", 1)
    monkeypatch.setattr(_cpu, "CHUNK", 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("layers", "mixed dtypes", "special values"):
            for scope in ("tensor", "global"):
                compare(CASES[name], 0.1, 0.5, scope, "cpu")
        test_masking_and_conserving_keep_every_bit(torch.float32, "contiguous", "cpu")
    finally:
        torch.set_num_threads(before)


class Wrapped(torch.Tensor):
    """A subclass, whose memory may lie elsewhere."""


@pytest.mark.parametrize("which", BACKENDS)
def test_subclasses_are_left_to_torch(which):
    g = torch.rand(40, 50).as_subclass(Wrapped)
    with pytest.raises(RuntimeError, match="a Wrapped; it runs on plain tensors"):
        functional.rgp_topk_masks([g], [g], alpha=0.5, update_fraction=0.5, backend=which)
    plain = torch.rand(40, 50, device=DEVICE[which])
    selection = functional.select([plain], [plain], [0.5], [0.5], [0], which)
    target, weight = (torch.ones(40, 50).as_subclass(Wrapped) for _ in range(2))
    saved = torch.zeros(40, 50)
    selection.apply_([target], [weight], [saved])
    assert int(target.sum()) == 1000
    weight.add_(1)
    selection.conserve_([weight], [saved])
    assert int(weight.sum()) == 3000
