"""`ConsistencyReviser`: an averaged copy of the model, and the loss that ties the model to it."""

from __future__ import annotations

import copy
import random
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rgp_optim import _checks as check
from rgp_optim._checks import logits_of, refuse, switched, unwrapped
from rgp_optim._distributed import is_sharded, local
from rgp_optim.losses import consistency_loss

__all__ = ["ConsistencyReviser"]

FEW_BATCHES = 50  # seen by BatchNorm
MANY_CALLS = 100  # without an update
STATISTICS = ("running_mean", "running_var")  # of BatchNorm
COUNTER = "num_batches_tracked"


class ConsistencyReviser:
    r"""Average the model's weights at random steps, and tie the model to the average.

    With probability ``rate`` per step, :math:`\theta_{rev} \leftarrow d\,\theta_{rev} + (1 -
    d)\,\theta`. Train with ``loss + gamma * reviser(x, x_adv, logits, logits_adv)``. Give it to
    ``RGPSelectiveOptimizer(..., reviser=reviser)``, whose ``step()`` calls `update` and whose
    checkpoint carries it; on its own call ``update()`` after each step. CURE starts from a network
    trained on natural images: load, move or convert it before the first `update`; until then the
    copy follows. With FSDP2, ``fully_shard`` the model and ``reviser.model`` alike afterwards.

    d = 0.999 at rate 0.2 averages over 5,000 steps, 6.4 % of the published run. In a shorter run
    the copy would stay at its start and pull the model back: give ``horizon`` and ``total_steps``.

    The copy runs in eval mode (an exported graph as it was exported). BatchNorm's ``running_mean``
    and ``running_var`` are averaged as weights are, each rank's own; other buffers are copied with
    each update, plain Python attributes never. Forward hooks are copied, as ``weight_norm`` and
    pruning need it: register one that records activations after the reviser is made.

    Args:
        model: The model that is trained; copied now, on its device, and read by `update`.
        rate: Probability of an update at each step, in [0, 1]; may be assigned, as ``decay`` may.
        decay: d, in [0, 1). Default 0.999.
        horizon: Time constant as a fraction of the run, in (0, 1], in place of ``decay``:
            ``d = 1 - 1 / (horizon * rate * total_steps)``. The published run has 0.064.
        total_steps: Steps of the whole run, >= 1; with ``horizon`` only.
        seed: Seed of the draws, >= 0: alike in all processes; torch's generators are not used.
        revised: A ready copy, where ``copy.deepcopy`` fails or frozen parts should be shared.

    Attributes:
        model: The averaged copy, without gradients; half-precision weights are averaged in float32
            internally. After the first `update` it may be loaded, moved or converted.
        steps: Number of calls of `update`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, numbers contradict each other, or the model cannot be
            copied without shared storage.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 7 and 8.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float = 0.2,
        decay: float | None = None,
        horizon: float | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        revised: nn.Module | None = None,
    ) -> None:
        check.model(model)
        self.rate = rate
        self.decay = _decay(decay, horizon, total_steps, self.rate)
        self.steps = 0
        self._seed = check.count("seed", seed)
        self._student = model
        self._masters: dict[str, Tensor] = {}
        self._calls = 0  # since the last update
        self._joined: Any = None  # what calls `_update`: an optimizer's state
        self.model = _copy(unwrapped(model)) if revised is None else revised
        check.model(self.model)
        theirs, ready = _named(model), revised is not None
        self._check_copy(theirs, "revised" if ready else "model", sharing=ready)
        self._uncounted: set[str] | None = _uncounted(theirs)  # None: warned
        for name, tensor in _named(self.model).items():  # a script has no `requires_grad_`
            if tensor is not theirs[name] and tensor.is_leaf:
                tensor.requires_grad_(False).grad = None
        with switched(model, dict.fromkeys(self.model.modules(), False)):
            pass  # to eval mode for good; parts shared with the model are switched back

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, NUMBERS[name](name, value) if name in NUMBERS else value)

    def __call__(self, x: Tensor, x_adv: Tensor, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """Return the `consistency_loss` of a batch, after two forward passes of the copy.

        ``logits`` and ``logits_adv`` are the model's outputs on ``x`` and ``x_adv``, with their
        graph. For a model whose input or output is not a single tensor, use `consistency_loss`.
        """
        hint = "Or pass logits to `consistency_loss`."
        for name, each in (("x", x), ("x_adv", x_adv), ("logits", logits)):
            check.tensor(name, each, floating=False, hint=hint)
        if x_adv.shape != x.shape or logits.shape[:1] != x.shape[:1]:
            found = f"shapes {tuple(x.shape)}, {tuple(x_adv.shape)}, {tuple(logits.shape)}"
            refuse("x, x_adv, logits", "be of one batch, in this order", found)
        if self.steps == 0:
            self._move()
        self._warn()
        with switched(self.model), torch.no_grad():  # a trainer may have switched it
            # One by one: BatchNorm without running statistics would mix them.
            revised, revised_adv = (logits_of(self.model, t.clone(), hint) for t in (x, x_adv))
        return consistency_loss(revised, revised_adv, logits, logits_adv)

    def update(self) -> bool:
        """With probability ``rate`` move the copy towards the model, and return whether.

        A model whose parameters or buffers are not those of the copy raises a ValueError.
        """
        if self._joined:
            hint = "`update()` is called by the optimizer's `step()`: remove this call."
            refuse("update()", "be left to the optimizer", "a call by hand", hint, RuntimeError)
        return self._update()

    def _update(self, only_check: bool = False) -> bool:
        """As `update`; ``only_check``: refuse what it would refuse, before the weights move."""
        moves = random.Random(f"{self._seed} {self.steps}").random() < self.rate
        if moves or self.steps == 0:
            self._move(only_check)
        if not only_check:
            self.steps, self._calls = self.steps + 1, 0
        return moves

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the copy and its draws: averages and plain numbers."""
        if self.steps == 0:
            self._move()
        numbers = {"rate": self.rate, "decay": self.decay, "steps": self.steps, "seed": self._seed}
        return {"model": self._average({}), **numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``; one that does not fit is refused, and nothing changes."""
        self._check_state(state_dict)
        self._average(state_dict["model"])
        self.rate, self.decay, self.steps, self._seed = (state_dict[key] for key in NUMBERS)

    def _check_state(self, state_dict: Any) -> None:
        """Refuse a checkpoint that does not fit, nothing changed."""
        ours = self.state_dict()
        if not isinstance(state_dict, Mapping) or ours.keys() - state_dict.keys():
            hint = "Pass what `ConsistencyReviser.state_dict()` returned."
            refuse("state_dict", f"have {', '.join(ours)}", type(state_dict).__name__, hint)
        _check_same(ours["model"], state_dict["model"], "state_dict")
        for key, checked in NUMBERS.items():
            checked(f"state_dict['{key}']", state_dict[key])

    @torch.inference_mode(False)  # what is made here outlives a validation loop's mode
    @torch.no_grad()
    def _move(self, only_check: bool = False) -> None:
        """Move the copy towards the model; until the first update it follows the model."""
        ours, student = (_named(each, "modules") for each in (self.model, self._student))
        modes = {ours[n]: getattr(m, "training", False) for n, m in student.items() if n in ours}
        with switched(self.model, modes):  # merged weights differ from unmerged ones
            theirs = _named(self._student)
            if self.steps == 0:
                self._follow(theirs, ours)
            self._check_copy(theirs, "model")
            if not only_check:
                self._average(theirs, 1.0 - self.decay if self.steps else 1.0)

    def _follow(self, theirs: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        """Give the copy the devices, dtypes and shapes that the model has been given since."""
        ours = _named(self.model)
        for name, tensor in theirs.items():
            path, _, last = name.rpartition(".")
            copied = ours.get(name, tensor)
            if name not in ours and path in modules and last in modules[path]._buffers:
                setattr(modules[path], last, tensor.clone())  # None until the first forward pass
            elif _layout(copied) != _layout(tensor) and not any(map(is_sharded, (copied, tensor))):
                copied.data = tensor.clone()

    def _check_copy(self, theirs: Mapping[str, Tensor], name: str, sharing: bool = True) -> None:
        """Refuse a copy that does not match, or shares more than frozen parts of `revised`."""
        ours = _named(self.model)
        _check_same(ours, theirs, name)
        taken = {_storage(tensor) for tensor in theirs.values()} - {0}
        for key, tensor in ours.items():
            frozen = sharing and tensor is theirs[key] and not tensor.requires_grad
            if not frozen and _storage(tensor) in taken:
                hint = "Only frozen parts may be shared, in a copy passed as `revised=`."
                refuse(name, "be copied without shared storage", key, hint)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _average(self, targets: Mapping[str, Tensor], weight: float = 1.0) -> dict[str, Tensor]:
        """Move the copy towards ``targets`` by ``weight``, if any; return the averages.

        Half-precision tensors have theirs in float32; where the tensor is not its average rounded,
        it was loaded, and the average restarts from it.
        """
        theirs, buffers = _named(self._student), _named(self.model, "buffers")
        before, self._masters = self._masters, {}
        averages = {n: t.detach() for n, t in _named(self.model).items() if t is not theirs.get(n)}
        for name, tensor in averages.items():
            now, averaged = local(tensor), tensor.is_floating_point() or tensor.is_complex()
            averaged &= name not in buffers or name.rpartition(".")[2] in STATISTICS
            if averaged and tensor.dtype in (torch.float16, torch.bfloat16):
                self._masters[name] = average = tensor.float()
                kept, now = before.get(name, average), local(average)
                if _layout(kept) == _layout(average):
                    same = local(kept).to(tensor.dtype) == local(tensor)
                    now.copy_(torch.where(same, local(kept), now))
            if targets:
                target = local(targets[name]).detach()
                if averaged and weight < 1.0:
                    now.lerp_(target.to(now), weight)
                else:
                    now.copy_(target)
                local(tensor).copy_(now)  # half precision: rounded
        return averages | self._masters

    def _warn(self) -> None:
        """Warn once of statistics that are not filled, and of a forgotten `update`."""
        self._calls += 1
        if self._calls == MANY_CALLS:
            text = "losses without an update: give the optimizer `reviser=`, or call `update()`."
            warnings.warn(f"{MANY_CALLS} {text}", stacklevel=3)
        if self._uncounted is not None:  # at the first call: on a GPU reading buffers synchronises
            tensors = _named(self.model)
            skipped, self._uncounted = self._uncounted | _uncounted(tensors), None
            counters = {n for n in tensors if n.endswith(COUNTER)} - skipped
            fewest = min((int(local(tensors[n])) for n in counters), default=FEW_BATCHES)
            if fewest < FEW_BATCHES:
                text = f"BatchNorm has seen {fewest} batches (< {FEW_BATCHES}): train on natural "
                text += "images first, or the copy's targets are unreliable."
                warnings.warn(text, stacklevel=3)


@torch.inference_mode(False)  # tensors made in that mode could not be updated outside of it
@torch.no_grad()  # the parameters of a script's copy would have a graph
def _copy(model: nn.Module) -> nn.Module:
    """Return a deep copy, or name the attribute that cannot be copied."""
    values = [value for module in model.modules() for value in vars(module).values()]
    # Attributes with a graph, such as the `weight` that pruning or weight_norm computes.
    derived = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    try:
        return copy.deepcopy(model, {id(value): value.detach().clone() for value in derived})
    except Exception as error:
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        keys = [str(frame["key"]) for frame in frames if "key" in frame and "memo" in frame]
        path = ".".join(key for key in keys if key not in ("_modules", "_parameters"))
        found = f"{path or type(model).__name__}: {type(error).__name__}: {error}".splitlines()[0]
        hint = "Make the reviser first, then shard or run the model; or pass a copy as `revised=`."
        refuse("model", "be copyable", found, hint)


def _decay(decay: float | None, horizon: float | None, total: int | None, rate: float) -> float:
    """Return d, from itself or from the horizon."""
    if (horizon is None) != (total is None) or (horizon is not None and decay is not None):
        found = f"horizon = {horizon}, total_steps = {total}, decay = {decay}"
        refuse("horizon", "be given with `total_steps` and without `decay`", found)
    if horizon is None:
        return 0.999 if decay is None else decay  # the paper's
    horizon = check.real("horizon", horizon, 1.0, strict=True)
    expected = check.count("total_steps", total, minimum=1) * rate
    if horizon * expected < 1.0:
        rule = "span at least one update: horizon * rate * total_steps >= 1"
        hint = f"Give {-(-1e3 // expected) / 1e3:g} or more, or `decay`." if expected > 1 else ""
        refuse("horizon", rule, f"{horizon:g} * {rate:g} * {total}", hint or "Give `decay`.")
    return 1.0 - 1.0 / (horizon * expected)


def _below_one(name: str, decay: Any) -> float:
    if check.fraction(name, decay) == 1.0:
        refuse(name, "be in [0, 1): 1 would never move", decay)
    return float(decay)


# Checked when assigned or loaded; in this order in a checkpoint.
NUMBERS: dict[str, Any] = {"rate": check.fraction, "decay": _below_one}
NUMBERS |= {"steps": check.count, "seed": check.count}


def _named(model: nn.Module, *kinds: str) -> dict[str, Any]:
    """Return parameters and buffers, or ``kinds``, by name, without torch.compile's prefix."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):  # FSDP2: writes to gathered weights would be lost
            module.reshard()  # type: ignore[operator]
    kinds = kinds or ("parameters", "buffers")
    pairs = [pair for kind in kinds for pair in getattr(unwrapped(model), f"named_{kind}")()]
    return {name.replace("_orig_mod.", ""): value for name, value in pairs}


def _uncounted(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the counters at 0 of filled statistics: these were loaded without their counter."""
    means = [n for n in tensors if n.endswith("running_mean") and _storage(tensors[n])]
    filled = {n.replace("running_mean", COUNTER) for n in means if tensors[n].any()}
    return {n for n in filled if n in tensors and not tensors[n]}


def _storage(tensor: Tensor) -> int:
    """Return the address of the tensor's storage; 0 for an empty or meta tensor."""
    return int(local(tensor.detach()).untyped_storage().data_ptr())


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.shape, getattr(tensor, "placements", None), tensor.dtype


def _check_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> None:
    """Refuse tensors whose names, shapes or shards are not those of the copy."""
    wrong = sorted(set(ours) ^ set(theirs)) or [
        n for n, tensor in ours.items() if _layout(tensor)[1:3] != _layout(theirs[n])[1:3]
    ]
    if wrong:
        hint = "Make a new reviser for a changed model; shard `reviser.model` as the model."
        rule = "have the parameters and buffers that were copied"
        refuse(name, rule, f"a difference at {', '.join(wrong)}", hint)
