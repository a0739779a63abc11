"""The example from end to end, on a small part of the digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rgp_optim

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import cifar10_cure as example
import report
import training
import updates

SMALL = ["--train-size", "64", "--val-size", "32", "--test-size", "40", "--batch-size", "16"]
SMALL += ["--epochs", "3", "--warmup-epochs", "2", "--attack-steps", "2", "--device", "cpu"]
SMALL += ["--horizon", "0.5"]  # so few steps are not enough for the default

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm's statistics")  # short runs


def run(out, *flags):
    example.main([*SMALL, "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text())


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def stopped(out, *flags):
    """A run that is trained and not evaluated."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.Phase, "judge", stop)
        run(out, *flags)


def other_images(monkeypatch, split, part):
    data = training.load_digits()
    images = getattr(data, split)
    setattr(images, part, getattr(images, part).flip(0))
    monkeypatch.setattr(training, "load_digits", lambda: data)


def without_times(result):
    history = result["history"].items()
    return {name: [{**row, "seconds": 0} for row in rows] for name, rows in history}


def assert_same_run(a, b):
    for file in a.glob("*-last.pt"):
        first, second = (torch.load(o / file.name, weights_only=True) for o in (a, b))
        for name, t in first.items():
            assert torch.equal(t, second[name]), name
    first, second = (json.loads((o / "results.json").read_text()) for o in (a, b))
    assert without_times(first) == without_times(second)
    assert first["results"] == second["results"]


def test_cure_beside_trades(tmp_path, capsys):
    out = tmp_path / "run"
    result = run(out, "--compare")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # but for where it is
    assert "Natural   PGD-20      C&W  NRR (C&W)" in printed
    for line in ("warm-up 2/2: loss", "cure 3/3: loss", "trades 3/3: loss"):
        assert printed.count(line) == 1
    assert printed.count("%, never updated ") == 3  # in each epoch of CURE
    for row in ("CURE, best (epoch", "CURE, last (epoch 3)", "TRADES, last (epoch 3)", "beta 6,"):
        assert row in printed
    assert "clean and under PGD-2" in printed
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"torch", "rgp_optim", "commit", "device"} <= set(result["versions"])
    assert result["settings"]["beta"] == 6.0
    assert result["data"] == "scikit-learn digits"
    lengths = {phase: len(rows) for phase, rows in result["history"].items()}
    assert lengths == {"warm-up": 2, "cure": 3, "trades": 3}
    for rows in result["results"].values():
        for row in rows.values():
            assert 0 <= row["cw"] <= 100
            assert row["nrr"] == pytest.approx(report.nrr(row["natural"], row["cw"]))
    updated = result["history"]["cure"][-1]["updated"]
    assert 0.6 < updated["conv.weight"] <= 0.71
    assert updated["fc.bias"] == 1.0
    assert "updated" not in result["history"]["trades"][-1]


def test_trades_of_the_comparison_is_the_plain_loop(tmp_path):
    """Without selection and reviser CURE is TRADES, bit for bit."""
    result = run(tmp_path / "run", "--compare", "--update-fraction", "1", "--gamma", "0")
    cure, trades = (without_times(result)[name] for name in ("cure", "trades"))
    assert [{k: v for k, v in row.items() if k != "updated"} for row in cure] == trades


@pytest.mark.parametrize(
    ("updated", "panels"),
    [
        ([{"conv.weight": 1.0}] * 2, 1),
        ([{"conv.weight": 0.704, "fc.weight": 0.7}] * 2, 1),  # scope="tensor", rounded
        ([{"conv.weight": 0.7, "fc.weight": 0.9}, {"conv.weight": 0.7, "fc.weight": 0.5}], 2),
    ],
)
def test_figure(updated, panels, monkeypatch, tmp_path):
    """Both curves of both methods; shares of layers where they differ."""
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    warm = [dict(natural=90, robust=0)]
    trades = [dict(natural=80, robust=50), dict(natural=85, robust=55)]
    cure = [
        {**row, "updated": {**each, "fc.bias": 1.0}}
        for row, each in zip(trades, updated, strict=True)
    ]
    report.plot(tmp_path / "c.png", {"warm-up": warm, "cure": cure, "trades": trades}, "")
    (figure,) = figures
    assert len(figure.axes) == panels
    curves = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert curves == [[90, 80, 85], [0, 50, 55]] * 2
    if panels == 2:
        (band,) = figure.axes[1].collections
        ends = [segment[:, 0].tolist() for segment in band.get_segments()]
        assert ends == [pytest.approx([70, 70]), pytest.approx([50, 90])]
        widest = max(line.get_markersize() for line in figure.axes[1].lines)
        assert band.get_linewidth()[0] > widest  # so that it shows behind the markers


