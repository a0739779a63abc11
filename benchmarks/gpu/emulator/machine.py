"""Blocks of warps that take turns at random, several blocks at a time."""

from __future__ import annotations

import random

import numpy as np

from .instructions import ALL, END, LANE, LANES, Array, Program
from .memory import SECTOR, Clocks, Memory, Region
from .parse import Fault

RESIDENT = 3  # blocks at a time
TURNS = (1, 5, 40, 300)  # instructions until another warp's turn


class Warp:
    """32 lanes, which share their place in the code until a branch parts them."""

    def __init__(self, block: Block, index: int, clocks: Clocks) -> None:
        self.block, self.clocks, self.waiting = block, clocks, False
        own = {"%tid.x": LANES * index + LANE, "%ctaid.x": np.full(LANES, block.index)}
        self.registers = [own.get(name, value) for name, value in block.program.registers.items()]
        self.places = {0: ALL}  # positions in the code, and which lanes are there

    def step(self) -> None:
        """Take the lanes furthest behind by one instruction; those at a ``.sync`` wait for all."""
        program = self.block.program
        at = min(self.places, key=lambda place: (program.steps[place].together, place))
        lanes, (it, together, guard, act) = self.places.pop(at), program.steps[at]
        active = lanes if guard is None else _mask(lanes & (guard(self) != it.negated))
        if isinstance(act, int):
            self._go(act, active)
            lanes = lanes & ~active
        elif active is ALL or active.any():
            try:
                if active is not ALL and together:
                    raise Fault("some lanes of the warp are elsewhere")
                act(self, active)
            except Fault as fault:
                name = f"{program.name}, warp {self.clocks.me}"
                raise Fault(f"{name}, {it.text}: {fault}") from None
        self._go(at + 1, lanes)

    def _go(self, at: int, lanes: Array) -> None:
        if at in self.places:
            lanes = lanes | self.places[at]
        if at != END and (lanes is ALL or lanes.any()):
            self.places[at] = _mask(lanes)


def _mask(lanes: Array) -> Array:
    return ALL if lanes.all() else lanes


class Block:
    """Warps that share memory and a barrier."""

    def __init__(self, machine: Machine, program: Program, index: int, grid: int) -> None:
        self.machine, self.program, self.index, self.shared = machine, program, index, Memory()
        garbage = np.random.default_rng(index).integers(256, size=program.shared, dtype=np.uint8)
        self.shared.regions.append(Region(0, garbage, "shared memory", {}, None))
        count = program.threads // LANES
        times = np.eye(count, count * grid, count * index, np.int32)  # each warp knows its own
        self.warps = [Warp(self, i, Clocks(count * index + i, times[i])) for i in range(count)]

    def ready(self) -> list[Warp]:
        """Return the warps that can go on; the barrier opens once all have come."""
        if all(warp.waiting for warp in self.warps):
            known = np.max([warp.clocks.known for warp in self.warps], 0)
            for warp in self.warps:
                warp.clocks.tick(known)
                warp.waiting = False
        ready = [warp for warp in self.warps if warp.places and not warp.waiting]
        if not ready and any(warp.waiting for warp in self.warps):
            raise Fault(f"{self.program.name}: a barrier waits for warps that have ended")
        return ready


class Machine:
    """Runs kernels in its memory, and counts what each launch does.

    The bytes are those of global memory, in whole sectors, as the warps ask for them.
    """

    def __init__(self, seed: int = 0) -> None:
        self.memory, self.random = Memory(), random.Random(seed)
        self.launches: list[dict[str, int]] = []
        self.arguments: list[Array] = []

    def launch(self, program: Program, grid: int, arguments: list[Array]) -> None:
        self.memory.begin()
        self.arguments = arguments
        indices, blocks, count = self.random.sample(range(grid), grid), [], 0
        while indices or blocks:
            while indices and len(blocks) < RESIDENT:
                blocks.append(Block(self, program, indices.pop(), grid))
            block = self.random.choice(blocks)
            ready = block.ready()
            if not ready:
                blocks.remove(block)
                continue
            warp = self.random.choice(ready)
            for _ in range(self.random.choice(TURNS)):
                warp.step()
                count += 1
                if warp.waiting or not warp.places:
                    break
        moved = {f"{kind}_bytes": SECTOR * n for kind, n in self.memory.sectors.items()}
        self.launches.append({"warp_instructions": count} | moved)
