r"""Score rules: what ranks the weights. ``score="rgp"``, the paper's, is the default.

The others are there for comparison, or are your own: any callable that takes `ScoreInputs` and
returns a tensor of scores, the highest of which are updated::

    opt = RGPSelectiveOptimizer(inner, score=lambda s: (s.adversarial * s.weight).abs())

==================  ==========================================================================
``"rgp"``           :math:`\alpha\,|g^{nat}| + (1 - \alpha)\,|g^{adv}|` (CURE, Eq. 6).
``"signed"``        :math:`\alpha\,g^{nat} + (1 - \alpha)\,g^{adv}` without absolute values, as
                    the authors' released ``rgp_soft`` ranks. There the second loss is the
                    KL term, and only layers named ``conv1`` are selected: pass that loss as
                    ``adversarial=`` and set ``rgp_select`` for the groups to follow it.
``"loss_gradient"`` :math:`|g|` of the whole loss, as the authors' released ``rgp`` ranks, in
                    all layers but the head. Needs no scoring passes.
``"random"``        Uniform draws, new at each step, repeatable by ``seed``. Needs no scoring
                    passes. What is left when the ranking is taken away.
==================  ==========================================================================

The rule of `rgp_optim.functional.topk_mask` holds for all of them: the k highest, without zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgp_optim._distributed import local, shard_of
from rgp_optim._reference import rgp_score, score_dtype
from rgp_optim._slots import Slots

__all__ = ["RULES", "NothingScored", "ScoreInputs", "ScoreRule"]


class NothingScored(RuntimeError):
    """A score was asked for, but its gradients were not taken since the last step."""

    def __init__(self, role: str) -> None:
        super().__init__(
            f"step() needs the gradients of the {role} loss, and none were taken since the last "
            "step or zero_grad. After `zero_grad()` and before `step()`, call `opt.backward(loss, "
            "natural=..., adversarial=...)`, or run that loss's backward pass inside `with "
            f"opt.score({role!r}):`."
        )


@dataclass(frozen=True)
class ScoreInputs:
    """What a score rule can look at, for one parameter; all tensors have the parameter's shape.

    With FSDP2 they are this process's shard of it, and a rule must treat each weight by itself.

    Attributes:
        weight: The parameter, before the step.
        gradient: Its ``.grad``: of the loss that is minimised, after unscaling and clipping.
        alpha: The group's ``rgp_alpha``, in [0, 1].
        step: Number of steps before this one.
        index: Position of the parameter among all parameters of the optimizer.
        seed: The optimizer's ``seed``.
    """

    weight: Tensor
    gradient: Tensor
    alpha: float
    step: int
    index: int
    seed: int
    _slots: Slots
    _parameter: Tensor

    @property
    def size(self) -> int:
        """How many weights the parameter has, over all its shards."""
        return self._parameter.numel()

    @property
    def natural(self) -> Tensor:
        """Gradient of the natural loss; zeros if it does not reach this parameter."""
        return self._or_zeros(self._slot("natural"))

    @property
    def adversarial(self) -> Tensor:
        """Gradient of the adversarial loss; zeros if it does not reach this parameter."""
        return self._or_zeros(self._slot("adversarial"))

    def rgp_gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return what ``"rgp"`` looks at: None for a gradient that counts for nothing, not both."""
        g_nat = self._slot("natural") if self.alpha > 0.0 else None
        g_adv = self._slot("adversarial") if self.alpha < 1.0 else None
        return (torch.zeros_like(self.weight), None) if g_nat is g_adv is None else (g_nat, g_adv)

    def _slot(self, role: str) -> Tensor | None:
        gradients = self._slots.gradients(role)
        if gradients is None:
            raise NothingScored(role)
        gradient = gradients.get(self._parameter)
        return None if gradient is None else local(gradient)

    def _or_zeros(self, gradient: Tensor | None) -> Tensor:
        return torch.zeros_like(self.weight) if gradient is None else gradient


ScoreRule = Callable[[ScoreInputs], Tensor]


def _rgp(s: ScoreInputs) -> Tensor:
    return rgp_score(*s.rgp_gradients(), s.alpha)


def _signed(s: ScoreInputs) -> Tensor:
    g_nat, g_adv = s.natural, s.adversarial
    if not g_nat.is_complex():  # a complex number has no order: it is refused with the score
        g_nat, g_adv = g_nat.to(score_dtype(g_nat)), g_adv.to(score_dtype(g_adv))
    return g_nat * s.alpha + g_adv * (1.0 - s.alpha)


def _loss_gradient(s: ScoreInputs) -> Tensor:
    return s.gradient.abs()


def _random(s: ScoreInputs) -> Tensor:
    # One generator for each parameter and step: a draw does not depend on what was drawn before, so
    # a resumed run repeats it. The three numbers are mixed with large odd constants.
    device = s.weight.device
    mixed = s.seed * 0x9E3779B97F4A7C15 + s.step * 0xC2B2AE3D27D4EB4F + s.index * 0x165667B19E3779F9
    generator = torch.Generator(device).manual_seed(mixed % 2**63)
    shape = s._parameter.shape  # of the whole, so that shards draw what a single process would
    draws = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return 1.0 - shard_of(draws, s._parameter)  # in (0, 1]: a score of 0 would never be selected


RULES: dict[str, ScoreRule] = {
    "rgp": _rgp,
    "signed": _signed,
    "loss_gradient": _loss_gradient,
    "random": _random,
}
