"""CIFAR-10 files: read without running them, fetched whole or not at all."""

import hashlib
import http.server
import io
import os
import pickle
import sys
import tarfile
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from harness import image_data
from harness.image_data import Data, DataError, Images, crop_and_flip, load_cifar10
from harness.training import CIFAR10, Settings, Setup


def batch(seed, n=4):
    rng = np.random.default_rng(seed)
    return {
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"labels": rng.integers(0, 10, n).tolist(),
        b"filenames": [b"a.png"] * n,
    }


def write_files(folder):
    folder.mkdir(parents=True)
    for seed, name in enumerate(image_data.FILE_MD5):
        (folder / name).write_bytes(pickle.dumps(batch(seed), protocol=2))
    return folder


def test_reading(tmp_path):
    folder = write_files(tmp_path / "cifar-10-batches-py")
    data = load_cifar10(tmp_path)
    assert data.label == "CIFAR-10 (not the original files)"
    assert data.train.pixels.shape == (20, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8
    want = batch(5)
    np.testing.assert_array_equal(data.test.pixels.flatten(1).numpy(), want[b"data"])
    assert data.test.labels.tolist() == want[b"labels"]
    assert torch.equal(load_cifar10(folder).test.pixels, data.test.pixels)
    x = data.test.floats()
    assert x.max() <= 1
    np.testing.assert_allclose(x.numpy().reshape(4, -1), want[b"data"] / 255, rtol=1e-6)


def test_files_as_python_2_wrote_them(tmp_path):
    """The official ones: arrays as byte strings, under numpy's old module name."""
    folder = write_files(tmp_path / "c")
    pixels = batch(5)[b"data"]
    old = (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\n"
        b"q\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x04M\x00\x0c\x86q\x08cnumpy\ndtype\n"
        b"q\tU\x02u1q\nK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\rNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tq\x0eb\x89T"
        + len(pixels.tobytes()).to_bytes(4, "little")
        + pixels.tobytes()
        + b"q\x0ftq\x10bU\x06labelsq\x11]q\x12(K\x01K\x02K\x03K\x09eu."
    )
    (folder / "test_batch").write_bytes(old)
    data = load_cifar10(folder)
    np.testing.assert_array_equal(data.test.pixels.flatten(1).numpy(), pixels)
    assert data.test.labels.tolist() == [1, 2, 3, 9]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


class Reaching:
    """What looks like numpy, but reaches for more through its name."""

    def __reduce__(self):
        return (np.load, ("x",))


def test_a_file_that_would_run_something_runs_nothing(tmp_path):
    folder = write_files(tmp_path / "c")
    target = tmp_path / "owned"
    for bad in (Malicious(target), {b"data": Malicious(target), b"labels": []}, Reaching()):
        (folder / "data_batch_3").write_bytes(pickle.dumps(bad, protocol=2))
        with pytest.raises(
            DataError, match=r"data_batch_3 is not a CIFAR-10 batch .* is not allowed"
        ):
            load_cifar10(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"not a pickle",
        pickle.dumps({b"labels": [1]}),
        pickle.dumps({**batch(0), b"labels": [1, 2, 3]}),
        pickle.dumps({**batch(0), b"labels": [1, 2, 3, 10]}),
        pickle.dumps({**batch(0), b"data": np.zeros((4, 3072))}),
    ],
)
def test_damaged_files_are_named(content, tmp_path):
    folder = write_files(tmp_path / "c")
    (folder / "data_batch_2").write_bytes(content)
    message = r"c/data_batch_2 is not a CIFAR-10 batch \(.+\): move the folder away and add --down"
    with pytest.raises(DataError, match=message):
        load_cifar10(folder)


def test_missing_data_names_both_ways_out(tmp_path):
    with pytest.raises(DataError, match=r"put the folder .* there, or add --download"):
        load_cifar10(tmp_path)


