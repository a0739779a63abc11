"""The reference against Python's sort and NumPy."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import from_numpy, numpy_masks, to_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim._reference import rgp_score, score_dtype, select, topk_masks, update_count

FRACTIONS = st.one_of(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.7, 1.0]), st.floats(0, 1))
# Few distinct values, so that ties and zeros are common.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-45, 3.5, math.inf, -math.inf, math.nan])
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
ARRAYS = hnp.arrays(np.float32, SHAPES, elements=VALUES)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def one(score, fraction):
    return topk_masks([score], [fraction], [0])[0]


@given(st.integers(0, 10**9), FRACTIONS)
def test_update_count(n, fraction):
    k = update_count(n, fraction)
    assert 0 <= k <= n
    assert (k == 0) == (n == 0 or fraction == 0)
    if k > 1:
        assert abs(k - Fraction(fraction) * n) <= 0.5 + 1e-7


@given(st.lists(ARRAYS, min_size=1, max_size=5), FRACTIONS, st.data())
def test_pools(scores, fraction, data):
    """One threshold per pool; ties go to the earlier tensor."""
    pools = [data.draw(st.integers(0, 2)) for _ in scores]
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in scores]
    tensors = [from_numpy(score).to(dtype) for score, dtype in zip(scores, dtypes, strict=True)]
    masks = topk_masks(tensors, [fraction] * len(scores), pools)
    wide = [to_numpy(each.double()) for each in tensors]
    wants = numpy_masks(wide, [fraction] * len(scores), pools)
    for mask, want in zip(masks, wants, strict=True):
        assert mask.shape == want.shape
        np.testing.assert_array_equal(to_numpy(mask), want)


def test_ties_go_to_the_lowest_row_major_index_whatever_the_strides():
    score = torch.ones(2, 3, 4, 5)
    for other in (
        score,
        score.to(memory_format=torch.channels_last),
        score.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.ones(1, 3, 1, 5).expand(2, 3, 4, 5),
    ):
        mask = one(other, 0.3)
        assert mask.reshape(-1)[:36].all()
        assert int(mask.sum()) == 36


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_the_score_is_computed_in_float32_or_float64(dtype, alpha):
    g_nat, g_adv = torch.randn(2, 1000, dtype=torch.float64).to(dtype)
    wide = np.float64 if dtype == torch.float64 else np.float32
    nat, adv = (np.abs(to_numpy(g.double()).astype(wide)) for g in (g_nat, g_adv))
    got = rgp_score(g_nat, g_adv, alpha)
    assert got.dtype == score_dtype(g_nat)
    np.testing.assert_array_equal(to_numpy(got), wide(alpha) * nat + wide(1.0 - alpha) * adv)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_at_its_ends_ignores_the_other_gradient(alpha):
    bad, good = torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor([-1.0, 2.0, -0.0])
    pair = (good, bad) if alpha == 1.0 else (bad, good)
    torch.testing.assert_close(rgp_score(*pair, alpha), good.abs(), rtol=0, atol=0)


def test_a_missing_gradient_counts_as_zero():
    g = torch.tensor([1.0, -3.0])
    assert [m.tolist() for m in select([None], [g], [0.9], [0.5], [0])] == [[0, 1]]
    assert [m.tolist() for m in select([g], [None], [0.0], [0.5], [0])] == [[0, 0]]
