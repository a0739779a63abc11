"""The functional layer: the method as functions, argument checks, the choice of a backend."""

import math
import sys
import warnings
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from common import DEVICE, from_numpy, numpy_masks, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim import _reference, functional
from rgp_optim._reference import Entry
from rgp_optim.functional import rgp_score, rgp_topk_masks, topk_mask

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
FRACTIONS = st.one_of(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.7, 1.0]), st.floats(0, 1))
ALPHAS = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
# Few distinct values, so that ties and zeros are common; and the special ones.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-45, 3.5, math.inf, -math.inf, math.nan])
ARRAYS = hnp.arrays(np.float32, SHAPES, elements=VALUES)


def numpy_score(pair, alpha):
    """Rounded after each product and the sum, in float64 only for float64 gradients."""
    dtype = np.float64 if pair[0].dtype == torch.float64 else np.float32
    sizes = [np.abs(to_numpy(g.double()).astype(dtype)) for g in pair]
    terms = [dtype(f) * size for f, size in zip((alpha, 1 - alpha), sizes, strict=True) if f]
    return sum(terms[1:], terms[0])


@pytest.mark.parametrize("backend", ["torch", "auto"])
@given(st.lists(ARRAYS, min_size=1, max_size=5), FRACTIONS, st.data())
def test_scores_and_masks_by_independent_code(backend, arrays, fraction, data):
    """One threshold per pool; ties go to the earlier tensor, in row-major order."""
    pools = [data.draw(st.integers(0, 2)) for _ in arrays]
    alphas = [data.draw(ALPHAS) for _ in arrays]
    pairs = []
    for array in arrays:
        g = from_numpy(array).to(data.draw(DTYPES))
        dims = list(range(g.dim()))
        if data.draw(st.booleans()):
            g = g.permute(dims[::-1]).contiguous().permute(dims[::-1])
        pairs.append((g, g.flip(dims)))
    fractions, g_nats = [fraction] * len(pairs), [g for g, _ in pairs]
    with np.errstate(all="ignore"):
        scores = [numpy_score(*each) for each in zip(pairs, alphas, strict=True)]
    for pair, alpha, want in zip(pairs, alphas, scores, strict=True):
        found = to_numpy(rgp_score(*pair, alpha=alpha))
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)
    rows = zip(pairs, alphas, pools, strict=True)
    entries = [Entry(*pair, alpha, fraction, pool) for pair, alpha, pool in rows]
    given = [Entry(g, None, None, fraction, pool) for g, pool in zip(g_nats, pools, strict=True)]
    found = [m for each in (entries, given) for m in functional.select(each, backend=backend)]
    wants = numpy_masks(scores, fractions, pools)
    wants += numpy_masks([to_numpy(g.double()) for g in g_nats], fractions, pools)
    for mask, want in zip(found, wants, strict=True):
        assert mask.shape == want.shape
        np.testing.assert_array_equal(to_numpy(mask), want)


def test_mixed_dtypes_and_missing_gradients():
    gs = [torch.tensor([1.0, 4.0]).half(), torch.tensor([3.0, 2.0]).double(), torch.tensor([5.0])]
    masks = rgp_topk_masks(gs, gs, alpha=0.5, update_fraction=0.4, scope="global")
    assert [m.tolist() for m in masks] == [[False, True], [False, False], [True]]
    (mask,) = rgp_topk_masks([None], [gs[0]], alpha=0.9, update_fraction=0.5)
    assert mask.tolist() == [False, True]
    (mask,) = rgp_topk_masks([gs[0]], [None], alpha=0.0, update_fraction=0.5)
    assert mask.tolist() == [False, False]  # no score: no weight
    masks = rgp_topk_masks(TWO, TWO, alpha=0.1, update_fraction=0.5)  # on two devices
    assert [m.device for m in masks] == [g.device for g in TWO]
    assert rgp_topk_masks([], [], alpha=0.5, update_fraction=0.5, scope="global") == []
    assert topk_mask(torch.zeros(3), update_fraction=1.0).all()


# Argument errors: the name, the rule, what was found, and the way out.

G = torch.ones(3, device=DEVICE)
HALF = dict(alpha=0.1, update_fraction=0.5)
TWO = [G, G.to("meta")]


def score(g_nat, g_adv, alpha=0.1):
    return lambda: rgp_score(g_nat, g_adv, alpha=alpha)


def topk(score, fraction=0.5, **options):
    return lambda: topk_mask(score, update_fraction=fraction, **options)


