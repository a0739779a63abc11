"""Memory that knows its tensors, and who has accessed each byte."""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .parse import Fault

Array = np.ndarray
SECTOR = 32  # bytes that a GPU moves at once
# Accesses of one byte that need no order; any others are a race without one.
PEACEFUL = (("read", "read"), ("atomic", "atomic"))


class Clocks(NamedTuple):
    """A warp's number, and up to which time of each warp it knows what that warp did."""

    me: int
    known: Array  # int32 [warps of the launch]; times begin at 1

    def tick(self, known: Array) -> None:
        """Learn what others knew, and begin a time that they do not know."""
        self.known[:] = known
        self.known[self.me] += 1


class History:
    """The accesses of one kind to each byte of a region.

    As FastTrack does (Flanagan and Freund, PLDI 2009), a byte has the last warp and its time while
    each access comes after the one before, and a time of each warp once they have no order.
    """

    def __init__(self, size: int, warps: int) -> None:
        self.who, self.when = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.several = np.zeros(size, bool)
        self.times = np.zeros((size, warps), np.int32)  # of those: most of it is never touched

    def unordered(self, where: Array, known: Array) -> bool:
        """Return whether an access is not known to come before now."""
        late = self.when[where] > known[self.who[where]]
        return bool(late.any() or (self.times[where[self.several[where]]] > known).any())

    def add(self, where: Array, clocks: Clocks) -> None:
        late = where[self.when[where] > clocks.known[self.who[where]]]
        self.times[late, self.who[late]] = self.when[late]
        self.several[late] = True
        now = clocks.known[clocks.me]
        self.times[where[self.several[where]], clocks.me] = now
        self.who[where], self.when[where] = clocks.me, now


class Region(NamedTuple):
    """Bytes from an address on: a tensor's memory, or a block's shared memory."""

    start: int
    data: Array
    name: str
    histories: dict[str, History]
    storage: StorageWeakRef | None


class Memory:
    """An address space. Each access is checked: in one region, aligned, and without a race."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.released: dict[int, Array] = {}  # times that whoever acquires at an address learns
        self.sectors: Counter[str] = Counter()

    def add(self, tensor: Tensor, garbage: bool = False) -> None:
        """Make a tensor's memory known for as long as it lives."""
        storage = tensor.untyped_storage()
        start, size = storage.data_ptr(), storage.nbytes()
        self.regions = [r for r in self.regions if not r.storage.expired()]
        if size and start not in [region.start for region in self.regions]:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            if garbage:
                data[:] = np.random.default_rng(size).integers(256, size=size)
            name = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            self.regions.append(Region(start, data, name, {}, StorageWeakRef(storage)))
            self.regions.sort(key=lambda region: region.start)

    def begin(self) -> None:
        """Begin a launch: all that came before is ordered, and what was freed is gone."""
        self.regions = [r for r in self.regions if not r.storage.expired()]
        self.released, self.sectors = {}, Counter(read=0, write=0, atomic=0)
        for region in self.regions:
            region.histories.clear()

    def load(self, at: Array, width: int, clocks: Clocks) -> Array:
        """Return ``width`` bytes at each address."""
        data, where = self._reach("read", at, width, clocks)
        return data[where]

    def store(self, at: Array, values: Array, clocks: Clocks) -> None:
        """Write a row of bytes at each address."""
        data, where = self._reach("write", at, values.shape[1], clocks)
        data[where] = values
        if (data[where] != values).any():
            raise Fault("lanes write different values to one address")

    def atomic_add(self, at: Array, values: Array, clocks: Clocks) -> Array:
        """Add to each address, one after another; return what was there."""
        data, where = self._reach("atomic", at, values.itemsize, clocks)
        old = np.zeros_like(values)
        for i, places in enumerate(where):
            old[i] = data[places].view(values.dtype)[0]
            data[places] = (old[i : i + 1] + values[i]).view(np.uint8)
        return old

    def acquire_release(self, address: int, clocks: Clocks) -> None:
        """Learn what those knew who were here before, and let those who come learn the same."""
        known = np.maximum(clocks.known, self.released.get(address, 0))
        self.released[address] = known
        clocks.tick(known)

    def _reach(self, kind: str, at: Array, width: int, clocks: Clocks) -> tuple[Array, Array]:
        """Check and note an access; return a region's data, and the positions of each lane."""
        if (at % width).any():
            raise Fault(f"an address is no multiple of {width}")
        first, last = int(at.min()), int(at.max()) + width
        region = next((r for r in reversed(self.regions) if r.start <= first), None)
        if region is None or first >= region.start + len(region.data):
            raise Fault(f"no tensor is at address {first:#x}")
        if (beyond := last - region.start - len(region.data)) > 0:
            raise Fault(f"an address is {beyond} bytes beyond the end of {region.name}")
        self.sectors[kind] += len(np.unique(at // SECTOR)) * -(-width // SECTOR)
        where = (at - region.start)[:, None] + np.arange(width)
        flat = where.ravel()
        for other, history in region.histories.items():
            if (other, kind) not in PEACEFUL and history.unordered(flat, clocks.known):
                raise Fault(f"a data race in {region.name}: {kind}, not ordered after a {other}")
        if kind not in region.histories:
            region.histories[kind] = History(len(region.data), len(clocks.known))
        region.histories[kind].add(flat, clocks)
        return region.data, where
