"""The benchmarks run, say what they measured, and compare ways that do the same. No times."""

import argparse
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernels  # noqa: E402
import bench_step  # noqa: E402
import collectives  # noqa: E402
import goals  # noqa: E402
import measure  # noqa: E402


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
    assert sum(math.prod(shape) for shape in bench_kernels.MODELS[model]()) == weights


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("name", bench_kernels.PROVIDERS)
def test_all_ways_select_the_same(name, scope):
    """Without ties; np.percentile's rank may differ by one."""
    shapes = [(30, 40), (7, 9, 3, 3), (2, 1)]
    cpu = torch.device("cpu")
    gs = [
        [bench_kernels.heavy(s, 2 * i + j, torch.float32, cpu) for i, s in enumerate(shapes)]
        for j in (0, 1)
    ]
    case = bench_kernels.Case(*gs, alpha=0.1, keep=0.5, scope=scope)
    got, want = bench_kernels.PROVIDERS[name](case), bench_kernels.sort(case)
    assert [m.shape for m in got] == [m.shape for m in want]
    different = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    assert different <= (len(shapes) if name == "percentile" else 0)


def test_the_authors_mask_is_the_librarys_but_for_one():
    g_nat, g_adv = torch.randn(2, 50, 40)
    got = bench_step.authors_mask(g_nat, g_adv, 0.1, 0.7)
    case = bench_kernels.Case([g_nat], [g_adv], alpha=0.1, keep=0.7, scope="tensor")
    assert int((got.bool() != bench_kernels.sort(case)[0]).sum()) <= 1
    assert np.isin(got.numpy(), [0, 1]).all()


def test_bench_kernels_writes_rows(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    arguments = ["--models", "tiny", "--rounds", "2", "--csv", str(path)]
    bench_kernels.main(arguments)
    bench_kernels.main(arguments)
    rows = rows_of(path)
    assert len(rows) == 2 * 2 * 4
    ours = rows[0]
    assert (ours["provider"], ours["weights"], ours["keep"]) == ("ours", "1417", "0.5")
    assert ours["note"] == "masks equal to a stable sort's"
    assert ours["torch"] == torch.__version__
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert int(ours["floor_bytes"]) == 9 * 1417
    assert "byte floor" in capsys.readouterr().out


def test_bench_step_writes_rows(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    small = ["--rounds", "1", "--steps", "1", "--batch-sizes", "2"]
    profile = tmp_path / "profile.txt"
    bench_step.main([*small, "--csv", str(path), "--profile", str(profile)])
    assert "convolution" in profile.read_text()
    rows = rows_of(path)
    assert [r["provider"] for r in rows if r["benchmark"] == "step"] == list(bench_step.PROVIDERS)
    assert {"attack", "selection"} < {r["provider"] for r in rows if r["benchmark"] == "part"}
    assert "against trades" in capsys.readouterr().out


def test_bench_kernels_times_the_step_of_the_optimizer(tmp_path, capsys):
    path = tmp_path / "speed.csv"
    bench_kernels.main(["--update", "--models", "tiny", "--rounds", "2", "--csv", str(path)])
    rows = rows_of(path)
    assert [r["provider"] for r in rows] == list(bench_kernels.UPDATES)
    assert {r["benchmark"] for r in rows} == {"update"}
    assert "against sgd" in capsys.readouterr().out


def test_the_steps_that_are_timed_do_what_they_say():
    args = argparse.Namespace(device="cpu", keep=[0.5], alpha=0.1)
    shapes = [(40, 30), (8, 3, 3, 3)]
    moved = {}
    for name in bench_kernels.UPDATES:
        update = bench_kernels.Update(name, shapes, torch.float32, args)
        update.prepare()
        update.optimizer.step()
        moved[name] = [int(p.count_nonzero()) for p in update.params]
    assert moved["sgd"] == [1200, 216]
    assert moved["ours"] == moved["ours-gradients"] == [600, 108]


def test_goals_are_read_from_the_rows(tmp_path):
    """Reached, not reached, and not measured; a later row counts."""
    path = tmp_path / "speed.csv"
    common = dict(
        device="NVIDIA H200", commit="abc", benchmark="select", model="resnet18", dtype="float32",
        scope="tensor", keep=0.5, weights=1000, peak_bytes=200, launches=5, host_syncs=0,
    )  # fmt: skip
    rows = [
        {**common, "provider": "ours-graph", "p50_ms": 0.5},
        {**common, "provider": "ours-graph", "p50_ms": 0.05},
        {**common, "provider": "topk-graph", "p50_ms": 0.5},
        {**common, "provider": "ours", "p50_ms": 0.1},
    ]
    measure.append_rows(path, rows)
    lines = goals.table(path).splitlines()
    assert "| resnet18, float32 | 75 µs | 50 µs | yes | NVIDIA H200, abc |" in lines
    assert "| resnet18, launches, to select and mask | 4 | 5 | **no** | NVIDIA H200, abc |" in lines
    times = "| resnet18, times faster than topk-graph | 20 x | 10.0 x | **no** | NVIDIA H200, abc |"
    assert times in lines
    assert "| resnet18, times faster than topk | 50 x | not measured |  |  |" in lines
    least = "| resnet18, memory besides the gradients | 0.25 B a weight | 0.20 B | yes |"
    assert any(line.startswith(least) for line in lines)


def test_the_tuning_log_has_the_goals_as_they_are():
    assert goals.table() in (ROOT / "benchmarks" / "TUNING.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ["roofs.py", "--rounds", "1", "--weights", "40000"],
        ["gpu_profile.py", "--models", "tiny", "--calls", "1", "--variants", "resolve: 8 warps"],
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
        (bench_kernels.main, ["--models", "vgg"], "'vgg' is none of resnet18"),
        (bench_kernels.main, ["--keep", "1.5"], "between 0 and 1"),
        (bench_step.main, ["--rounds", "0"], "--rounds: it should be at least 1"),
        (bench_step.main, ["--batch-sizes", "8", "0"], "--batch-sizes: it should be at least 1"),
        (bench_step.main, ["--attack", "graph"], "a CPU has no CUDA graphs"),
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


def test_what_the_compiler_makes_is_read(tmp_path):
    """For a GPU that is not there. Kernels under the interpreter cannot be compiled: ask afresh.

    The interpreter does not mind types that differ between branches; the compiler does.
    """
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "benchmarks/compiled.py",
        "--dtypes",
        "float32",
        "mixed",
    ]
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split()[:2]): line for line in done.stdout.splitlines()[2:]}
    assert {kernel for kernel, _ in rows} == {
        "_bracket",
        "_count",
        "_mask",
        "_resolve",
        "_use_bits",
    }
    for kernel in ("_count", "_mask"):
        assert "x128" in rows[kernel, "float32"]  # four float32 at once


def test_what_is_sent_is_what_the_algorithm_says():
    """A real step of two processes, counted."""
    rows = collectives.rows_of("resnet8", 1, [2])
    texts = [{key: str(value) for key, value in row.items()} for row in rows]
    collectives.check(texts)
    assert {row["collective"] for row in rows} == set(collectives.SENT)
    trades, cure = (
        sum(int(r["bytes"]) for r in texts if r["method"] == method and r["purpose"] == "passes")
        for method in ("trades", "cure")
    )
    assert cure > trades  # two more backward passes of FSDP2
    collectives.check(collectives.read(collectives.RESULTS))
    wrong = [row for row in texts if row["method"] == "cure" and row["purpose"] == "selection"]
    wrong[0]["bytes"] += "1"
    with pytest.raises(AssertionError):
        collectives.check(wrong)
