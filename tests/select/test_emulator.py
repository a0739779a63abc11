"""The compiled kernels, run instruction by instruction without a GPU, and faults made on purpose.

In a process of their own, since this one may have Triton's interpreter.
"""

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "rgp_optim" / "_triton.py"
SCRIPT = "benchmarks/gpu/emulate.py"
CASES = (
    "1 weights", "255 weights", "2049 weights", "32769 weights", "several tensors", "ties",
    "special values", "special values, scores", "unaligned", "channels_last", "mixed dtypes",
    "merge, unaligned, torch.bfloat16", "merge, transposed, torch.float64", "merge of many",
)  # fmt: skip
# What is changed, how the emulator says so, and the case that shows it.
FAULTS = {
    "a relaxed ticket": (
        'ticket = tl.atomic_add(state + TICKET, 1, sem="acq_rel")',
        'ticket = tl.atomic_add(state + TICKET, 1, sem="relaxed")',
        r"_count.*data race in int64",
        "32769 weights",
    ),
    "no barrier": (
        "    tl.debug_barrier()  # a layout may load a count in several threads\n",
        "",
        r"_count.*data race in int64",
        "2049 weights",
    ),
    "an index one too far": (
        "            tl.store(there, selected.to(tl.int8), mask=inside)",
        "            tl.store(there + 1, selected.to(tl.int8), mask=inside)",
        r"_mask.*1 bytes beyond the end of bool",
        "ties",
    ),
    "wide loads of misaligned memory": (
        "layout == FLAT and all(address % 16 == 0 for address in rest[:3])",
        "layout == FLAT",
        r"_count.*ld\.global\.v4\.b32.*no multiple of 16",
        "unaligned",
    ),
    "an instruction that is not known": (  # ptxas may fuse products and sums without ``.rn``
        '"enable_fp_fusion": False',
        '"enable_fp_fusion": True',
        r"no such instruction: mul\.f32",
        "2049 weights",
    ),
    "a lost tie": (
        "(tl.cumsum(tie.to(tl.int32)) <= room)",
        "(tl.cumsum(tie.to(tl.int32)) < room)",
        "differs from the reference",
        "ties",
    ),
}


# Runs pairs of a file and a case.
PAIRS = """
import pathlib, sys
sys.path.insert(0, "benchmarks/gpu")
import emulate
if reason := emulate.unable():
    print("not able to compile:", reason)
    sys.exit(3)
for path, case in zip(sys.argv[1::2], sys.argv[2::2]):
    emulate.run(emulate.loaded(pathlib.Path(path)), 90, 0, [case])
"""


def python(*command):
    """Return the status of a script and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module", autouse=True)
def needs_triton():
    pytest.importorskip("triton")


def test_compiled_kernels_equal_the_reference():
    status, printed = python(SCRIPT, *(f"--only={case}" for case in CASES))
    assert f"sm_90: {len(CASES)} of {len(CASES)} cases" in printed
    assert status == 0, printed


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What is printed about copies of the kernels with a fault each."""
    folder, text = tmp_path_factory.mktemp("kernels"), KERNELS.read_text()
    for i, (right, wrong, *_) in enumerate(FAULTS.values()):
        assert text.count(right) == 1, right
        (folder / f"fault{i}.py").write_text(text.replace(right, wrong))
    pairs = [(str(folder / f"fault{i}.py"), case) for i, (*_, case) in enumerate(FAULTS.values())]
    return python("-c", PAIRS, *chain(*pairs))[1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(fault, reports):
    *_, report, case = FAULTS[fault]
    assert re.search(rf"^fault{[*FAULTS].index(fault)}, sm_90, {case}: .*{report}", reports, re.M)


def test_the_page_has_the_committed_counts():
    status, printed = python(SCRIPT, "--table")
    assert status == 0
    assert printed in (ROOT / "benchmarks" / "gpu" / "TUNING.md").read_text()
