"""Gradients for the score: taken in the backward pass of a scored loss, read by a score rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from rgp_optim import _distributed as distributed
from rgp_optim._checks import refuse
from rgp_optim._distributed import Ranks, is_sharded, local, shard
from rgp_optim._reference import rgp_score

ROLES = ("natural", "adversarial")
DONATED = (
    "This loss shares a compiled graph with another, and its backward pass was compiled to write "
    "over what it reads. Before anything is compiled, `import torch._functorch.config`, set "
    "`torch._functorch.config.donated_buffer = False` and `torch.compiler.config.cache_key_tag = "
    "'kept graphs'`: without the second, PyTorch may take such code from its cache on disk, and "
    "gradients are wrong without an error. Or give each loss a forward pass of its own."
)


def check_loss(name: str, loss: Any) -> None:
    """Refuse everything but one number with a graph."""
    if not isinstance(loss, Tensor):
        refuse(name, "be a scalar tensor", type(loss).__name__, error=TypeError)
    if loss.numel() != 1:
        refuse(name, "be a scalar", f"shape {tuple(loss.shape)}", "Reduce it with .mean().")
    if not loss.requires_grad:
        hint = "Compute it from the model's output with gradients enabled; do not detach it."
        refuse(name, "carry a graph", "requires_grad = False", hint)


def refuse_sparse(name: str, gradient: Tensor) -> NoReturn:
    """Refuse a sparse gradient of a selected parameter."""
    hint = "Set 'rgp_select': False for the parameter's group, or make the gradient dense."
    found = f"a {gradient.layout} gradient, {tuple(gradient.shape)}"
    refuse(name, "be dense", found, hint, TypeError)


class Scored(torch.autograd.Function):
    """The identity on a loss; its backward takes the scores before the loss's graph runs."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, take: Callable[..., None], losses: dict[str, Tensor]
    ) -> Any:
        """Keep the losses of the score until the graph of ``loss`` is freed."""
        ctx.take, ctx.roles = take, list(losses)
        ctx.save_for_backward(*losses.values())
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Take the scores under the incoming gradient, then pass it on."""
        ctx.take(dict(zip(ctx.roles, ctx.saved_tensors, strict=True)), grads[0])
        return grads[0], None, None


class NothingScored(RuntimeError):
    """A score was asked for, but its gradients were not taken since the last step."""

    def __init__(self, role: str) -> None:
        super().__init__(
            f"step() needs the gradients of the {role} loss, and none were taken since the last "
            "step or zero_grad. Write `loss = opt.scored(loss, natural=..., adversarial=...)` and "
            "run `loss.backward()` before `step()`, under the same settings."
        )


@dataclass
class Scores:
    """The gradients of both losses since the last step, by role and parameter."""

    taken: dict[str, dict[Tensor, Tensor | None]] = field(default_factory=dict)  # None: unused
    taking: bool = False
    _warned: bool = False
    _pass: int = -1  # the backward pass that took last

    @property
    def waiting(self) -> bool:
        """Whether scores wait for a step, or are being taken."""
        return bool(self.taken) or self.taking

    @property
    def running(self) -> bool:
        """Whether the backward pass that takes the scores still runs."""
        return self.taking or self._pass == torch._C._current_graph_task_id() != -1

    @torch.no_grad()
    def take(self, losses: dict[str, Tensor], params: Sequence[Tensor], grad: Tensor) -> None:
        """Add the gradients of the losses, each seeded with the incoming gradient."""
        if self.taking:
            raise RuntimeError("A scored loss was given as `natural` or `adversarial`: score once.")
        if not params:  # frozen, say
            return
        if not self.running and all(p.grad is None for p in params):
            self._drop()
        self._pass = torch._C._current_graph_task_id()  # other scored losses may share it
        self.taking = True
        try:
            for role, loss in losses.items():
                factor = grad.to(loss.device, loss.dtype).reshape(loss.shape)
                self._add(role, params, distributed.take(loss, params, factor))
        except BaseException as error:
            self.taken.clear()  # half a score would select the wrong weights
            if "donated buffers" in str(error):
                raise RuntimeError(DONATED) from error
            raise
        finally:
            self.taking = False

    def _drop(self) -> None:
        """Forget scores whose gradients are gone, as after a skipped step."""
        if self.taken and not self._warned:
            self._warned = True
            warnings.warn(
                "Earlier scores were dropped: no parameter has a gradient. That is right after a "
                "skipped step. Where gradients are collected outside `.grad`, only the last scores "
                "count: keep them in `.grad` until the step, or score the sum of the losses once.",
                stacklevel=2,
            )
        self.taken.clear()

    def _add(self, role: str, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients to a role's; never in place, they may share memory."""
        if all(gradient is None for gradient in gradients):
            hint = "Compute it from the output of the model that this optimizer trains."
            if any(is_sharded(p) for p in params):
                hint += (
                    " Or FSDP2's gradient synchronisation is off: leave "
                    "`set_requires_gradient_sync(True)`; in Accelerate use "
                    "`GradientAccumulationPlugin(sync_each_batch=True)`."
                )
            raise RuntimeError(
                f"scored: the {role} loss depends on no parameter in which weights are selected. "
                f"{hint}"
            )
        held = self.taken.setdefault(role, {})
        for p, gradient in zip(params, gradients, strict=True):
            earlier = held.setdefault(p, None)
            if gradient is not None:
                if gradient.layout != torch.strided:
                    refuse_sparse(f"{role} gradient", gradient)
                gradient = gradient.detach()
                held[p] = gradient if earlier is None else earlier + gradient

    def average(self, ranks: Ranks, params: Sequence[Tensor]) -> None:
        """Replace gradients by their means over ranks that each have a batch of their own."""
        keys = [(r, p) for r in ROLES if r in self.taken for p in params if not is_sharded(p)]
        if ranks.size > 1 and keys:
            held = [(self.taken[role].get(p), p) for role, p in keys]  # None: unused on this rank
            filled = [torch.zeros_like(p) if g is None else g for g, p in held]
            for (role, p), mean in zip(keys, ranks.average(filled), strict=True):
                self.taken[role][p] = mean

    def get(self, role: str, p: Tensor) -> Tensor | None:
        """Return this rank's gradient of a role; None where the loss does not depend on ``p``.

        Every rank must call: partial sums of a sharded gradient are reduced here.
        """
        if role not in self.taken:
            raise NothingScored(role)
        if p not in self.taken[role] and p.requires_grad:
            raise RuntimeError(
                f"step(): a parameter of shape {tuple(p.shape)} is selected in, but was not when "
                "the loss was scored. Change `rgp_update_fraction`, `rgp_select` or "
                "`requires_grad` before `scored`, or after the step."
            )
        gradient: Tensor | None = shard(self.taken[role].get(p), p)
        return gradient

    def pair(self, p: Tensor, alpha: float) -> tuple[Tensor | None, Tensor | None]:
        """Return the natural and the adversarial gradient that the score reads, not both None."""
        g_nat = self.get("natural", p) if alpha > 0.0 else None
        g_adv = self.get("adversarial", p) if alpha < 1.0 else None
        if g_nat is None and g_adv is None:
            g_nat = torch.zeros_like(local(p.detach()))
        return g_nat, g_adv

    def score(self, p: Tensor, alpha: float, rule: Any) -> Tensor:
        """Return the scores of this rank's part of a parameter, under a rule."""
        if rule == "rgp":
            return rgp_score(*self.pair(p, alpha), alpha)
        weight = local(p.detach())
        score = rule(ScoreInputs(p, weight, shard(p.grad, p), alpha, self))
        if not isinstance(score, Tensor) or not score.is_floating_point():
            found = f"{getattr(score, 'dtype', type(score).__name__)}"
            refuse("score", "return a tensor of a real floating dtype", found, error=TypeError)
        if score.shape != weight.shape or score.device != weight.device:
            rule = f"return the weight's shape and device, {tuple(weight.shape)} on {weight.device}"
            refuse("score", rule, f"{tuple(score.shape)} on {score.device}")
        return score.detach()


@dataclass(frozen=True)
class ScoreInputs:
    """Inputs of a score rule for one parameter; all tensors have the parameter's shape.

    Of a sharded parameter a rule sees this rank's shard, and must treat each weight by itself. A
    rule that never reads ``natural`` or ``adversarial`` needs no scored loss.

    Attributes:
        parameter: The parameter, whole or a DTensor.
        weight: Its values before the step.
        gradient: Its ``.grad``: of the training loss, after unscaling and clipping.
        alpha: The group's ``rgp_alpha``, in [0, 1].
    """

    parameter: Tensor
    weight: Tensor
    gradient: Tensor
    alpha: float
    _scores: Scores

    @property
    def natural(self) -> Tensor:
        """Gradient of the natural loss; zeros where that loss does not depend on the weight."""
        return self._read("natural")

    @property
    def adversarial(self) -> Tensor:
        """Gradient of the adversarial loss, likewise."""
        return self._read("adversarial")

    def _read(self, role: str) -> Tensor:
        gradient = self._scores.get(role, self.parameter)
        return torch.zeros_like(self.weight) if gradient is None else gradient
