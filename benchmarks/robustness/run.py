"""Train and evaluate every method of the paper's table, and print it.

    python benchmarks/robustness/run.py                                   # digits, all, three seeds
    python benchmarks/robustness/run.py --methods cure,trades --seeds 0   # some of it
    python benchmarks/robustness/run.py --compare cure trades-pre         # is one better?

Every run has the same data, network, schedule and evaluation. What is finished is skipped, what was
interrupted goes on from its last epoch: the same command, started again, loses nothing. Each run
leaves a JSON under benchmarks/robustness/results/PRESET; the table is made of these.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import summary
import trainer
from harness.image_data import DataError
from methods import METHODS, ROWS
from trainer import PRESETS, Place, Preset, Trainer, needs, warm_file


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = trainer.parser(__doc__)
    add = parser.add_argument
    add(
        "--methods",
        default="all",
        help=f"some of {', '.join(ROWS)}, by commas; or all of the preset",
    )
    add("--seeds", default="0,1,2", help="by commas (0,1,2)")
    add("--network", help="another of the examples' networks")
    add("--epochs", type=int, help="of each method")
    add("--auto-attack", type=int, metavar="N", help="images that AutoAttack gets; 0: none")
    add("--jobs", type=int, default=1, help="runs at the same time, one thread each (1)")
    add("--download", action="store_true", help="fetch CIFAR-10 if it is not there")
    add("--report", action="store_true", help="print the table of what is there, and train nothing")
    add("--figure", type=Path, metavar="PNG", help="draw natural against robust accuracy")
    add("--curves", type=Path, metavar="PNG", help="draw how the runs of the first seed went")
    add("--compare", nargs=2, metavar=("A", "B"), help="compare two methods over their seeds")
    add("--quiet", action="store_true", help="say only what is finished")
    add("--no-table", action="store_true", help="print no table at the end")
    args = parser.parse_args(argv)
    rows = trainer.rows_of(args.preset)
    args.methods = rows if args.methods == "all" else args.methods.split(",")
    unknown = [name for name in [*args.methods, *(args.compare or ())] if name not in METHODS]
    if unknown:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}.")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds should be integers by commas, not {args.seeds!r}.")
    if args.epochs is not None and args.epochs < 1:
        parser.error(f"--epochs: it should be at least 1, not {args.epochs}.")
    name = args.preset + "".join(f"-{v}" for v in (args.network, args.epochs) if v)
    args.place = replace(trainer.place_of(args, name), download=args.download)
    return args


def preset_of(args: argparse.Namespace) -> Preset:
    given = {key: getattr(args, key) for key in ("network", "epochs", "auto_attack")}
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(PRESETS[args.preset], **changes)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.compare:
        print(summary.comparison(summary.read(args.place.results), *args.compare))
        return
    if not args.report:
        names = args.methods if args.no_table else ordered(args.methods, preset_of(args))
        wanted = [(name, seed) for seed in args.seeds for name in names]
        try:
            run_all(wanted, args)
        except DataError as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit("\nstopped; the same command goes on")
    if not args.no_table:
        print(summary.report(summary.read(args.place.results)))
    if args.figure or args.curves:
        draw(summary.read(args.place.results), args)


def draw(runs: summary.Runs, args: argparse.Namespace) -> None:
    from analysis.figure import draw_curves, draw_scatter, save

    if runs and args.figure:
        save(args.figure, lambda figure: draw_scatter(figure, runs), (10, 7))
    if runs and args.curves:
        some = {name: of[args.seeds[0]] for name, of in runs.items() if args.seeds[0] in of}
        some = {name: run for name, run in some.items() if name in args.methods}
        if not some:
            sys.exit(f"error: --curves: no run of these methods with seed {args.seeds[0]}.")
        save(args.curves, lambda figure: draw_curves(figure, some), (12, 4))


def ordered(methods: list[str], preset: Preset) -> list[str]:
    """Return the methods and what they need, those needed first."""
    found: list[str] = []
    for name in methods:
        found += [each for each in (*needs(name, preset), name) if each not in found]
    return found


def run_all(wanted: list[tuple[str, int]], args: argparse.Namespace) -> None:
    """Run what is not done yet, ``--jobs`` at a time, and say how long the rest will take."""
    preset, place = preset_of(args), args.place
    todo = [run for run in wanted if not (place.results / f"{run[0]}-seed{run[1]}.json").exists()]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are done already")
    began, finished = time.perf_counter(), []

    def one(run: tuple[str, int]) -> None:
        if args.jobs == 1:
            say = (lambda text: None) if args.quiet else (lambda text: print(text, flush=True))
            Trainer(*run, preset, place).run(say)
        elif subprocess.run(command(run, args)).returncode:
            raise DataError(f"{run[0]}, seed {run[1]}, failed: see above.")
        finished.append(run)
        if not args.no_table:
            stem = f"{run[0]}-seed{run[1]}"
            print(progress(stem, len(finished), len(todo), began), flush=True)

    if args.jobs == 1:
        for run in todo:
            one(run)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for stage in stages(todo, preset, place):
                list(pool.map(one, stage))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def stages(
    todo: list[tuple[str, int]], preset: Preset, place: Place
) -> tuple[list[tuple[str, int]], ...]:
    """Split runs into those that others need, one for each warm-up that is missing, the rest."""
    needed = {other for name, _ in todo for other in needs(name, preset)}
    first = [run for run in todo if run[0] in needed]
    warm = {s: (n, s) for n, s in reversed(todo) if METHODS[n].warm and n not in needed}
    second = [run for seed, run in warm.items() if not warm_file(place.runs, seed).exists()]
    return first, second, [run for run in todo if run not in first + second]


def command(run: tuple[str, int], args: argparse.Namespace) -> list[str]:
    """Return the command that makes one run in a process of its own."""
    words = [sys.executable, __file__, "--preset", args.preset, "--methods", run[0]]
    words += ["--seeds", str(run[1]), "--data-dir", args.data_dir, "--device", args.device]
    words += [
        "--runs",
        str(args.place.runs),
        "--results",
        str(args.place.results),
        "--quiet",
        "--no-table",
    ]
    words += ["--download"] * args.download
    for flag in ("network", "epochs", "auto_attack", "data_label"):
        if getattr(args, flag) is not None:
            words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    return words


def progress(what: str, finished: int, total: int, began: float) -> str:
    """Return a line that says what is done and how long the rest will take."""
    spent = time.perf_counter() - began
    left = spent / finished * (total - finished)
    return f"[{finished}/{total}] {what} done; {spent / 60:.1f} min, about {left / 60:.1f} min left"


if __name__ == "__main__":
    main()
