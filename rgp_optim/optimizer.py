"""`RGPSelectiveOptimizer`: any torch optimizer, updating only the top-scored weights.

Four steps: take the gradients for the score, select, run the inner step, restore.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim uses it: imports no compiler

from rgp_optim import _checks as check
from rgp_optim import _distributed as distributed
from rgp_optim import _scores, functional
from rgp_optim._checks import refuse
from rgp_optim._distributed import Ranks, Refused, is_sharded, local
from rgp_optim._reference import Entry, by_pool
from rgp_optim._scores import ROLES, NothingScored, Scored, ScoreInputs, Scores
from rgp_optim.functional import BACKENDS, SCOPES, Backend, Scope
from rgp_optim.groups import Settings
from rgp_optim.reviser import ConsistencyReviser

__all__ = ["RGPSelectiveOptimizer", "ScoreInputs"]

Conserve = Literal["weights", "gradients", "update"]
REVISER = "rgp_reviser"  # in a checkpoint
SAM_HINT = (
    "Wrap the optimizer inside it: SAM(params, lambda g, **k: RGPSelectiveOptimizer("
    "torch.optim.SGD(g, **k))), with the loss scored in the second pass."
)


@dataclass
class _Holder:
    """All state of the wrapper in one object, which trainers' proxies of the wrapper share."""

    inner: torch.optim.Optimizer
    defaults: dict[str, Any]  # of the rgp_* settings of a param group
    scope: Scope
    conserve: Conserve
    score: str | Callable[[ScoreInputs], Tensor]
    backend: Backend
    scores: Scores
    reviser: ConsistencyReviser | None = None
    masks: dict[Tensor, Tensor] = field(default_factory=dict)  # of the last step
    ranks_compared: bool = False  # once, and again after groups or a checkpoint have changed
    used_closure: bool = False
    needs_closure: bool = False
    copies_checked: bool = False
    warned: set[str] = field(default_factory=set)

    def warn(self, kind: str, text: str, stacklevel: int = 4) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(text, stacklevel=stacklevel)


def _of_inner(name: str, doc: str) -> Any:
    """Return a property of the wrapper that reads and sets the inner optimizer's attribute."""
    return property(
        lambda self: getattr(self._holder.inner, name),
        lambda self, value: setattr(self._holder.inner, name, value),
        doc=doc,
    )


def _of_groups(name: str) -> Any:
    """Return a property of the wrapper that reads and sets a setting that all groups share."""
    key = f"rgp_{name}"

    def get(self: RGPSelectiveOptimizer) -> float:
        self._complete_groups()
        values = {group[key] for group in self.param_groups}
        if len(values) > 1:
            refuse(key, "be the same in all groups", f"{values}", "Read `param_groups`.")
        return float(values.pop()) if values else float(self._holder.defaults[key])

    def set_(self: RGPSelectiveOptimizer, value: float) -> None:
        self._holder.defaults[key] = check.fraction(name, value)
        for group in self.param_groups:
            group[key] = self._holder.defaults[key]

    return property(get, set_, doc=f"``{key}`` of all param groups, in [0, 1].")


