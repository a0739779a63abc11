"""The closure of a step: evaluated once, before the selection; its loss is handed on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rgp_optim._distributed import local

AROUND = (
    "Wrap the optimizer inside it: SAM(params, lambda g, **k: RGPSelectiveOptimizer("
    "torch.optim.SGD(g, **k))), with the loss scored in the second pass."
)


class Reevaluated(RuntimeError):
    """The inner step wants the loss of other weights, which its closure no longer gives."""


class Evaluated:
    """A closure after its evaluation: gives its loss again, as long as the weights are the same."""

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor], first: bool) -> None:
        with torch.enable_grad():
            self.loss = closure()
        self._params = params
        self._versions = [p._version for p in params]
        self._before = [p.detach().clone() for p in params] if first else []

    def __call__(self) -> Any:
        """Return the loss; refuse where the weights have changed since the evaluation."""
        changed = [p._version for p in self._params] != self._versions
        for p, old in zip(self._params, self._before, strict=False):  # `p.data` has no version
            changed = changed or not bool(((local(p) == local(old)) | local(old).isnan()).all())
        if changed:
            raise Reevaluated(
                "step(): the inner optimizer changed the weights and called the closure again, but "
                f"the closure is evaluated once per step, before weights are selected. {AROUND}"
            )
        return self.loss

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the weights of the first step."""
        for p, old in zip(self._params, self._before, strict=False):
            p.copy_(old)


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether ``step`` cannot be called without a closure."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
