"""The example from end to end, on a small part of the digits."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import rgp_optim

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import cifar10_cure as example  # noqa: E402
import report  # noqa: E402
import updates  # noqa: E402

SMALL = ["--train-size", "64", "--val-size", "32", "--eval-size", "40", "--batch-size", "16"]
SMALL += ["--epochs", "3", "--warmup-epochs", "2", "--attack-steps", "2", "--device", "cpu"]
CURE = ["--horizon", "0.5"]  # so few steps are not enough for the default

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm's statistics")  # short runs


def run(out, *flags):
    other = {"trades", "at", "standard"} & set(flags)
    example.main([*SMALL, *([] if other else CURE), "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text())


def weights(out, name="last.pt"):
    if name == "checkpoint.pt":
        return example.load_checked(out / name, torch.device("cpu"))
    return torch.load(out / name, weights_only=True)


def assert_same_run(a, b):
    for name, t in weights(a).items():
        assert torch.equal(t, weights(b)[name]), name
    first, second = (json.loads((o / "results.json").read_text()) for o in (a, b))
    for each in (first, second):
        for row in each["history"]:
            del row["seconds"]
    assert first["history"] == second["history"]
    assert first["results"] == second["results"]


@pytest.mark.parametrize("method", ["cure", "trades", "at", "standard"])
def test_each_method(method, tmp_path, capsys):
    out = tmp_path / "run"
    result = run(out, "--method", method)
    printed = capsys.readouterr().out
    assert "Natural   PGD-20      C&W  NRR (C&W)" in printed
    assert " warm-up epoch 2/5: loss" in printed
    assert "training epoch 5/5: loss" in printed
    assert "last (epoch 5)" in printed
    assert (
        "natural, robust: accuracy on the validation images, as they are and under PGD-2" in printed
    )
    assert ("beta 6" in printed) == (method in ("cure", "trades"))
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"torch", "rgp_optim", "commit", "device"} <= set(result["versions"])
    assert result["settings"]["beta"] == 6.0
    assert result["data"] == "scikit-learn digits"
    assert [row["phase"] for row in result["history"]] == ["warm-up"] * 2 + ["training"] * 3
    for row in result["results"].values():
        assert 0 <= row["cw"] <= 100
        assert row["nrr"] == pytest.approx(report.nrr(row["natural"], row["cw"]))
    if method == "cure":
        updated = result["history"][-1]["updated"]
        assert 0.6 < updated["conv.weight"] <= 0.71
        assert updated["fc.bias"] == 1.0
    (warmup,) = tmp_path.glob("warmup-digits-*.pt")
    assert example.load_checked(warmup, torch.device("cpu"))["settings"]["seed"] == 0


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in place of those that are closed."""
    import matplotlib.pyplot as plt

    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        yield kept
    for figure in kept:
        plt.close(figure)


@pytest.mark.parametrize(
    ("updated", "panels"),
    [
        ([None, None], 2),
        ([{"conv.weight": 1.0}] * 2, 2),
        ([{"conv.weight": 0.704, "fc.weight": 0.7}] * 2, 2),  # scope="tensor", rounded
        ([{"conv.weight": 0.7, "fc.weight": 0.9}, {"conv.weight": 0.7, "fc.weight": 0.5}], 3),
    ],
)
def test_shares_of_layers_are_drawn_where_they_differ(updated, panels, figures, tmp_path):
    phases = ["warm-up", "training", "training"]
    history = [dict(phase=p, loss=1.0, loss_natural=0.5, natural=90, robust=50) for p in phases]
    for row, each in zip(history[1:], updated, strict=True):
        row |= {} if each is None else {"updated": {**each, "fc.bias": 1.0}}
    settings = dict(method="cure", network="resnet8", seed=0, attack_steps=7)
    settings |= dict(scope="global", update_fraction=0.7)
    results = {"best": {"epoch": 2}}
    content = dict(history=history, settings=settings, data="", eps_text="0.1", results=results)
    report.plot(tmp_path / "curves.png", content)
    (figure,) = figures
    assert len(figure.axes) == panels
    for line in figure.axes[1].lines:  # broken between the phases
        assert np.isnan(line.get_ydata()).tolist() == [False, True, False, False]
    if panels == 3:
        (band,) = figure.axes[2].collections
        ends = [segment[:, 0].tolist() for segment in band.get_segments()]
        assert ends == [pytest.approx([70, 70]), pytest.approx([50, 90])]
        widest = max(line.get_markersize() for line in figure.axes[2].lines)
        assert band.get_linewidth()[0] > widest  # so that it shows behind the markers