def masks(g_nats, g_advs, **options):
    return lambda: rgp_topk_masks(g_nats, g_advs, **{**HALF, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (score(G, G, 1.4), ValueError, r"`alpha` should be in \[0, 1\]. Found `alpha = 1.4`."),
        (score(G, G, math.nan), ValueError, "Found `alpha = nan`"),
        (score(G, G, "a"), TypeError, "Found `alpha: str 'a'`"),
        (score(G, G.double()), ValueError, "match `g_nat` in shape, dtype"),
        (score(G, G[1:]), ValueError, r"\(2,\) torch.float32 on"),
        (score(G.long(), G), TypeError, "`g_nat` should have a floating"),
        (score(G.to_sparse(), G), TypeError, "`g_nat` should be a dense"),
        (score(G, [1.0]), TypeError, "`g_adv` should be a tensor"),
        (score(G + 0j, G), TypeError, "`g_nat` should have a real dtype"),
        (topk(G, -0.1), ValueError, "`update_fraction` should be in"),
        (topk(G, True), TypeError, "bool True"),
        (topk(G + 0j), TypeError, "`score` should have a real"),
        (topk(G, backend="cuda"), ValueError, "`backend` should be one of 'auto', 'cpu', 'triton'"),
        (masks([G], []), ValueError, "as many entries as `g_nats`"),
        (masks([None], [None]), ValueError, r"where `g_advs\[0\]` is None.*Leave out"),
        (masks([G], [G], alpha=2.0), ValueError, r"`alpha` should be in"),
        (masks([G], [G], update_fraction=[0.5]), TypeError, "`update_fraction` should be a number"),
        (masks([G], [G], scope="layer"), ValueError, "`scope` should be one of 'tensor', 'gl"),
        (masks(TWO, TWO, scope="global"), ValueError, "`scope` should be 'tensor' where"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The backend.


class Marked(torch.Tensor):
    pass


NEGATED = torch.full((3,), -1j, device=DEVICE).conj()  # its imaginary part is -(-1) in memory


@pytest.mark.parametrize(
    ("backend", "tensor", "reason"),
    [
        ("cpu", torch.ones(3, device="meta"), "tensors on meta"),
        ("triton", torch.ones(3, device="meta"), "tensors on meta"),
        ("cpu", torch.ones(3, device="cpu").as_subclass(Marked), "a Marked"),
        ("triton", torch.ones(3, dtype=torch.float64, device=DEVICE), "a float64 tensor"),
        ("cpu", torch.imag(NEGATED.cpu()), "the negative bit"),
        ("triton", torch.imag(NEGATED), "the negative bit"),
    ],
)
def test_a_named_backend_must_run(backend, tensor, reason):
    message = f"`backend` should be able to run on these.*{backend}.*{reason}.*Use 'auto'"
    with pytest.raises(RuntimeError, match=message):
        topk_mask(tensor, update_fraction=0.5, backend=backend)
    mask = topk_mask(tensor, update_fraction=0.5)
    assert mask.is_meta or mask.tolist() == [True, True, False]


# The kernels are compared with the reference before "auto" relies on them.


def raising(*_):
    raise OSError("no compiler")


def reading(change):
    """Select by gradients that are read wrongly."""

    def select(entries):
        def read(g):
            return None if g is None else change(g)

        return _reference.select([Entry(*map(read, e[:2]), *e[2:]) for e in entries])

    return select


def ties_to_the_last(entries):
    return [mask.flip(0) for mask in reading(lambda g: g.flip(0))(entries)]


def from_aligned_addresses(g):
    start = g.data_ptr() % 16 // g.element_size()
    return g.as_strided(g.shape, g.stride(), g.storage_offset() - start)


def without_subnormals(dtype):
    least = torch.finfo(dtype).smallest_normal
    return reading(lambda g: g.where(~(g.abs() < least), 0) if g.dtype == dtype else g)


def flushed_products(entries):
    least = torch.finfo(torch.float32).smallest_normal
    scores = [e.natural if e.alpha is None else _reference.rgp_score(*e[:3]) for e in entries]
    scores = [
        s if e.alpha is None else s.where(~(s < least), 0)
        for e, s in zip(entries, scores, strict=True)
    ]
    return _reference.select(
        [Entry(s, None, None, *e[3:]) for e, s in zip(entries, scores, strict=True)]
    )


def keeps_nan(rows):
    for mask, gradient, _ in rows:
        gradient.mul_(mask)
    return [weight.clone() for *_, weight in rows]


def saves_four_bytes(rows):
    saved = _reference.zero_and_save_(rows)
    return [w if w is None or w.itemsize < 8 else w.float().double() + 1 for w in saved]


FAULTS = {
    "select raises": ({"select": raising}, "which raises OSError: no compiler"),
    "ties": ({"select": ties_to_the_last}, "whose masks differ"),
    "scores without a sign": ({"select": reading(torch.abs)}, "whose masks differ"),
    "misaligned memory": ({"select": reading(from_aligned_addresses)}, "whose masks differ"),
    "subnormals, 32 bits": ({"select": without_subnormals(torch.float32)}, "whose masks differ"),
    "subnormals, 16 bits": ({"select": without_subnormals(torch.float16)}, "whose masks differ"),
    "subnormal products": ({"select": flushed_products}, "whose masks differ"),
    "NaN stays": ({"zero_and_save_": keeps_nan}, "whose masks differ"),
    "nothing is restored": ({"restore_": lambda *_: None}, "whose masks differ"),
    "nothing is saved": (
        {"zero_and_save_": lambda rows: [w for *_, w in rows]},
        "whose masks differ",
    ),
    "weights of 8 bytes": ({"zero_and_save_": saves_four_bytes}, "whose masks differ"),
}


@pytest.fixture
def kernels(monkeypatch):
    """Replace the kernels by the reference, with faults; make "auto" choose them."""

    def install(**faults):
        names = ("select", "zero_and_save_", "restore_")
        fake = SimpleNamespace(**{name: getattr(_reference, name) for name in names} | faults)
        modules = {"rgp_optim._triton": fake}
        monkeypatch.setattr(functional, "import_module", modules.__getitem__)
        monkeypatch.setattr(functional, "_INTERPRETED", DEVICE.type == "cpu")
        monkeypatch.setattr(functional, "_faults", {("cpu", DEVICE): "which is left out"})

    return install


def test_a_cuda_graph_captures_the_reference(monkeypatch):
    """The kernels' tables would be gone at a replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(functional, "_INTERPRETED", False)
    on_gpu = [SimpleNamespace(device=torch.device("cuda"))]
    assert functional._module("auto", "select", on_gpu) is _reference
    with pytest.raises(RuntimeError, match=r"a stream under CUDA graph capture.*Use 'auto'"):
        functional._module("triton", "select", on_gpu)


@pytest.mark.parametrize(("faults", "problem"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("first", ["auto", "triton"])
def test_kernels_that_differ_are_not_used_and_raise_where_they_are_named(
    first, faults, problem, kernels
):
    kernels(**faults)
    score = torch.tensor([3.0, 1.0, 3.0, 0.0])
    if first == "auto":
        with pytest.warns(RuntimeWarning, match=f"The backend 'triton', .*{problem}.*same masks"):
            mask = topk_mask(score, update_fraction=0.25)
        assert mask.tolist() == [True, False, False, False]
        assert topk_mask(score, update_fraction=0.25).tolist() == mask.tolist()  # one warning
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{problem}.*Use 'auto'"):
            topk_mask(score, update_fraction=0.25, backend="triton")


def test_kernels_that_agree_are_used(kernels):
    calls = []

    def select(entries):
        calls.append(entries[0].natural.numel())
        return _reference.select(entries)

    kernels(select=select)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("auto", "triton"):
            topk_mask(G, update_fraction=0.5, backend=backend)
    assert calls[-2:] == [3, 3]
    assert calls.count(3) == 2  # the others are of the comparison


def test_kernels_without_masked_histograms_are_not_used(kernels, monkeypatch):
    kernels()
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.3.1")
    monkeypatch.setattr(functional, "import_module", import_module)  # the real one, anew
    monkeypatch.delitem(sys.modules, "rgp_optim._triton", raising=False)
    with pytest.warns(RuntimeWarning, match="ImportError: Triton 3.3.1 has no masked histogram"):
        mask = topk_mask(G, update_fraction=0.5)
    assert mask.tolist() == [True, True, False]


def test_a_package_that_is_missing(monkeypatch):
    """Every tensor is selected in by the reference, after a warning."""
    missing = mock.Mock(side_effect=ModuleNotFoundError("No module named 'numpy'"))
    monkeypatch.setattr(functional, "import_module", missing)
    monkeypatch.setattr(functional, "_faults", {})
    with pytest.warns(RuntimeWarning, match="No module named 'numpy'.*selected by a sort"):
        assert topk_mask(G, update_fraction=0.5).tolist() == [True, True, False]
    with pytest.raises(RuntimeError, match=r"No module named 'numpy'`. Use 'auto'"):
        topk_mask(torch.ones(3, device="cpu"), update_fraction=0.5, backend="cpu")


# Memory that is not the value.


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_negative_bit_is_read(backend):
    """Imaginary parts of a conjugate are the memory's numbers, negated."""
    values = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
    g = torch.imag(torch.complex(values, values).conj())
    assert g.is_neg()
    mask = topk_mask(g, update_fraction=0.4, backend=backend)
    assert mask.tolist() == [False, True, False, True, False]
    options = dict(alpha=0.5, update_fraction=0.4, backend=backend)
    (mask,) = rgp_topk_masks([g], [g], **options)
    assert mask.tolist() == [False, False, False, True, True]
    assert rgp_score(g, g, alpha=0.5).tolist() == [1, 2, 3, 4, 5]
    weight = torch.imag(torch.complex(values, values).conj())
    (saved,) = functional.zero_and_save_([(mask, g, weight)], backend=backend)
    assert g.tolist() == [0, 0, 0, 4, -5]
    weight.add_(1)
    functional.restore_([(mask, weight, saved)], backend=backend)
    assert weight.tolist() == [-1, 2, -3, 5, -4]
