"""Score, select, conserve as functions, against Python's sort, torch.topk and numpy."""

import math

import numpy as np
import pytest
import torch
from common import DEVICE, from_numpy, numpy_topk, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim import _reference, functional
from rgp_optim.functional import rgp_score, rgp_topk_masks, topk_mask

FRACTIONS = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), st.floats(0, 1))
# Few distinct values, so that ties and zeros are common; and the special ones.
VALUES = st.sampled_from([0.0, 1.0, 2.0, 1e-45, 3.5, math.inf, math.nan])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)


def arrays(elements=VALUES):
    return hnp.arrays(np.float32, SHAPES, elements=elements)


def count(n, fraction):
    return 0 if n == 0 or fraction == 0 else max(1, round(fraction * n))


# Limits.


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (0,), (2, 0, 3)])
def test_one_selects_everything_and_zero_nothing(shape):
    score = torch.zeros(shape)
    assert topk_mask(score, update_fraction=1.0).all()
    assert not topk_mask(torch.ones(shape), update_fraction=0.0).any()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_at_its_ends_ignores_the_other_gradient(alpha):
    bad = torch.tensor([math.nan, math.inf, -math.inf])
    good = torch.tensor([-1.0, 2.0, -0.0])
    pair = (good, bad) if alpha == 1.0 else (bad, good)
    torch.testing.assert_close(rgp_score(*pair, alpha=alpha), good.abs(), rtol=0, atol=0)


def test_a_tiny_fraction_still_updates_one_weight():
    assert topk_mask(torch.tensor([1.0, 3.0, 2.0]), update_fraction=1e-9).tolist() == [0, 1, 0]


# The rule against independent code.


@given(arrays(), FRACTIONS)
def test_topk_mask_is_the_rule(score, fraction):
    got = to_numpy(topk_mask(from_numpy(score), update_fraction=fraction))
    k = count(score.size, fraction)
    want = np.ones(score.shape, bool) if fraction == 1 else numpy_topk(score, k)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_topk_mask_marks_what_torch_topk_returns(dtype, fraction):
    score = torch.randperm(997).to(torch.float64).add(1).to(dtype).unique()  # no ties
    score = score[torch.randperm(len(score))]
    k = count(len(score), fraction)
    want = torch.zeros(len(score), dtype=torch.bool)
    want[torch.topk(score, k).indices] = True
    assert torch.equal(topk_mask(score, update_fraction=fraction), want)


@given(arrays(st.floats(0, 2.0**100, width=32)), FRACTIONS)
def test_what_is_kept_is_not_below_what_is_dropped(score, fraction):
    score = from_numpy(score)
    mask = topk_mask(score, update_fraction=fraction)
    if fraction < 1:
        assert mask.sum() == min(count(score.numel(), fraction), int((score > 0).sum()))
    if mask.any() and not mask.all():
        assert score[mask].min() >= score[~mask].max()


@given(
    hnp.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(0, 2.0**100, width=32), unique=True
    ),
    FRACTIONS,
    st.randoms(use_true_random=False),
)
def test_permuted_scores_give_the_permuted_mask(score, fraction, random):
    order = list(range(len(score)))
    random.shuffle(order)
    mask = topk_mask(from_numpy(score), update_fraction=fraction)
    permuted = topk_mask(from_numpy(score[order]), update_fraction=fraction)
    assert torch.equal(permuted, mask[order])


@given(arrays(st.floats(-(2.0**60), 2.0**60, width=32)), FRACTIONS, st.integers(-8, 8))
def test_a_common_factor_changes_no_mask(gradient, fraction, exponent):
    g = from_numpy(gradient)
    g = torch.where(g.abs() < 1e-20, 0.0, g)  # powers of two are exact, away from the subnormals
    kwargs = dict(alpha=0.25, update_fraction=fraction)
    (plain,) = rgp_topk_masks([g], [g.flip(0) if g.dim() else g], **kwargs)
    g = g * 2.0**exponent
    (scaled,) = rgp_topk_masks([g], [g.flip(0) if g.dim() else g], **kwargs)
    assert torch.equal(plain, scaled)


def test_nan_ranks_first_whatever_its_bits_and_zeros_never():
    quiet, payload = 0x7FC00000, 0x7FC00123
    negative = -0x400000  # the bits 0xFFC00000
    bits = torch.tensor([0, payload, negative, quiet, 0x7F800000], dtype=torch.int32)
    mask = topk_mask(bits.view(torch.float32), update_fraction=0.4)
    assert mask.tolist() == [False, True, True, False, False]
    assert topk_mask(torch.tensor([0.0, 0.0, 1.0]), update_fraction=0.9).tolist() == [0, 0, 1]


