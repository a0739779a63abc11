"""Every fast backend against the reference: equal masks, bit for bit; the kernels' launches."""

import math
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from common import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim import _cpu, _reference
from rgp_optim._reference import Entry

CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA  # Triton without a GPU
FRACTIONS = [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0]
# Small inputs in several chunks, a bracket around each threshold.
PATCHES = {
    "cpu": {"SMALL": 16, "CHUNK": 40},
    "triton": {"CHUNK": 64, "BLOCK": 32, "PIECE": 16},
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCOPES = pytest.mark.parametrize("scope", ["tensor", "global"])


class Setup(NamedTuple):
    """A backend, where it runs, and how large the inputs of the tests are."""

    module: Any
    device: str
    n: int
    slow: bool
    dtypes: list[torch.dtype]


def load(name, patch, n=None, **constants):
    """Return a backend with small constants, or skip; ``n`` leaves all but the given ones."""
    if name == "triton":
        pytest.importorskip("triton", minversion="3.4")
    module = import_module(f"rgp_optim._{name}")
    constants = constants or ({} if n else PATCHES[name])
    for constant, value in constants.items() if name == "cpu" or INTERPRETED else ():
        patch.setattr(module, constant, value)
    if name == "cpu":
        return Setup(module, "cpu", n or 300, False, DTYPES)
    device = "cuda" if CUDA else "cpu"  # functional keeps float64 from the kernels
    return Setup(module, device, 40_000 if CUDA else 140, INTERPRETED, DTYPES[:3])


@pytest.fixture(scope="module", autouse=True)
def on_device():
    """Make tensors on the CPU; `on` sends them to a backend's device."""


@pytest.fixture(params=["cpu", "cpu large", "triton"])
def backend(request, monkeypatch):
    name = request.param.split()[0]
    return load(name, monkeypatch, 40_000 if "large" in request.param else None)


def on(device, tensor):
    """Return the tensor on a device, with its strides and its alignment."""
    if tensor is None or device == "cpu":
        return tensor
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((size,), (1,), 0).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def heavy(*shape, seed=0, dtype=torch.float32):
    """Gradients whose scale differs by row, over several orders of magnitude."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn((shape[0],) + (1,) * (len(shape) - 1), generator=draw, dtype=torch.float64)
    return (torch.randn(shape, generator=draw, dtype=torch.float64) * (2 * rows).exp()).to(dtype)


def two(*shape, layout=lambda g: g, dtype=torch.float32):
    """A pair of gradients; rounded, so that ties show the order."""
    pair = (heavy(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    return tuple(layout(g.mul(4).round().clamp(-9e3, 9e3)) for g in pair)


def channels_last(g):
    return g.contiguous(memory_format=torch.channels_last)


def special(n, seed=0):
    """Few distinct values, many of them 0, infinite or NaN of both signs and several payloads."""
    values = np.array([0, 0, -0.0, 1, 2, -2, 1e-45, math.inf, -math.inf, math.nan], np.float32)
    found = np.random.default_rng(seed).choice(values, n)
    bits, nans = found.view(np.int32), np.flatnonzero(np.isnan(found))
    bits[nans[::2]] |= 0x123
    bits[nans[1::3]] |= -(2**31)
    return torch.from_numpy(found)


def bits(low, high, n, seed=0):
    """Floats whose bits are neighbours."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n,), generator=draw, dtype=torch.int32).view(torch.float32)


def fused_otherwise(n):
    """Two scores at the threshold that are equal unless product and sum are rounded at once."""
    a, b = np.random.default_rng(0).uniform(1, 2, (2, 200_000)).astype(np.float32)
    first = a * np.float32(0.1)
    score = first + b * np.float32(0.9)
    fused = (first.astype(np.float64) + b.astype(np.float64) * np.float32(0.9)).astype(np.float32)
    order = np.argsort(score, kind="stable")
    same = np.flatnonzero((np.diff(score[order]) == 0) & (fused[order[:-1]] < fused[order[1:]]))
    pair = torch.from_numpy(np.stack([a, b])[:, order[same[0] :][:2]].copy())
    rest = torch.cat([torch.rand(n // 2) * 0.1, 3 + torch.rand(n // 2)])
    return tuple(torch.cat([rest[: n // 2], g, rest[n // 2 :]]) for g in pair)


CASES = {  # n: about the number of elements
    "heavy-tailed": lambda n: [(heavy(n // 8, 8, seed=1), heavy(n // 8, 8, seed=2))],
    "several tensors": lambda n: [(heavy(m, 5, seed=m), heavy(m, 5)) for m in (n // 20, 1, n // 7)],
    "tiny tensors": lambda n: [(heavy(m, seed=m), heavy(m)) for m in (1, 2, 7, 8, 9, 16, 17)],
    "one element": lambda n: [(torch.tensor([3.0]), torch.tensor([0.0]))],
    "0-d": lambda n: [(torch.tensor(2.0), torch.tensor(1.0))],
    "empty": lambda n: [(torch.zeros(0),) * 2, (torch.zeros(2, 0),) * 2, (heavy(9), heavy(9))],
    "ties": lambda n: [(torch.arange(n) % 3 + 1.0, torch.ones(n))],
    "all equal": lambda n: [(torch.ones(n), torch.ones(n))],
    "zeros": lambda n: [(torch.zeros(n), -torch.zeros(n))],
    "mostly zeros": lambda n: [tuple(torch.relu(heavy(n // 8, 8, seed=s) - 2) for s in (1, 2))],
    "special values": lambda n: [(special(n, 1), special(n, 2)), (special(n // 3),) * 2],
    "only NaN": lambda n: [(bits(0x7F800001, 0x7F800003, n), torch.full((n,), -math.nan))],
    "largest": lambda n: [(torch.full((n,), 3.4028234e38),) * 2],
    "subnormals": lambda n: [tuple(heavy(n // 8, 8, seed=s) * 1e-42 for s in (1, 2))],
    "neighbouring floats": lambda n: [(bits(0x3F800000, 0x3F800000 + n // 4, n), torch.zeros(n))],
    "lowest bits": lambda n: [(bits(0, n // 4, n), torch.zeros(n))],
    "highest bits": lambda n: [(bits(0x7F800000 - n // 4, 0x7F800004, n), torch.zeros(n))],
    "a spike": lambda n: [(torch.where(torch.arange(n) % 5 < 2, 1.0, heavy(n)), torch.zeros(n))],
    "sorted": lambda n: [(torch.linspace(0, 1, n),) * 2],
    "outside the sample": lambda n: [((torch.arange(n) % 9 == 7).float(),) * 2],
    "fused multiply-add": lambda n: [fused_otherwise(n)],
    "unaligned": lambda n: [(heavy(n + 1)[1:], heavy(n + 1, seed=1)[1:])],
    "channels_last": lambda n: [two(n // 72, 8, 3, 3, layout=channels_last)],
    "transposed": lambda n: [(two(n // 8, 8)[0].t(), two(8, n // 8)[1])],
    "both transposed": lambda n: [two(n // 8, 8, layout=torch.t)],
    "strided": lambda n: [two(n // 10, 20, layout=lambda g: g[::2, 1::2])],
    "expanded": lambda n: [(torch.ones(1, 8).expand(n // 8, 8), heavy(n // 8, 8))],
    "one is None": lambda n: [(None, heavy(n // 8, 8)), (heavy(n // 8, 8, seed=1), None)],
    "float16": lambda n: [two(n // 8, 8, dtype=torch.float16)],
    "mixed dtypes": lambda n: [two(n // 24, 8, dtype=t) for t in DTYPES[:3]],
    "float64": lambda n: [two(n // 8, 8, dtype=torch.float64)],
    "float64 and float32": lambda n: [two(n // 16, 8, dtype=t) for t in DTYPES[2:]],
}
ONE_TERM = ("0-d", "empty", "several tensors", "mixed dtypes", "special values", "one is None")


def check(setup, pairs, alphas, fractions, pools):
    """Compare the masks with the reference's; gradients and default device change nothing.

    Without alphas the first of each pair are scores, as of a custom rule: of any sign.
    """
    if alphas is None:
        pairs = [(a if b is None else b, None) for b, a in pairs]
        alphas = [None] * len(pairs)
    settings = list(zip(alphas, fractions, pools, strict=True))

    def select(module, pairs):
        return module.select([Entry(*p, *s) for p, s in zip(pairs, settings, strict=True)])

    want = select(_reference, pairs)
    pairs = [[on(setup.device, g) for g in pair] for pair in pairs]
    before = [[None if g is None else g.clone() for g in pair] for pair in pairs]
    with torch.device("meta"), np.errstate(invalid="ignore" if setup.slow else "warn"):  # NumPy
        got = select(setup.module, pairs)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g.dtype, g.shape, g.device.type) == (torch.bool, w.shape, setup.device)
        assert g.is_contiguous()
        assert torch.equal(g.cpu(), w)
    for pair, olds in zip(pairs, before, strict=True):
        assert all(g is None or same_bits(g, old) for g, old in zip(pair, olds, strict=True))


@SCOPES
@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("name", CASES)
def test_masks_equal_the_reference(name, alpha, scope, backend):
    if "float64" in name and torch.float64 not in backend.dtypes:
        return
    fractions = FRACTIONS
    if backend.slow:
        if alpha != 0.1 and (name not in ONE_TERM or (scope == "global" and alpha is not None)):
            return
        fractions = [0.5] if alpha != 0.1 else [0.9, 1.0] if scope == "global" else [0.0, 1e-6, 0.4]
    pairs = CASES[name](backend.n)
    count = len(pairs)
    pools = [0] * count if scope == "global" else list(range(count))
    alphas = None if alpha is None else [alpha] * count
    for fraction in fractions:
        check(backend, pairs, alphas, [fraction] * count, pools)


def test_pools_and_shares_apart(backend):
    n = backend.n // 16
    pairs = [(heavy(n, 4, seed=i), heavy(n, 4, seed=i + 9)) for i in range(6)]
    close = [bits(0x3F800000, 0x3F800040, 4 * n, seed) for seed in (1, 2)]  # ties by rounding
    pairs, fractions = [*pairs, close], [0.2, 0.5, 0.2, 1.0, 0.5, 0.0, 0.5]
    alphas, pools = [0.0, 0.2, 0.3, 0.4, 1, 0.7, np.float64(0.1)], [7, 1, 7, 3, 1, 0, 8]
    check(backend, pairs, alphas, fractions, pools)
    assert backend.module.select([]) == []


# Any input.

GRADIENTS = hnp.arrays(
    np.float32,
    st.integers(0, 200),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, math.inf, math.nan]),
        st.floats(-4, 4, width=16),
    ),
)


@pytest.mark.parametrize("name", ["cpu", "triton"])
@settings(max_examples=80)
@given(data=st.data())
def test_any_gradients(name, data):
    with pytest.MonkeyPatch.context() as patch:
        backend = load(name, patch)
        arrays = data.draw(st.lists(GRADIENTS, min_size=1, max_size=2 if backend.slow else 4))
        pairs = []
        for array in arrays:
            dtype = data.draw(st.sampled_from(backend.dtypes))
            g = torch.from_numpy(array).to(dtype)
            if g.numel() % 6 == 0 and data.draw(st.booleans()):
                g = g.view(-1, 6).t().contiguous().t()
            pairs.append((g, g.flip(0) * 0.5))
        count = len(pairs)
        fraction = data.draw(st.one_of(st.sampled_from(FRACTIONS), st.floats(0, 1)))
        alphas = [data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])) for _ in pairs]
        pools = [data.draw(st.integers(0, 1)) for _ in pairs]
        check(backend, pairs, alphas, [fraction] * count, pools)


# Masking, saving and restoring.


LAYOUTS = {
    "contiguous": lambda g: g,
    "channels_last": channels_last,
    "transposed": lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_save_and_restore(dtype, lay, backend):
    if dtype not in backend.dtypes:
        return
    shape = (6, 4, 3, 3)
    gradient, weight = (on(backend.device, lay(heavy(*shape, dtype=dtype))) for _ in range(2))
    for i, value in enumerate([math.nan, -math.nan, math.inf, -0.0]):
        gradient[i, 0], weight[:, i] = value, value
    mask = on(backend.device, torch.arange(gradient.numel()).view(shape) % 3 == 0)
    g, w = gradient.clone(), weight.clone()
    rows = [(mask, g, w), (mask, None, w), (mask, None, None)]
    saved = backend.module.zero_and_save_(rows)
    assert same_bits(g, torch.where(mask, gradient, 0))
    assert saved[2] is None
    assert all(same_bits(old, weight) and old is not w for old in saved[:2])
    w += 1
    moved = w.clone()
    backend.module.restore_([(mask, w, saved[0])])
    assert same_bits(w, torch.where(mask, moved, weight))


# The bracket of the CPU backend.


@pytest.fixture
def ranked_whole(monkeypatch):
    """Sizes of the arrays of keys that are ranked: first the sample, then a pool that it missed."""
    sizes, original = [], _cpu._keys
    monkeypatch.setattr(_cpu, "_keys", lambda pool: seen(original(pool)))

    def seen(keys):
        sizes.append(keys.size)
        return keys

    return sizes


@pytest.mark.parametrize("bracket", [(1, 2), (0x7F000000, 0x7F000001), (5, 4)])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_bracket_that_misses_costs_no_exactness(bracket, fraction, monkeypatch, ranked_whole):
    setup = load("cpu", monkeypatch, n=20_000)
    monkeypatch.setattr(_cpu, "_bracket", lambda *_: bracket)
    for name in ("heavy-tailed", "special values", "mostly zeros"):
        pairs = CASES[name](setup.n)
        check(setup, pairs, [0.1] * len(pairs), [fraction] * len(pairs), [0] * len(pairs))
    assert ranked_whole


def test_the_bracket_seldom_misses_where_scales_follow_the_channels(ranked_whole):
    """With a fixed stride a third of these tensors would miss."""
    missed = 0
    for seed in range(60):
        shape = (64, 32 + seed, 3, 3)
        columns = torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed)).exp()
        g = heavy(*shape, seed=seed) * columns
        _cpu.select([Entry(g, g, 0.1, 0.5)])
        missed += g.numel() in ranked_whole
        assert ranked_whole.pop(0) < g.numel() / 4
        ranked_whole.clear()
    assert missed <= 1


def test_indices_of_a_sample_have_64_bits(monkeypatch):
    """Also where NumPy's default integer has 32, as on Windows."""
    arange = np.arange
    monkeypatch.setattr(np, "arange", lambda *a, dtype=np.int32: arange(*a, dtype=dtype))
    total = 2**30
    runs = _cpu._runs(total, 2.0**-12)
    assert runs.dtype == torch.int64
    assert len(runs) == 2**18
    assert torch.equal(runs // 2**12, torch.arange(2**18))  # one in each stratum


def test_several_threads_at_once(monkeypatch):
    setup = load("cpu", monkeypatch, CHUNK=4096)

    def one(seed):
        pairs = [(heavy(3000, 10, seed=seed + i), heavy(3000, 10, seed=-seed)) for i in range(3)]
        check(setup, pairs, [0.1, 0.5, 0.9], [0.5] * 3, [0, 1, 0])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one, range(16)))


# Large tensors and many chunks; the launches of the kernels.


@pytest.mark.parametrize(
    ("name", "n", "values", "fraction", "constants"),
    [
        ("cpu", 2**24 + 5, 1000003, 0.3, {"CHUNK": _cpu.CHUNK}),
        ("triton", 2**24 + 5, 1000003, 0.3, {"BLOCK": 1 << 18, "CHUNK": 1 << 22}),  # fast
        # Ties are counted 1,024 chunks at a time; all 3s and 95 % of the 2s are selected.
        ("triton", 1100, 3, 0.65, {"CHUNK": 2, "BLOCK": 2, "PIECE": 2, "DIGITS": (8, 8, 8, 8)}),
    ],
)
def test_large_tensors(name, n, values, fraction, constants, monkeypatch):
    setup = load(name, monkeypatch, **constants)
    n *= setup.module.CHUNK if n == 1100 else 1
    score = (torch.arange(n) * 48271 % values + 1).float()
    (mask,) = setup.module.select([Entry(on(setup.device, score), None, None, fraction)])
    mask = mask.cpu()
    assert int(mask.sum()) == round(fraction * n)
    lowest = score[mask].min()
    assert score[~mask].max() <= lowest
    tied = mask[score == lowest]
    assert torch.equal(tied, tied.sort(descending=True).values)  # the first of the ties


class Launches:
    """Stands in for a kernel and logs its launches."""

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        self.log.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_at_most_eight_launches(dtype, monkeypatch):
    """One selection with zeroing, saving and restoring, of one tensor or of 21."""
    kernels, device, *_ = load("triton", monkeypatch)
    log, counts = [], []
    for name in ("_count", "_mask", "_merge"):
        monkeypatch.setattr(kernels, name, Launches(getattr(kernels, name), log))
    for count in (1, 21):
        g, w = ([heavy(30 + i, 7, dtype=dtype).to(device) for i in range(count)] for _ in range(2))
        log.clear()
        masks = kernels.select([Entry(t, t, 0.3, 0.5, i) for i, t in enumerate(g)])
        saved = kernels.zero_and_save_(list(zip(masks, g, w, strict=True)))
        kernels.restore_(list(zip(masks, w, saved, strict=True)))
        counts.append(len(log))
    assert counts[0] == counts[1] <= 8


@pytest.mark.skipif(CUDA, reason="the interpreter's grid is permuted")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_programs_changes_nothing(order, monkeypatch):
    """Any program may finish last and pick the digit."""
    setup = load("triton", monkeypatch)
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    draw = torch.Generator().manual_seed(1)
    set_index, permuted = builder.set_grid_idx, {}

    def permute(x, y, z):
        n = int(builder.grid_dim[0])
        if n not in permuted:
            places = torch.randperm(n, generator=draw, device="cpu").tolist()
            permuted[n] = places if order == "shuffled" else list(range(n))[::-1]
        set_index(permuted[n][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", permute)
    for pools in ([0, 0], [0, 1]):
        check(setup, [two(100, 5), two(40, 9)], [0.3] * 2, [0.4] * 2, pools)
    assert permuted
