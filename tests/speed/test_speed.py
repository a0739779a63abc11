"""The benchmarks run, say what they measured, and compare ways that do the same. No times."""

import csv
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = map(str, [ROOT / "examples", BENCHMARKS, BENCHMARKS / "speed"])

import host  # noqa: E402
import measure  # noqa: E402
import selection  # noqa: E402
import step  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row) for row in rows} == {measure.COLUMNS}
    return rows


def benchmark(script, *flags, **environment):
    """What a script for a GPU prints without one, in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, f"benchmarks/gpu/{script}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet18", 11_173_962 - 9_610),  # less biases and normalisation
        ("wrn34-10", 46_160_474 - 22_442),
        ("vit-b", 86_567_656 - 123_112),
        ("1b", 10**9),
    ],
)
def test_models_have_their_weights(model, weights):
    assert sum(math.prod(shape) for shape in selection.MODELS[model]()) == weights


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("name", selection.PROVIDERS)
def test_all_ways_select_the_same(name, scope):
    """Without ties; np.percentile's rank may differ by one."""
    shapes, cpu = [(30, 40), (7, 9, 3, 3), (2, 1)], torch.device("cpu")
    case = selection.Case(*selection.heavy(shapes, "float32", cpu), keep=0.5, scope=scope)
    got, want = selection.PROVIDERS[name](case), selection.library_masks(case, "torch")
    assert [m.shape for m in got] == [m.shape for m in want]
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    assert different <= (len(shapes) if name == "percentile" else 0)


def test_the_authors_mask_is_the_librarys_but_for_one():
    g_nat, g_adv = torch.randn(2, 50, 40)
    got = step.authors_mask(g_nat, g_adv, 0.1, 0.7)
    case = selection.Case([g_nat], [g_adv], keep=0.7, scope="tensor")
    (want,) = selection.library_masks(case, "torch")
    assert int((got.bool() != want).sum()) <= 1
    assert np.isin(got.numpy(), [0, 1]).all()


def test_selection_writes_rows(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    for _ in range(2):
        selection.main(["--models", "tiny", "--rounds", "2", "--csv", str(path)])
    rows = rows_of(path)
    assert len(rows) == 2 * 2 * 4
    ours = rows[0]
    assert (ours["provider"], ours["weights"], ours["keep"]) == ("ours", "1417", "0.5")
    assert ours["note"] == "masks equal to a stable sort's"
    assert ours["torch"] == torch.__version__
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert int(ours["floor_bytes"]) == 9 * 1417
    assert "byte floor" in capsys.readouterr().out


def test_step_writes_rows(tmp_path, capsys):
    path, profile = tmp_path / "speed.csv", tmp_path / "profile.txt"
    small = ["--rounds", "1", "--steps", "1", "--batch-sizes", "2"]
    step.main([*small, "--csv", str(path), "--profile", str(profile)])
    assert "convolution" in profile.read_text()
    rows = rows_of(path)
    assert [r["provider"] for r in rows if r["benchmark"] == "step"] == list(step.PROVIDERS)
    assert {"attack", "selection"} < {r["provider"] for r in rows if r["benchmark"] == "part"}
    assert "against trades" in capsys.readouterr().out


def test_host_times_the_step_of_the_optimizer(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    host.main(["--repeats", "1", "--csv", str(path)])
    host.main(["--repeats", "1", "--csv", str(path), "--models", "tiny"])
    rows = rows_of(path)
    assert [r["provider"] for r in rows] == ["wrapped", "plain"] * 4
    benchmarks = [r["benchmark"] for r in rows[::2]]
    assert benchmarks == ["host passes", "host step", "update passes", "update step"]
    assert (rows[0]["weights"], rows[-1]["weights"]) == ("500", "1417")
    assert "against plain" in capsys.readouterr().out


def test_the_steps_that_are_timed_do_what_they_say():
    moved = []
    for keep in (None, 0.7):
        loop = host.Loop(keep, "tiny", torch.device("cpu"))
        for call in (loop.forward, loop.backward, loop.opt.step):
            call()
        moved.append([int(p.count_nonzero()) for p in loop.model.parameters()])
    assert moved == [[216, 1200, 1], [151, 840, 1]]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("roofs", ["--rounds", "1", "--weights", "40000"]),
        ("kernels", ["--models", "tiny", "--calls", "1", "--variants", "4 warps"]),
    ],
)
def test_what_is_for_a_gpu_is_rehearsed(script, flags, tmp_path):
    """In the interpreter, which is chosen before triton is imported."""
    pytest.importorskip("triton")
    path = tmp_path / "rows.csv"
    assert "FAILED" not in benchmark(script, "--device", "cpu", *flags, "--csv", str(path))
    assert {row["benchmark"] for row in rows_of(path)} <= {"roof", "kernel"}


def test_the_figure_is_drawn_from_the_rows(tmp_path):
    plot = pytest.importorskip("plot", reason="matplotlib", exc_type=ImportError)
    path = tmp_path / "speed.csv"
    common = dict(device="A CPU (AVX2, 2 cores)", repeats=3, dtype="float32", scope="tensor")
    common |= dict(model="m", keep=0.5, p20_ms=1, p50_ms=2, p80_ms=3, floor_share=0.25)
    rows = [
        {**common, "benchmark": benchmark, "weights": weights, "provider": provider}
        for benchmark, weights in (("select", 10), ("size", 10), ("size", 1000), ("step", 10))
        for provider in ("ours", "topk")
    ]
    for some in (rows, [{**rows[0], "p50_ms": 2.5}]):
        measure.keep(path, torch.device("cpu"), some)
    assert float(plot.read(path)[0]["p50_ms"]) == 2.5
    plot.main([str(path), "--out", str(tmp_path)])
    found = {p.name: p.read_bytes()[:4] for p in tmp_path.glob("*.png")}
    assert found == {"size-a-cpu.png": b"\x89PNG"}


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (selection.main, ["--models", "vgg"], "'vgg' is not one of resnet18"),
        (selection.main, ["--keep", "1.5"], "between 0 and 1"),
        (step.main, ["--rounds", "0"], "--rounds: it should be at least 1"),
        (step.main, ["--batch-sizes", "8", "0"], "--batch-sizes: it should be at least 1"),
        (step.main, ["--attack", "graph"], "a CPU has no CUDA graphs"),
    ],
)
def test_bad_flags_get_a_sentence(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_interleaved_takes_turns():
    seen, cpu = [], torch.device("cpu")
    calls = {name: functools.partial(seen.append, name) for name in "ab"}
    times = measure.interleaved(calls, 3, cpu, {"b": lambda: seen.append("-")})
    assert "".join(seen) == "a-b" * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_timing():
    row = {"p20_ms": "1000", "p50_ms": "2500", "p80_ms": "4000", "repeats": 6}
    assert measure.timing([5, 1, 2, 3, 4, 0]) == row


def test_kernels_compile_for_a_gpu_without_spills(tmp_path):
    """The script fails where a loop spills; interpreted kernels cannot be compiled."""
    pytest.importorskip("triton")
    printed = benchmark("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    kernels = re.findall(r"^(\w[\w ]+): .* 0 B stack.* 0 spills", printed, re.MULTILINE)
    assert {name.split()[0] for name in kernels} == {"count", "mask", "merge"}
    assert "128" in printed  # four float32 at once