# Download, from a server of the test's own.


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a small archive, with ranges; count what is asked for."""
    write_files(tmp_path / "made" / image_data.FOLDER)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / "made" / image_data.FOLDER, image_data.FOLDER)
    content = packed.getvalue()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            asked.append(start)
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http_server.server_port}/c.tar.gz"
        monkeypatch.setattr(image_data, "URL", url)
        monkeypatch.setattr(image_data, "ARCHIVE_MD5", hashlib.md5(content).hexdigest())
        yield content, asked
        http_server.shutdown()


def left_in(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("have", [None, 100, 10**9])
def test_a_download_goes_on_where_it_stopped(have, server, tmp_path):
    content, asked = server
    if have:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "cifar-10-python.tar.gz.part").write_bytes(content[:have])
    for _ in range(2):  # the second time all is there
        assert len(load_cifar10(tmp_path / "data", download=True).train) == 20
        assert left_in(tmp_path / "data") == [image_data.FOLDER]
    assert asked == [min(have or 0, len(content))]


@pytest.mark.parametrize("download", [False, True])
def test_a_folder_of_the_user_is_left_alone(download, server, tmp_path):
    own = tmp_path / "data" / image_data.FOLDER / "test_batch.bak"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    message = f"{image_data.FOLDER} lacks data_batch_1: move the folder away and add --download"
    with pytest.raises(DataError, match=message):
        load_cifar10(tmp_path / "data", download)
    assert own.read_text() == "mine"
    assert left_in(tmp_path / "data") == [image_data.FOLDER]
    assert server[1] == []


def test_a_folder_that_comes_while_fetching_is_left_alone(server, tmp_path, monkeypatch):
    own = tmp_path / "data" / image_data.FOLDER / "notes"
    fetch = image_data._download

    def fetch_and_write(*args):
        fetch(*args)
        own.parent.mkdir()
        own.write_text("mine")

    monkeypatch.setattr(image_data, "_download", fetch_and_write)
    with pytest.raises(DataError, match=r"cannot be put in place .*: move it away and rerun"):
        load_cifar10(tmp_path / "data", download=True)
    assert own.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ARCHIVE_MD5",
            "0" * 32,
            r"data/cifar.*part .* MD5 .*, not 0000.* deleted: rerun to downl",
        ),
        ("URL", "http://127.0.0.1:9/c.tar.gz", "failed .*: rerun to resume"),  # no server
    ],
)
def test_a_wrong_archive_is_never_unpacked(name, value, message, server, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, name, value)
    with pytest.raises(DataError, match=message):
        load_cifar10(tmp_path / "data", download=True)
    assert left_in(tmp_path / "data") == []


# Batches.


def images(n=10, crop=0):
    pixels = torch.arange(n * 3 * 8 * 8).remainder(251).to(torch.uint8).view(n, 3, 8, 8)
    return Images(pixels, torch.arange(n), 255, crop)


def test_batches_hold_every_image_once():
    in_order = list(images().batches(4))
    assert [len(y) for _, y in in_order] == [4, 4, 2]
    assert torch.cat([y for _, y in in_order]).tolist() == list(range(10))
    shuffled = list(images().batches(3, torch.Generator().manual_seed(0)))
    seen = torch.cat([y for _, y in shuffled])
    assert len(seen) == len(set(seen.tolist())) == 9
    for x, y in shuffled:
        torch.testing.assert_close(x, images()[y].floats())


def test_crop_and_flip_against_a_loop():
    x = images(n=50).floats()
    out = crop_and_flip(x, 2, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [2] * 4)
    used = set()
    for before, after in zip(padded, out, strict=True):
        found = set()
        for dy, dx in product(range(5), repeat=2):
            part = before[:, dy : dy + 8, dx : dx + 8]
            ways = {False: part, True: part.flip(-1)}
            found |= {(dy, dx, flip) for flip, x in ways.items() if torch.equal(after, x)}
        assert found
        used |= found
    assert {dy for dy, _, _ in used} == {dx for _, dx, _ in used} == set(range(5))
    assert {flip for _, _, flip in used} == {False, True}


def test_training_images_are_augmented_or_left_as_they_are():
    given = {"val_size": 2, "batch_size": 4, "image_size": 4}
    for augment in (True, False):
        settings = Settings(**CIFAR10 | given, augment=augment)
        setup = Setup(settings, 0, "cpu", Data("test", images(crop=4), images(crop=4)))
        whole = setup.train.floats()
        (x, _), *_ = setup.loader(setup.train, torch.Generator().manual_seed(0))
        same = (x[:, None] == whole[None]).flatten(2).all(2).any(1)
        assert bool(same.all()) is not augment
        (x, y), *_ = setup.loader(setup.val)
        torch.testing.assert_close(x, images().shrink(4)[y].floats())  # labels are numbers


def test_shrink_averages():
    small = images().shrink(4)
    assert small.pixels.shape == (10, 3, 4, 4)
    want = images().pixels.float().view(10, 3, 4, 2, 4, 2).mean((3, 5))
    assert (small.pixels.float() - want).abs().max() <= 0.5
    with pytest.raises(DataError, match="8 x 8 pixels cannot be averaged to 3 x 3"):
        images().shrink(3)
