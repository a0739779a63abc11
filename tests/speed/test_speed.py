"""The benchmarks run, say what they measured, and compare ways that do the same. No times."""

import argparse
import csv
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
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks" / "speed")]

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
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == measure.COLUMNS
    return rows


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
    shapes = [(30, 40), (7, 9, 3, 3), (2, 1)]
    cpu = torch.device("cpu")
    gs = [
        [selection.heavy(s, 2 * i + j, torch.float32, cpu) for i, s in enumerate(shapes)]
        for j in (0, 1)
    ]
    case = selection.Case(*gs, alpha=0.1, keep=0.5, scope=scope)
    got, want = selection.PROVIDERS[name](case), selection.sort(case)
    assert [m.shape for m in got] == [m.shape for m in want]
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    assert different <= (len(shapes) if name == "percentile" else 0)


def test_the_authors_mask_is_the_librarys_but_for_one():
    g_nat, g_adv = torch.randn(2, 50, 40)
    got = step.authors_mask(g_nat, g_adv, 0.1, 0.7)
    case = selection.Case([g_nat], [g_adv], alpha=0.1, keep=0.7, scope="tensor")
    assert int((got.bool() != selection.sort(case)[0]).sum()) <= 1
    assert np.isin(got.numpy(), [0, 1]).all()


def test_selection_writes_rows(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    arguments = ["--models", "tiny", "--rounds", "2", "--csv", str(path)]
    selection.main(arguments)
    selection.main(arguments)
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
    path = tmp_path / "speed.csv"
    small = ["--rounds", "1", "--steps", "1", "--batch-sizes", "2"]
    profile = tmp_path / "profile.txt"
    step.main([*small, "--csv", str(path), "--profile", str(profile)])
    assert "convolution" in profile.read_text()
    rows = rows_of(path)
    assert [r["provider"] for r in rows if r["benchmark"] == "step"] == list(step.PROVIDERS)
    assert {"attack", "selection"} < {r["provider"] for r in rows if r["benchmark"] == "part"}
    assert "against trades" in capsys.readouterr().out


def test_selection_times_the_step_of_the_optimizer(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    selection.main(["--update", "--models", "tiny", "--rounds", "2", "--csv", str(path)])
    rows = rows_of(path)
    assert [r["provider"] for r in rows] == list(selection.UPDATES)
    assert {r["benchmark"] for r in rows} == {"update"}
    assert "against sgd" in capsys.readouterr().out


def test_the_steps_that_are_timed_do_what_they_say():
    args = argparse.Namespace(device="cpu", keep=[0.5], alpha=0.1)
    shapes = [(40, 30), (8, 3, 3, 3)]
    moved = {}
    for name in selection.UPDATES:
        update = selection.Update(name, shapes, torch.float32, args)
        update.prepare()
        update.optimizer.step()
        moved[name] = [int(p.count_nonzero()) for p in update.params]
    assert moved["sgd"] == [1200, 216]
    assert moved["ours"] == moved["ours-gradients"] == [600, 108]


@pytest.mark.parametrize(
    "command",
    [
        ["gpu/roofs.py", "--rounds", "1", "--weights", "40000"],
        ["gpu/kernels.py", "--models", "tiny", "--calls", "1", "--variants", "4 warps"],
    ],
    ids=lambda command: command[0],
)
def test_what_is_for_a_gpu_is_rehearsed(command, tmp_path):
    """In the interpreter, which is chosen before triton is imported."""
    pytest.importorskip("triton")
    path = tmp_path / "rows.csv"
    script, *flags = command
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--device", "cpu", *flags, "--csv", str(path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert {row["benchmark"] for row in rows_of(path)} <= {"roof", "kernel"}


def test_figures_are_drawn_from_the_rows(tmp_path):
    plot = pytest.importorskip("plot", reason="matplotlib", exc_type=ImportError)
    path = tmp_path / "speed.csv"
    common = dict(device="A CPU (AVX2, 2 cores)", repeats=3, dtype="float32", scope="tensor")
    rows = [
        {
            **common, "benchmark": benchmark, "model": "m", "weights": weights, "keep": 0.5,
            "provider": provider, "p20_ms": 1, "p50_ms": 2, "p80_ms": 3, "floor_share": 0.25,
        }
        for benchmark, weights in (("select", 10), ("size", 10), ("size", 1000), ("step", 10))
        for provider in ("ours", "topk")
    ]  # fmt: skip
    measure.append_rows(path, rows)
    measure.append_rows(path, [{**rows[0], "p50_ms": 2.5}])
    assert float(plot.read(path)[0]["p50_ms"]) == 2.5
    plot.main([str(path), "--out", str(tmp_path)])
    found = sorted(p.name for p in tmp_path.glob("*.png"))
    assert found == ["select-a-cpu.png", "size-a-cpu.png", "step-a-cpu.png"]
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in found)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (selection.main, ["--models", "vgg"], "'vgg' is none of resnet18"),
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
    seen = []
    times = measure.interleaved(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")},
        3,
        torch.device("cpu"),
        lambda: seen.append("-"),
    )
    assert "".join(seen) == "-a-b" * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}


def test_quantiles():
    assert measure.quantiles([5, 1, 2, 3, 4, 0]) == pytest.approx((1.0, 2.5, 4.0))


def test_kernels_compile_for_a_gpu_without_spills(tmp_path):
    """For a GPU that is not there. Interpreted kernels cannot be compiled: ask a fresh process."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "benchmarks/gpu/compiled.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # 1 where a loop spills
    kernels = re.findall(r"^(\w[\w ]+): .* 0 B stack.* 0 spills", done.stdout, re.MULTILINE)
    assert {name.split()[0] for name in kernels} == {"count", "mask", "merge"}
    assert "128" in done.stdout  # four float32 at once
