"""What a run leaves behind: a table, a JSON file and a picture of the training curves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rgp_optim

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # for all kinds of eyes


def nrr(natural: float, robust: float) -> float:
    """Return the natural-robust ratio, the harmonic mean of both accuracies, in percent."""
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the results as text: a row for the best and the last epoch, accuracies in percent."""
    lines = [f"{'':<18}{'Natural':>9}{'PGD-20':>9}{'C&W':>9}{'NRR (C&W)':>11}"]
    for name, row in results.items():
        title = f"{name} (epoch {row['epoch']})"
        cells = (row["natural"], row["pgd20"], row["cw"])
        numbers = "".join(f"{value:9.2f}" for value in cells)
        lines.append(f"{title:<18}{numbers}{row['nrr']:11.2f}")
    return "\n".join(lines)


def updated_text(row: dict[str, Any]) -> str:
    """Say which share of the weights the steps of an epoch have updated, 80 columns wide."""
    shares = {name.removesuffix(".weight"): s for name, s in row["updated"].items() if s < 1}
    if not shares:
        return "each step updated all weights"
    low, high = (f(shares, key=shares.__getitem__) for f in (min, max))
    text = f"each step of the last epoch updated {shares[low]:.0%} of each layer"
    if shares[high] - shares[low] > 0.01:
        text = (
            "updated by each step of the last epoch:\n"
            f"  least in {low}, {shares[low]:.1%}; most in {high}, {shares[high]:.1%}"
        )
    return f"{text};\n{row['never_updated']:.2%} of these layers' weights were never updated"


def versions(device: torch.device) -> dict[str, Any]:
    """Return what a number depends on besides the settings: versions, device, commit."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {
        "rgp_optim": rgp_optim.__version__,
        "commit": commit,
        "modified": None if commit is None else bool(git("status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
    }


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make the file under another name, then rename it: never half a file."""
    scratch = path.with_name(path.name + ".new")
    write(scratch)
    os.replace(scratch, path)


def save_checked(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and numbers after a line with their checksum, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest().encode()
    write_whole(path, lambda scratch: scratch.write_bytes(digest + b"\n" + data))


def load_checked(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what `save_checked` wrote.

    Raises:
        ValueError: the file is damaged, or another kind of file.
    """
    digest, _, data = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(data).hexdigest().encode():
        raise ValueError(f"{path} is damaged, or another kind of file")
    content: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return content


def writable(folder: Path) -> str:
    """Return why no file can be made in a folder, which is made if need be; "" if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``, whole or not at all."""
    write_whole(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def plot(path: Path, run: dict[str, Any]) -> None:
    """Draw accuracies, losses and, where layers differ in it, the share of weights updated."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history, settings = run["history"], run["settings"]
    shares = _shares(history)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        columns = 3 if shares else 2
        figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 4.6), layout="constrained")
        _accuracies(axes[0], run)
        _losses(axes[1], run)
        if shares:
            _updated(axes[2], shares, settings)
        figure.suptitle(
            f"{settings['method'].upper()} on {run['data']}, {settings['network']}, "
            f"$\\epsilon$ = {run['eps_text']}, seed {settings['seed']}",
            fontsize=13,
        )
        write_whole(path, lambda p: figure.savefig(p, dpi=130, format="png"))
        plt.close(figure)


def _phases(axis: Any, run: dict[str, Any]) -> None:
    """Shade the natural warm-up and name both phases."""
    history = run["history"]
    standard = run["settings"]["method"] == "standard"
    warmup = sum(row["phase"] == "warm-up" for row in history)
    axis.set_xlim(0.5, len(history) + 0.5)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(axis="y", alpha=0.25)
    if 0 < warmup < len(history):
        axis.axvspan(0.5, warmup + 0.5, color="black", alpha=0.06, lw=0)
        top = axis.get_xaxis_transform()
        text = dict(transform=top, color=GREY, fontsize=9, va="bottom", ha="center")
        axis.text(warmup / 2 + 0.5, 1.0, "natural warm-up", **text)
        axis.text(
            (warmup + len(history)) / 2 + 0.5,
            1.0,
            "standard training" if standard else "adversarial training",
            **text,
        )


