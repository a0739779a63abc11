"""Gradients for the score: taken in the backward pass of a scored loss, read by a score rule."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from rgp_optim import _checks as check
from rgp_optim import _distributed as distributed
from rgp_optim._checks import refuse
from rgp_optim._distributed import Ranks, Refused, is_sharded, local, shard
from rgp_optim._reference import rgp_score

ROLES = ("natural", "adversarial")
DONATED = (
    "This loss shares a compiled graph with another, whose backward pass writes over what it reads."
    " Before anything is compiled, `import torch._functorch.config`, set `torch._functorch.config."
    "donated_buffer = False` and `torch.compiler.config.cache_key_tag = 'kept graphs'` (or PyTorch "
    "may take such code from its cache on disk). Or give each loss a forward pass of its own."
)

DROPPED = (
    "Earlier scores were dropped: no parameter has a gradient. That is right if a step was skipped."
    " Otherwise keep gradients in `.grad` until the step, or score the sum of the losses once."
)


def check_loss(name: str, loss: Any) -> None:
    """Refuse everything but one number with a graph."""
    hint = "Without an attack yet, pass the natural loss." if name == "adversarial" else ""
    if not isinstance(loss, Tensor):
        refuse(name, "be a scalar tensor", type(loss).__name__, hint, TypeError)
    if loss.numel() != 1:
        refuse(name, "be a scalar", f"shape {tuple(loss.shape)}", "Reduce it with .mean().")
    if not loss.requires_grad:
        attached = "Compute it from the model's output with gradients enabled; do not detach it."
        refuse(name, "carry a graph", "requires_grad = False", hint or attached)


def roles_read(rule: Any, alpha: float) -> Sequence[str]:
    """Return the roles that a score rule reads, or may read."""
    return ROLES if rule != "rgp" or 0.0 < alpha < 1.0 else ROLES[:1] if alpha else ROLES[1:]


def refuse_sparse(name: str, gradient: Tensor) -> NoReturn:
    """Refuse a sparse gradient of a selected parameter."""
    hint = "Set 'rgp_select': False for the parameter's group, or make the gradient dense."
    found = f"a {gradient.layout} gradient, {tuple(gradient.shape)}"
    refuse(name, "be dense", found, hint, TypeError)


class Scored(torch.autograd.Function):
    """The identity on a loss; its backward takes the scores before the loss's graph runs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, take: Any, losses: dict[str, Tensor]) -> Any:
        ctx.take, ctx.roles, ctx.token = take, list(losses), object()
        ctx.save_for_backward(*losses.values())
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        losses = dict(zip(ctx.roles, ctx.saved_tensors, strict=True))
        return grads[0] + ctx.take(losses, grads[0], ctx), None, None


class NothingScored(Refused):
    """A score was asked for, but its gradients were not taken since the last step."""

    def __init__(self, role: str) -> None:
        super().__init__(
            f"step() needs the gradients of the {role} loss, and none were taken since the last "
            f"step or zero_grad. Give `{role}=` in `loss = opt.scored(loss, natural=..., "
            "adversarial=...)` and run `loss.backward()` before `step()`. Without an attack pass "
            "the natural loss as both. Engines that step copies of the weights (DeepSpeed's bf16, "
            "fp16) leave nothing to score: use DistributedDataParallel or FSDP2's `fully_shard`."
        )


