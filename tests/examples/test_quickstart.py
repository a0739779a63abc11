"""The quickstart: whole, interrupted, called wrongly; on a few digits."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from common import same

pytest.importorskip("sklearn")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quickstart

EPOCHS, BATCHES = 16, 5  # 80 steps: with fewer than 79 the averaged copy would not move
ACCURACIES = r"test images natural [\d.]+%, PGD-20 [\d.]+%"
pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm has seen")  # short runs


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Batches of eight images, as many to train as to test on."""
    data = [[(x[:8], y[:8]) for x, y in list(each)[:BATCHES]] for each in quickstart.load_data()]
    monkeypatch.setattr(quickstart, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(quickstart, "load_data", lambda: data)


def run(*flags):
    quickstart.main(["--epochs", str(EPOCHS), *map(str, flags)])


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    run("--checkpoint", tmp_path / "straight.pt")
    straight = capsys.readouterr().out.splitlines()
    assert max(map(len, straight)) <= 80
    assert re.fullmatch(f"natural training: {ACCURACIES}", straight[0])
    assert re.fullmatch(f"CURE: {ACCURACIES}", straight[-1])
    assert [line.split(":")[0] for line in straight[1:-1]] == [
        f"CURE {epoch + 1}/{EPOCHS}" for epoch in range(EPOCHS)
    ]

    kl_attack, attacks = quickstart.kl_attack, iter(range(EPOCHS * BATCHES))

    def attack_or_stop(*args, **kwargs):
        if next(attacks) == 3 * BATCHES + 2:  # within the fourth epoch
            raise KeyboardInterrupt
        return kl_attack(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart, "kl_attack", attack_or_stop)
        run("--checkpoint", tmp_path / "run.pt")
    assert capsys.readouterr().out.splitlines() == straight[:4]
    run("--checkpoint", tmp_path / "run.pt")
    assert capsys.readouterr().out.splitlines() == straight[4:]

    states = [torch.load(tmp_path / name, weights_only=True) for name in ("straight.pt", "run.pt")]
    models, opts = [state["model"] for state in states], [state["opt"] for state in states]
    copies = [opt["rgp_reviser"] for opt in opts]
    assert same(*(model.values() for model in models))
    assert same(*(copied["model"].values() for copied in copies))
    assert not same(models[0].values(), copies[0]["model"].values())  # it is an average
    for opt, copied in zip(opts, copies, strict=True):
        assert copied["steps"] == EPOCHS * BATCHES
        (group,) = opt["param_groups"]
        assert group["rgp_update_fraction"] == 0.7
        assert group["lr"] < 1e-4 < group["max_lr"]  # the schedule ends with the run


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--bf16"], "bfloat16")])
def test_bfloat16_holds_for_attack_and_training(flags, dtype, monkeypatch):
    """In every forward pass of natural training and of five steps of CURE."""
    found = []

    def record(layer, inputs, logits):
        found.append(str(logits.dtype))
        if len(found) == 8 * BATCHES + 5 * (8 + 2 + 2):  # attack, model, averaged copy
            raise KeyboardInterrupt

    def network():
        model = make()
        model[-1].register_forward_hook(record)
        return model

    make = quickstart.network
    monkeypatch.setattr(quickstart, "network", network)
    monkeypatch.setattr(quickstart, "evaluate", lambda *_: "")
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert set(found) == {f"torch.{dtype}"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "1"], "--epochs 1 are too few: `horizon` should span at least one update"),
        (["--epochs", "0"], "--epochs 0 are too few: `total_steps` should be an integer >= 1"),
        (["--epochs", "two"], "--epochs: invalid int value: 'two'"),
        (["--epoch-size", "3"], "unrecognized arguments: --epoch-size"),
    ],
)
def test_wrong_flags(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "evaluate", None)  # said before anything is trained
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_length_is_refused(tmp_path, capsys):
    torch.save({"flags": (20, False)}, tmp_path / "run.pt")
    with pytest.raises(SystemExit):
        run("--checkpoint", tmp_path / "run.pt")
    assert "run.pt: has --epochs 20, bf16 False." in capsys.readouterr().err


def test_one_short_file_that_needs_little():
    text = Path(quickstart.__file__).read_text()
    assert len(text.splitlines()) <= 120
    names = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert packages <= {"argparse", "pathlib", "torch", "sklearn", "rgp_optim"}
