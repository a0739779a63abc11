"""The training attack, compiled and replayed as a CUDA graph.

An attack of ten steps launches thousands of small kernels, which takes the host longer than the
GPU where networks or batches are small. Captured once, it is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rgp_optim import kl_attack

WAYS = ("eager", "compile", "graph", "compile-graph")


class Captured:
    """A function from batch to batch as a CUDA graph for each shape; on a CPU the plain function.

    What it returns is overwritten by the next call. It should read parameters in place, so that
    each replay sees what they have become: under autocast without its cache, which would keep the
    cast weights of the capture.

    Args:
        function: Takes and returns a tensor; does not wait for the device.
        generators: That it draws from, besides torch's own.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], generators: Sequence[torch.Generator] = ()
    ) -> None:
        self.function, self.generators = function, generators
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            return self.function(x)
        key = x.shape, x.stride(), x.dtype, x.device
        if key not in self.graphs:
            self.graphs[key] = self._capture(x)
        graph, given, found = self.graphs[key]
        given.copy_(x)
        graph.replay()
        return found

    def _capture(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        states = [generator.get_state() for generator in self.generators]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compilers and libraries settle down
            for _ in range(2):
                self.function(given)
        torch.cuda.current_stream().wait_stream(stream)
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)  # drawn from for practice
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            found = self.function(given)
        return graph, given, found


def kl_attack_of(
    model: nn.Module,
    way: str,
    autocast: Callable[[bool], AbstractContextManager[Any]],
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Callable[[Tensor], Tensor]:
    """Return `rgp_optim.kl_attack` of a model in one of `WAYS`.

    ``autocast`` makes the context in which the model runs, with or, for a capture, without a cache.
    """
    attacked = torch.compile(model) if "compile" in way else model
    capture = "graph" in way

    def attack(x: Tensor) -> Tensor:
        with autocast(not capture):
            return kl_attack(attacked, x, generator=generator, **settings)

    if not capture:
        return attack
    return Captured(attack, () if generator is None else (generator,))