def test_a_seed_repeats_a_run_and_methods_share_the_warm_up(tmp_path, capsys):
    run(tmp_path / "a" / "cure")
    run(tmp_path / "b" / "cure")
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "b" / "cure")
    run(tmp_path / "a" / "again")  # its warm-up comes from the file this time
    assert "epochs taken from" in capsys.readouterr().out
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "a" / "again")
    trades = run(tmp_path / "a" / "trades", "--method", "trades")
    cure = json.loads((tmp_path / "a" / "cure" / "results.json").read_text())
    assert trades["history"][:2] == cure["history"][:2]
    other = run(tmp_path / "c", "--seed", "1")
    assert other["history"][0]["loss"] != cure["history"][0]["loss"]


@pytest.mark.parametrize("epoch", [1, 3, 4])
@pytest.mark.parametrize("method", ["cure", "trades"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, epoch, tmp_path, monkeypatch, capsys):
    """Stopped in the warm-up, after the first epoch of training, and later."""
    straight, stopped = tmp_path / "a" / "run", tmp_path / "b" / "run"
    run(straight, "--method", method)
    save = example.Run.save

    def save_and_stop(self, *args):
        save(self, *args)
        if len(self.history) == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="with --resume goes on"):
        patch.setattr(example.Run, "save", save_and_stop)
        run(stopped, "--method", method)
    with pytest.raises(SystemExit, match="holds an unfinished run: add --resume"):
        run(stopped, "--method", method)
    with pytest.raises(SystemExit, match=r"other settings: --beta was 6.0, is 2.0"):
        run(stopped, "--method", method, "--resume", "--beta", "2")
    run(stopped, "--method", method, "--resume")
    assert_same_run(straight, stopped)


def test_command_line_in_a_fresh_process(tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore:BatchNorm",
        EXAMPLES / "cifar10_cure.py",
        *SMALL,
        *CURE,
    ]
    flags = ["--out", tmp_path / "run", "--bf16", "--channels-last", "--scope", "global"]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "training epoch 5/5" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "cifar10"], r"CIFAR-10 is not in .*data: put the folder cifar-10-batches-py"),
        (["--resume"], "nothing to resume in"),
        (["--train-size", "8"], "8 training images are left, less than one batch of 16"),
        (["--horizon", "0.0001"], "--rate, --horizon, --decay: `horizon` should span"),
        (["--image-size", "3"], "cannot be averaged to 3 x 3"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "run", "--data-dir", str(tmp_path / "data"), *flags)