@dataclass
class Scores:
    """The gradients of both losses since the last step, by role and parameter."""

    ranks: Ranks
    taken: dict[str, dict[Tensor, Tensor | None]] = field(default_factory=dict)  # None: unused
    thread: int = 0  # which takes scores now
    _tokens: set[object] = field(default_factory=set)  # of the scored losses that gave them
    _tested: bool = False  # whether graphs can run several times
    _retained: bool = False  # whether tensors with `retain_grad` were found then
    _warned: bool = False
    _pass: int = -1  # the backward pass that took last

    @property
    def waiting(self) -> bool:
        """Whether scores wait for a step, or are being taken."""
        return bool(self.taken or self.thread)

    @property
    def running(self) -> bool:
        """Whether the backward pass that takes the scores still runs."""
        return bool(self.thread) or self._pass == torch._C._current_graph_task_id() != -1

    def clear(self) -> None:
        """Discard the scores."""
        self.taken.clear()
        self._tokens.clear()

    @torch.no_grad()
    def take(
        self, losses: dict[str, Tensor], params: Sequence[Tensor], grad: Tensor, node: Any
    ) -> Tensor:
        """Add the gradients of the losses, each seeded with the gradient that reached ``node``.

        Returns 0, or NaN if one of them is not finite: for the training gradient, so that a
        gradient scaler skips the step.
        """
        if self.thread:
            raise Refused(
                "A scored loss was given as `natural` or `adversarial`: score once."
                if self.thread == get_ident()
                else "Two threads run scored backward passes of one optimizer at the same time. "
                "Let one wait for the other, with a lock."
            )
        if not params:
            return torch.zeros_like(grad)
        fresh = node.token not in self._tokens and not self.running
        if fresh and all(p.grad is None for p in params):
            if self.taken and not self._warned:
                self._warned = True
                warnings.warn(DROPPED, stacklevel=2)
            self.clear()
        self._tokens.add(node.token)
        self._pass = torch._C._current_graph_task_id()  # other scored losses may share it
        test = not (self._tested or grad.is_meta or check.capturing(grad))
        before = _gradients(params) if test or self._retained else {}
        self.thread = get_ident()
        try:
            repeated = distributed.repeated(losses, node) if test else []
            passes: dict[str, tuple[Any, Any]] = {}
            for role, loss in losses.items():
                factor = grad.to(loss.device, loss.dtype).reshape(loss.shape)
                found = distributed.take(role, loss, params, factor) if role in repeated else ()
                first = [None if g is None else local(g).clone() for g in found]
                gradients = distributed.take(role, loss, params, factor)
                passes[role] = first, gradients
                self._add(role, params, gradients)
            apart = {r: _apart(*passes[r], grad.device) for r in repeated}  # all are over
            passed = test and _same(apart, grad.device, self.ranks)
            self._put_back(before)
            self._tested |= passed
            taken = [local(g) for held in self.taken.values() for g in held.values()]
            largest = get_total_norm([g for g in taken if g is not None and g.numel()], math.inf)
            return (largest * 0.0).to(grad.device, grad.dtype)
        except BaseException as error:
            self.clear()  # half a score would select the wrong weights
            if "donated buffers" in str(error):
                raise RuntimeError(DONATED) from error
            raise
        finally:
            self.thread = 0

    def _put_back(self, before: dict[Tensor, tuple[Tensor | None, int]]) -> None:
        """Restore `.grad` of tensors with `retain_grad`; refuse if a leaf's has changed."""
        for tensor, (gradient, version) in before.items():
            if not tensor.is_leaf:
                tensor.grad, self._retained = gradient, True
            elif tensor.grad is not gradient or (
                gradient is not None and gradient._version != version
            ):
                raise Refused(
                    f"scored: the `.grad` of a tensor of shape {tuple(tensor.shape)} changed while "
                    "the scores were taken: a layer calls `backward` inside its own backward pass, "
                    f"or another thread ran one. {distributed.ONCE}"
                )

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
            raise Refused(
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

    def average(self, params: Sequence[Tensor]) -> None:
        """Replace gradients by their means over ranks that each have a batch of their own.

        A loss that reaches a parameter on one rank reaches it on all.
        """
        for p in params:
            if p.requires_grad and any(p not in held for held in self.taken.values()):
                raise RuntimeError(
                    f"step(): a parameter of shape {tuple(p.shape)} is selected in, but was not "
                    "when the loss was scored. Change `rgp_update_fraction`, `rgp_select` or "
                    "`requires_grad` before `scored`, or after the step."
                )
        plain = [p for p in params if not is_sharded(p)] if self.ranks.size > 1 else []
        keys = [(role, p) for role in ROLES if role in self.taken for p in plain]
        if keys:
            held = [(self.taken[role].get(p), p) for role, p in keys]
            filled = [torch.zeros_like(p) if g is None else g for g, p in held]
            unused = [i for i, (g, _) in enumerate(held) if g is None]
            reached = torch.ones(len(keys), device=filled[0].device)
            for i in unused:
                reached[i] = 0.0
            *means, reached = self.ranks.average([*filled, reached])
            # Read on the host only where a loss leaves a parameter out.
            nowhere = {i for i in unused if float(reached[i]) == 0.0}
            for i, (role, p) in enumerate(keys):
                self.taken[role][p] = None if i in nowhere else means[i]

    def reaches(self, p: Tensor, alpha: float, rule: Any) -> bool:
        """Return whether a loss that the score reads depends on a parameter."""
        read = roles_read(rule, alpha) if rule == "rgp" else list(self.taken)
        if missing := [role for role in read if role not in self.taken]:
            raise NothingScored(missing[0])
        held = [self.taken[role].get(p) for role in read]
        return not held or any(g is not None for g in held) or not p.requires_grad

    def pair(self, p: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return this rank's natural and adversarial gradient, not both None.

        Every rank must call: partial sums of a sharded gradient are reduced here.
        """
        g_nat, g_adv = (shard(self.taken.get(role, {}).get(p), p) for role in ROLES)
        if g_nat is None and g_adv is None:
            g_nat = torch.zeros_like(local(p.detach()))
        return g_nat, g_adv

    def score(self, p: Tensor, alpha: float, rule: Any) -> Tensor:
        """Return the scores of this rank's part of a parameter, under a rule."""
        if rule == "rgp":
            return rgp_score(*self.pair(p), alpha)
        weight = local(p.detach())
        score = rule(ScoreInputs(p, weight, shard(p.grad, p), alpha, self))
        if not isinstance(score, Tensor) or not score.is_floating_point():
            found = f"{getattr(score, 'dtype', type(score).__name__)}"
            refuse("score", "return a tensor of a real floating dtype", found, error=TypeError)
        if score.shape != weight.shape or score.device != weight.device:
            rule = f"return the weight's shape and device, {tuple(weight.shape)} on {weight.device}"
            refuse("score", rule, f"{tuple(score.shape)} on {score.device}")
        return score.detach()


def _gradients(params: Sequence[Tensor]) -> dict[Tensor, tuple[Tensor | None, int]]:
    """Return `.grad` and its version of parameters and of all tensors with `retain_grad`.

    Other leaves are left out: a thread may train another model meanwhile.
    """
    with torch._C.DisableTorchFunctionSubclass():
        found = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.requires_grad]
        held = [(t, t.grad) for t in [*params, *(t for t in found if t.retains_grad)]]
        return {t: (g, 0 if g is None or g.is_inference() else g._version) for t, g in held}


def _apart(first: Sequence[Any], second: Sequence[Any], device: torch.device) -> Tensor:
    """Return the norms of the difference and of the first; both are 0 without weights."""
    pairs = [(a, local(b)) for a, b in zip(first, second, strict=True) if a is not None]
    sizes = [torch.stack([(a - b).float().norm(), a.float().norm()]).to(device) for a, b in pairs]
    norms: Tensor = torch.stack([torch.zeros(2, device=device), *sizes]).norm(dim=0)
    return norms


def _same(found: dict[str, Tensor], device: torch.device, ranks: Ranks) -> bool:
    """Refuse gradients of two passes that differ; False if finite nonzero ones must decide.

    All ranks decide alike: a rank without weights, or alone with an overflow, would otherwise
    repeat passes, and their collectives, by itself.
    """
    untested = torch.tensor([0.0, 1e-30], device=device)  # hides no other rank's fault
    table = torch.stack([found.get(role, untested) for role in ROLES])
    if ranks.size > 1:
        (table,) = ranks.average([table])
    passed = True
    for role, (apart, size) in zip(ROLES, table.tolist(), strict=True):
        if apart > 0.01 * size:  # kernels that add in any order differ by far less
            raise Refused(
                f"scored: two backward passes of the {role} loss give gradients "
                f"{apart / size:.0%} apart. {distributed.ONCE}"
            )
        passed &= 0.0 < size < math.inf
    return passed


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
        if role not in self._scores.taken:
            raise NothingScored(role)
        gradient = shard(self._scores.taken[role].get(self.parameter), self.parameter)
        return torch.zeros_like(self.weight) if gradient is None else gradient
