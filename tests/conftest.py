"""Settings of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start, too

import pytest
import torch

if not torch.cuda.is_available():  # before triton and the library are imported
    os.environ["TRITON_INTERPRET"] = "1"
from common import DEVICE
from hypothesis import settings
from ranks import Ranks

torch.set_num_threads(1)  # small networks; several threads would wait for each other
torch.backends.cudnn.deterministic = True  # on a GPU: bits are compared
torch.backends.cudnn.allow_tf32 = False
settings.register_profile("suite", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("suite")

STAY = {  # on the CPU: by folder or module
    "distributed": "processes of a gloo group",
    "examples": "scripts, which have --device; trainers, which choose it",
    "robustness": "the benchmark, which has --device",
    "test_speed": "scripts, tables, figures",
    "test_project": "files of the project",
}


@pytest.fixture(scope="module", autouse=True)
def on_device(request):
    """Make tensors on ``RGP_TEST_DEVICE``, by default the CPU."""
    for name in (request.module.__name__, request.path.parent.name):
        if DEVICE.type != "cpu" and name in STAY:
            pytest.skip(f"on the CPU only: {STAY[name]}")
    torch.set_default_device(None if DEVICE.type == "cpu" else DEVICE)
    yield
    torch.set_default_device(None)


def _ranks(size):
    def start():
        if DEVICE.type != "cpu":
            pytest.skip("on the CPU only: processes of a gloo group")
        ranks = Ranks(size)
        yield ranks
        ranks.stop()

    return pytest.fixture(start, scope="session")


two, four = _ranks(2), _ranks(4)