class RGPSelectiveOptimizer(torch.optim.Optimizer):
    r"""Wrap an optimizer so that each step updates the top-scored weights and conserves the rest.

    Each weight is scored by its robust gradient prominence,

    .. math:: \mathrm{RGP}(w) = \alpha\,|\partial\,\mathrm{CE}(x) / \partial w|
              + (1 - \alpha)\,|\partial\,\mathrm{CE}(x_{adv}) / \partial w|,

    and the highest are updated, as `rgp_optim.functional.topk_mask` states in full. The wrapper is
    a ``torch.optim.Optimizer``; ``param_groups``, ``state`` and checkpoints are the inner one's::

        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = RGPSelectiveOptimizer(inner, update_fraction=0.7, alpha=0.1)
        loss = opt.scored(loss, natural=F.cross_entropy(logits, y),
                          adversarial=F.cross_entropy(logits_adv, y))
        opt.zero_grad()
        loss.backward()
        opt.step()

    A param group's own ``rgp_update_fraction``, ``rgp_alpha`` and ``rgp_select`` (None: select in
    tensors with two or more dimensions, update the others whole; True: select in all; False: in
    none) win over the arguments here. They may be set before or after wrapping, may change during
    training, and are saved in checkpoints. Complex tensors are left to the inner optimizer.

    Args:
        optimizer: The optimizer to wrap, an instance; it may have stepped already. From now on call
            the wrapper's methods.
        update_fraction: Share of the selected weights that is updated, dimensionless, in [0, 1].
            The paper's p is the percentage conserved: p = 30 is 0.7. May be assigned: all groups.
        alpha: Share of the natural gradient in the score, dimensionless, in [0, 1]. Likewise.
        scope: ``"tensor"``: the fraction holds in each tensor, as in the paper. ``"global"``: over
            all selected tensors; groups with different fractions are selected separately.
        conserve: ``"weights"``: a conserved weight is bit-identical after the step; the inner
            optimizer sees a gradient of 0 there, so its momentum decays. ``"gradients"``: only the
            gradient is set to 0, as in the authors' code: momentum and weight decay still move the
            weight. ``"update"``: the inner optimizer sees the whole gradient, and the weight is
            restored.
        score: ``"rgp"``, or a callable from `ScoreInputs` to a tensor of scores, the highest of
            which are updated: ``lambda s: (s.adversarial * s.weight).abs()``.
        backend: ``"auto"`` takes the fastest that runs on the tensors; a named one must run.
        process_group: The processes that train this model together and step alike. None: all.
        reviser: A `ConsistencyReviser` of the optimized model. ``step()`` updates it (unless it is
            skipped), and checkpoints carry it. May be assigned, say when natural training ends.

    Raises:
        TypeError: ``optimizer`` is no optimizer, wrapped already, or does not step once for each
            gradient (LBFGS, SAM); an argument has the wrong type.
        ValueError: a number is out of its range, a name unknown, or ``differentiable`` is True.
        RuntimeError: the parameters are FSDP1's.

    Note:
        ``.grad`` is an ordinary gradient between backward and step: unscaling, clipping and logging
        see it whole. ``step()`` sets it to 0 where weights are conserved (not with ``"update"``).
        Step hooks of the wrapper and of the inner optimizer both run; global step hooks run twice.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6 and Algorithm 1.
    """

    _step_supports_amp_scaling = False  # a fused inner optimizer must not unscale by itself
    _holder: _Holder

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        update_fraction: float = 0.7,
        alpha: float = 0.1,
        scope: Scope = "tensor",
        conserve: Conserve = "weights",
        score: Literal["rgp"] | Callable[[ScoreInputs], Tensor] = "rgp",
        backend: Backend = "auto",
        process_group: torch.distributed.ProcessGroup | None = None,
        reviser: ConsistencyReviser | None = None,
        **options: Any,
    ) -> None:
        inner = _check_inner(optimizer, options)
        if not callable(score):
            check.choice("score", score, ("rgp",), "Or pass a callable from ScoreInputs to scores.")
        check.choice("scope", scope, SCOPES)
        check.choice("conserve", conserve, ("weights", "gradients", "update"))
        check.choice("backend", backend, BACKENDS)
        hint = "Conserving 30 % is update_fraction=0.7."
        closure = inspect.signature(inner.step).parameters.get("closure")
        self._holder = _Holder(
            inner=inner,
            defaults={
                "rgp_update_fraction": check.fraction("update_fraction", update_fraction, hint),
                "rgp_alpha": check.fraction("alpha", alpha),
                "rgp_select": None,
            },
            scope=scope,
            conserve=conserve,
            score=score,
            backend=backend,
            scores=Scores(Ranks(process_group)),
            needs_closure=closure is not None and closure.default is closure.empty,
        )
        self._check_groups()
        self.reviser = reviser
        for hook in inner._optimizer_step_pre_hooks.values():
            if isinstance(hook, _Guard):  # of an earlier wrapper, whose settings are not the user's
                hook.forget(inner.param_groups)
        self.__setstate__(self.__getstate__())
        self._complete_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set up hook tables and the guard; so for copies and pickles too."""
        super().__setstate__(state)
        self.inner.register_step_pre_hook(_Guard(self._holder))

    def __getstate__(self) -> dict[str, Any]:
        """Return the contents of a copy: not the ``step`` that schedulers put on an instance."""
        return {"_holder": self._holder}

    def __getattr__(self, name: str) -> Any:
        """Forward the inner optimizer's public methods, except those that step."""
        inner = self.__dict__["_holder"].inner if "_holder" in self.__dict__ else None
        if name.startswith("_") or "step" in name or not callable(getattr(inner, name, None)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inner, name)

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The wrapped optimizer. Its own ``step`` updates all weights."""
        return self._holder.inner

    param_groups: list[dict[str, Any]] = _of_inner("param_groups", "The inner optimizer's groups.")
    state: Any = _of_inner("state", "The inner optimizer's state, by parameter.")
    defaults: dict[str, Any] = _of_inner("defaults", "The inner optimizer's defaults.")
    update_fraction: float = _of_groups("update_fraction")
    alpha: float = _of_groups("alpha")
    scope = property(lambda self: self._holder.scope, doc="``scope``, fixed.")
    conserve = property(lambda self: self._holder.conserve, doc="``conserve``, fixed.")
    score = property(lambda self: self._holder.score, doc="``score``, fixed.")
    backend = property(lambda self: self._holder.backend, doc="``backend``, fixed.")
    process_group = property(lambda self: self._holder.scores.ranks.group, doc="Fixed, too.")

    @property
    def reviser(self) -> ConsistencyReviser | None:
        """The reviser that ``step()`` updates; assignable; None removes it."""
        return self._holder.reviser

    @reviser.setter
    def reviser(self, reviser: ConsistencyReviser | None) -> None:
        holder, before = self._holder, self._holder.reviser
        if reviser is not None and not isinstance(reviser, ConsistencyReviser):
            refuse("reviser", "be a ConsistencyReviser", type(reviser).__name__, error=TypeError)
        ours = set(self._parameters())
        if reviser and ours.isdisjoint(check.unwrapped(reviser._student).parameters()):
            hint = "Make it of the model whose parameters the optimizer holds."
            refuse("reviser", "average the model that is optimized", "no shared parameter", hint)
        if before is not None and before._joined is holder:
            before._joined = None
        holder.reviser = reviser
        if reviser is not None:
            reviser._joined = holder  # and no other's: two optimizers would count a step twice

    @property
    def scoring(self) -> bool:
        """True during a pass that takes the scores, so that hooks can skip it."""
        return bool(self._holder.scores.thread)

    def _complete_groups(self) -> None:
        """Give each param group the ``rgp_*`` settings it lacks."""
        for group in self.param_groups:
            group |= {**self._holder.defaults, **group}

    def _check_groups(self) -> None:
        """Refuse settings and parameters that cannot be selected in."""
        for group in self.param_groups:
            Settings.of(self._holder.defaults | group)
            if group.get("differentiable"):
                hint = "Masked and restored weights have no derivative."
                refuse("differentiable", "be False", True, hint)
        params = self._parameters()
        if any(hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened") for p in params):
            found = "a parameter of FullyShardedDataParallel (FSDP1)"
            hint = "Shard the model with `torch.distributed.fsdp.fully_shard` (FSDP2)."
            refuse("optimizer", "have parameters that keep their shape", found, hint, RuntimeError)
        plain = [p for p in params if type(p) in (Tensor, nn.Parameter)]
        starts = Counter(p.data_ptr() for p in plain if p.data_ptr())  # 0: empty, meta, XLA
        for p in plain:  # the mask of one would hold for the other
            if starts[p.data_ptr()] > 1:
                hint = "Tie weights by using one parameter twice, or give each memory of its own."
                found = f"two parameters at one address, one of shape {tuple(p.shape)}"
                refuse("optimizer", "have parameters with memory of their own", found, hint)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the inner optimizer; missing ``rgp_*`` settings get the defaults."""
        self._holder.inner.add_param_group(param_group)
        self._holder.ranks_compared = False
        try:
            self._check_groups()
        except BaseException:
            self.param_groups.pop()
            raise
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's checkpoint, with the ``rgp_*`` settings in its groups.

        The state of a joined reviser is in it, as ``"rgp_reviser"``. Tools that keep only ``state``
        and ``param_groups`` (torch.distributed.checkpoint) lose it: save ``reviser.state_dict()``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._complete_groups()
        state_dict = self._holder.inner.state_dict()
        if self.reviser is not None:
            state_dict = {**state_dict, REVISER: self.reviser.state_dict()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain inner optimizer.

        ``rgp_*`` settings in the checkpoint replace those of the groups, as torch does with ``lr``;
        settings that it lacks stay. A joined reviser is loaded, too, if the checkpoint has one.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._complete_groups()
        ours = [{name: g[name] for name in self._holder.defaults} for g in self.param_groups]
        for group in state_dict.get("param_groups", ()):  # other formats are the inner one's
            Settings.of({**self._holder.defaults, **group})
        reviser, copied = self.reviser, state_dict.pop(REVISER, None)
        if reviser and copied is not None:
            reviser._check_state(copied)
        self._holder.inner.load_state_dict(state_dict)
        if reviser and copied is not None:
            reviser.load_state_dict(copied)
        elif reviser and self.state:
            text = (
                "The checkpoint has no averaged copy: the reviser stays as it is. Load it with "
                "`reviser.load_state_dict` if it was saved apart."
            )
            self._holder.warn("copy", text, stacklevel=3)
        for group, before in zip(self.param_groups, ours, strict=True):
            group |= {**before, **group}
        self._holder.ranks_compared = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and scores. Scores of a loss whose backward pass comes later stay."""
        self._holder.scores.clear()
        options = {} if set_to_none else {"set_to_none": False}  # older ones have no options
        self._holder.inner.zero_grad(**options)

    @_disable_dynamo
    def scored(
        self, loss: Tensor, *, natural: Tensor | None = None, adversarial: Tensor | None = None
    ) -> Tensor:
        """Return the loss; its backward pass also takes the scores.

        A loss scale reaches scores and training gradient alike. Scores of micro-batches add up, as
        gradients do, until ``step()`` or ``zero_grad()``. After a skipped step clear gradients to
        None: zeroed in place they leave earlier scores. The extra passes change no ``.grad``; hooks
        run in them.

        Args:
            loss: The loss to minimise; a scalar tensor with a graph.
            natural: Cross-entropy on the natural batch; a scalar tensor that may share the graph of
                ``loss``. None: not needed (``alpha`` is 0), or scored by another call.
            adversarial: Cross-entropy on the adversarial batch, likewise (``alpha`` is 1).

        Returns:
            A scalar of the same value; ``loss`` itself under ``torch.no_grad``, or if no group
            needs a score.

        Raises:
            TypeError: a loss is not a tensor.
            ValueError: a loss is not a scalar or carries no graph; both scored losses are None.
            RuntimeError: in the backward pass: a loss depends on no selected parameter; a graph
                cannot run several times (tested in the first pass); FSDP2 holds gradients back.
        """
        if not torch.is_grad_enabled():
            return loss
        pairs = zip(ROLES, (natural, adversarial), strict=True)
        given = {role: each for role, each in pairs if each is not None}
        for name, each in {"loss": loss, **given}.items():
            _scores.check_loss(name, each)
        if not given:
            hint = "Pass the cross-entropies that score the weights."
            refuse("natural", "be given, or `adversarial`", "None", hint)
        selected = self._selected()
        if not any(p.requires_grad for p in selected):
            self._refuse_unselected()
        ranked = [each for each in selected.values() if each.update_fraction > 0.0]
        read = {role for s in ranked for role in _scores.roles_read(self._holder.score, s.alpha)}
        wanted = {role: each for role, each in given.items() if role in read}
        for role, each in wanted.items():
            if each.dtype == torch.float16 != loss.dtype:
                hint = f"Compute the cross-entropy of `logits.float()`, or pass {role}.float()."
                refuse(role, f"be {loss.dtype} as `loss`: a loss scale overflows", each.dtype, hint)
        if not wanted:
            return loss
        return cast(Tensor, Scored.apply(loss, self._take, wanted))  # type: ignore[no-untyped-call]

    def _take(self, losses: dict[str, Tensor], grad: Tensor, node: Any) -> Tensor:
        """Take the scores, within the backward pass; see `Scores.take`."""
        params = [p for p, s in self._selected().items() if s.update_fraction and p.requires_grad]
        return self._holder.scores.take(losses, params, grad, node)

    def _refuse_unselected(self) -> None:
        """Refuse groups in which weights should be selected, and none can be."""
        taken_out = not self._parameters()  # by ZeRO 3, which puts them back for its step
        for group in self.param_groups:
            chosen = group["rgp_update_fraction"] == 1.0 or group["rgp_select"] is False
            if (group["params"] or taken_out) and not chosen:
                shapes = _listed([str(tuple(p.shape)) for p in group["params"]])
                rule = "have a trainable parameter with two or more dimensions to select in"
                found = "empty groups" if taken_out else f"shapes {shapes}, or frozen ones"
                hint = (
                    "Engines that flatten or copy the parameters (DeepSpeed's ZeRO and bf16) leave "
                    "none: use DistributedDataParallel or FSDP2's `fully_shard`. To update all "
                    "weights on purpose set `update_fraction` to 1."
                )
                refuse("param_groups", rule, found, hint)

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the top-scored weights with the inner optimizer and conserve the others.

        Args:
            closure: Reevaluates the model, runs the backward pass of a `scored` loss and returns
                the loss; called once, with gradients enabled.

        Returns:
            What the closure returned; without one, what the inner step returned.

        Raises:
            RuntimeError: a selected parameter has a gradient but no score, or scores wait without a
                gradient; it is called within the backward pass, or needs the loss at other weights;
                the ranks differ (compared in the first step). With all learning rates 0 an unscored
                step moves nothing instead: checkpoint tools do that.
            TypeError: a selected parameter has a sparse gradient; a score has the wrong type.
            ValueError: a setting is out of its range; a score has the wrong shape. No weight has
                been changed then; the closure, if any, has run.
        """
        holder, evaluated = self._holder, None
        if closure is not None:
            evaluated = _Evaluated(closure, self._parameters(), copy=not holder.used_closure)
            holder.used_closure = True
        elif holder.needs_closure:
            refuse("closure", "be given: the inner step needs it", "None", error=TypeError)
        reviser = holder.reviser if holder.reviser and holder.reviser._joined is holder else None
        if reviser and any(map(check.capturing, self._parameters())):
            hint = "Set `opt.reviser = None`, and call `reviser.update()` after each replay."
            refuse("reviser", "be None in a CUDA graph", "a reviser", hint, RuntimeError)
        masks, steps = self._select()
        if steps and reviser:
            reviser._update(only_check=True)
        with torch.no_grad():
            _own_gradients(list(masks), self._parameters())
            zeroed, restored = holder.conserve != "update", holder.conserve != "gradients"
            if restored:
                _check_restorable(masks, holder.backend)
            rows = [
                (mask, local(p.grad) if zeroed else None, local(p) if restored else None)
                for p, mask in masks.items()
            ]
            saved = functional.zero_and_save_(rows, backend=holder.backend)
            holder.masks = masks
            holder.scores.clear()  # used up: the guard lets the inner step pass
            try:
                result = holder.inner.step(*([] if evaluated is None else [evaluated]))
                if restored and masks and not holder.copies_checked:
                    self._warn_of_copies(masks)
            finally:  # also if the inner step raises
                if evaluated is not None:
                    evaluated.undo()
                if restored:  # the inner step may have given weights new memory
                    rows = [*zip(masks.values(), map(local, masks), saved, strict=True)]
                    functional.restore_(rows, backend=holder.backend)
        if steps and reviser:
            reviser._update()
        return result if evaluated is None else evaluated.loss

    def masks(self) -> dict[Tensor, Tensor]:
        """Return the masks of the last step: by parameter, bool, True where it was updated.

        Parameters in which nothing is selected are missing. A sharded parameter has the mask of
        this rank's shard. ``mask.float().mean()`` is the fraction updated.
        """
        return dict(self._holder.masks)

    def _select(self) -> tuple[dict[Tensor, Tensor], bool]:
        """Return the masks of this step, by parameter, and whether it counts as one."""
        holder, params = self._holder, self._parameters()
        selected = {p: each for p, each in self._selected().items() if p.grad is not None}
        for p in selected:
            if cast(Tensor, p.grad).layout != torch.strided:
                _scores.refuse_sparse(f"gradient of {self._names()[p]}", cast(Tensor, p.grad))
        if holder.scores.running and (holder.scores.thread or len(params) > 1):
            raise Refused(
                "step() was called within the backward pass, where other parameters may wait for "
                "their gradient. Call it after `loss.backward()`, or wrap one optimizer per "
                "parameter."
            )
        if holder.scores.waiting and all(p.grad is None for p in params):
            raise RuntimeError(
                "step(): the weights are scored, but no parameter has a gradient to step with. "
                "Call `backward()` on the loss that `scored` returned, after `zero_grad()`."
            )
        ranked = {p: s for p, s in selected.items() if s.update_fraction > 0.0}
        ranks = holder.scores.ranks
        fractions = {group["rgp_update_fraction"] for group in self.param_groups}
        if first := ranks.size > 1 and not holder.ranks_compared and fractions != {1.0}:
            self._compare_ranks({})
        if ranks.size > 1 and ranked:
            ranks.refuse_join(first)
        try:
            with torch.no_grad():
                masks = self._score_and_mask(ranked) if ranked else {}
        except NothingScored:
            if any(group.get("lr") != 0 for group in self.param_groups):
                raise
            dense = [p for p in params if p.grad is not None and p.grad.layout == torch.strided]
            return {p: _empty_mask(p) for p in dense}, False  # all: Rprop moves at a rate of 0
        masks |= {p: _empty_mask(p) for p, s in selected.items() if s.update_fraction == 0.0}
        if first:
            self._compare_ranks(masks)
            holder.ranks_compared = True
        return masks, True

    def _selected(self) -> dict[Tensor, Settings]:
        """Return the parameters in which some weights are conserved, with their settings."""
        found: dict[Tensor, Settings] = {}
        self._complete_groups()
        for group in self.param_groups:
            settings = Settings.of(group)
            if settings.update_fraction < 1.0:
                found |= {p: settings for p in group["params"] if settings.selects(p)}
        return found

    def _score_and_mask(self, selected: dict[Tensor, Settings]) -> dict[Tensor, Tensor]:
        """Score and select, with the averaged gradients or the gathered scores of all ranks."""
        holder, scores = self._holder, self._holder.scores
        scores.average(list(selected))
        reached = {p: s for p, s in selected.items() if scores.reaches(p, s.alpha, holder.score)}
        if len(reached) < len(selected):
            names = [self._names()[p] for p in selected.keys() - reached.keys()]
            text = (
                f"No scored loss depends on {_listed(names)}, but the training loss does: all of "
                "it is updated. If that is meant, set 'rgp_select': False for its group; if not, "
                "look for `detach()` or `use_reentrant=True` on the way."
            )
            holder.warn("unreached", text)
        # Under the global scope groups with different fractions cannot share a threshold.
        shared = holder.scope == "global"
        pools = [s.update_fraction if shared else i for i, s in enumerate(reached.values())]
        select = partial(functional.select, backend=holder.backend)
        if holder.score == "rgp" and not any(map(is_sharded, reached)):
            rows = zip(map(scores.pair, reached), reached.values(), pools, strict=True)
            entries = [Entry(*pair, s.alpha, s.update_fraction, pool) for pair, s, pool in rows]
            return dict(zip(reached, select(entries), strict=True))
        masks: dict[Tensor, Tensor] = {}
        items = list(reached.items())
        for indices in by_pool(pools):  # gathered pool by pool
            part, entries = [items[i] for i in indices], []
            for p, s in part:
                score = distributed.whole(scores.score(p, s.alpha, holder.score), p)
                entries.append(Entry(score, None, None, s.update_fraction))
            found = zip(part, select(entries), strict=True)
            masks |= {p: distributed.own_part(mask, p) for (p, _), mask in found}
        return masks

    def _compare_ranks(self, masks: dict[Tensor, Tensor]) -> None:
        """Raise if replicas differ: in their parameters, and once there are masks in the rest."""
        names = {p: name for p, name in self._names().items() if not is_sharded(p)}
        shapes = repr([(tuple(p.shape), p.dtype) for p in names]).encode()
        held: dict[str, Tensor | None] = {"their parameters": torch.tensor(list(shapes))}
        for p, name in names.items() if masks else ():
            held |= {f"the weights of {name}": p, f"the gradient of {name}": p.grad}
            held[f"the mask of {name}"] = masks.get(p)
        device = local(self._parameters()[0]).device
        if differing := self._holder.scores.ranks.differing(held, device):
            raise RuntimeError(
                f"step(): the ranks differ in {_listed(differing)}. Nothing was changed. Each rank "
                "must hold the whole model (ZeroRedundancyOptimizer around the wrapper splits it: "
                "use FSDP2's `fully_shard`) and start alike. A gradient differs if the model was "
                "not called through DistributedDataParallel, or another loss had its backward pass "
                "first; a mask if a score rule draws at random. Models that train apart need a "
                "`process_group` each."
            )

    def _warn_of_copies(self, params: Iterable[Tensor]) -> None:
        """Warn of weights that the inner optimizer keeps twice; looks once, and waits for it."""
        self._holder.copies_checked = True
        for p in [p for p in params if isinstance(self.state.get(p), dict) and not p.is_meta]:
            for key, copy in self.state[p].items():
                dense = isinstance(copy, Tensor) and not copy.is_sparse
                if dense and copy.shape == p.shape and key != "ax":  # ASGD's is never written back
                    copy, weight = local(copy).to(p.dtype), local(p)
                    if torch.equal(copy, weight) and weight.any():
                        text = (
                            f"{type(self.inner).__name__} keeps a copy of the weights in its state "
                            f"({key!r}) that knows nothing of the selection: what a conserved "
                            "weight is spared arrives later, with its next update or in eval()."
                        )
                        return self._holder.warn("copies", text)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> dict[Tensor, str]:
        """Return the parameters' names, or their places, for messages."""
        found: dict[Tensor, str] = {}
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names", ())  # may lack those that were put in later
            for j, p in enumerate(group["params"]):
                found[p] = f"{names[j] if j < len(names) else f'parameter {j}'} (group {i})"
        return found


def _check_inner(optimizer: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the optimizer if it can be wrapped."""
    kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    rule = ""
    hint = "Write RGPSelectiveOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.1)."
    if not isinstance(optimizer, torch.optim.Optimizer):
        rule = "be an instance of torch.optim.Optimizer, not a class"
        if isinstance(optimizer, type):
            hint = f"Write RGPSelectiveOptimizer({kind}(model.parameters(), ...))."
    elif options:
        rule, kind = "have its options itself", f"the options {', '.join(options)}"
    elif isinstance(optimizer, RGPSelectiveOptimizer):
        rule = "not be wrapped already"
    elif not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # Accelerate's prepared one
        rule, hint = "have step hooks", "Wrap your own optimizer, then prepare the wrapper."
    elif kind == "ZeroRedundancyOptimizer":
        rule = "hold its whole state"
        hint = "To shard it use `torch.distributed.fsdp.fully_shard`."
    elif isinstance(optimizer, torch.optim.LBFGS) or kind.endswith("Closure"):
        rule = "evaluate its closure once per step, before it changes weights"
        hint = "Use a first-order optimizer."
    elif hasattr(optimizer, "fused_backward"):
        rule = "step in step(), not in the backward pass"
        hint = "Use the variant of the optimizer that has a step()."
    elif hasattr(optimizer, "synchronize"):
        rule = "leave averaging to torch.distributed, where the scores are averaged too"
        hint = "Use DistributedDataParallel, with the optimizer that this one wraps."
    elif hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        rule = "take one gradient per step"
        hint = SAM_HINT
    if rule:
        refuse("optimizer", rule, kind, hint, TypeError)
    return cast(torch.optim.Optimizer, optimizer)


class _Guard:
    """A step hook of the inner optimizer: refuses a step past the wrapper while scores wait."""

    def __init__(self, holder: _Holder) -> None:
        self._holder = weakref.ref(holder)  # a dropped wrapper must not block its inner optimizer
        self._defaults = holder.defaults

    def __call__(self, *_: Any) -> None:
        held = self._holder()
        if held is not None and held.scores.waiting:
            raise Refused(
                "The weights are scored, and the inner optimizer's step() was called: it would "
                "update all of them. Call step() of the RGPSelectiveOptimizer around it."
            )

    def forget(self, groups: Sequence[dict[str, Any]]) -> None:
        """Remove the settings that this wrapper gave to the groups."""
        for group in groups:
            for key in [k for k, value in self._defaults.items() if group.get(k) == value]:
                del group[key]


def _own_gradients(params: Sequence[Tensor], everyone: Sequence[Tensor]) -> None:
    """Clone gradients that several parameters share or `expand` made: masks write in place."""
    held = [local(p.grad) for p in everyone if p.grad is not None]
    starts = Counter(g.data_ptr() for g in held if g.layout == torch.strided)
    for p in params:
        gradient = local(p.grad)
        if starts[gradient.data_ptr()] > 1 or 0 in gradient.stride():
            p.grad = cast(Tensor, p.grad).clone(memory_format=torch.contiguous_format)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + ", ..." * (len(names) > 4)


def _check_restorable(masks: dict[Tensor, Tensor], backend: Backend) -> None:
    """Refuse tensor subclasses that cannot be restored, by a trial."""
    odd = [w for w in map(local, masks) if type(w) not in (Tensor, nn.Parameter)]
    try:
        if rows := [(torch.ones_like(w, dtype=torch.bool), w, w.clone()) for w in odd]:
            functional.restore_(rows, backend=backend)
    except Exception as error:
        hint = "Set 'rgp_select': False for its group, or conserve='gradients'."
        found = f"{type(odd[0]).__name__}, {type(error).__name__}: {error}"
        refuse("conserve", "have weights that can be restored", found, hint)


def _empty_mask(p: Tensor) -> Tensor:
    return torch.zeros_like(local(p.detach()), dtype=torch.bool)


class _Evaluated:
    """A closure after its evaluation: gives its loss again, as long as the weights are the same."""

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor], copy: bool) -> None:
        with torch.enable_grad():
            self.loss = closure()
        self._params, self._versions = params, [p._version for p in params]
        self._before = [p.detach().clone() for p in params] if copy else []
        self._changed = False

    @torch.no_grad()
    def __call__(self) -> Any:
        """Return the loss; refuse where the weights have changed since the evaluation."""
        self._changed = [p._version for p in self._params] != self._versions
        for p, old in zip(self._params, self._before, strict=False):  # `p.data` has no version
            self._changed |= not torch.equal(local(p).nan_to_num(), local(old).nan_to_num())
        if self._changed:
            raise RuntimeError(
                "step(): the inner optimizer changed the weights and called the closure again, but "
                f"the closure is evaluated once per step, before weights are selected. {SAM_HINT}"
            )
        return self.loss

    def undo(self) -> None:
        """Put changed weights back; they are copied in the first such step only."""
        for p, old in zip(self._params, self._before if self._changed else (), strict=False):
            p.copy_(old)
