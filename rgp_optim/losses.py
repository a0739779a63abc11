"""The losses of CURE on logits, and the divergence that attacks and reviser share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgp_optim import _checks as check
from rgp_optim._checks import refuse

__all__ = ["consistency_loss", "kl_adv_loss", "kl_divergence"]

NO_LABEL = torch.iinfo(torch.int64).min  # in place of -100, which would change the mean


def kl_adv_loss(logits: Tensor, logits_adv: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Add the divergence of the attacked prediction to the natural cross-entropy.

    .. math:: L = \mathrm{CE}(f(x), y) + \beta\,\mathrm{KL}\bigl(p(x) \,\|\, p(x_{adv})\bigr)

    Both terms are means over the batch; gradients flow into both arguments of the divergence.

    Args:
        logits: Output on the natural batch, [batch, classes], floating; float16 and bfloat16 are
            computed in float32.
        logits_adv: Output on the attacked batch; shape, dtype and device of ``logits``.
        target: Class indices, [batch], int64 (-100 is none); or probabilities, [batch, classes],
            floating. The range is validated on the CPU only: a GPU would synchronise.
        beta: Weight of the divergence, >= 0, dimensionless. 1 is the paper's equation; the authors'
            code uses 5, TRADES 6.

    Returns:
        The loss, a scalar >= 0, in nats; float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument is not a tensor of the required dtype.
        ValueError: shapes, dtypes or devices do not match; a label or ``beta`` is out of range.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 5; Zhang et al., TRADES, ICML 2019, Eq. 5.
    """
    check_pair(logits, logits_adv, "logits", "logits_adv")
    check.target(target, logits, probabilities=True)
    beta = check.real("beta", beta)
    if target.is_floating_point():
        target = target.to(widen(logits).dtype)
    else:
        check.classes(target, logits)
    natural = F.cross_entropy(widen(logits), target, ignore_index=NO_LABEL)
    return natural + beta * kl_divergence(logits, logits_adv)


def consistency_loss(
    revised: Tensor, revised_adv: Tensor, logits: Tensor, logits_adv: Tensor
) -> Tensor:
    r"""Measure how far the model's predictions are from those of its averaged copy.

    .. math:: L_{CR} = \mathrm{KL}\bigl(p(x; \theta_{rev}) \,\|\, p(x; \theta)\bigr)
              + \mathrm{KL}\bigl(p(x_{adv}; \theta_{rev}) \,\|\, p(x_{adv}; \theta)\bigr)

    Args:
        revised: The copy's logits on the natural batch, [batch, classes], floating; detached here.
        revised_adv: The copy's logits on the attacked batch, as ``revised``.
        logits: The model's logits on the natural batch, with graph; shape, device of ``revised``.
        logits_adv: The model's logits on the attacked batch, as ``logits``.

    Returns:
        The loss, a mean over the batch, >= 0, in nats; float32, or float64 if a logit is float64.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, dtypes or devices do not match.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 8.
    """
    check_pair(logits, logits_adv, "logits", "logits_adv")
    check_pair(revised, revised_adv, "revised", "revised_adv")
    check_pair(logits, revised.to(logits.dtype), "logits", "revised")
    return kl_divergence(revised.detach(), logits) + kl_divergence(revised_adv.detach(), logits_adv)


def kl_divergence(logits_p: Tensor, logits_q: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return KL(softmax(logits_p) || softmax(logits_q)) in nats, by default its batch mean.

    A class that p excludes, its logit -inf, adds 0.
    """
    log_p, log_q = (F.log_softmax(widen(logits), dim=1) for logits in (logits_p, logits_q))
    masked = log_p.detach() == -math.inf
    log_p, log_q = log_p.masked_fill(masked, 0.0), log_q.masked_fill(masked, 0.0)
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def check_pair(first: Tensor, second: Tensor, name: str, partner: str) -> None:
    """Refuse logits that are not [batch, classes], or do not match."""
    for logits, shown in ((first, name), (second, partner)):
        check.tensor(shown, logits)
        if logits.dim() != 2:
            refuse(shown, "be [batch, classes]", f"{tuple(logits.shape)}")
    check.match(first, second, name, partner)


def widen(logits: Tensor) -> Tensor:
    """Return the logits in float32 at least, for softmax."""
    return logits if logits.dtype == torch.float64 else logits.float()
