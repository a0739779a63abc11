"""Which fraction of each parameter the last steps have updated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rgp_optim._distributed import local

Counts = Mapping[Tensor, Tensor | int]  # by parameter: how many of its weights were updated


class UpdateTracker:
    """Counts of updated weights, by parameter: of the last step, and since the last `reset`.

    Made by `RGPSelectiveOptimizer.track_updates`. The counts stay on the device until they are
    asked for; asking waits for the device. A parameter without a gradient counts as not updated.
    """

    def __init__(
        self, names: Callable[[], dict[Tensor, str]], stop: Callable[[UpdateTracker], None]
    ):
        self._names = names
        self._stop = stop
        self._last: Counts = {}
        self._sum: dict[Tensor, Tensor | int] = {}
        self._steps = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(steps={self._steps}, parameters={len(self._names())})"

    def last(self) -> dict[str, float]:
        """Return the fraction of each parameter's weights that the last step updated, in [0, 1]."""
        return self._fractions(self._last, 1) if self._steps else {}

    def mean(self) -> dict[str, float]:
        """Return the same, averaged over the steps since the last `reset`; empty without a step."""
        return self._fractions(self._sum, self._steps) if self._steps else {}

    def reset(self) -> None:
        """Begin a new window."""
        self._last, self._sum, self._steps = {}, {}, 0

    def stop(self) -> None:
        """Stop counting; what was counted can still be read."""
        self._stop(self)

    def record(self, updated: Counts) -> None:
        """Count one step of the optimizer."""
        self._last = updated
        for p, count in self._last.items():
            self._sum[p] = self._sum.get(p, 0) + count
        self._steps += 1

    def _fractions(self, counts: Counts, steps: int) -> dict[str, float]:
        on_device: dict[torch.device, dict[Tensor, Tensor]] = {}
        for p, count in counts.items():
            if isinstance(count, Tensor):
                on_device.setdefault(p.device, {})[p] = count
        numbers = {p: count for p, count in counts.items() if not isinstance(count, Tensor)}
        for each in on_device.values():  # one wait for each device
            numbers.update(zip(each, torch.stack(list(each.values())).tolist(), strict=True))
        names = self._names()
        sizes = {p: max(local(p.detach()).numel(), 1) for p in names}
        return {name: numbers.get(p, 0) / (sizes[p] * steps) for p, name in names.items()}
