"""The kernels' launches: few whatever the number of tensors, in any order; large tensors."""

import pytest
import torch

triton = pytest.importorskip("triton")
from rgp_optim import _reference, _triton  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(scope="module", autouse=True)
def on_device():
    """Make tensors on the CPU; those of the kernels are sent to their device."""


class Launches:
    """Stands in for a kernel and logs its launches."""

    def __init__(self, kernel, log):
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid):
        self.log.append(grid)
        return self.kernel[grid]


def check_tied(mask, score, value):
    """Of the tied scores, the first are marked; all higher ones are, and no lower one."""
    assert mask[score > value].all()
    assert not mask[score < value].any()
    tied = mask[score == value]
    assert torch.equal(tied, tied.sort(descending=True).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_at_most_eight_launches(dtype, monkeypatch):
    """One selection with zeroing, saving and restoring, of one tensor or of 21."""
    log, counts = [], []
    for name in ("_count", "_mask", "_merge"):
        monkeypatch.setattr(_triton, name, Launches(getattr(_triton, name), log))
    for count in (1, 21):
        g, w = ([torch.randn(30 + i, 7).to(DEVICE, dtype) for i in range(count)] for _ in range(2))
        settings = [0.3] * count, [0.5] * count, list(range(count))
        log.clear()
        masks = _triton.select(g, [each.flip(0) for each in g], *settings)
        _triton.restore_(masks, w, _triton.zero_and_save_(masks, g, w))
        counts.append(len(log))
    assert counts[0] == counts[1] <= 8


def test_a_tensor_of_more_than_two_to_the_24_weights(monkeypatch):
    """In large blocks, which the interpreter runs fast."""
    if not CUDA:
        monkeypatch.setattr(_triton, "BLOCK", 1 << 18)
        monkeypatch.setattr(_triton, "CHUNK", 1 << 22)
    n = 2**24 + 5
    score = (torch.arange(n, dtype=torch.int64) * 48271 % 1000003).to(torch.float32).to(DEVICE)
    (mask,) = _triton.topk_masks([score], [0.3], [0])
    assert int(mask.sum()) == round(0.3 * n)
    check_tied(mask, score, torch.topk(score, round(0.3 * n)).values.min())


def test_ties_are_split_over_more_than_1024_chunks(monkeypatch):
    """Their counts are summed 1,024 chunks at a time."""
    if not CUDA:
        for size in ("CHUNK", "BLOCK", "PIECE"):
            monkeypatch.setattr(_triton, size, 2)
        monkeypatch.setattr(_triton, "DIGITS", (8, 8, 8, 8))
    n = 2200 if not CUDA else 1100 * _triton.CHUNK
    score = torch.arange(n, dtype=torch.int64).mul_(48271).remainder_(3).add_(1).float()
    (mask,) = _triton.topk_masks([score.to(DEVICE)], [0.65], [0])  # all 3s, 95 % of the 2s
    assert int(mask.sum()) == round(0.65 * n)
    check_tied(mask.cpu(), score, 2)


@pytest.mark.skipif(CUDA, reason="the interpreter's grid is permuted")
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_programs_changes_nothing(order, monkeypatch):
    """Any program may finish last and pick the digit."""
    from triton.runtime import interpreter

    for name, size in {"BLOCK": 32, "PIECE": 16, "CHUNK": 64}.items():
        monkeypatch.setattr(_triton, name, size)
    builder = interpreter.interpreter_builder
    draw = torch.Generator().manual_seed(1)
    set_index, permuted = builder.set_grid_idx, {}

    def permute(x, y, z):
        n = int(builder.grid_dim[0])
        if n not in permuted:
            places = torch.randperm(n, generator=draw).tolist()
            permuted[n] = places if order == "shuffled" else list(range(n))[::-1]
        set_index(permuted[n][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", permute)
    torch.manual_seed(0)
    g = [torch.randn(500).round(decimals=1), torch.randn(40, 9)]
    for pools in ([0, 0], [0, 1]):
        got = _triton.select(g, [each.flip(0) for each in g], [0.3] * 2, [0.4] * 2, pools)
        want = _reference.select(g, [each.flip(0) for each in g], [0.3] * 2, [0.4] * 2, pools)
        assert all(map(torch.equal, got, want))
    assert permuted
