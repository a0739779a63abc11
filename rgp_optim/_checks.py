"""Checks of arguments and models; a message names argument, rule, value, and often a way out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn


def refuse(
    name: str, rule: str, found: object, hint: str = "", error: type[Exception] = ValueError
) -> NoReturn:
    """Raise "`name` should RULE. Found `FOUND`. HINT"; a string is shown as it is."""
    shown = found if isinstance(found, str) else f"{name} = {found!r}"
    raise error(f"`{name}` should {rule}. Found `{shown}`. {hint}".rstrip())


def _refuse_type(name: str, rule: str, value: object, hint: str = "") -> NoReturn:
    shown = f" {value!r}" if len(repr(value)) <= 40 else ""
    refuse(name, rule, f"{name}: {type(value).__name__}{shown}", hint, TypeError)


def real(
    name: str, value: Any, high: float = math.inf, *, strict: bool = False, hint: str = ""
) -> float:
    """Return ``value`` as a float in [0, high], finite, and above 0 if ``strict``."""
    bounds = f"in {'(' if strict else '['}0, {high:g}{']' if high < math.inf else ')'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse_type(name, f"be a number {bounds}", value, hint)
    number = float(value)
    if not 0.0 <= number <= high or number == math.inf or (strict and number == 0.0):
        refuse(name, f"be {bounds}", value, hint)
    return number


def fraction(name: str, value: Any, hint: str = "") -> float:
    """Return ``value`` as a float in [0, 1]."""
    return real(name, value, 1.0, hint=hint)


def count(name: str, value: Any, *, minimum: int = 0) -> int:
    """Return ``value`` as an int >= ``minimum``."""
    rule = f"be an integer >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse_type(name, rule, value)
    if value < minimum:
        refuse(name, rule, value)
    return int(value)


def choice(name: str, value: Any, choices: Collection[str], hint: str = "") -> None:
    """Refuse anything but one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        refuse(name, f"be one of {listed}", f"{name} = {value!r}", hint)


def tensor(name: str, value: Any, *, floating: bool = True, hint: str = "") -> None:
    """Refuse anything but a dense tensor; if ``floating``, of a real floating dtype."""
    if not isinstance(value, Tensor):
        _refuse_type(name, "be a tensor", value, hint)
    if value.layout != torch.strided:
        refuse(name, "be a dense tensor", f"{name}: {value.layout}", hint, TypeError)
    if floating and not value.is_floating_point():
        rule = f"have a {'real' if value.is_complex() else 'floating'} dtype"
        refuse(name, rule, f"{name}: {value.dtype}", hint, TypeError)


def match(first: Tensor, second: Tensor, name: str, partner: str) -> None:
    """Refuse tensors that differ in shape, dtype or device."""
    if (first.shape, first.dtype, first.device) != (second.shape, second.dtype, second.device):
        one, other = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (first, second))
        refuse(partner, f"match `{name}` in shape, dtype and device", f"{other} against {one}")


def capturing(tensor: Tensor) -> bool:
    """Tell whether a CUDA graph captures what is done with a tensor."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def model(model: Any) -> None:
    """Refuse anything but a module."""
    if not isinstance(model, nn.Module):
        hint = "Wrap a function in an nn.Module that calls it and holds its networks."
        hint = hint if callable(model) else "The model is the first argument."
        refuse("model", "be a torch.nn.Module", type(model).__name__, hint, TypeError)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside torch.compile's and the data-parallel wrappers."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)  # type: ignore[arg-type]
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    return model


@contextmanager
def switched(model: nn.Module, modes: Mapping[nn.Module, bool] | None = None) -> Iterator[None]:
    """Switch to ``modes``, by default to eval mode, and back, by calls of ``train`` and ``eval``.

    Setting the flags would not do: some layers merge weights in ``eval`` and undo it in ``train``.
    Where a module's own ``train`` refuses its old mode, the flag is set, as its owner did.
    """
    before = {module: module.training for module in model.modules() if hasattr(module, "training")}
    try:
        _set_modes(dict.fromkeys(before, False) if modes is None else modes)
        yield
    finally:
        _set_modes(before)
        for module, training in before.items():
            module.training = training


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    """Call ``train`` or ``eval`` where a module has another mode; a frozen script has none.

    Parents come first, since their calls reach their children; the second pass corrects modules
    with several parents. A model from torch.export raises: it has one mode for good.
    """
    for module, training in [*modes.items()] * 2:
        if getattr(module, "training", training) != training:
            with suppress(NotImplementedError):
                (module.train if training else module.eval)()


def logits_of(model: nn.Module, x: Tensor, hint: str = "") -> Tensor:
    """Return the model's output if it is a tensor [batch, classes]; ``hint`` ends the refusal."""
    logits = model(x)
    if not isinstance(logits, Tensor):
        hint = f"Wrap the model in an nn.Module whose forward returns the logits alone. {hint}"
        refuse("model(x)", "be a tensor of logits", type(logits).__name__, hint, TypeError)
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != x.shape[0]:
        found = f"{shape} for a batch of {x.shape[0]}"
        refuse("model(x)", "be logits, [batch, classes]", found, hint)
    if shape[1] < 2:
        hint = "Turn one logit z into two: [0, z]."
        refuse("model(x)", "have two classes or more", f"{shape}", hint)
    return logits


def target(target: Tensor, logits: Tensor, *, probabilities: bool) -> None:
    """Refuse targets of a shape, dtype or device that cross-entropy would misread."""
    tensor("target", target, floating=False)
    one_each = target.shape == logits.shape[:1]
    soft = probabilities and target.is_floating_point() and target.shape == logits.shape
    if not soft and not (one_each and target.dtype == torch.int64):
        either = f", or class probabilities, {list(logits.shape)}" if probabilities else ""
        whole = not (target.is_floating_point() or target.is_complex())
        hint = "Write target.long()." if whole and one_each else ""
        found = f"{tuple(target.shape)} {target.dtype}"
        refuse("target", f"be class indices, int64, [{logits.shape[0]}]{either}", found, hint)
    if target.device != logits.device:
        refuse("target", f"be on {logits.device}", str(target.device))


def classes(target: Tensor, logits: Tensor) -> None:
    """Refuse labels without a logit, on the CPU only: on a GPU this would synchronise."""
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= logits.shape[1]:
            rule, found = f"be in [0, {logits.shape[1] - 1}]", f"labels from {low} to {high}"
            refuse("target", rule, found, "Leave out samples without a label.")
