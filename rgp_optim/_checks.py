"""Checks of arguments and models; a message names argument, rule, value, and often a way out."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def error_text(name: str, rule: str, found: object, hint: str = "") -> str:
    """Return "`name` should RULE. Found `FOUND`. HINT"; a string is shown as it is."""
    shown = found if isinstance(found, str) else f"{name} = {found!r}"
    text = f"`{name}` should {rule}. Found `{shown}`."
    return f"{text} {hint}" if hint else text


def check_fraction(name: str, value: Any, hint: str = "") -> float:
    """Return ``value`` as a float in [0, 1]; a tensor, a bool, NaN or a number outside raises."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(error_text(name, "be a number in [0, 1]", f"{name}: {_kind(value)}", hint))
    number = float(value)
    if not 0.0 <= number <= 1.0:  # true for NaN
        raise ValueError(error_text(name, "be in [0, 1]", value, hint))
    return number


def check_real(name: str, value: Any, *, minimum: float = 0.0, strict: bool = False) -> float:
    """Return ``value`` as a finite float >= ``minimum``, or > it if ``strict``."""
    bound = f"{'>' if strict else '>='} {minimum:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(error_text(name, f"be a number {bound}", f"{name}: {_kind(value)}"))
    number = float(value)
    if not math.isfinite(number) or number < minimum or (strict and number == minimum):
        raise ValueError(error_text(name, f"be finite and {bound}", value))
    return number


def check_count(name: str, value: Any, *, minimum: int = 0) -> int:
    """Return ``value`` as an int >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(error_text(name, f"be an integer >= {minimum}", f"{name}: {_kind(value)}"))
    if value < minimum:
        raise ValueError(error_text(name, f"be an integer >= {minimum}", value))
    return int(value)


def check_choice(name: str, value: Any, choices: Collection[str], hint: str = "") -> str:
    """Return ``value`` if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(error_text(name, f"be one of {listed}", f"{name} = {value!r}", hint))
    return value


def check_tensor(name: str, value: Any, *, floating: bool = True, hint: str = "") -> Tensor:
    """Return ``value`` if it is a dense tensor; if ``floating``, of a floating or complex dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(error_text(name, "be a tensor", f"{name}: {_kind(value)}", hint))
    if value.layout != torch.strided:
        raise TypeError(error_text(name, "be a dense tensor", f"{name}: {value.layout}"))
    if floating and not (value.is_floating_point() or value.is_complex()):
        raise TypeError(error_text(name, "have a floating dtype", f"{name}: {value.dtype}", hint))
    return value


def check_dense(name: str, gradient: Tensor) -> None:
    """Refuse the gradient of a selected parameter if it is sparse."""
    if gradient.layout != torch.strided:
        hint = "Set 'rgp_select': False for the parameter's group, or make the gradient dense."
        found = f"a {gradient.layout} gradient, {tuple(gradient.shape)}"
        raise TypeError(error_text(name, "be dense", found, hint))


def _kind(value: object) -> str:
    """Name the type of ``value``; show it too when it is short."""
    shown = repr(value)
    name = type(value).__name__
    return f"{name} {shown}" if len(shown) <= 40 else name


# Models: inner module, modes, logits, labels.


def check_model(model: Any) -> None:
    """Refuse anything but a module."""
    if not isinstance(model, nn.Module):
        hint = "The model is the first argument."
        if callable(model):
            hint = "Wrap a function in an nn.Module that calls it and holds its networks."
        raise TypeError(error_text("model", "be a torch.nn.Module", type(model).__name__, hint))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's module inside torch.compile's and the data-parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def set_eval(model: nn.Module) -> None:
    """Call ``eval`` unless all modules are in eval mode already."""
    if any(module.training for module in model.modules()):
        model.eval()


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Return the ``training`` flag of each module by name."""
    return {name: module.training for name, module in model.named_modules()}


@contextmanager
def switched(model: nn.Module, modes: Mapping[str, bool] | None = None) -> Iterator[None]:
    """Switch to ``modes``, by default to eval mode, and back, by calls of ``train`` and ``eval``.

    Setting the flags would not do: some layers merge weights in ``eval`` and undo it in ``train``.
    """
    before = modes_of(model)
    try:
        if modes is None:
            set_eval(model)
        else:
            _set_modes(model, modes)
        yield
    finally:
        _set_modes(model, before)


def _set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Switch parents first, since their calls reach their children.

    The second pass corrects modules with several parents. Where a module's own ``train`` refuses
    the mode, the flag is set, as its owner did.
    """
    for _ in range(2):
        for name, module in list(model.named_modules()):
            if module.training != modes.get(name, module.training):
                (module.eval if module.training else module.train)()
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)


def logits_of(model: nn.Module, x: Tensor, hint: str = "") -> Tensor:
    """Return the model's output if it is a tensor [batch, classes]; ``hint`` ends the refusal."""
    check_tensor("x", x, floating=False, hint=hint)
    logits = model(x)
    if not isinstance(logits, Tensor):
        way = f"Wrap the model in an nn.Module whose forward returns the logits alone. {hint}"
        found = type(logits).__name__
        raise TypeError(error_text("model(x)", "be a tensor of logits", found, way.rstrip()))
    if logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        found = f"{tuple(logits.shape)} for a batch of {x.shape[0]}"
        raise ValueError(error_text("model(x)", "be logits, [batch, classes]", found, hint))
    if logits.shape[1] < 2:
        hint = "Turn one logit z into two: [0, z]."
        found = str(tuple(logits.shape))
        raise ValueError(error_text("model(x)", "have two classes or more", found, hint))
    return logits


def check_target(target: Tensor, logits: Tensor, *, probabilities: bool) -> None:
    """Refuse targets of a shape, dtype or device that cross-entropy would misread."""
    check_tensor("target", target, floating=False)
    indices = target.dtype == torch.int64 and target.shape == logits.shape[:1]
    soft = probabilities and target.is_floating_point() and target.shape == logits.shape
    if not (indices or soft):
        rule = f"be class indices, int64, [{logits.shape[0]}]"
        if probabilities:
            rule += f", or class probabilities, {list(logits.shape)}"
        whole = not (target.is_floating_point() or target.is_complex())
        hint = "Write target.long()." if whole and target.shape == logits.shape[:1] else ""
        raise ValueError(error_text("target", rule, f"{tuple(target.shape)} {target.dtype}", hint))
    if target.device != logits.device:
        raise ValueError(error_text("target", f"be on {logits.device}", str(target.device)))


def check_classes(target: Tensor, logits: Tensor) -> None:
    """Refuse labels without a logit, on the CPU only: on a GPU this would synchronise."""
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in target.aminmax())
        if low < 0 or high >= logits.shape[1]:
            hint = "Leave out samples without a label."
            found = f"labels from {low} to {high}"
            raise ValueError(error_text("target", f"be in [0, {logits.shape[1] - 1}]", found, hint))
