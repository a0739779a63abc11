"""Stand in for Triton's launcher: kernels compiled for a GPU run on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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

_program = cache(Program)


class _Watch(TorchDispatchMode):
    """Makes new tensors known to a machine's memory; those without values get garbage."""

    machine: Machine

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor):
                self.machine.memory.add(each, garbage="empty" in func.__name__)
        return found


@contextmanager
def emulated(machine: Machine, arch: int) -> Iterator[None]:
    """Run every kernel on a machine, compiled for an architecture: 90 is sm_90."""
    original, gpu = JITFunction.run, SimpleNamespace()
    gpu.get_current_device = lambda: arch  # Triton keeps by device what it has compiled
    gpu.get_current_stream = lambda device: 0
    gpu.get_current_target = lambda: GPUTarget("cuda", arch, LANES)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # A warm-up compiles, specialised as for a launch, and launches nothing.
        compiled = original(kernel, *args, grid=grid, warmup=True, **kwargs)
        program = _program(compiled.asm["ptx"], compiled.metadata.shared, kernel.__name__)
        named = dict(zip(kernel.arg_names, args, strict=False))
        kinds = compiled.src.signature.items()
        tensors = [named[name] for name, kind in kinds if kind != "constexpr"]
        arguments = [np.full(LANES, tensor.data_ptr()) for tensor in tensors]
        with np.errstate(all="ignore"):  # lanes that take no part hold anything
            machine.launch(program, grid[0], arguments)

    driver.set_active(gpu)
    watch = _Watch()
    watch.machine = machine
    with mock.patch.object(JITFunction, "run", run), watch:
        yield