def test_a_seed_repeats_a_run_and_runs_share_the_warm_up(tmp_path, capsys, monkeypatch):
    cure = run(tmp_path / "a" / "cure")
    run(tmp_path / "b" / "cure")
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "b" / "cure")
    capsys.readouterr()
    run(tmp_path / "a" / "again")  # its warm-up comes from the file this time
    assert "warm-up epoch" not in capsys.readouterr().out
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "a" / "again")
    run(tmp_path / "a" / "eps", "--eps", "0.3")
    assert len(list((tmp_path / "a").glob("warmup-digits-*.pt"))) == 2
    other = run(tmp_path / "c", "--seed", "1")
    assert other["history"]["warm-up"][0]["loss"] != cure["history"]["warm-up"][0]["loss"]
    other_images(monkeypatch, "train", "pixels")
    run(tmp_path / "a" / "other images")
    assert len(list((tmp_path / "a").glob("warmup-digits-*.pt"))) == 3


@pytest.mark.parametrize(
    ("phase", "epoch"), [("warm-up", 1), ("cure", 1), ("cure", 2), ("trades", 2)]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(phase, epoch, tmp_path, monkeypatch):
    straight, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    run(straight, "--compare")
    save = training.Phase._save

    def save_and_stop(self, done):
        save(self, done)
        if (self.name, done) == (phase, epoch):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="with --resume goes on"):
        patch.setattr(training.Phase, "_save", save_and_stop)
        run(broken, "--compare")
    with pytest.raises(SystemExit, match="holds an unfinished run: add --resume"):
        run(broken, "--compare")
    name, was = ("eps", 0.15) if phase == "warm-up" else ("beta", 6.0)  # no beta in a warm-up
    with pytest.raises(SystemExit, match=rf"other settings: {name} was {was}, is 0.2"):
        run(broken, "--compare", "--resume", f"--{name}", "0.2")
    with pytest.raises(SystemExit, match="a run cannot be extended"):
        run(broken, "--compare", "--resume", "--epochs", "9")
    run(broken, "--compare", "--resume")
    assert_same_run(straight, broken)


def test_command_line_in_a_fresh_process(tmp_path):
    command = [sys.executable, "-W", "error", "-W", "ignore:BatchNorm", example.__file__]
    command += [*SMALL, "--out", tmp_path / "run", "--bf16", "--channels-last", "--scope", "global"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "cure 3/3" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "cifar10"], r"CIFAR-10 is not in .*data: put the folder cifar-10-batches-py"),
        (["--resume"], "nothing to resume in"),
        (["--train-size", "8"], "8 training images are left, less than one batch of 16"),
        (["--horizon", "0.0001"], "--rate, --horizon: `horizon` should span"),
        (["--lr", "1e30"], r"the loss is nan in epoch 1 of warm-up: lower --lr"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "run", "--data-dir", str(tmp_path / "data"), *flags)


@pytest.mark.parametrize("kind", ["checkpoint", "warm-up"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "bit-flipped"])
def test_damaged_files_are_refused(kind, damage, tmp_path):
    """With the path and the way out; nothing is trained from half a file."""
    out = tmp_path / "run"
    stopped(out)
    (warmup,) = tmp_path.glob("warmup-*.pt")
    file = out / "cure.pt" if kind == "checkpoint" else warmup
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    content = {"truncated": good[:-100], "empty": b"", "text": b"hello\n", "bit-flipped": flipped}
    if damage == "foreign":
        torch.save({"weights": torch.ones(3)}, file)
    else:
        file.write_bytes(content[damage])
    flag = "--resume" if kind == "checkpoint" else "--overwrite"
    with pytest.raises(SystemExit, match=rf"{file.name} is damaged, or another kind.*delete it"):
        run(out, flag)


def full(*_):
    raise OSError(28, "No space left on device", "cure.pt")


@pytest.mark.parametrize(
    ("owner", "name", "fails", "message"),
    [
        (training, "save_checked", full, r"cure.pt: No space left on device\. Free space"),
        (training.Phase, "batches", stop, "before the first checkpoint"),
        (training.Phase, "judge", stop, "--resume in place of --over"),
    ],
)
def test_a_stop_says_what_the_next_command_is(owner, name, fails, message, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=message):
        patch.setattr(owner, name, fails)
        run(tmp_path / "run", "--overwrite")
    run(tmp_path / "run", *(["--resume"] if name == "judge" else []))


