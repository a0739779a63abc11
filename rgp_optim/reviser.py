"""`ConsistencyReviser`: an averaged copy of the model, and the loss that ties the model to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rgp_optim._checks import check_choice, check_count, check_fraction, check_real, error_text
from rgp_optim._distributed import local
from rgp_optim.losses import check_pair, kl_divergence

__all__ = ["ConsistencyReviser"]

DECAY = 0.999  # of the paper


class ConsistencyReviser:
    r"""Average the model's weights at random steps and ask it to agree with the average.

    With probability ``rate`` a step, :math:`\theta_{rev} \leftarrow d\,\theta_{rev} + (1 -
    d)\,\theta`. The consistency loss is

    .. math:: L_{CR} = \mathrm{KL}\bigl(p(x; \theta_{rev}) \,\|\, p(x; \theta)\bigr)
              + \mathrm{KL}\bigl(p(x_{adv}; \theta_{rev}) \,\|\, p(x_{adv}; \theta)\bigr)

    without a gradient into :math:`\theta_{rev}`; train with ``loss + gamma * reviser(...)`` and
    call `update` after each step::

        reviser = ConsistencyReviser(model, rate=0.2, decay=0.999)
        loss = loss + gamma * reviser(x, x_adv, logits, logits_adv)
        ...
        opt.step()
        reviser.update()

    d = 0.999 at rate 0.2 averages over 5,000 steps, which is 6.4 % of the published run. In a
    shorter run the copy would never leave the weights it began with, and pull the model back to
    them: give ``horizon=0.064`` and ``total_steps`` there.

    **BatchNorm.** The copy is always in eval mode: it normalises with its own running statistics
    and never changes them by looking. They are averaged with the same d and at the same steps as
    the weights, or, with ``buffers="copy"``, taken over from the model at these steps. Integer
    buffers (``num_batches_tracked``) are always taken over.

    **FSDP2.** Make the reviser first, then ``fully_shard`` the model and ``reviser.model`` alike.

    Args:
        model: The model that is trained. It is copied now, without shared storage; later updates
            read it again.
        rate: Probability of an update at each step, in [0, 1]; or a function from the number of
            steps made so far to that probability, to let it decay.
        decay: d, in [0, 1). Default 0.999.
        horizon: In place of ``decay``: the time constant as a fraction of the run, in (0, 1], which
            makes ``d = 1 - 1 / (horizon * rate * total_steps)``. The published run has 0.064.
        total_steps: Steps of the whole run, >= 1; with ``horizon`` only.
        ramp: Let d grow as ``min(1 - 1 / (t + 1), d)`` with t the steps made so far, as the
            authors' code does. The first update then copies the model.
        buffers: ``"average"`` or ``"copy"``: what happens to floating buffers.
        seed: Of the draws, >= 0. They come from a generator of their own on the CPU: the same in
            every process, without waiting for the device, apart from torch's global draws.

    Attributes:
        model: The averaged copy, for evaluation; eval mode, no gradients, on the model's device and
            in its dtype. Weights in float16 or bfloat16 are averaged in float32 aside. What you
            load into it, or a dtype that you give it, is what the next update starts from.
        decay: d; may be changed.
        rate: May be changed.
        steps: Number of calls of `update`.

    Raises:
        TypeError: ``model`` is no module, or an argument has the wrong type.
        ValueError: a number is out of its range; both ``decay`` and ``horizon`` are given;
            only one of ``horizon`` and ``total_steps`` is; the model is sharded already; the copy
            shares storage with it.

    Reference: Gowda et al., CURE, ICLR 2024, Eq. 7 and 8.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rate: float | Callable[[int], float] = 0.2,
        decay: float | None = None,
        horizon: float | None = None,
        total_steps: int | None = None,
        ramp: bool = False,
        buffers: Literal["average", "copy"] = "average",
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(error_text("model", "be a torch.nn.Module", type(model).__name__))
        self.rate = rate
        self.steps = 0
        self._rate_now()
        self.decay = self._decay(decay, horizon, total_steps)
        self._ramp = ramp
        self._buffers = check_choice("buffers", buffers, ("average", "copy"))
        self._generator = torch.Generator().manual_seed(check_count("seed", seed))
        self._student = model
        if _sharded(_unwrapped(model)):
            hint = "Make the reviser first, then shard the model and `reviser.model` alike."
            raise ValueError(error_text("model", "be given before `fully_shard`", "FSDP", hint))
        self.model = copy.deepcopy(_unwrapped(model)).eval().requires_grad_(False)
        student = {_address(t) for t in _tensors(_unwrapped(model)).values()}
        for name, tensor in _tensors(self.model).items():
            tensor.grad = None
            if _address(tensor) and _address(tensor) in student:
                hint = "Its __deepcopy__ must copy parameters and buffers."
                raise ValueError(
                    error_text("model", "be copied without shared storage", name, hint)
                )
        self._masters: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        ours = f"rate={self.rate!r}, decay={self.decay!r}, ramp={self._ramp!r}"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {ours}, "
            f"buffers={self._buffers!r}, steps={self.steps})"
        )

    def __call__(self, x: Tensor, x_adv: Tensor, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """Return the consistency loss of a batch.

        Args:
            x: Natural images, as the model gets them.
            x_adv: Attacked images, shape of ``x``.
            logits: The model's output on ``x``, [batch, classes], with its graph.
            logits_adv: The model's output on ``x_adv``, shape of ``logits``.

        Returns:
            The loss, a scalar >= 0, in nats, a mean over the batch; float32, or float64 for
            float64.

        Raises:
            ValueError: shapes, dtypes or devices do not match.
        """
        check_pair(logits, logits_adv, "logits", "logits_adv")
        if x.shape != x_adv.shape or x.shape[0] != logits.shape[0]:
            found = f"{tuple(x_adv.shape)} against {tuple(x.shape)}, {logits.shape[0]} logits"
            raise ValueError(error_text("x_adv", "have the shape of `x`, one row a logit", found))
        self.model.eval()  # whoever switched it
        with torch.no_grad():  # apart: BatchNorm without running statistics would mix the two
            revised, revised_adv = self.model(x), self.model(x_adv)
        return kl_divergence(revised, logits) + kl_divergence(revised_adv, logits_adv)

    def update(self) -> bool:
        """Draw, and with probability ``rate`` move the copy towards the model. Call it once a step.

        Returns:
            Whether the copy moved.

        Raises:
            ValueError: the model's parameters or buffers are no longer those that were copied;
                ``rate`` gave a number outside [0, 1]. Nothing is changed then.
        """
        rate = self._rate_now()
        student, mine = _tensors(_unwrapped(self._student)), _tensors(self.model)
        _check_same(mine, student, "model")
        draws, cpu = self._generator, self._generator.device  # not the program's default device
        draw = torch.rand((), generator=draws, dtype=torch.float64, device=cpu).item()
        decay = _check_decay("decay", self.decay)
        if self._ramp:
            decay = min(1.0 - 1.0 / (self.steps + 1), decay)
        if draw < rate:
            self._average(mine, student, decay)
        self.steps += 1
        return draw < rate

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the copy and its draws: tensors and plain numbers."""
        return {
            "model": _tensors(self.model),
            "masters": dict(self._float32()),
            "steps": self.steps,
            "decay": self.decay,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from ``state_dict``, draws included. What does not fit is refused unchanged."""
        hint = "Pass what `ConsistencyReviser.state_dict()` returned."
        mine = self.state_dict()
        missing = set(mine) - set(state_dict if isinstance(state_dict, Mapping) else ())
        if missing:
            found = f"no {', '.join(sorted(missing))}"
            raise ValueError(error_text("state_dict", "be a reviser's", found, hint))
        for part in ("model", "masters"):
            theirs = state_dict[part]
            if not isinstance(theirs, Mapping) or not all(map(torch.is_tensor, theirs.values())):
                name = f"state_dict['{part}']"
                found = f"{part}: {type(theirs).__name__}"
                raise ValueError(error_text(name, "hold tensors by name", found, hint))
            _check_same(mine[part], theirs, "state_dict")
        decay = _check_decay("state_dict['decay']", state_dict["decay"])
        steps = check_count("state_dict['steps']", state_dict["steps"])
        draws = torch.Generator()
        try:
            draws.set_state(state_dict["generator"].cpu())
        except (AttributeError, RuntimeError, TypeError) as error:
            name, rule = "state_dict['generator']", "be the state of a CPU generator"
            raise ValueError(error_text(name, rule, str(error), hint)) from error
        with torch.no_grad():
            for part in ("model", "masters"):
                for name, tensor in mine[part].items():
                    tensor.copy_(state_dict[part][name])
        self.decay, self.steps, self._generator = decay, steps, draws

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles continue the same draws."""
        return {**self.__dict__, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])

    @torch.no_grad()
    def _float32(self) -> dict[str, Tensor]:
        """Return the averages of low-precision tensors, begun at first need: sharded by then.

        Where a tensor no longer is its average rounded, others have written it: it counts.
        """
        masters: dict[str, Tensor] = {}
        for name, tensor in _tensors(self.model).items():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                master = self._masters.get(name)
                if master is None or _place(master) != _place(tensor):
                    master = tensor.detach().float()
                ours, theirs = local(master), local(tensor)
                ours.copy_(torch.where(ours.to(theirs.dtype) == theirs, ours, theirs.float()))
                masters[name] = master
        self._masters = masters
        return masters

    @torch.no_grad()
    def _average(self, mine: dict[str, Tensor], student: dict[str, Tensor], decay: float) -> None:
        masters = {name: local(tensor) for name, tensor in self._float32().items()}
        mine = {name: local(tensor) for name, tensor in mine.items()}
        student = {name: local(tensor) for name, tensor in student.items()}
        averaged: list[Tensor] = []
        towards: list[Tensor] = []
        parameters = {name for name, _ in self.model.named_parameters()}
        for name, tensor in mine.items():
            floating = tensor.is_floating_point() or tensor.is_complex()
            if floating and (name in parameters or self._buffers == "average"):
                averaged.append(masters.get(name, tensor))
                towards.append(student[name].detach().to(averaged[-1]))
            else:
                tensor.copy_(student[name])
                if name in masters:
                    masters[name].copy_(student[name])
        if averaged:
            torch._foreach_lerp_(averaged, towards, 1.0 - decay)
        for name, master in masters.items():
            mine[name].copy_(master)

    def _rate_now(self) -> float:
        rate = self.rate
        return check_fraction("rate", rate(self.steps) if callable(rate) else rate)

    def _decay(self, decay: float | None, horizon: float | None, total: int | None) -> float:
        """Return d, from either way to give it."""
        if horizon is None:
            if total is not None:
                hint = "Without it nothing depends on the steps of the run."
                raise ValueError(
                    error_text("horizon", "be given with `total_steps`", "horizon = None", hint)
                )
            return _check_decay("decay", DECAY if decay is None else decay)
        if decay is not None:
            found = f"decay = {decay}, horizon = {horizon}"
            raise ValueError(error_text("horizon", "be given in place of `decay`", found))
        if check_real("horizon", horizon, strict=True) > 1.0:
            hint = "It is a fraction of the run."
            raise ValueError(error_text("horizon", "be in (0, 1]", horizon, hint))
        if total is None:
            hint = "Pass the steps of the whole run."
            raise ValueError(
                error_text("total_steps", "be given with `horizon`", "total_steps = None", hint)
            )
        check_count("total_steps", total, minimum=1)
        rate = self.rate
        if callable(rate):
            drawn = sum(check_fraction("rate", rate(step)) for step in range(total))
        else:
            drawn = check_fraction("rate", rate) * total
        if horizon * drawn < 1.0:
            found = f"{horizon} of {drawn:g} expected updates"
            rule = "span at least one update, horizon * rate * total_steps >= 1"
            hint = "Train longer, or give `decay`."
            if drawn > 1.0:
                least = math.ceil(1000 / drawn) / 1000
                hint = f"For {total} steps it should be {least:g} or more; or give `decay`."
            raise ValueError(error_text("horizon", rule, found, hint))
        return 1.0 - 1.0 / (horizon * drawn)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside torch.compile's and the parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _sharded(model: nn.Module) -> list[Any]:
    """Return the modules that FSDP2 has sharded."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule  # slow to import, so only where it can matter

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _address(tensor: Tensor) -> int:
    """Return where the tensor's storage begins; 0 for an empty or meta tensor."""
    with torch.no_grad():
        return local(tensor).untyped_storage().data_ptr()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, each tensor once."""
    for module in _sharded(model):
        module.reshard()  # a forward may leave them gathered: what is written there is lost
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> None:
    """Refuse tensors whose names, shapes or shards are not those of the copy."""
    wrong = sorted(set(mine) ^ set(theirs)) or [
        n for n, tensor in mine.items() if _layout(tensor) != _layout(theirs[n])
    ]
    if wrong:
        rule = "have the parameters and buffers that were copied"
        hint = "Make a new reviser for a changed model; shard `reviser.model` as the model."
        raise ValueError(error_text(name, rule, f"a difference at {', '.join(wrong)}", hint))


def _layout(tensor: Tensor) -> tuple[torch.Size, Any]:
    return tensor.shape, getattr(tensor, "placements", None)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, *_layout(tensor)


def _check_decay(name: str, decay: Any) -> float:
    if check_fraction(name, decay) == 1.0:
        raise ValueError(error_text(name, "be in [0, 1): 1 would never move", f"{name} = 1"))
    return float(decay)
