"""Count which weights an optimizer has updated: fractions by parameter, averaged over steps."""

from __future__ import annotations

from torch import Tensor

from rgp_optim import RGPSelectiveOptimizer


class Updates:
    """Mean fraction of updated weights since the last `mean`, by parameter name."""

    def __init__(self, optimizer: RGPSelectiveOptimizer) -> None:
        self._optimizer = optimizer
        self._sums: dict[Tensor, Tensor] = {}
        self._ever: dict[Tensor, Tensor] = {}
        self._steps = 0

    def record(self) -> None:
        """Count the last step; nothing waits for the device."""
        for p, mask in self._optimizer.masks().items():
            self._sums[p] = self._sums.get(p, 0.0) + mask.float().mean()
            self._ever[p] = self._ever[p] | mask if p in self._ever else mask
        self._steps += 1

    def mean(self) -> dict[str, float]:
        """Return the fractions, in [0, 1], and start over. Parameters without a mask have 1."""
        found = {}
        for name, p in self._named():
            found[name] = float(self._sums[p]) / self._steps if p in self._sums else 1.0
        self._sums, self._steps = {}, 0
        return found

    def never(self) -> float:
        """Return the fraction of the selected tensors' weights that no step has updated."""
        updated = sum(int(mask.sum()) for mask in self._ever.values())
        return 1.0 - updated / max(1, sum(mask.numel() for mask in self._ever.values()))

    def _named(self) -> list[tuple[str, Tensor]]:
        groups = self._optimizer.param_groups
        return [pair for g in groups for pair in zip(g["param_names"], g["params"], strict=True)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return which weights have been updated, by parameter name."""
        return {name: self._ever[p] for name, p in self._named() if p in self._ever}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on counting from a `state_dict`."""
        self._ever = {p: state_dict[name] for name, p in self._named() if name in state_dict}
