"""Runs the programs of a Triton kernel side by side; the interpreter runs one after another.

Each program has a thread of its own, and exactly one of them runs at a time. Before each access to
memory, and between the parts of a store or of an atomic, another one may be let go on: a schedule
says which. What a GPU leaves undefined is drawn at random: in which order the lanes of a block do
their atomics, and what a lane gets that is masked off.

Other orders are not all that a GPU can do: a plain store may become visible late, a plain load may
see what was there before. Programs without data races cannot tell, so races are looked for: two
accesses to one address by two programs, one of them a store and not both atomic, neither of which
happened before the other. Only atomics that release and acquire order programs, and what a program
releases is what it did before its last barrier, for another of its threads may have done it.
"""

import random
import sys
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from triton.runtime import interpreter


class Schedule:
    """Says which program goes on; this one lets each come to its end, in a random order."""

    def __init__(self, draw, count):
        self.draw = draw
        self.order = draw.sample(range(count), count)

    def next(self, running, ready, atomic):
        """Return one of those that are ready; the running one is None if it came to its end."""
        return self.first(ready) if running is None else running

    def first(self, ready):
        return min(ready, key=self.order.index)


class LastFirst(Schedule):
    """Each to its end, the last one first."""

    def __init__(self, draw, count):
        super().__init__(draw, count)
        self.order = list(reversed(range(count)))


class LockStep(Schedule):
    """One access each, in turn."""

    def next(self, running, ready, atomic):
        if running is None:
            return self.first(ready)
        turn = self.order.index(running) + 1
        return min(ready, key=lambda p: (self.order.index(p) - turn) % len(self.order))


class Anywhere(Schedule):
    """Any program, at any access."""

    def next(self, running, ready, atomic):
        stays = running is not None and self.draw.random() < 0.7
        return running if stays else self.draw.choice(ready)


class AtAtomics(Schedule):
    """Any program, but only where one is about to do an atomic, or has just done it."""

    def __init__(self, draw, count):
        super().__init__(draw, count)
        self.after = False

    def next(self, running, ready, atomic):
        stays = running is not None and not (atomic or self.after)
        self.after = atomic
        return running if stays else self.draw.choice(ready)


class Starve(Schedule):
    """One program stops somewhere until all others have come to their end."""

    def __init__(self, draw, count):
        super().__init__(draw, count)
        self.victim, self.left = draw.randrange(count), draw.randrange(80)

    def next(self, running, ready, atomic):
        if running == self.victim and self.counts(atomic):
            self.left -= 1
        if self.left <= 0 and len(ready) > 1:
            ready = [p for p in ready if p != self.victim]
        stays = running in ready and self.draw.random() < 0.9
        return running if stays else self.draw.choice(ready)

    def counts(self, atomic):
        return True


class Hold(Starve):
    """As `Starve`, but it stops right before or right after one of its atomics."""

    def __init__(self, draw, count):
        super().__init__(draw, count)
        self.left = draw.choice([1, 1, 2, 3, 4, 5, 6, 7])
        self.before, self.after = draw.random() < 0.5, False

    def counts(self, atomic):
        counts, self.after = atomic if self.before else self.after, atomic
        return counts


class Priorities(Schedule):
    """The first in an order goes on; now and then it becomes the last (PCT, Burckhardt 2010)."""

    def next(self, running, ready, atomic):
        if running is not None and self.draw.random() < 0.1:
            self.order.remove(running)
            self.order.append(running)
        return self.first(ready)


SCHEDULES = [Schedule, LastFirst, LockStep, Anywhere, AtAtomics, Starve, Hold, Priorities]


class Race(Exception):
    """Two accesses to one address that nothing orders."""


class _Stop(BaseException):
    """Ends a program because another one failed."""


class SideBySide:
    """While it is entered, the programs of each launch run side by side, under a schedule.

    Args:
        schedule: A subclass of `Schedule`.
        seed: Of all that is drawn at random.
        races: Whether to look for data races.
    """

    def __init__(self, schedule, seed=0, races=True):
        self.schedule = schedule
        self.draw = random.Random(seed)
        self.races = races
        self.launches = []  # what can be replayed
        self.switches = 0
        self.launch = None

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        original = interpreter.GridExecutor.__call__

        def call(executor, *args, **kwargs):
            executor.fn = _Programs(executor.fn, self)
            self.launches.append(lambda: original(executor, *args, **kwargs))
            original(executor, *args, **kwargs)

        patch_lang, patched = interpreter._patch_lang, set()

        def patch_once(fn):  # not at each call of each function: that is half the time
            if isinstance(fn, _Programs):
                patched.clear()
                return patch_lang(fn)
            if id(fn.__globals__) not in patched:
                patched.add(id(fn.__globals__))
                patch_lang(fn)

        self._patch.setattr(interpreter, "_patch_lang", patch_once)
        self._patch.setattr(interpreter.GridExecutor, "__call__", call)
        self._patch.setattr(interpreter, "_interpreter", _Memory(interpreter._interpreter, self))
        builder = interpreter.interpreter_builder
        self._patch.setattr(builder, "create_barrier", lambda: self.launch.barrier())
        return self

    def __exit__(self, *error):
        self._patch.undo()

    def replay(self):
        """Launch all again on the same memory, as a CUDA graph does."""
        for launch in self.launches:
            launch()


