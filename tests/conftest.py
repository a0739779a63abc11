"""Settings of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
from hypothesis import settings
from ranks import Ranks

torch.set_num_threads(1)  # small networks; several threads would wait for each other
settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def two():
    """Two processes of a gloo group."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four():
    """Four processes of a gloo group."""
    yield from _ranks(4)


def _ranks(size):
    ranks = Ranks(size)
    yield ranks
    ranks.stop()
