"""Output of a run: a table, a JSON file and a figure of the training curves."""

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

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # colour-blind-safe


def nrr(natural: float, robust: float) -> float:
    """Return the natural-robust ratio, the harmonic mean of both accuracies, in percent."""
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a row for the best and the last epoch of each method, accuracies in percent."""
    lines = [f"{'':<26}{'Natural':>9}{'PGD-20':>9}{'C&W':>9}{'NRR (C&W)':>11}"]
    for method, rows in results.items():
        for which, row in rows.items():
            title = f"{method.upper()}, {which} (epoch {row['epoch']})"
            numbers = "".join(f"{row[key]:9.2f}" for key in ("natural", "pgd20", "cw"))
            lines.append(f"{title:<26}{numbers}{row['nrr']:11.2f}")
    return "\n".join(lines)


def updated_text(updated: dict[str, float], never: float) -> str:
    """Describe which share of the weights an epoch's steps updated, in 80 columns."""
    shares = {name.removesuffix(".weight"): s for name, s in updated.items() if s < 1}
    if not shares:
        return "each step updated all weights."
    low, high = (f(shares, key=shares.__getitem__) for f in (min, max))
    text = f"each step of the last epoch updated {shares[low]:.0%} of each layer's weights"
    if shares[high] - shares[low] > 0.01:
        text = (
            "updated by each step of the last epoch:\n"
            f"  least in {low}, {shares[low]:.1%}; most in {high}, {shares[high]:.1%}"
        )
    return f"{text}.\nThe selection varies: {never:.2%} of these weights were never updated."


def versions(device: torch.device) -> dict[str, Any]:
    """Return versions, device and commit, for the record."""
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


def plot(path: Path, history: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Draw accuracies over the epochs and, where layers differ in it, the share updated.

    Args:
        path: A PNG file.
        history: By phase; "pre-training", if it is there, comes before epoch 1 of the others.
        title: Of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = _shares(history.get("cure", []))
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        columns = 2 if shares else 1
        figure, axes = plt.subplots(
            1, columns, figsize=(2 + 5 * columns, 4.6), layout="constrained", squeeze=False
        )
        _accuracies(axes[0, 0], history)
        if shares:
            _updated(axes[0, 1], shares)
        figure.suptitle(title, fontsize=12)
        write_whole(path, lambda p: figure.savefig(p, dpi=130, format="png"))
        plt.close(figure)


def _accuracies(axis: Any, history: dict[str, list[dict[str, Any]]]) -> None:
    before = history.get("pre-training", [])
    methods = {name: rows for name, rows in history.items() if name != "pre-training"}
    for (name, rows), color in zip(methods.items(), (ORANGE, BLUE), strict=False):
        for key, line, what in (("natural", "--", "natural"), ("robust", "-", "under attack")):
            values = [row[key] for row in [*before, *rows]]
            label = f"{name.upper()}, {what}"
            epochs = range(1 - len(before), len(rows) + 1)  # as the table counts them
            axis.plot(epochs, values, line, color=color, lw=1.8, label=label)
    last = max(map(len, methods.values()))
    axis.set(xlim=(0.5 - len(before), last + 0.5), ylim=(0, 100), xlabel="epoch")
    axis.set_ylabel("accuracy on validation images (%)")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xticks([1, *(tick for tick in axis.get_xticks() if 1 < tick <= last)])
    axis.grid(axis="y", alpha=0.25)
    if before:
        axis.axvspan(0.5 - len(before), 0.5, color="black", alpha=0.06, lw=0)
        how = dict(transform=axis.get_xaxis_transform(), color=GREY, fontsize=9, ha="center")
        axis.text(0.5 - len(before) / 2, 1.01, "natural pre-training", **how)
    axis.legend(framealpha=0.8, edgecolor="none", loc="best")


def _shares(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return for each layer, in percent, the share of its weights that each epoch updated.

    Empty if it says nothing: no weights were selected, or the same share of all layers always.
    """
    rows = [row["updated"] for row in history]
    names = [name for name in (rows[0] if rows else ()) if min(row[name] for row in rows) < 1]
    shares = {name: [100 * row[name] for row in rows] for name in names}
    every = [share for values in shares.values() for share in values]
    differ = bool(every) and max(every) - min(every) > 1  # more than rounding to whole weights
    return shares if differ else {}


def _updated(axis: Any, layers: dict[str, list[float]]) -> None:
    """Show for each layer the share at the start, at the end, and its range in between."""
    shares = np.array(list(layers.values()))
    y = np.arange(len(layers))
    band = dict(color=GREY, lw=9 if len(layers) <= 12 else 5, alpha=0.35)
    axis.hlines(y, shares.min(1), shares.max(1), label="range over all epochs", **band)
    axis.plot(shares[:, 0], y, "o", mfc="white", color=BLUE, ms=6, label="first epoch")
    axis.plot(shares[:, -1], y, "o", color=ORANGE, ms=4, label="last epoch")
    size = 9 if len(layers) <= 12 else 7
    axis.set_yticks(y, [name.removesuffix(".weight") for name in layers], fontsize=size)
    axis.set(ylim=(len(layers) - 0.4, -0.6), xlim=(0, 100))
    axis.set_xlabel("weights updated, mean over an epoch's steps (%)")
    axis.grid(axis="both", alpha=0.25)
    axis.legend(framealpha=0.8, edgecolor="none", loc="best")
