"""Argument checks. Each message names the argument, the rule, the value, and often a way out."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


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
