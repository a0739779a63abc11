"""Settings of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too

import pytest
import torch
from common import DEVICE

if not torch.cuda.is_available():  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
from hypothesis import settings
from ranks import Ranks

torch.set_num_threads(1)  # small networks; several threads would wait for each other
torch.backends.cudnn.deterministic = True  # on a GPU: bits are compared
torch.backends.cudnn.allow_tf32 = False
settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")


STAY = {  # on the CPU
    "test_analysis": "small networks of the analysis",
    "test_benchmarks": "scripts, tables, figures",
    "test_datasets": "files and pixels",
    "test_distributed": "processes of a gloo group",
    "test_example": "the script, which has --device",
    "test_project": "files of the project",
    "test_robustness": "the benchmark, which has --device",
    "test_trainers": "the trainers choose the device",
}


@pytest.fixture(scope="module", autouse=True)
def on_device(request):
    """Make tensors on ``RGP_TEST_DEVICE``, by default the CPU."""
    if DEVICE.type == "cpu":
        yield
        return
    if (name := request.module.__name__) in STAY:
        pytest.skip(f"on the CPU only: {STAY[name]}")
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def two():
    """Two processes of a gloo group."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four():
    """Four processes of a gloo group."""
    yield from _ranks(4)


def _ranks(size):
    if DEVICE.type != "cpu":
        pytest.skip("on the CPU only: processes of a gloo group")
    ranks = Ranks(size)
    yield ranks
    ranks.stop()