def _accuracies(axis: Any, run: dict[str, Any]) -> None:
    history = run["history"]
    epochs = range(1, len(history) + 1)
    for key, color, marker, label in (
        ("natural", BLUE, "o", "natural"),
        ("robust", ORANGE, "s", f"under PGD-{run['settings']['attack_steps']}"),
    ):
        values = [row[key] for row in history]
        axis.plot(epochs, values, color=color, marker=marker, ms=3, lw=1.6, label=label)
    best = run["results"]["best"]["epoch"]
    axis.axvline(best, color=GREY, lw=1, ls=":", label="best epoch")
    axis.set_ylim(0, 100)
    axis.set_ylabel("accuracy on validation images (%)")
    axis.legend(framealpha=0.8, edgecolor="none", loc="best")
    _phases(axis, run)


def _losses(axis: Any, run: dict[str, Any]) -> None:
    """Draw the losses; lines break where another loss begins to be minimised."""
    history = run["history"]
    epochs = np.arange(1, len(history) + 1)
    warmup = sum(row["phase"] == "warm-up" for row in history)
    lines = (
        ("loss", BLUE, "o", "minimised"),
        ("loss_natural", GREEN, "^", "cross-entropy, natural"),
        ("loss_adversarial", ORANGE, "s", "cross-entropy, attacked"),
        ("loss_consistency", GREY, "v", "consistency"),
    )
    for key, color, marker, label in lines:
        values = np.array([row.get(key) for row in history], dtype=float)
        if np.isfinite(values).any():
            x, y = (np.insert(each, warmup, np.nan) for each in (epochs.astype(float), values))
            axis.plot(x, y, color=color, marker=marker, ms=3, lw=1.6, label=label)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("training loss (nats)")
    axis.legend(frameon=False)
    _phases(axis, run)


def _shares(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return for each layer, in percent, the share of its weights that each epoch updated.

    Empty if it says nothing: no weights were selected, or the same share of all layers always.
    """
    rows = [row["updated"] for row in history if row.get("updated")]
    names = [name for name in (rows[0] if rows else ()) if min(row[name] for row in rows) < 1]
    shares = {name: [100 * row[name] for row in rows] for name in names}
    every = [share for values in shares.values() for share in values]
    return (
        shares if every and max(every) - min(every) > 1 else {}
    )  # 1: of rounding to whole weights


def _updated(axis: Any, layers: dict[str, list[float]], settings: Any) -> None:
    """Show for each layer the share at the start, at the end, and its range in between."""
    shares = np.array(list(layers.values()))
    y = np.arange(len(layers))
    band = dict(color=GREY, lw=9 if len(layers) <= 12 else 5, alpha=0.35)
    axis.hlines(y, shares.min(1), shares.max(1), label="range over all epochs", **band)
    axis.plot(shares[:, 0], y, "o", mfc="white", color=BLUE, ms=6, label="first epoch")
    axis.plot(shares[:, -1], y, "o", color=ORANGE, ms=4, label="last epoch")
    size = 9 if len(layers) <= 12 else 7
    axis.set_yticks(y, [name.removesuffix(".weight") for name in layers], fontsize=size)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.set_xlabel("weights updated, mean over an epoch's steps (%)")
    axis.grid(axis="both", alpha=0.25)
    share = f"{settings['update_fraction']:.0%}"
    tensor = f"scope = tensor: at most {share} of each layer"
    overall = f"scope = global: {share} of all selected weights"
    axis.set_title(tensor if settings["scope"] == "tensor" else overall, fontsize=10, color=GREY)
    axis.legend(framealpha=0.8, edgecolor="none", loc="best")
