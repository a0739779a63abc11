"""`RGPSelectiveOptimizer`: any torch optimizer, updating only the weights that matter most.

One step: score (the slots) -> select (masks) -> the inner optimizer's step -> conserve.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rgp_optim import _distributed as distributed
from rgp_optim import functional
from rgp_optim._bits import pack_bits, unpack_bits
from rgp_optim._checks import (
    check_choice,
    check_count,
    check_dense,
    check_fraction,
    error_text,
)
from rgp_optim._distributed import ALONE, Ranks, Wanted, local, sharded
from rgp_optim._slots import ROLES, Claims, Slots
from rgp_optim._tracking import UpdateTracker
from rgp_optim.functional import SCOPES, Backend, Scope, Selection
from rgp_optim.groups import Settings
from rgp_optim.scores import RULES, NothingScored, ScoreInputs, ScoreRule

__all__ = ["RGPSelectiveOptimizer"]

Conserve = Literal["weights", "gradients", "update"]
CheckRanks = Literal["first", "always", "never"]
CONSERVE = ("weights", "gradients", "update")
CHECK_RANKS = ("first", "always", "never")
FIRST = 3  # steps in which the processes compare what they have
_KEPT = "rgp_kept"  # entry of a checkpoint: masks that are kept for more than one step


@dataclass
class _Rgp:
    """All that the wrapper owns, in one object that is changed and never replaced.

    Proxies of the wrapper that have a ``__dict__`` of their own then see the same state.
    """

    inner: torch.optim.Optimizer
    defaults: dict[str, Any]  # of the rgp_* settings of a param group
    scope: Scope
    conserve: Conserve
    score: str | ScoreRule
    seed: int
    backend: Backend
    refresh_every: int
    ranks: Ranks
    check_ranks: CheckRanks
    checked: int = 0  # steps since the processes began to compare
    slots: Slots = field(default_factory=Slots)
    trackers: list[UpdateTracker] = field(default_factory=list)
    choice: _Choice | None = None  # kept for the next steps
    stepping: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the trackers behind, which belong to the original."""
        choice = self.choice
        if choice is not None:  # in a form that can be copied
            choice = replace(choice, selection=functional.selection_of(choice.selection.masks()))
        return {**self.__dict__, "trackers": [], "choice": choice, "stepping": False}


@dataclass
class _Choice:
    """What was selected: masks for ``params``, under ``settings``, for ``age`` steps so far."""

    params: list[Tensor]
    selection: Selection
    settings: list[tuple[Tensor, float, float]]
    age: int = 0


