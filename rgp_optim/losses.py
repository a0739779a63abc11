"""The loss that CURE trains with, and the divergence that it shares with attack and reviser."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgp_optim._checks import check_real, check_tensor, error_text

__all__ = ["kl_adv_loss", "kl_divergence"]


def kl_adv_loss(logits: Tensor, logits_adv: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
    r"""Add to the natural cross-entropy how far the prediction moves under attack.

    .. math:: L = \mathrm{CE}(f(x), y)
              + \beta\,\mathrm{KL}\bigl(p(x) \,\|\, p(x_{adv})\bigr)

    Both terms are means over the batch, and gradients flow into both arguments of the divergence.

    Args:
        logits: Output on the natural batch, [batch, classes], floating; float16 and bfloat16 are
            computed in float32.
        logits_adv: Output on the attacked batch; shape, dtype and device of ``logits``.
        target: Class indices, [batch], int64; or class probabilities, [batch, classes], floating.
        beta: Weight of the divergence, >= 0, dimensionless. 1 is the paper's equation; the authors'
            code used 5, TRADES 6.

    Returns:
        The loss, a scalar >= 0, in nats; float32, or float64 for float64 logits.

    Raises:
        TypeError: an argument is not a tensor of the dtype asked for.
        ValueError: shapes, dtypes or devices do not match, or ``beta`` is negative.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 5; Zhang et al., TRADES, ICML 2019, Eq. 5.
    """
    check_pair(logits, logits_adv, "logits", "logits_adv")
    check_target(target, logits, probabilities=True)
    beta = check_real("beta", beta)
    natural = F.cross_entropy(widen(logits), target)
    return natural + beta * kl_divergence(logits, logits_adv)


def kl_divergence(logits_p: Tensor, logits_q: Tensor, reduction: str = "batchmean") -> Tensor:
    """Return KL(softmax(logits_p) || softmax(logits_q)) in nats, by default its batch mean.

    A class that p excludes, its logit -inf, adds 0.
    """
    log_p = F.log_softmax(widen(logits_p), dim=1)
    log_q = F.log_softmax(widen(logits_q), dim=1)
    masked = log_p.detach() == -math.inf
    log_p, log_q = log_p.masked_fill(masked, 0.0), log_q.masked_fill(masked, 0.0)
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def check_pair(first: Tensor, second: Tensor, name: str, partner: str) -> None:
    """Refuse logits that are not [batch, classes], or do not match."""
    for each, shown in ((first, name), (second, partner)):
        check_tensor(shown, each)
        if each.dim() != 2 or each.is_complex():
            found = f"{tuple(each.shape)} {each.dtype}"
            raise ValueError(error_text(shown, "be real and [batch, classes]", found))
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        found = f"{tuple(second.shape)} {second.dtype} on {second.device}"
        against = f"{found} against {tuple(first.shape)} {first.dtype} on {first.device}"
        raise ValueError(error_text(partner, f"match `{name}` in shape, dtype and device", against))


def check_target(target: Tensor, logits: Tensor, *, probabilities: bool) -> None:
    """Refuse targets that cross-entropy would misread; values are not read."""
    check_tensor("target", target, floating=False)
    indices = target.dtype == torch.int64 and target.shape == logits.shape[:1]
    soft = probabilities and target.is_floating_point() and target.shape == logits.shape
    if not (indices or soft):
        rule = f"be class indices, int64, [{logits.shape[0]}]"
        if probabilities:
            rule += f", or class probabilities, {list(logits.shape)}"
        found = f"{tuple(target.shape)} {target.dtype}"
        whole = not (target.is_floating_point() or target.is_complex())
        hint = "Write target.long()." if whole and target.shape == logits.shape[:1] else ""
        raise ValueError(error_text("target", rule, found, hint))
    if target.device != logits.device:
        raise ValueError(error_text("target", f"be on {logits.device}", str(target.device)))


def widen(logits: Tensor) -> Tensor:
    """Compute softmax in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()
