"""Processes that form a gloo group and run functions of the tests, one after another.

Starting a process costs seconds, so a group is started once and used by all tests.
"""

import gc
import itertools
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300  # seconds for one function; machines can be busy
_numbers = itertools.count()


def _serve(rank, size, store, pipe):
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning, message=".*torch.distributed")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(size))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE / 2),
    )
    while True:
        try:
            work = pipe.recv()
        except EOFError:
            break
        if work is None:
            break
        function, args = work
        try:
            torch.manual_seed(1000 + rank)  # of what a test does not draw from a seed
            answer = True, function(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        gc.collect()
        pipe.send(answer)
    os._exit(0)  # without the interpreter's own end, in which threads of gloo abort now and then


class RankFailed(AssertionError):
    """A function raised on one of the ranks."""


class Ranks:
    """``size`` processes; `run` gives a function to all of them."""

    def __init__(self, size):
        self.size = size
        self._processes = []

    def run(self, function, *args):
        """Return what ``function(rank, *args)`` returned on each rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = {}
        deadline = time.monotonic() + PATIENCE
        while len(answers) < self.size:
            for rank, pipe in enumerate(self._pipes):
                if rank in answers:
                    continue
                try:
                    if pipe.poll(0.002):
                        answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = False, "the process died"
                if rank in answers and not answers[rank][0]:  # others may wait for it in vain
                    deadline = min(deadline, time.monotonic() + 3)
            if time.monotonic() > deadline:
                break
        missing = set(range(self.size)) - set(answers)
        failed = {rank: text for rank, (fine, text) in answers.items() if not fine}
        if missing or any(text == "the process died" for text in failed.values()):
            self.stop()
        if missing or failed:
            told = [f"rank {rank}: {text}" for rank, text in sorted(failed.items())]
            raise RankFailed("\n".join([*told, *(f"rank {rank}: no answer" for rank in missing)]))
        return [answers[rank][1] for rank in range(self.size)]

    def _start(self):
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / f"store{next(_numbers)}"
        self._pipes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self):
        """End the processes; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []
        if hasattr(self, "_folder"):
            self._folder.cleanup()