def test_a_finished_run_is_not_written_over_unasked(tmp_path):
    out = tmp_path / "run"
    run(out)
    before = (out / "results.json").read_bytes()
    for _ in range(2):
        with pytest.raises(SystemExit, match="finished run: add --overwrite to begin anew, or gi"):
            run(out, "--seed", "1")
        assert (out / "results.json").read_bytes() == before
        (out / "cure.pt").unlink(missing_ok=True)  # as one does to save space
    assert run(out, "--seed", "1", "--overwrite")["seed"] == 1


def test_trades_can_be_added_to_a_finished_run(tmp_path, capsys):
    run(tmp_path / "a" / "run")
    capsys.readouterr()
    run(tmp_path / "a" / "run", "--compare", "--resume")
    assert "cure epoch" not in capsys.readouterr().out
    run(tmp_path / "b" / "run", "--compare")
    assert_same_run(tmp_path / "a" / "run", tmp_path / "b" / "run")


@pytest.mark.parametrize(("split", "part"), [("train", "labels"), ("test", "pixels")])
def test_a_run_does_not_go_on_with_other_images(split, part, tmp_path, monkeypatch):
    run(tmp_path / "run")
    other_images(monkeypatch, split, part)
    with pytest.raises(SystemExit, match="made with other images: give the data it had"):
        run(tmp_path / "run", "--resume")


def test_sizes_of_the_networks():
    """Those of the usual CIFAR networks, so that published settings mean the same here."""
    sizes = {"resnet18": 11_173_962, "preactresnet18": 11_172_170}
    sizes |= {"wrn34-10": 46_160_474, "resnet8": 78_042}
    for name, make in example.NETWORKS.items():
        assert sum(p.numel() for p in make().parameters()) == sizes[name], name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs: should be at least 1"),
        (["--warmup-epochs", "-1"], "--warmup-epochs: should be at least 0, not -1."),
        (["--train-size", "-5"], "--train-size: should be at least 1, not -5."),
        (["--test-size", "0"], "--test-size: should be at least 1, not 0."),
        (["--update-fraction", "2"], "--update-fraction: should be in [0, 1], not 2."),
        (["--eps", "-0.1"], "--eps: should be above 0 and at most 1, as pixels are, not -"),
        (["--eps", "8"], "--eps: should be above 0 and at most 1, as pixels are, not 8."),
        (["--lr", "nan"], "--lr: should be finite and above 0, not nan."),
        (["--beta", "inf"], "--beta: should be finite and at least 0, not inf."),
        (["--gamma", "-1"], "--gamma: should be finite and at least 0, not -1."),
        (["--seed", "99999999999999999999"], "--seed: should be at least 0 and below"),
        (["--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "--device meta cannot be used here"),
        (["--out", "/proc/run"], "--out cannot be written, /proc/run: "),
        (["--download"], "--download is for --data cifar10"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ],
)
def test_flags_are_checked_before_data_are_loaded(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "load_digits", stop)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *flags)
    assert message in capsys.readouterr().err


def test_published_settings_are_the_defaults_for_cifar10(tmp_path):
    args = example.parse(["--data", "cifar10", "--out", str(tmp_path)])
    published = dict(network="resnet18", epochs=200, batch_size=128, lr=0.1, momentum=0.9)
    published |= dict(update_fraction=0.7, alpha=0.1, gamma=1.0, rate=0.2, attack_steps=10)
    published |= dict(eps=8 / 255, step_size=None)  # None: eps / 4
    assert {name: getattr(args, name) for name in published} == published


def test_updates_are_counted_as_a_loop_does():
    """Means and never-updated weights of three steps, over a break, against the masks."""
    model = torch.nn.Linear(4, 5)
    groups = rgp_optim.rgp_param_groups(model)
    opt = rgp_optim.RGPSelectiveOptimizer(torch.optim.SGD(groups, lr=0.1), update_fraction=0.2)
    counted, masks = updates.Updates(opt), []
    for step in range(3):
        opt.zero_grad()
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().sum()
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
    updated = {"conv.weight": 0.7, "fc.weight": 0.7, "fc.bias": 1.0}
    assert "updated 70% of each layer's weights;\nthe choice changes: 0.40%" in report.updated_text(
        updated, 0.004
    )
    updated["stages.1.0.shortcut.0.weight"] = 0.25
    text = report.updated_text(updated, 0.004)
    assert "least in stages.1.0.shortcut.0, 25.0%; most in conv, 70.0%" in text
    assert max(map(len, text.splitlines())) <= 80
    assert report.updated_text({"fc.bias": 1.0}, 0.0) == "each step updated all weights"