def test_more_than_two_to_the_24_elements():
    n = 2**24 + 3
    score = (torch.arange(n, dtype=torch.int64) * 48271 % 1000003).to(torch.float32)
    mask = topk_mask(score, update_fraction=0.3)
    assert int(mask.sum()) == round(0.3 * n)
    threshold = torch.topk(score, round(0.3 * n)).values.min()
    assert mask[score > threshold].all()
    assert not mask[score < threshold].any()
    tied = (score == threshold).nonzero().squeeze(1)
    kept = mask[tied]
    assert torch.equal(kept, kept.sort(descending=True).values)  # the first of them


# The score.


# Several tensors.


@given(st.lists(arrays(), min_size=1, max_size=4), st.sampled_from([0.1, 0.5, 0.9]), st.booleans())
def test_masks_of_a_list(gradients, fraction, share_threshold):
    g_nats = [from_numpy(g) for g in gradients]
    g_advs = [from_numpy(np.array(np.flip(g))) for g in gradients]
    masks = rgp_topk_masks(
        g_nats,
        g_advs,
        alpha=0.5,
        update_fraction=fraction,
        scope="global" if share_threshold else "tensor",
    )
    half = np.float32(0.5)
    with np.errstate(over="ignore"):
        scores = [half * np.abs(g) + half * np.abs(np.flip(g)) for g in gradients]
    if share_threshold:
        joined = np.concatenate([s.reshape(-1) for s in scores])
        flat = numpy_topk(joined, count(joined.size, fraction))
        wants = np.split(flat, np.cumsum([s.size for s in scores])[:-1])
    else:
        wants = [numpy_topk(s, count(s.size, fraction)) for s in scores]
    for mask, want, g in zip(masks, wants, g_nats, strict=True):
        np.testing.assert_array_equal(to_numpy(mask), want.reshape(g.shape))


def test_mixed_dtypes_share_a_global_threshold():
    gs = [torch.tensor([1.0, 4.0]).half(), torch.tensor([3.0, 2.0]).double(), torch.tensor([5.0])]
    masks = rgp_topk_masks(gs, gs, alpha=0.5, update_fraction=0.4, scope="global")
    assert [m.tolist() for m in masks] == [[False, True], [False, False], [True]]


def test_settings_for_each_tensor():
    g = torch.arange(1.0, 11.0)
    masks = rgp_topk_masks([g, g], [g, g], alpha=[0, 1], update_fraction=[0.2, 0.5])
    assert [int(m.sum()) for m in masks] == [2, 5]
    assert rgp_topk_masks([], [], alpha=0.5, update_fraction=0.5, scope="global") == []


# Refusals.