class _Programs:
    """Takes the place of a kernel's function: notes the calls, and runs all with the last one."""

    def __init__(self, fn, harness):
        self.__signature__ = interpreter.inspect.signature(fn)
        self.__globals__, self.__name__ = fn.__globals__, fn.__name__
        self.__annotations__ = fn.__annotations__
        self._fn, self._harness = fn, harness
        self._places = []

    def __call__(self, **args):
        builder = interpreter.interpreter_builder
        self._places.append(builder.grid_idx)
        if len(self._places) == np.prod(builder.grid_dim):
            places, self._places = self._places, []
            self._harness.launch = _Launch(self._fn, args, places, self._harness)
            self._harness.launch.run()


class _Launch:
    """The programs of one launch, of which one runs at a time."""

    def __init__(self, fn, args, places, harness):
        self._fn, self._args, self._places, self._harness = fn, args, places, harness
        count = len(places)
        self._schedule = harness.schedule(harness.draw, count)
        self._ready = list(range(count))
        self._go = [threading.Semaphore(0) for _ in places]
        self._error = None
        self.running = None
        self._shadow = {}
        self._epochs = [1] * count  # a barrier begins another one
        self._known = [[0] * count for _ in places]  # which epochs of others happened before
        self._released = {}

    def run(self):
        threads = [
            threading.Thread(target=self._program, args=(p,), daemon=True) for p in self._ready
        ]
        for thread in threads:
            thread.start()
        self._hand_over(self._schedule.next(None, self._ready, False))
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _program(self, p):
        try:
            self._wait(p)
            self._fn(**self._args)
        except _Stop:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._ready.remove(p)
        if self._ready:
            self._hand_over(self._schedule.next(None, self._ready, False))

    def _hand_over(self, p):
        self.running = p
        self._harness.switches += 1
        self._go[p].release()

    def _wait(self, p):
        self._go[p].acquire()
        interpreter.interpreter_builder.grid_idx = self._places[p]
        if self._error is not None:
            raise _Stop

    def pause(self, atomic=False):
        """Let another program go on, perhaps."""
        p = self.running
        chosen = self._schedule.next(p, self._ready, atomic)
        if chosen != p:
            self._hand_over(chosen)
            self._wait(p)

    # Races.

    def barrier(self):
        self._epochs[self.running] += 1

    def synchronise(self, address):
        """Acquire what was released here, then release what was done before the last barrier."""
        p = self.running
        released = self._released.get(address, [0] * len(self._places))
        self._known[p] = list(map(max, released, self._known[p]))
        self._released[address] = list(self._known[p])
        self._released[address][p] = self._epochs[p] - 1

    def note(self, kind, addresses):
        """Compare accesses with the earlier ones of other programs."""
        if not self._harness.races:
            return
        p, line = self.running, _line()
        epoch, known = self._epochs[p], self._known[p]
        for address in addresses.tolist():
            seen = self._shadow.get(address)
            if seen is None:
                seen = self._shadow[address] = _Seen()
            for what in _CONFLICTS[kind]:
                for q, (when, where) in getattr(seen, what).items():
                    if q != p and when > known[q]:
                        raise Race(
                            f"{self._fn.__name__}: {kind} in line {line} of program {p} and {what} "
                            f"in line {where} of program {q}"
                        )
            if kind == "stores":
                self._shadow[address] = seen = _Seen()
            getattr(seen, kind)[p] = epoch, line


@dataclass(slots=True)
class _Seen:
    """The latest accesses to an address, by program: its epoch and the line of source."""

    loads: dict = field(default_factory=dict)
    stores: dict = field(default_factory=dict)
    atomics: dict = field(default_factory=dict)


_CONFLICTS = {
    "loads": ("stores", "atomics"),
    "stores": ("loads", "stores", "atomics"),
    "atomics": ("loads", "stores"),
}


def _line():
    """Return the line of the kernel's source that is being run."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_lineno


class _Memory:
    """Takes the place of the interpreter's access to memory."""

    def __init__(self, real, harness):
        self._real, self._harness = real, harness

    def __getattr__(self, name):
        return getattr(self._real, name)

    def load(self, pointers, mask, other, dtype):
        launch = self._harness.launch
        launch.pause()
        launch.note("loads", pointers[mask])
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        launch = self._harness.launch
        values = np.broadcast_to(values, pointers.shape)[mask]
        pointers = pointers[mask]
        for part in self._parts(len(pointers), 2):
            launch.pause()
            launch.note("stores", pointers[part])
            self._real.store(pointers[part], values[part], np.ones(len(part), bool))

    def atomic_rmw(self, op, pointers, values, mask, sem):
        launch = self._harness.launch
        old = np.empty(pointers.shape, values.dtype)
        old.fill(self._harness.draw.randrange(2**31))
        active, drawn = pointers[mask], np.broadcast_to(values, pointers.shape)[mask]
        got = np.empty(len(active), values.dtype)
        for part in self._parts(len(active), 3):
            launch.pause(atomic=True)
            launch.note("atomics", active[part])
            if sem == self._real.MEM_SEMANTIC.ACQUIRE_RELEASE:
                for address in active[part].tolist():
                    launch.synchronise(address)
            ones = np.ones(len(part), bool)
            got[part] = self._real.atomic_rmw(op, active[part], drawn[part], ones, sem)
        old[mask] = got
        return old

    def atomic_cas(self, pointers, expected, values, sem):
        raise NotImplementedError

    def _parts(self, size, count):
        """Return the lanes in a random order, in a few parts."""
        if size < 2:
            return [np.arange(size)] if size else []
        lanes = np.array(self._harness.draw.sample(range(size), size))
        cuts = sorted(self._harness.draw.randrange(size) for _ in range(count - 1))
        return [part for part in np.split(lanes, cuts) if len(part)]