@pytest.mark.parametrize("kind", ["checkpoint", "warm-up"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "bit-flipped"])
def test_damaged_files_are_refused(kind, damage, tmp_path, monkeypatch):
    """With the path and the way out; nothing is trained from half a file."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(example.Run, "evaluate", stop)
        run(out, "--method", "at")
    (warmup,) = tmp_path.glob("warmup-*.pt")
    file = out / "checkpoint.pt" if kind == "checkpoint" else warmup
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    if damage == "foreign":
        torch.save({"weights": torch.ones(3)}, file)
    else:
        content = {
            "truncated": good[:-100],
            "empty": b"",
            "text": b"hello\n",
            "bit-flipped": flipped,
        }
        file.write_bytes(content[damage])
    flags = ["--resume"] if kind == "checkpoint" else ["--overwrite"]
    way_out = "begin anew with --overwrite" if kind == "checkpoint" else "another --warmup-file"
    with pytest.raises(SystemExit, match=rf"{file.name} is damaged, or another kind.*{way_out}"):
        run(out, "--method", "at", *flags)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "checkpoint.pt")

    monkeypatch.setattr(example, "save_checked", full)
    with pytest.raises(SystemExit, match=r"checkpoint.pt: No space left on device\. Free space"):
        run(tmp_path / "run", "--method", "at")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"the loss is nan in warm-up epoch 1: lower --lr"):
        run(tmp_path / "run", "--method", "at", "--lr", "1e30")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "/proc/run"], "--out cannot be written, /proc/run: "),
        (["--warmup-file", "/proc/none/w.pt"], "--warmup-file cannot be written, /proc/none: "),
        (["--seed", "99999999999999999999"], "--seed should be at least 0 and below"),
        (["--device", "meta"], "--device meta cannot be used here"),
    ],
)
def test_flags_are_checked_before_data_are_loaded(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(example, "load_digits", stop)
    with pytest.raises(SystemExit):
        example.main(flags)
    assert message in capsys.readouterr().err


def test_a_run_cannot_be_extended(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(example.Run, "evaluate", stop)
        run(tmp_path / "run", "--method", "at")
    with pytest.raises(SystemExit, match="a run cannot be extended"):
        run(tmp_path / "run", "--method", "at", "--epochs", "9", "--resume")


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "message"),
    [("train_epoch", "before the first checkpoint"), ("evaluate", "--resume in place of --over")],
)
def test_a_stop_says_what_the_next_command_is(where, message, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(example.Run, where, stop)
        run(tmp_path / "run", "--method", "at", "--overwrite")
    run(tmp_path / "run", "--method", "at", *(["--resume"] if where == "evaluate" else []))


def test_a_finished_run_is_not_written_over_unasked(tmp_path):
    run(tmp_path / "run", "--method", "at")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match="holds a finished run"):
        run(tmp_path / "run", "--method", "at", "--seed", "1")
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    (tmp_path / "run" / "checkpoint.pt").unlink()  # as one does to save space
    with pytest.raises(SystemExit, match=r"finished run: add --overwrite to begin anew, or give"):
        run(tmp_path / "run", "--method", "at", "--seed", "1")
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    after = run(tmp_path / "run", "--method", "at", "--seed", "1", "--overwrite")
    assert after["settings"]["seed"] == 1


def test_a_warm_up_on_other_images_is_not_taken_over(tmp_path, monkeypatch):
    run(tmp_path / "a", "--method", "standard")
    data = example.load_digits()
    data.train.pixels = data.train.pixels.flip(-1)
    monkeypatch.setattr(example, "load_digits", lambda: data)
    run(tmp_path / "b", "--method", "standard")
    run(tmp_path / "c", "--method", "standard", "--eps", "0.3")
    made = list(tmp_path.glob("warmup-digits-*.pt"))
    assert len(made) == 3
    with pytest.raises(SystemExit, match="other settings or images: give another --warmup-file"):
        run(tmp_path / "d", "--eps", "0.4", "--warmup-file", str(made[0]))


@pytest.mark.parametrize(("split", "part"), [("train", "labels"), ("test", "pixels")])
def test_a_run_does_not_go_on_with_other_images(split, part, tmp_path, monkeypatch):
    run(tmp_path / "run", "--method", "at")
    data = example.load_digits()
    images = getattr(data, split)
    setattr(images, part, getattr(images, part).flip(0))
    monkeypatch.setattr(example, "load_digits", lambda: data)
    with pytest.raises(SystemExit, match="made with other images: give the data it had"):
        run(tmp_path / "run", "--method", "at", "--resume")


def test_sizes_of_the_networks():
    """Those of the usual CIFAR networks, so that published settings mean the same here."""
    sizes = {
        name: sum(p.numel() for p in make().parameters()) for name, make in example.NETWORKS.items()
    }
    assert sizes == {
        "resnet18": 11_173_962,
        "preactresnet18": 11_172_170,
        "wrn34-10": 46_160_474,
        "resnet8": 78_042,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs should be at least 1"),
        (["--warmup-epochs", "-1"], "--warmup-epochs should be at least 0, not -1."),
        (["--train-size", "-5"], "--train-size should be at least 1, not -5."),
        (["--eval-size", "0"], "--eval-size should be at least 1, not 0."),
        (["--image-size", "0"], "--image-size should be at least 1, not 0."),
        (["--update-fraction", "2"], "--update-fraction should be in [0, 1], not 2."),
        (
            ["--eps", "-0.1"],
            "--eps should be above 0 and at most 1, as pixels are, not -",
        ),
        (["--eps", "8"], "--eps should be above 0 and at most 1, as pixels are, not 8."),
        (["--lr", "nan"], "--lr should be finite and above 0, not nan."),
        (["--beta", "inf"], "--beta should be finite and at least 0, not inf."),
        (["--gamma", "-1"], "--gamma should be finite and at least 0, not -1."),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--download"], "--download is for --data cifar10"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--horizon", "0.1", "--decay", "0.9"], "--horizon and --decay exclude each other"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", example.USED_BY)
def test_a_flag_that_the_method_would_ignore_is_refused(flag, capsys):
    name = f"--{flag.replace('_', '-')}"
    value = {"scope": "tensor", "conserve": "weights", "score": "rgp"}.get(flag, "0.1")
    assert getattr(example.parse(["--method", "cure", name, value]), flag) is not None
    for method in {"trades", "at", "standard"} - set(example.USED_BY[flag]):
        with pytest.raises(SystemExit):
            example.parse(["--method", method, name, value])
        message = rf"{name} is for --method cure( or trades)?, not {method}: leave it out\."
        assert re.search(message, capsys.readouterr().err)


def test_published_settings_are_the_defaults_for_cifar10():
    args = example.parse(["--data", "cifar10"])
    published = dict(network="resnet18", epochs=200, batch_size=128, lr=0.1, momentum=0.9)
    published |= dict(update_fraction=0.7, alpha=0.1, gamma=1.0, rate=0.2, attack_steps=10)
    assert {name: getattr(args, name) for name in published} == published
    assert args.eps == 8 / 255
    assert args.attack_step_size == args.eps / 4


def test_updates_are_counted_as_a_loop_does():
    """Means and never-updated weights of three steps, over a break, against the masks."""
    model = torch.nn.Linear(4, 5)
    groups = rgp_optim.rgp_param_groups(model)
    opt = rgp_optim.RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1), update_fraction=0.2)
    counted, masks = updates.Updates(opt), []
    for step in range(3):
        opt.zero_grad()
        loss = (
            model(torch.randn(2, 4, generator=torch.Generator().manual_seed(step))).square().sum()
        )
        opt.scored(loss, natural=loss, adversarial=loss).backward()
        opt.step()
        counted.record()
        masks.append(opt.masks()[model.weight].clone())
        if step == 0:
            state, first = counted.state_dict(), counted.mean()
            assert first == {"weight": pytest.approx(0.2), "bias": 1.0}
            counted = updates.Updates(opt)
            counted.load_state_dict(state)
    never = ~(masks[0] | masks[1] | masks[2])
    assert counted.never() == pytest.approx(float(never.float().mean()))
    assert counted.mean()["weight"] == pytest.approx(0.2)


def test_what_was_updated_is_said_in_eighty_columns():
    row = {
        "updated": {"conv.weight": 0.7, "fc.weight": 0.7, "fc.bias": 1.0},
        "never_updated": 0.004,
    }
    assert "updated 70% of each layer;\n0.40%" in report.updated_text(row)
    row["updated"]["stages.1.0.shortcut.0.weight"] = 0.25
    text = report.updated_text(row)
    assert "least in stages.1.0.shortcut.0, 25.0%; most in conv, 70.0%" in text
    assert max(map(len, text.splitlines())) <= 80
    assert report.updated_text({"updated": {"fc.bias": 1.0}}) == "each step updated all weights"