G = torch.ones(3, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: rgp_score(G, G, alpha=1.4),
            ValueError,
            r"`alpha` should be in \[0, 1\]. Found `alpha = 1.4`.",
        ),
        (lambda: rgp_score(G, G, alpha=math.nan), ValueError, "Found `alpha = nan`"),
        (lambda: rgp_score(G, G, alpha="a"), TypeError, "Found `alpha: str 'a'`"),
        (lambda: rgp_score(G, G.double(), alpha=0.1), ValueError, "match `g_nat` in shape, dtype"),
        (lambda: rgp_score(G, torch.ones(4), alpha=0.1), ValueError, r"\(4,\) torch.float32 on"),
        (lambda: rgp_score(G.long(), G, alpha=0.1), TypeError, "`g_nat` should have a floating"),
        (lambda: rgp_score(G.to_sparse(), G, alpha=0.1), TypeError, "`g_nat` should be a dense"),
        (lambda: rgp_score([1.0], G, alpha=0.1), TypeError, "`g_nat` should be a tensor"),
        (lambda: topk_mask(G, update_fraction=-0.1), ValueError, "`update_fraction` should be in"),
        (lambda: topk_mask(G, update_fraction=True), TypeError, "bool True"),
        (lambda: topk_mask(G + 0j, update_fraction=0.5), TypeError, "real dtype"),
        (
            lambda: topk_mask(G, update_fraction=0.5, backend="cuda"),
            ValueError,
            "`backend` should be one of 'auto', 'cpu', 'triton', 'torch'. Found `backend = 'cuda'`",
        ),
        (
            lambda: rgp_topk_masks([G], [], alpha=0.1, update_fraction=0.5),
            ValueError,
            "as many entries as `g_nats`. Found `0 against 1`",
        ),
        (
            lambda: rgp_topk_masks([None], [None], alpha=0.1, update_fraction=0.5),
            ValueError,
            r"`g_nats\[0\]` should be a tensor where `g_advs\[0\]` is None",
        ),
        (
            lambda: rgp_topk_masks([G], [G], alpha=[0.1, 0.2], update_fraction=0.5),
            ValueError,
            "one for each of the 1 tensors",
        ),
        (
            lambda: rgp_topk_masks(
                [G, G], [G, G], alpha=0.1, update_fraction=[0.5, 0.6], scope="global"
            ),
            ValueError,
            "one number under scope='global'",
        ),
        (
            lambda: rgp_topk_masks([G], [G], alpha=0.1, update_fraction=0.5, scope="layer"),
            ValueError,
            "`scope` should be one of 'tensor', 'global'",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Backends.


@pytest.mark.parametrize(
    ("backend", "patch", "message"),
    [
        ("triton", {"_INTERPRETED": False}, "tensors on cpu"),
        ("cpu", {"_installed": lambda _: False}, "numpy is not installed"),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused(backend, patch, message, monkeypatch):
    g = torch.ones(3, device="cpu")
    for name, value in patch.items():
        monkeypatch.setattr(functional, name, value)
    with pytest.raises(RuntimeError, match=message):
        topk_mask(g, update_fraction=0.5, backend=backend)
    assert topk_mask(g, update_fraction=1.0).all()


class Counts(torch.Tensor):
    """A subclass need not have its values in memory."""


def test_subclasses_and_float64_go_to_the_reference():
    g = torch.tensor([1.0, 3.0, 2.0], device="cpu").as_subclass(Counts)
    assert topk_mask(g, update_fraction=0.3).tolist() == [False, True, False]
    with pytest.raises(RuntimeError, match="a Counts"):
        topk_mask(g, update_fraction=0.3, backend="cpu")
    if functional._INTERPRETED:
        with pytest.raises(RuntimeError, match="a float64 tensor"):
            topk_mask(torch.ones(3).double(), update_fraction=0.3, backend="triton")


class Broken:
    """Kernels that forget one weight, or do not run."""

    def __init__(self, what):
        self.what = what

    def select(self, *arguments):
        if self.what == "raises":
            raise RuntimeError("no kernel image is available")
        masks = _reference.select(*arguments)
        if self.what == "select":
            masks[0].view(-1)[7] ^= True
        return masks

    topk_masks = staticmethod(_reference.topk_masks)

    def zero_and_save_(self, masks, gradients, weights):
        saved = _reference.zero_and_save_(masks, gradients, weights)
        if self.what == "zero":
            gradients[1].view(-1)[0] = 5.0
        return saved

    def restore_(self, masks, weights, saved):
        if self.what != "restore":
            _reference.restore_(masks, weights, saved)


@pytest.mark.parametrize("what", ["select", "zero", "restore", "raises", "nothing"])
def test_kernels_are_compared_with_the_reference_before_they_are_trusted(what, monkeypatch):
    """As on a GPU: the kernels come first, and the CPU backend is not there."""
    load, broken = functional._load, Broken(what)
    monkeypatch.setattr(functional, "_load", lambda b: broken if b == "triton" else load(b))
    monkeypatch.setattr(functional, "_INTERPRETED", True)
    monkeypatch.setattr(functional, "_installed", lambda package: package == "triton")
    monkeypatch.setattr(functional, "_trusted", {})
    g = torch.arange(1.0, 11.0, device="cpu")
    if what == "nothing":
        topk_mask(g, update_fraction=0.3)
        assert functional._trusted == {g.device: True}
        return
    with pytest.warns(RuntimeWarning, match="Triton kernels do not run correctly on cpu"):
        mask = topk_mask(g, update_fraction=0.3)
    assert mask.tolist() == [False] * 7 + [True] * 3
    topk_mask(g, update_fraction=0.3)  # one warning is enough
    if what == "raises":
        with pytest.raises(RuntimeError, match="no kernel image"):
            rgp_topk_masks([g], [g], alpha=0.5, update_fraction=0.5, backend="triton")
