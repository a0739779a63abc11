"""The data of the example: scikit-learn's digits, and CIFAR-10 from its standard files.

Images are kept as they are stored, integers on the device, and become floats in [0, 1] batch by
batch. CIFAR-10: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
FILE_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


REPLACE = "move the folder away and add --download."


class DataError(RuntimeError):
    """The data is missing or is not what it should be; the message says what to do."""


@dataclass
class Images:
    """Images of one split.

    Attributes:
        pixels: uint8, [n, channels, height, width], from 0 to ``scale``.
        labels: int64, [n].
        scale: What counts as 1.
        crop: Padding of the random crop in training, in pixels; with it goes a horizontal flip. 0:
            none.
    """

    pixels: Tensor
    labels: Tensor
    scale: int
    crop: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def to(self, device: torch.device) -> Images:
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def floats(self) -> Tensor:
        return self.pixels.float() / self.scale

    def shrink(self, size: int) -> Images:
        """Average pixels down to ``size`` x ``size``."""
        now = self.pixels.shape[-1]
        if now % size:
            raise DataError(
                f"Images of {now} x {now} pixels cannot be averaged to {size} x {size}."
            )
        small = F.avg_pool2d(self.pixels.float(), now // size).round().to(torch.uint8)
        return replace(self, pixels=small, crop=self.crop * size // now)

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images in [0, 1] and labels.

        With a generator they are shuffled and augmented, and an incomplete last batch is dropped.
        """
        if generator is None:
            for start in range(0, len(self), size):
                part = self[start : start + size]
                yield part.floats(), part.labels
            return
        order = torch.randperm(len(self), generator=generator, device=self.labels.device)
        for i in range(len(self) // size):
            part = self[order[i * size : (i + 1) * size]]
            x = part.floats()
            yield (crop_and_flip(x, self.crop, generator) if self.crop else x), part.labels


def fingerprint(*splits: Images) -> str:
    """Return a hash of the pixels and labels of ``splits``."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.pixels, split.labels):
            digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


def crop_and_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filled with 0, and flip half of them."""
    n, _, height, width = x.shape
    draw = torch.rand(3, n, generator=generator, device=x.device)
    shift = (draw[:2] * (2 * padding + 1)).long()
    rows = shift[0][:, None] + torch.arange(height, device=x.device)
    columns = shift[1][:, None] + torch.arange(width, device=x.device)
    columns = torch.where(draw[2][:, None] < 0.5, columns.flip(1), columns)
    padded = F.pad(x, [padding] * 4).permute(0, 2, 3, 1)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@dataclass
class Data:
    """A data set.

    Attributes:
        label: How to name it beside a result.
        train: Training images.
        test: Test images.
    """

    label: str
    train: Images
    test: Images


def load_digits() -> Data:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels; every fourth one is a test image."""
    from sklearn.datasets import load_digits as load

    digits = load()
    pixels = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    images = Images(pixels, torch.from_numpy(digits.target).long(), scale=16)
    test = torch.arange(len(images)) % 4 == 3
    return Data("scikit-learn digits", images[~test], images[test])


def load_cifar10(data_dir: str | Path, download: bool = False) -> Data:
    """Load CIFAR-10 from ``data_dir`` or its folder cifar-10-batches-py; fetch it if told to."""
    data_dir = Path(data_dir)
    folder = data_dir if (data_dir / "test_batch").exists() else data_dir / FOLDER
    if not os.path.lexists(folder):
        if not download:
            raise DataError(
                f"CIFAR-10 is not in {data_dir}: put the folder {FOLDER} there, or add --download "
                "to fetch it (170 MB)."
            )
        fetch_cifar10(data_dir)
    official = True
    parts = []
    for name, md5 in FILE_MD5.items():
        if not (folder / name).exists():
            raise DataError(f"{folder} lacks {name}: {REPLACE}")
        content = (folder / name).read_bytes()
        official &= hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
        parts.append(_read_batch(folder / name, content))
    train = Images(
        torch.cat([p for p, _ in parts[:-1]]), torch.cat([y for _, y in parts[:-1]]), 255, crop=4
    )
    test = Images(*parts[-1], scale=255, crop=4)
    return Data("CIFAR-10" if official else "CIFAR-10 (not the original files)", train, test)


class _BatchUnpickler(pickle.Unpickler):
    """Load arrays, numbers, texts and containers, and nothing that could run."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        if name == "_reconstruct":
            return np.ndarray([0]).__reduce__()[0]
        return super().find_class(module, name)


def _read_batch(path: Path, content: bytes) -> tuple[Tensor, Tensor]:
    """Return pixels, uint8 [n, 3, 32, 32], and labels, int64 [n], of one file."""
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"])
        labels = np.asarray(batch[b"labels"])
        right = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)
        if not (right and labels.dtype.kind == "i" and labels.min() >= 0 and labels.max() <= 9):
            raise ValueError(f"pixels {pixels.dtype} {pixels.shape}, labels {labels.dtype}")
    except Exception as error:
        raise DataError(f"{path} is not a CIFAR-10 batch ({error!r}): {REPLACE}") from error
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))


def fetch_cifar10(data_dir: Path) -> None:
    """Download the official archive, going on where an earlier try stopped, check and unpack it.

    The folder appears whole or not at all.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    part = data_dir / "cifar-10-python.tar.gz.part"
    _download(URL, part)
    digest = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != ARCHIVE_MD5:
        part.unlink()
        raise DataError(
            f"{part} from {URL} had MD5 {digest}, not {ARCHIVE_MD5}, and was deleted: rerun to "
            "download it again."
        )
    with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        with tarfile.open(part) as archive:
            # Early 3.10 and 3.11 know no filters; the archive is the one of the checksum above.
            safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(scratch, **safely)  # type: ignore[arg-type]
        target = data_dir / FOLDER
        try:
            os.replace(Path(scratch) / FOLDER, target)
        except OSError as error:  # something is there: it is not ours to delete
            raise DataError(
                f"{target} cannot be put in place ({error.strerror}): move it away and rerun."
            ) from error
    part.unlink()


def _download(url: str, part: Path) -> None:
    """Fetch ``url`` into ``part``, from where it ends."""
    from tqdm import tqdm

    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            length = int(answer.headers.get("Content-Length", 0)) + (have if resumed else 0)
            with (
                open(part, "ab" if resumed else "wb") as file,
                tqdm(
                    total=length or None,
                    initial=have if resumed else 0,
                    unit="B",
                    unit_scale=True,
                    desc="CIFAR-10",
                ) as bar,
            ):
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to fetch
            return
        raise DataError(f"{url} answered {error}: try later, or get {FOLDER} elsewhere.") from error
    except OSError as error:
        raise DataError(f"Download of {url} failed ({error}): rerun to resume.") from error
    if length and part.stat().st_size < length:
        raise DataError(f"Download of {url} stopped early: rerun to resume.")
