"""kl_adv_loss and consistency_loss against hand-computed values and numpy."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from common import DEVICE, cpu_only, from_numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rgp_optim import consistency_loss, kl_adv_loss
from rgp_optim.losses import kl_divergence

LOGITS = hnp.arrays(np.float64, (3, 4), elements=st.floats(-30, 30))
Z, Y = torch.zeros(2, 3, device=DEVICE), torch.tensor([0, 1], device=DEVICE)


def softmax(z):
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


def numpy_kl(z, z_adv):
    p, q = softmax(z), softmax(z_adv)
    return (p * np.log(p / q)).sum(1).mean()


@given(LOGITS, LOGITS, st.floats(0, 10) | st.fractions(0, 10) | st.integers(0, 10))
def test_the_loss_is_numpys(z, z_adv, beta):
    y = np.array([0, 3, 1])
    want = numpy_kl(z, z_adv) * float(beta) - np.log(softmax(z)[np.arange(3), y]).mean()
    got = kl_adv_loss(*map(from_numpy, (z, z_adv, y)), beta=beta).item()
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


@given(LOGITS, LOGITS)
def test_the_divergence_is_not_negative_and_zero_on_itself(p, q):
    p, q = from_numpy(p), from_numpy(q)
    assert kl_divergence(p, q) >= -1e-12
    assert kl_divergence(p, p) == 0
    torch.testing.assert_close(kl_divergence(p + 5, q - 7), kl_divergence(p, q))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("both", [True, False], ids=["masked in both", "masked in p"])
def test_a_masked_class_adds_nothing(dtype, both):
    """p = (3/4, 1/4, 0) against q = (1/2, 1/2, 0) or (1/3, 1/3, 1/3), in closed form."""
    third, q = (-math.inf, 1 / 2) if both else (0.0, 1 / 3)
    z = torch.tensor([[math.log(3.0), 0.0, -math.inf]], dtype=dtype, requires_grad=True)
    z_adv = torch.tensor([[0.0, 0.0, third]], dtype=dtype, requires_grad=True)
    kl = 0.75 * math.log(0.75 / q) + 0.25 * math.log(0.25 / q)
    loss = kl_adv_loss(z, z_adv, torch.tensor([0]))
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-14)
    assert loss.item() == pytest.approx(math.log(4 / 3) + kl, rel=tolerance)
    loss.backward()
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    towards_p = torch.zeros(3, dtype=torch.float64)
    towards_p[:2] = (p - torch.tensor([1.0, 0.0])) + p * ((p / q).log() - kl)
    towards_q = torch.tensor([q - 0.75, q - 0.25, 0.0 if both else q], dtype=torch.float64)
    torch.testing.assert_close(z.grad[0].double(), towards_p, rtol=0, atol=tolerance)
    torch.testing.assert_close(z_adv.grad[0].double(), towards_q, rtol=0, atol=tolerance)


def test_a_class_that_only_q_excludes_is_infinitely_far():
    q = torch.tensor([[0.0, -math.inf]])
    assert kl_divergence(torch.zeros(1, 2), q) == math.inf


def test_gradients_flow_into_both_arguments():
    z, z_adv = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.tensor([0, 1, 2, 0])
    assert torch.autograd.gradcheck(lambda a, b: kl_adv_loss(a, b, y, beta=2.0), (z, z_adv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    z, z_adv = (torch.randn(5, 4).mul(20).to(dtype) for _ in range(2))
    y = torch.tensor([0, 1, 2, 3, 0])
    got, want = kl_adv_loss(z, z_adv, y), kl_adv_loss(z.double(), z_adv.double(), y)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64, torch.float16])
def test_class_probabilities_as_targets(wide):
    """They do not widen the loss; the values are those of the class indices."""
    z, y = torch.randn(3, 4), torch.tensor([1, 0, 3])
    hard, soft = kl_adv_loss(z, z, y), kl_adv_loss(z, z, torch.eye(4)[y].to(wide))
    assert soft.dtype == torch.float32
    torch.testing.assert_close(hard, soft)
    assert kl_adv_loss(z.double(), z.double(), torch.eye(4)[y]).dtype == torch.float64


@given(LOGITS, LOGITS, LOGITS, LOGITS)
def test_the_consistency_loss_is_the_sum_of_two_divergences(revised, revised_adv, z, z_adv):
    got = consistency_loss(*map(from_numpy, (revised, revised_adv, z, z_adv)))
    want = numpy_kl(revised, z) + numpy_kl(revised_adv, z_adv)
    assert got.item() == pytest.approx(want, rel=1e-9, abs=1e-9)


def test_the_consistency_loss_has_no_gradient_into_the_copy():
    copies, logits = ([torch.randn(4, 3, requires_grad=True) for _ in range(2)] for _ in range(2))
    consistency_loss(*copies, *logits).backward()
    assert all(t.grad is None for t in copies)
    assert all(t.grad is not None for t in logits)
    half = consistency_loss(*copies, *(t.bfloat16() for t in logits))  # as under autocast
    assert half.dtype == torch.float32


@cpu_only("elsewhere reading values would synchronise")
@pytest.mark.parametrize("y", [[0, -100], [-100, -100], [-1, 0], [0, 3]])
def test_labels_without_a_class_are_refused(y):
    """Ignoring some would average the two terms over different samples."""
    with pytest.raises(ValueError, match=r"`target` should be in \[0, 2\].*without a label"):
        kl_adv_loss(Z, Z, torch.tensor(y))


T, V = TypeError, ValueError


@pytest.mark.parametrize(
    ("loss", "args", "error", "message"),
    [
        (kl_adv_loss, (Z[0], Z[0], Y), V, r"`logits` should be \[batch, classes\]"),
        (kl_adv_loss, (Z + 0j, Z + 0j, Y), T, "`logits` should have a real dtype"),
        (kl_adv_loss, (Z, Z[:, :2], Y), V, "`logits_adv` should match `logits`"),
        (kl_adv_loss, (Z, Z.half(), Y), V, f"torch.float16 on {Z.device} against"),
        (kl_adv_loss, (Z.long(), Z, Y), T, "`logits` should have a floating dtype"),
        (kl_adv_loss, (Z, Z, Y.int()), V, r"indices, int64, \[2\].* Write target.long\(\)"),
        (kl_adv_loss, (Z, Z, Y[:1]), V, r"or class probabilities, \[2, 3\]. Found `\(1,\)"),
        (kl_adv_loss, (Z, Z, [0, 1]), T, "`target` should be a tensor"),
        (partial(kl_adv_loss, beta=-1.0), (Z, Z, Y), V, "`beta` should be in .* Found `beta = -1"),
        (partial(kl_adv_loss, beta="6"), (Z, Z, Y), T, r"`beta` should be a number in \[0, inf\)"),
        (consistency_loss, (Z[:1], Z, Z, Z), V, "`revised_adv` should match `revised`"),
        (consistency_loss, (Z, Z[:, :2], Z, Z), V, "`revised_adv` should match `revised`"),
        (consistency_loss, (Z, Z, (Z, Z), Z), T, "`logits` should be a tensor"),
        (consistency_loss, (Z, Z, Z, Z.double()), V, "`logits_adv` should match `logits`"),
        (consistency_loss, (Z[:1], Z[:1], Z, Z), V, "`revised` should match `logits`"),
    ],
)
def test_refusals(loss, args, error, message):
    with pytest.raises(error, match=message):
        loss(*args)