class RGPSelectiveOptimizer(torch.optim.Optimizer):
    r"""Wrap an optimizer so that each step updates the top-scored weights and conserves the rest.

    Each weight is scored by its robust gradient prominence,

    .. math:: \mathrm{RGP}(w) = \alpha\,|\partial\,\mathrm{CE}(x) / \partial w|
              + (1 - \alpha)\,|\partial\,\mathrm{CE}(x_{adv}) / \partial w|,

    and of n weights the ``max(1, round(update_fraction * n))`` highest are updated, never one that
    scores 0; the rule in full is `rgp_optim.functional.topk_mask`'s. The wrapper is itself a
    ``torch.optim.Optimizer``: ``param_groups``, ``state`` and checkpoints are the inner one's::

        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        opt = RGPSelectiveOptimizer(inner, update_fraction=0.7, alpha=0.1)
        opt.zero_grad()
        opt.backward(loss, natural=F.cross_entropy(logits, y),
                     adversarial=F.cross_entropy(logits_adv, y))
        opt.step()

    A loop that owns its backward call says which pass scores the weights, and steps as before::

        with opt.score("natural"):
            scaler.scale(F.cross_entropy(logits, y)).backward(retain_graph=True)
        with opt.score("adversarial"):
            scaler.scale(F.cross_entropy(logits_adv, y)).backward(retain_graph=True)
        scaler.scale(loss).backward()
        scaler.step(opt)

    The settings of a param group are ``rgp_update_fraction``, ``rgp_alpha`` and ``rgp_select``
    (None: select in tensors with two or more dimensions, update the others always; True: select in
    all; False: update all always). They can be set before or after wrapping, change during
    training, and are saved in checkpoints; what a group has already wins over the arguments here.
    Tensors whose fraction is 1 are left to the inner optimizer entirely.

    Args:
        optimizer: The optimizer to wrap, an instance; it may have stepped already. Not LBFGS, which
            evaluates its closure several times within a step. From now on call the wrapper's
            methods.
        update_fraction: Share of the selected weights that is updated, dimensionless, in [0, 1].
            The paper's p is the percentage conserved: p = 30 is 0.7.
        alpha: Share of the natural gradient in the score, dimensionless, in [0, 1].
        scope: ``"tensor"``: the fraction holds in each tensor, as in the paper. ``"global"``: for
            all selected tensors together; groups with different fractions are selected separately.
        conserve: ``"weights"``: a conserved weight is bit-identical after the step; the inner
            optimizer sees a gradient of 0 there, so its momentum decays. ``"gradients"``: only the
            gradient is set to 0, as in the authors' code: momentum and weight decay still move the
            weight. ``"update"``: the inner optimizer sees the whole gradient, and the weight is put
            back.
        score: A name in `rgp_optim.scores`, or a callable from `rgp_optim.scores.ScoreInputs` to
            scores.
        seed: Seed of the ``"random"`` score, an integer >= 0.
        backend: ``"auto"`` takes the fastest that runs on the tensors; a named one must run.
        refresh_every: Select anew in every n-th step only, n >= 1, and keep the masks in between.
            `needs_scores` tells a loop when the scoring passes are wanted; `backward` asks it by
            itself. ``state_dict()`` contains the masks that are kept; after a checkpoint without
            them (``torch.distributed.checkpoint`` drops them) the next step selects anew. The
            paper's is 1.
        process_group: With ``torch.distributed``: the processes that train this model together.
            None: all of them. Every one must score and step alike.
        check_ranks: Compare weights, gradients and settings across these processes and raise where
            replicas differ: in the ``"first"`` three steps, ``"always"`` (which waits for the
            device), or ``"never"``.

    Raises:
        TypeError: ``optimizer`` is a class, no optimizer, LBFGS, ZeroRedundancyOptimizer, or
            wrapped already; an argument has the wrong type.
        ValueError: a number is out of its range, or a name unknown.
        RuntimeError: the parameters are FSDP1's, or are sharded in another way than by
            ``fully_shard``.

    Note:
        ``.grad`` is an ordinary gradient between backward and step: unscaling, clipping and logging
        see what they expect. In ``step()`` what is conserved is set to 0 in it (not with
        ``"update"``). A NaN score ranks first, so that it is seen; a scaler that finds infinities
        skips the step as usual. Step hooks of the wrapper and of the inner optimizer are both
        called.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 6 and Algorithm 1.
    """

    # A fused inner optimizer can unscale gradients by itself; through a wrapper it must not.
    _step_supports_amp_scaling = False

    _rgp: _Rgp

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        update_fraction: float = 0.7,
        alpha: float = 0.1,
        scope: Scope = "tensor",
        conserve: Conserve = "weights",
        score: str | ScoreRule = "rgp",
        seed: int = 0,
        backend: Backend = "auto",
        refresh_every: int = 1,
        process_group: torch.distributed.ProcessGroup | None = None,
        check_ranks: CheckRanks = "first",
    ) -> None:
        if not callable(score):
            check_choice("score", score, RULES, "Or pass a callable: see rgp_optim.scores.")
        functional.check_backend(backend)
        rgp = _Rgp(
            inner=_check_inner(optimizer),
            defaults={
                "rgp_update_fraction": check_fraction(
                    "update_fraction", update_fraction, "Conserving 30 % is update_fraction=0.7."
                ),
                "rgp_alpha": check_fraction("alpha", alpha),
                "rgp_select": None,
                "rgp_step": 0,
            },
            scope=cast(Scope, check_choice("scope", scope, SCOPES)),
            conserve=cast(Conserve, check_choice("conserve", conserve, CONSERVE)),
            score=score,
            seed=check_count("seed", seed),
            backend=backend,
            refresh_every=check_count("refresh_every", refresh_every, minimum=1),
            ranks=Ranks(process_group),
            check_ranks=cast(CheckRanks, check_choice("check_ranks", check_ranks, CHECK_RANKS)),
        )
        for group in rgp.inner.param_groups:
            Settings.of({**rgp.defaults, **group})
            for p in group["params"]:
                distributed.check_parameter(p)
        # The base class's way to come back from a pickle: it adds the hook tables and leaves the
        # parameter groups, which are the inner optimizer's, alone.
        self.__setstate__({"_rgp": rgp})
        self._complete_groups()
        rgp.slots.watch(self._parameters())
        rgp.inner.register_step_pre_hook(_refuse_inner_step(rgp))

    def __repr__(self) -> str:
        rgp = self._rgp
        ours = ("scope", "conserve", "score", "backend", "refresh_every")
        shown = ", ".join(f"{name}={getattr(rgp, name)!r}" for name in ours)
        return f"{type(self).__name__}({rgp.inner!r}, {shown})"

    # What belongs to the inner optimizer stays there; assigning here assigns there.

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The wrapped optimizer. Its own ``step`` knows nothing of the selection."""
        return self._rgp.inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's param groups."""
        return self._rgp.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._rgp.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state, by parameter."""
        return self._rgp.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self._rgp.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self._rgp.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._rgp.inner.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies hold: not the ``step`` that schedulers put on an instance."""
        return {"_rgp": self._rgp}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the inner optimizer; missing ``rgp_*`` settings get the defaults."""
        if isinstance(param_group, dict):  # or let torch say that it should be one
            Settings.of({**self._rgp.defaults, **param_group})
            params = param_group.get("params", ())
            if isinstance(params, Iterator):  # it can be read once only
                params = list(params)
                param_group = {**param_group, "params": params}
            for each in [params] if isinstance(params, Tensor) else params:
                distributed.check_parameter(each[1] if isinstance(each, tuple) else each)
        self._rgp.inner.add_param_group(param_group)
        self._rgp.checked = 0
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's checkpoint, with the ``rgp_*`` settings in its groups."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._complete_groups()
        state_dict = self._rgp.inner.state_dict()
        if self._rgp.choice is not None:
            state_dict[_KEPT] = self._pack(self._rgp.choice)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = _or(post_hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this wrapper, or of the plain inner optimizer.

        ``rgp_*`` settings in the checkpoint replace those of the groups, as torch does with ``lr``;
        where it has none, the groups keep theirs.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _or(pre_hook(self, state_dict), state_dict)
        self._complete_groups()
        kept = state_dict.pop(_KEPT, None)
        names = self._rgp.defaults
        ours = [{name: group[name] for name in names} for group in self.param_groups]
        for group in state_dict["param_groups"]:
            Settings.of({**self._rgp.defaults, **group})
        self._rgp.inner.load_state_dict(state_dict)
        for group, before in zip(self.param_groups, ours, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)
        self._rgp.choice = self._unpack(kept) if kept else None
        self._rgp.checked = 0
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _pack(self, choice: _Choice) -> dict[str, Any]:
        """Return masks as a checkpoint holds them: eight weights a byte, by parameter number."""
        numbers = {p: i for i, p in enumerate(self._parameters())}
        masks = zip(choice.params, choice.selection.masks(), strict=True)
        return {
            "age": choice.age,
            "settings": [(numbers[p], *each) for p, *each in choice.settings],
            "masks": {numbers[p]: pack_bits(mask) for p, mask in masks},
        }

    def _unpack(self, kept: dict[str, Any]) -> _Choice | None:
        """Undo `_pack`; None where the masks are of other shards: the next step selects anew."""
        params = self._parameters()
        chosen = [params[i] for i in kept["masks"]]
        packed = kept["masks"].values()
        pairs = [(bits, local(p.detach())) for p, bits in zip(chosen, packed, strict=True)]
        if any(bits.numel() != -(-p.numel() // 8) for bits, p in pairs):
            return None
        masks = [unpack_bits(bits, p) for bits, p in pairs]
        settings = [(params[i], fraction, alpha) for i, fraction, alpha in kept["settings"]]
        return _Choice(chosen, functional.selection_of(masks), settings, kept["age"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients and what was taken for the score: a new batch begins."""
        self._refuse_while_scoring("zero_grad()")
        self._rgp.slots.clear()
        self._rgp.inner.zero_grad(set_to_none=set_to_none)

    # Score.

    @property
    def needs_scores(self) -> bool:
        """Whether the next step selects anew; if not, the scoring passes can be left out.

        Always True with ``refresh_every=1``, unless no weight is selected. Scores that are taken
        all the same are used.
        """
        self._complete_groups()
        settings = self._selected_settings()
        partly = any(fraction > 0.0 for _, fraction, _ in settings)
        return partly and not self._keeps(settings)

    def _keeps(self, settings: list[tuple[Tensor, float, float]]) -> bool:
        """Tell whether the masks at hand are good for one more step under these settings."""
        choice, n = self._rgp.choice, self._rgp.refresh_every
        if choice is None or choice.age >= n or len(choice.settings) != len(settings):
            return False
        pairs = zip(choice.settings, settings, strict=True)
        return all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)

    def _selected_settings(self) -> list[tuple[Tensor, float, float]]:
        """Return parameter, fraction and alpha wherever weights are selected."""
        found = []
        for group in self.param_groups:
            each = Settings.of(group)
            if each.update_fraction < 1.0:
                selected = [p for p in group["params"] if each.selects(p)]
                found += [(p, each.update_fraction, each.alpha) for p in selected]
        return found

    def score(self, role: Literal["natural", "adversarial"]) -> AbstractContextManager[None]:
        """Take what the backward passes inside compute for the score, not for the update.

        Outside, before or after, run the backward pass of the loss that is minimised. Gradients of
        several blocks with the same role add up until `step` or `zero_grad`. A common factor, such
        as a loss scale, does not change the ranking, so scale both roles alike and never unscale.
        An exception inside drops all that was taken since the last step.

        Args:
            role: ``"natural"`` or ``"adversarial"``.

        Returns:
            A context manager. Inside, ``.grad`` of each parameter is the gradient of this role, and
            its memory is the optimizer's: clone what you keep. Afterwards it is what it was before.
            No other ``.grad`` is touched: not that of another optimizer's parameters, or images.
            Under ``torch.distributed`` the gradients of whole parameters are taken past ``.grad``,
            and averaged over the processes in `step`: DistributedDataParallel reduces the training
            loss, as if these passes were not there.

        Raises:
            ValueError: ``role`` is neither; a loss was scaled by another gradient scaler.
            RuntimeError: inside another block; no parameter received a gradient.
            TypeError: a selected parameter received a sparse gradient.
        """
        check_choice("role", role, ROLES)
        params, keep = self._scored_parameters()
        return self._rgp.slots.filling(role, params, keep, _past_grad(params))

    def backward(self, loss: Tensor | None = None, *, natural: Tensor, adversarial: Tensor) -> None:
        """Run the backward passes of a step: two for the score, one for the gradient in ``.grad``.

        Those for the score are left out where `needs_scores` is False. The losses may share their
        graphs. Under a gradient scaler pass all three scaled:
        ``opt.backward(scaler.scale(loss), natural=scaler.scale(...),
        adversarial=scaler.scale(...))``.

        Args:
            loss: What is minimised; a scalar tensor. None minimises ``natural + adversarial``,
                which costs no third pass. (With several processes it does where the parameters have
                hooks, another optimizer waits for its gradients, or DistributedDataParallel was
                given ``find_unused_parameters`` or ``static_graph``.)
            natural: Cross-entropy on the natural batch; a scalar tensor.
            adversarial: Cross-entropy on the adversarial batch; a scalar tensor.

        Raises:
            TypeError: a loss is not a tensor.
            ValueError: a loss has more than one element, or carries no graph.
            RuntimeError: no parameter received a gradient; inside a scoring block.
        """
        losses = {"natural": natural, "adversarial": adversarial}
        for name, each in (losses if loss is None else {"loss": loss, **losses}).items():
            _check_loss(name, each)
        if not self.needs_scores:
            self._refuse_while_scoring("backward()")
            _backward(natural + adversarial if loss is None else loss)
            return
        if loss is None:
            self._backward_of_sum(natural, adversarial)
            return
        with self.score("natural"):
            _backward(natural, loss, adversarial)
        with self.score("adversarial"):
            _backward(adversarial, loss)
        _backward(loss)

    def _backward_of_sum(self, natural: Tensor, adversarial: Tensor) -> None:
        """Take both gradients once, for the score and, added, for ``.grad``."""
        slots = self._rgp.slots
        params, keep = self._scored_parameters()
        past_grad = _past_grad(params)
        again = past_grad and not distributed.gives_back((natural, adversarial), params)
        with slots.taking("natural", params, past_grad) as g_nats:
            _backward(natural, adversarial, *[natural] * again)
        with slots.taking("adversarial", params, past_grad) as g_advs:
            _backward(adversarial, *[adversarial] * again)
        if again:
            _backward(natural + adversarial)
        elif past_grad:
            _accumulate(params, g_nats, g_advs)
        else:
            with torch.no_grad():
                for p in params:
                    for g in (g_nats.get(p), g_advs.get(p)):
                        if g is not None:
                            p.grad = g.clone() if p.grad is None else p.grad.add_(g)
        scored = {p for p, k in zip(params, keep, strict=True) if k}
        with torch.no_grad():
            for role, gradients in (("natural", g_nats), ("adversarial", g_advs)):
                slots.add(role, {p: g for p, g in gradients.items() if p in scored})
        slots.note_training_gradient()

    # Select, step, conserve.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the top-scored weights with the inner optimizer and conserve the others.

        Args:
            closure: Reevaluates the model and returns the loss; called once, with gradients
                enabled, and expected to clear the gradients, call `backward` and so on itself.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a selected parameter has a gradient but nothing was scored since the last
                step, or the reverse. With all learning rates 0 the step is passed on instead:
                checkpointing tools do that. Or the processes differ (``check_ranks``).
            TypeError: a selected parameter has a sparse gradient, or a score has the wrong type.
            ValueError: a setting is out of its range, or a score has the wrong shape. Whatever is
                raised before the inner step, no weight and no gradient has been changed.
        """
        self._refuse_while_scoring("step()")
        rgp = self._rgp
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._complete_groups()
        at_rest = _at_rest(self.param_groups)
        compare = not at_rest and self._compares()
        if compare:  # before anything is reduced: it must be the same list everywhere
            self._compare_settings()
        try:
            choice = self._choose()
        except NothingScored:
            if not at_rest:
                raise
            choice = _Choice([], functional.selection_of([]), [])
        if not rgp.slots.empty and all(p.grad is None for p in self._parameters()):
            raise RuntimeError(
                "step(): the weights are scored, but no parameter has a gradient to step with. "
                "Run `loss.backward()` outside the scoring blocks, after `zero_grad()`."
            )
        if compare:
            self._compare_replicas(choice)
        with torch.no_grad():
            self._step_and_conserve(choice)
        if not at_rest:
            self._count(choice)
        return result

    def _choose(self) -> _Choice:
        """Select in the parameters that have a gradient, or take the masks that are kept."""
        rgp = self._rgp
        settings = self._selected_settings()
        for p, *_ in settings:
            if p.grad is not None:
                check_dense("grad", p.grad)
        if rgp.slots.empty and rgp.choice is not None and self._keeps(settings):
            return rgp.choice
        entries = self._entries()
        with torch.no_grad():
            selection = self._select(entries) if entries else functional.selection_of([])
        return _Choice([e.p for e in entries], selection, settings)

    def _entries(self) -> list[_Entry]:
        """Return the parameters to select in now."""
        entries: list[_Entry] = []
        index = 0
        for group in self.param_groups:
            settings = Settings.of(group)
            for p in group["params"]:
                partly = 0.0 < settings.update_fraction < 1.0
                if partly and settings.selects(p) and p.grad is not None:
                    entries.append(_Entry(p, p.grad, index, group["rgp_step"], settings))
                index += 1
        return entries

    def _select(self, entries: Sequence[_Entry]) -> Selection:
        """Score and select in ``entries``, under the scope."""
        rgp = self._rgp
        inputs = [
            ScoreInputs(
                local(e.p.detach()),
                local(e.gradient),
                e.settings.alpha,
                e.step,
                e.index,
                rgp.seed,
                rgp.slots,
                e.p,
            )
            for e in entries
        ]
        fractions = [e.settings.update_fraction for e in entries]
        pools = list(range(len(entries)))
        if rgp.scope == "global":  # groups with different fractions cannot share a threshold
            pools = [fractions.index(fraction) for fraction in fractions]
        ring = rgp.ranks.ring
        taken = [rgp.slots.gradients(role) or {} for role in rgp.slots.roles]
        rings = [_ring(e.p, [e.gradient, *(t[e.p] for t in taken if e.p in t)]) for e in entries]
        in_pieces = any(each is not None and each.size > 1 for each in rings)
        if rgp.score == "rgp":
            g_nats, g_advs = zip(*(s.rgp_gradients() for s in inputs), strict=True)
            alphas = [s.alpha for s in inputs]
            if not in_pieces and ring.size == 1:
                return functional.select(g_nats, g_advs, alphas, fractions, pools, rgp.backend)
            parts = zip(g_nats, g_advs, inputs, fractions, pools, rings, strict=True)
            wanted = [
                Wanted(nat, adv, s.weight, s.alpha, fraction, pool, s.size, each)
                for nat, adv, s, fraction, pool, each in parts
            ]
            return functional.selection_of(distributed.select(wanted, ring))
        rule = RULES[rgp.score] if isinstance(rgp.score, str) else rgp.score
        self._average_slots([e.p for e, each in zip(entries, rings, strict=True) if each is None])
        scores = [_check_score(rule(s), s.weight) for s in inputs]
        if not in_pieces:
            masks = functional.topk_masks(scores, fractions, pools, rgp.backend)
        else:
            parts = zip(scores, inputs, fractions, pools, rings, strict=True)
            wanted = [
                Wanted(None, None, s.weight, s.alpha, fraction, pool, s.size, each or ALONE, score)
                for score, s, fraction, pool, each in parts
            ]
            masks = distributed.select(wanted, ring)
        return functional.selection_of(masks)

    def _average_slots(self, params: Sequence[Tensor]) -> None:
        """Average what was taken over the processes, for rules that look at whole tensors."""
        rgp = self._rgp
        ring = rgp.ranks.ring
        if ring.size == 1:
            return
        for role in rgp.slots.roles:
            slots = rgp.slots.gradients(role)
            assert slots is not None
            for p in params:
                if p not in slots:
                    slots[p] = torch.zeros_like(p)
            distributed.average_([slots[p] for p in params], ring)

    # Do the processes agree?

    def _compares(self) -> bool:
        rgp = self._rgp
        if rgp.check_ranks == "never" or rgp.ranks.ring.size == 1:
            return False
        return rgp.check_ranks == "always" or rgp.checked < FIRST

    def _compare_settings(self) -> None:
        """Raise if the processes would not select in the same tensors in the same way."""
        rgp = self._rgp
        params = self._parameters()
        ours = {
            "the parameters": [(tuple(p.shape), p.dtype) for p in params],
            "which parameters have a gradient": [p.grad is not None for p in params],
            "the rgp_* settings of the param groups": [
                [group[name] for name in rgp.defaults] for group in self.param_groups
            ],
            "the wrapper's options": (
                *(rgp.scope, rgp.conserve, rgp.seed, rgp.refresh_every),
                rgp.score if isinstance(rgp.score, str) else "a rule",
            ),
            "the roles that were scored": rgp.slots.roles,
            "the masks that are kept": self._keeps(self._selected_settings()),
        }
        numbers = [distributed.digest(each) for each in ours.values()]
        at = distributed.differing(torch.tensor(numbers, device=self._device()), rgp.ranks.ring)
        if at:
            raise RuntimeError(_difference([list(ours)[i] for i in at]))

    def _device(self) -> torch.device:
        """Return where the processes exchange small numbers."""
        for p in self._parameters():
            return local(p.detach()).device
        return torch.device("cpu")

    def _compare_replicas(self, choice: _Choice) -> None:
        """Raise if processes that should hold the same weights, gradients and masks do not."""
        rgp = self._rgp
        masks = dict(zip(choice.params, choice.selection.masks(), strict=True))
        names = self._names()
        rings: dict[distributed.Ring, list[Tensor]] = {}
        for p in self._parameters():
            for ring in distributed.replicas_of(p, rgp.ranks.ring):
                rings.setdefault(ring, []).append(p)
        found: list[str] = []
        device = self._device()
        for ring, params in rings.items():
            held = [
                (kind, p, tensor)
                for p in params
                for kind, tensor in (("weights", p), ("gradient", p.grad), ("mask", masks.get(p)))
            ]
            prints = torch.stack([distributed.fingerprint(t, device) for _, _, t in held])
            at = distributed.differing(prints, ring) if ring.size > 1 else []
            found += [f"the {held[i][0]} of {names[held[i][1]]}" for i in at]
        everyone = rgp.ranks.ring
        if any(ring != everyone for ring in rings):  # those who hold other shards must raise, too
            count = torch.tensor(len(found), device=device)
            if everyone.sum_(count).item() and not found:
                found = ["what other processes hold"]
        if found:
            raise RuntimeError(_difference(found))

    def _step_and_conserve(self, choice: _Choice) -> None:
        """Run the inner step; before and after it do what ``conserve`` asks for."""
        rgp = self._rgp
        selection, chosen = choice.selection, set(choice.params)
        late = [p for p, *_ in choice.settings if p not in chosen and p.grad is not None]
        if late:  # their fraction is 0, or no gradient reached them when the masks were made
            nothing = [torch.zeros_like(local(p.detach()), dtype=torch.bool) for p in late]
            selection = functional.selection_of([*selection.masks(), *nothing])
        params = [*choice.params, *late]
        weights = [None if p.grad is None else local(p.detach()) for p in params]
        saved: list[Tensor | None] = [None] * len(params)
        if rgp.conserve != "gradients":
            spare = rgp.slots.spare(self._parameters())  # their work is done: no memory is added
            saved = [
                None if w is None else local(spare[p]) if p in spare else torch.empty_like(w)
                for p, w in zip(params, weights, strict=True)
            ]
        targets: list[Tensor | None] = [None] * len(params)
        if rgp.conserve != "update":
            _give_own_memory(params, self._parameters())
            targets = [None if p.grad is None else local(p.grad) for p in params]
        rgp.stepping = True
        try:
            selection.apply_(targets, weights, saved)
            try:
                rgp.inner.step()
            finally:  # also when the inner optimizer stops half-way
                selection.conserve_(weights, saved)
        finally:
            rgp.stepping = False
            rgp.slots.clear()

    def _count(self, choice: _Choice) -> None:
        """Note that a step was taken."""
        rgp = self._rgp
        if rgp.trackers:
            updated = self._updated(choice)
            for tracker in rgp.trackers:
                tracker.record(updated)
        for group in self.param_groups:
            group["rgp_step"] += 1
        choice.age += 1
        rgp.checked += 1
        rgp.choice = choice if rgp.refresh_every > 1 else None

    def _updated(self, choice: _Choice) -> dict[Tensor, Tensor | int]:
        """Return how many weights of each parameter the step has updated."""
        masks = dict(zip(choice.params, choice.selection.masks(), strict=True))
        counts: dict[Tensor, Tensor | int] = {
            p: local(p.detach()).numel() for p in self._parameters() if p.grad is not None
        }
        counts.update({p: 0 for p, *_ in choice.settings if p in counts})
        counts.update({p: mask.sum() for p, mask in masks.items() if p in counts})
        return counts

    # Ask.

    def track_updates(self) -> UpdateTracker:
        """Count from now on which fraction of each parameter is updated.

        Returns:
            A tracker: ``last()`` and ``mean()`` give fractions in [0, 1] by parameter name,
            ``reset()`` begins a new window, ``stop()`` ends counting. Names are those of
            `rgp_param_groups` or of a ``named_parameters()`` given to the inner optimizer;
            otherwise ``group0.param3``. Under FSDP2 the fractions are those of this process's
            shards: no process waits for another.
        """
        trackers = self._rgp.trackers

        def stop(tracker: UpdateTracker) -> None:
            if tracker in trackers:
                trackers.remove(tracker)

        trackers.append(UpdateTracker(self._names, stop))
        return trackers[-1]

    def _names(self) -> dict[Tensor, str]:
        found: list[tuple[Tensor, int, str]] = []
        for i, group in enumerate(self.param_groups):
            fallback = [f"group{i}.param{j}" for j in range(len(group["params"]))]
            for p, name in zip(group["params"], group.get("param_names", fallback), strict=True):
                found.append((p, i, name))
        uses = Counter(name for _, _, name in found)  # two models may share names
        return {p: name if uses[name] == 1 else f"group{i}.{name}" for p, i, name in found}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _scored_parameters(self) -> tuple[list[Tensor], list[bool]]:
        """Return all parameters, and which of them the score is for."""
        self._complete_groups()
        keep = []
        for group in self.param_groups:
            settings = Settings.of(group)
            keep += [settings.selects(p) for p in group["params"]]
        return self._parameters(), keep

    def _complete_groups(self) -> None:
        """Give each param group the ``rgp_*`` settings that it lacks."""
        for group in self.param_groups:
            for name, value in self._rgp.defaults.items():
                group.setdefault(name, value)

    def _refuse_while_scoring(self, what: str) -> None:
        if self._rgp.slots.busy is not None:
            found = f"inside score({self._rgp.slots.busy!r})"
            raise RuntimeError(error_text(what, "be called outside scoring blocks", found))


@dataclass(frozen=True)
class _Entry:
    """A parameter in which weights are selected in this step."""

    p: Tensor
    gradient: Tensor
    index: int
    step: int
    settings: Settings


def _check_inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer if it can be wrapped."""
    if isinstance(optimizer, type):
        hint = f"Write RGPSelectiveOptimizer({optimizer.__name__}(model.parameters(), ...))."
        found = f"the class {optimizer.__name__}"
        raise TypeError(error_text("optimizer", "be an instance, not a class", found, hint))
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = f"{type(optimizer).__name__}"
        raise TypeError(error_text("optimizer", "be a torch.optim.Optimizer", found))
    if isinstance(optimizer, RGPSelectiveOptimizer):
        raise TypeError(error_text("optimizer", "not be wrapped already", "RGPSelectiveOptimizer"))
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # Accelerate's prepared one
        found = f"a {type(optimizer).__name__} that has no hooks"
        hint = "Wrap your own optimizer, then prepare the wrapper."
        raise TypeError(error_text("optimizer", "be a whole torch.optim.Optimizer", found, hint))
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":  # importing it takes a second
        hint = (
            "It steps with other weights on each process. To share out the optimizer's state, "
            "shard the model with `torch.distributed.fsdp.fully_shard`."
        )
        raise TypeError(
            error_text("optimizer", "hold its whole state", "ZeroRedundancyOptimizer", hint)
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        hint = (
            "LBFGS evaluates its closure several times within a step. Use a first-order optimizer."
        )
        raise TypeError(error_text("optimizer", "take one gradient a step", "LBFGS", hint))
    return optimizer


def _check_loss(name: str, loss: Any) -> None:
    """Refuse what has no single number to differentiate."""
    if not isinstance(loss, Tensor):
        found = f"{type(loss).__name__}"
        raise TypeError(error_text(name, "be a scalar tensor", found))
    if loss.numel() != 1:
        hint = "Reduce it with .mean() or .sum()."
        raise ValueError(error_text(name, "be a scalar", f"shape {tuple(loss.shape)}", hint))
    if not loss.requires_grad:
        hint = "Compute it from the model's output with gradients enabled; do not detach it."
        raise ValueError(error_text(name, "carry a graph", "requires_grad = False", hint))


def _backward(loss: Tensor, *later: Tensor) -> None:
    """Run a backward pass; keep the graph only where one of the ``later`` ones needs it.

    A graph that is kept without need holds its activations through the next forward pass.
    """
    shared = any(_share_a_node(loss, other) for other in later)
    loss.backward(retain_graph=shared)  # type: ignore[no-untyped-call]


def _share_a_node(first: Tensor, second: Tensor) -> bool:
    """Tell whether two graphs have more in common than parameters; walk both from their ends."""
    walks: tuple[tuple[set[Any], deque[Any]], ...]
    walks = (set(), deque([first.grad_fn])), (set(), deque([second.grad_fn]))
    while any(waiting for _, waiting in walks):
        for (mine, waiting), (theirs, _) in (walks, walks[::-1]):
            node = waiting.popleft() if waiting else None
            if node is None or node in mine or hasattr(node, "variable"):  # a parameter's own node
                continue
            if node in theirs:
                return True
            mine.add(node)
            waiting.extend(upstream for upstream, _ in node.next_functions)
    return False


def _check_score(score: Any, weight: Tensor) -> Tensor:
    """Return what a score rule returned, if it can rank the weights."""
    if not isinstance(score, Tensor):
        raise TypeError(error_text("score", "return a tensor", type(score).__name__))
    if score.shape != weight.shape or score.device != weight.device:
        rule = (
            f"return the shape and device of the weight, {tuple(weight.shape)} on {weight.device}"
        )
        found = f"{tuple(score.shape)} on {score.device}"
        raise ValueError(error_text("score", rule, found))
    return score.detach()


def _give_own_memory(params: Sequence[Tensor], everyone: Sequence[Tensor]) -> None:
    """Replace the gradients of ``params`` that share memory: they are about to be masked."""
    chosen = set(params)
    claims = Claims(p for p in everyone)
    claims.add(p.grad for p in everyone if p.grad is not None and p not in chosen)
    for p in params:
        if p.grad is not None and claims.claim(p.grad):
            p.grad = p.grad.clone(memory_format=torch.contiguous_format)


def _at_rest(groups: Sequence[dict[str, Any]]) -> bool:
    """Tell whether all learning rates are 0, without waiting for a device."""
    rates = [group.get("lr", 1.0) for group in groups]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False
    return all(rate is not None and float(rate) == 0.0 for rate in rates)


def _refuse_inner_step(rgp: _Rgp) -> Callable[..., None]:
    """Return a hook that stops a step of the inner optimizer that passes the wrapper by."""
    holder = weakref.ref(rgp)

    def hook(*_: Any) -> None:
        rgp = holder()
        if rgp is not None and not rgp.stepping and not rgp.slots.empty:
            raise RuntimeError(
                "The weights are scored, and the inner optimizer's step() was called: it would "
                "update all of them. Call the step() of the RGPSelectiveOptimizer around it."
            )

    return hook


def _past_grad(params: Sequence[Tensor]) -> bool:
    """Tell whether scores are taken past ``.grad``.

    So wherever DistributedDataParallel may have hooks there. FSDP2 reduces in every pass, and only
    in one that goes through ``.grad``.
    """
    return distributed.initialised() and not any(sharded(p) for p in params)


def _accumulate(params: Sequence[Tensor], *parts: dict[Tensor, Tensor]) -> None:
    """Add the sum of gradients to ``.grad`` through autograd, whose hooks reduce it."""
    sums: dict[Tensor, Tensor] = {}
    for p in params:
        own = [part[p] for part in parts if p in part]
        if own:
            sums[p] = own[0].clone() if len(own) == 1 else own[0] + own[1]
    torch.autograd.backward(list(sums), list(sums.values()))


def _ring(p: Tensor, gradients: Sequence[Tensor]) -> distributed.Ring | None:
    """Return who holds the pieces of a sharded parameter; None if each process has all of it."""
    if not sharded(p):
        return None
    ring = distributed.ring_of("a parameter", p)
    for g in gradients:
        if not sharded(g) or distributed.ring_of("a gradient", g) != ring:
            found = f"{getattr(g, 'placements', 'a plain tensor')}"
            raise RuntimeError(error_text("a gradient", "be sharded as its parameter", found))
    return ring


_CAUSES = {
    "the gradient of": "A gradient differs where it was not reduced: the model was not called "
    "through DistributedDataParallel (but as `ddp.module(x)`, or before wrapping), or two training "
    "losses had a backward pass each after one forward pass, of which only the first is reduced: "
    "add them up, and call backward once.",
    "the weights of": "Weights differ if the processes started or loaded a checkpoint differently.",
    "the mask of": "Masks differ if the score rule draws at random, or looks at what one process "
    "alone has.",
    "": "Give every process the same model and settings, and run the same passes on each.",
}


def _difference(found: Sequence[str]) -> str:
    """Say in what the processes differ, and why that can be."""
    shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    kinds = [kind for kind in _CAUSES if kind and any(each.startswith(kind) for each in found)]
    causes = " ".join(_CAUSES[kind] for kind in kinds or [""])
    return (
        f"step(): the processes do not agree on {shown}. Nothing was changed. {causes} Processes "
        "that train apart need a `process_group` each, or check_ranks='never'."
    )


def _or(value: Any, otherwise: dict[str, Any]) -> dict[str, Any]:
    """Return what a hook returned, or what it was given if it returned None."""
    return otherwise if value is None else cast(dict[str, Any], value)
