"""Train and evaluate every method of the paper's table, and print it.

    python benchmarks/robustness/run.py                                   # digits, all, three seeds
    python benchmarks/robustness/run.py --methods cure,trades --seeds 0   # some of it
    python benchmarks/robustness/run.py --preset ranking-digits --report  # tables, no training

All runs share data, network, schedule and evaluation. An interrupted command, rerun, skips what is
finished and resumes the rest. Tables are made from the runs' JSON files in results/PRESET.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import summary
import trainer
from harness.image_data import DataError
from methods import METHODS, ROWS
from trainer import EXPERIMENTS, PRESETS, Preset, Trainer, needs


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = trainer.parser(__doc__)
    add = parser.add_argument
    add("--methods", default="all", help=f"comma-separated (all): {', '.join(ROWS)}")
    add("--seeds", default="0,1,2", help="comma-separated seeds (0,1,2)")
    add("--network", help="another of the examples' networks")
    add("--epochs", type=int, help="epochs of each method")
    add("--auto-attack", type=int, metavar="N", help="images for AutoAttack; 0 skips it")
    add("--jobs", type=int, default=1, help="seeds at the same time, one thread each (1)")
    add("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    add("--report", action="store_true", help="print the table of finished runs; train nothing")
    add("--figure", type=Path, metavar="PNG", help="draw what the preset compares")
    add("--curves", type=Path, metavar="PNG", help="draw training curves")
    add("--quiet", action="store_true", help="print finished runs only")
    add("--no-table", action="store_true", help="print no table at the end")
    args = parser.parse_args(argv)
    _, rows, args.beside = EXPERIMENTS.get(args.preset, (None, list(ROWS), ()))
    args.methods = rows if args.methods == "all" else args.methods.split(",")
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}.")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds should be comma-separated integers, not {args.seeds!r}.")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs: should be at least 1, not {args.epochs}.")
    name = args.preset + "".join(f"-{v}" for v in (args.network, args.epochs) if v)
    args.given = sys.argv[1:] if argv is None else argv
    args.place = replace(trainer.place_of(args, name), download=args.download)
    return args


def preset_of(args: argparse.Namespace) -> Preset:
    given = {key: getattr(args, key) for key in ("network", "epochs", "auto_attack")}
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(PRESETS[args.preset], **changes)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not args.report:
        try:
            run_all(args)
        except DataError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("\nstopped; rerun the command to resume")
    if args.no_table:
        return
    place = args.place.results
    runs = summary.read(place, *(place.with_name(name) for name in args.beside))
    print(summary.report(runs))
    if args.figure or args.curves:
        draw(runs, args)


def draw(runs: summary.Runs, args: argparse.Namespace) -> None:
    from analysis.experiments import DRAWN, draw_curves
    from analysis.figure import draw_methods, save

    of, size = DRAWN.get(args.preset.split("-")[0], (draw_methods, (10, 6.5)))
    some = {name: runs[name] for name in args.methods if name in runs}
    if args.figure:
        save(args.figure, partial(of, runs=runs), size)
    if args.curves and some:
        save(args.curves, partial(draw_curves, runs=some), (13, 4.2))


def ordered(methods: list[str], preset: Preset) -> list[str]:
    """Return the methods and those that they depend on, in order of training."""
    found: list[str] = []
    for name in methods:
        found += [each for each in (*needs(name, preset), name) if each not in found]
    return found


def run_all(args: argparse.Namespace) -> None:
    """Run what is not done yet, and say how long the rest will take."""
    if args.jobs > 1:
        return share(args)
    preset, place = preset_of(args), args.place
    wanted = [(name, seed) for seed in args.seeds for name in ordered(args.methods, preset)]
    todo = [run for run in wanted if not (place.results / f"{run[0]}-seed{run[1]}.json").exists()]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are done already")
    began = time.perf_counter()
    for done, run in enumerate(todo, 1):
        say = (lambda text: None) if args.quiet else (lambda text: print(text, flush=True))
        Trainer(*run, preset, place).run(say)
        spent = (time.perf_counter() - began) / 60
        left = f"{spent:.1f} min, about {spent / done * (len(todo) - done):.1f} min left"
        print(f"[{done}/{len(todo)}] {run[0]}-seed{run[1]} done; {left}", flush=True)


def share(args: argparse.Namespace) -> None:
    """Give each seed to a process of its own, of one thread, ``--jobs`` at the same time."""
    again = [sys.executable, __file__, *args.given, "--jobs", "1", "--quiet", "--no-table"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def one(seed: int) -> int:
        return subprocess.run([*again, "--seeds", str(seed)], env=env).returncode

    with ThreadPoolExecutor(args.jobs) as pool:
        if any(list(pool.map(one, args.seeds))):
            raise DataError("a run failed: see above.")


if __name__ == "__main__":
    main()
