"""Processes that form a gloo group and run functions of the tests, one after another.

Starting a process costs seconds, so a group is started once and used by all tests.
"""

import gc
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300  # seconds for one function; machines can be busy
DIED = "the process died"


def _serve(rank, size, store, pipe):
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=FutureWarning, message=".*torch.distributed")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(size))
    options = dict(rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE / 2))
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    while work := pipe.recv():
        function, args = work
        try:
            torch.manual_seed(1000 + rank)  # of what a test does not draw from a seed
            answer = True, function(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        gc.collect()
        pipe.send(answer)


class RankFailed(AssertionError):
    """A function raised on one of the ranks."""


class Ranks:
    """``size`` processes; `run` gives a function to all of them."""

    def __init__(self, size):
        self.size = size
        self._pipes = {}  # process: pipe

    def run(self, function, *args):
        """Return what ``function(rank, *args)`` returned on each rank."""
        if not self._pipes:
            self._start()
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes.values())}
        for pipe in waiting:
            pipe.send((function, args))
        answers = dict.fromkeys(range(self.size), (False, "no answer"))
        deadline = time.monotonic() + PATIENCE
        while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = False, DIED
                if not answers[rank][0]:  # others may wait for it in vain
                    deadline = min(deadline, time.monotonic() + 3)
        if waiting or (False, DIED) in answers.values():
            self.stop()
        if failed := [f"rank {r}: {text}" for r, (fine, text) in answers.items() if not fine]:
            raise RankFailed("\n".join(failed))
        return [answer for _, answer in answers.values()]

    def _start(self):
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = rank, self.size, f"{self._folder.name}/store", theirs
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes[process] = ours

    def stop(self):
        """End the processes; the next `run` starts new ones."""
        for process in self._pipes:
            process.kill()
        for process in self._pipes:
            process.join()
        if self._pipes:
            self._folder.cleanup()
        self._pipes = {}
