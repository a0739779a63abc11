"""Stand in for Triton's launcher: kernels compiled for a GPU run on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from .instructions import LANES, Program
from .machine import Machine

_programs: dict[str, Program] = {}


class _Watch(TorchDispatchMode):
    """Makes new tensors known to a memory; those without values get garbage."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.machine.memory.add(each, garbage="empty" in func.__name__)
        return found


@contextmanager
def emulated(machine: Machine, arch: int) -> Iterator[None]:
    """Run every kernel on a machine, compiled for an architecture: 90 is sm_90."""
    original = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # A warm-up compiles, specialised as for a launch, and launches nothing.
        compiled = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
        if ptx not in _programs:
            _programs[ptx] = Program(ptx, shared, kernel.__name__)
        named = dict(zip(kernel.arg_names, args, strict=False))
        kinds = compiled.src.signature
        given = [named[name] for name in kinds if kinds[name] != "constexpr"]
        values = [each.data_ptr() if isinstance(each, Tensor) else each for each in given]
        with np.errstate(all="ignore"):  # lanes that take no part hold anything
            arguments = [np.full(LANES, value) for value in values]
            machine.launch(_programs[ptx], grid[0], arguments)

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: arch,  # Triton keeps by device what it has compiled
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )
    with mock.patch.object(JITFunction, "run", run), _Watch(machine):
        yield
