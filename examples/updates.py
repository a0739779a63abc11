"""Where an optimizer has updated weights: fractions by parameter, averaged over steps."""

from __future__ import annotations

from torch import Tensor

from rgp_optim import RGPSelectiveOptimizer


class Updates:
    """Mean fraction of updated weights since the last `mean`, by parameter name."""

    def __init__(self, optimizer: RGPSelectiveOptimizer) -> None:
        self._optimizer = optimizer
        self._sums: dict[Tensor, Tensor] = {}
        self._steps = 0

    def record(self) -> None:
        """Count the last step; nothing waits for the device."""
        for p, mask in self._optimizer.masks().items():
            self._sums[p] = self._sums.get(p, 0.0) + mask.float().mean()
        self._steps += 1

    def mean(self) -> dict[str, float]:
        """Return the fractions, in [0, 1], and begin anew. Parameters without a mask have 1."""
        found = {}
        for group in self._optimizer.param_groups:
            for p, name in zip(group["params"], group["param_names"], strict=True):
                found[name] = float(self._sums[p]) / self._steps if p in self._sums else 1.0
        self._sums, self._steps = {}, 0
        return found
