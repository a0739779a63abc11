"""The example from end to end, on a small part of the digits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import same

import rgp_optim

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import cifar10_cure as example
from harness import report, training, updates

SMALL = ["--train-size", "64", "--val-size", "32", "--test-size", "40", "--batch-size", "16"]
SMALL += ["--epochs", "3", "--pretrain-epochs", "2", "--attack-steps", "2", "--device", "cpu"]
SMALL += ["--horizon", "0.5"]  # so few steps are not enough for the default

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm has seen")  # short runs


def run(out, *flags):
    example.main([*SMALL, "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text())


def refused(capsys, out, *flags):
    """The exit code of a run that does not end well, and what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(out, *flags)
    return ended.value.code, capsys.readouterr().err


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def stopped(capsys, out, *flags, within=("cure", "evaluation")):
    """The same for Ctrl-C within an epoch, or before a method's evaluation."""
    batches = training.Phase.batches

    def batches_or_stop(self):
        if (self.name, len(self.history) + 1) == within:
            raise KeyboardInterrupt
        return batches(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Phase, "batches", batches_or_stop)
        if within[1] == "evaluation":
            patch.setattr(training.Phase, "judge", stop)
        return refused(capsys, out, *flags)


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
        assert same(first.values(), second.values()), file.name
    first, second = (json.loads((o / "results.json").read_text()) for o in (a, b))
    assert without_times(first) == without_times(second)
    assert first["results"] == second["results"]


def test_cure_beside_trades(tmp_path, capsys):
    out = tmp_path / "run"
    result = run(out, "--compare")
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    (warm,) = tmp_path.glob("pretrained-digits-*.pt")
    assert printed.count(f"pre-training: weights saved for other runs as {warm}") == 1
    assert "reused" not in printed
    assert "Natural   PGD-20      C&W  NRR (C&W)" in printed
    for line in ("pre-training 2/2: loss", "cure 3/3: loss", "trades 3/3: loss"):
        assert printed.count(line) == 1
    assert printed.count("%, never updated ") == 3  # in each epoch of CURE
    for row in ("CURE, best (epoch", "CURE, last (epoch 3)", "TRADES, last (epoch 3)", "beta 2,"):
        assert row in printed
    assert "clean and under PGD-2" in printed
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"torch", "rgp_optim", "commit", "device"} <= set(result["versions"])
    assert result["settings"]["beta"] == 2.0
    assert result["data"] == "scikit-learn digits"
    lengths = {phase: len(rows) for phase, rows in result["history"].items()}
    assert lengths == {"pre-training": 2, "cure": 3, "trades": 3}
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
    """Both curves of both methods over the table's epochs; shares of layers where they differ."""
    figures = []
    monkeypatch.setattr("matplotlib.pyplot.close", figures.append)
    warm = [dict(natural=90, robust=0)]
    trades = [dict(natural=80, robust=50), dict(natural=85, robust=55)]
    cure = [
        {**row, "updated": {**each, "fc.bias": 1.0}}
        for row, each in zip(trades, updated, strict=True)
    ]
    report.plot(tmp_path / "c.png", {"pre-training": warm, "cure": cure, "trades": trades}, "")
    (figure,) = figures
    assert len(figure.axes) == panels
    curves = [line.get_ydata().tolist() for line in figure.axes[0].lines]
    assert curves == [[90, 80, 85], [0, 50, 55]] * 2
    for line in figure.axes[0].lines:
        assert list(line.get_xdata()) == [0, 1, 2]
    assert figure.axes[0].get_xticks().tolist() == [1, 2]
    if panels == 2:
        (band,) = figure.axes[1].collections
        ends = [segment[:, 0].tolist() for segment in band.get_segments()]
        assert ends == [pytest.approx([70, 70]), pytest.approx([50, 90])]
        widest = max(line.get_markersize() for line in figure.axes[1].lines)
        assert band.get_linewidth()[0] > widest  # so that it shows behind the markers


def test_a_seed_repeats_a_run_and_runs_share_the_pretraining(tmp_path, capsys, monkeypatch):
    cure = run(tmp_path / "a" / "cure")
    run(tmp_path / "b" / "cure")
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "b" / "cure")
    (warm,) = (tmp_path / "a").glob("pretrained-digits-*.pt")
    assert "pre-training 1/2" in capsys.readouterr().out
    run(tmp_path / "a" / "again")  # its pre-training comes from the file this time
    printed = capsys.readouterr().out
    assert "pre-training 1/2" not in printed
    assert printed.count(f"pre-training: weights reused from {warm}\n") == 1
    assert_same_run(tmp_path / "a" / "cure", tmp_path / "a" / "again")
    run(tmp_path / "a" / "eps", "--eps", "0.3")
    assert len(list((tmp_path / "a").glob("pretrained-digits-*.pt"))) == 2
    other = run(tmp_path / "c", "--seed", "1")
    assert other["history"]["pre-training"][0]["loss"] != cure["history"]["pre-training"][0]["loss"]
    other_images(monkeypatch, "train", "pixels")
    run(tmp_path / "a" / "other images")
    assert len(list((tmp_path / "a").glob("pretrained-digits-*.pt"))) == 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A comparison that was never stopped."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run(out, "--compare")
    return out


NOTHING = "No epoch was finished, nothing is saved; the same command "
PRETRAIN = "The pre-trained weights are saved as {warm}; the same command "
EPOCHS = "Finished epochs are saved in {out}; the same command "


@pytest.mark.parametrize(
    ("within", "first", "said", "then", "reused"),
    [
        (("pre-training", 1), [], NOTHING + "starts again.", [], "pre-training 1/2: loss"),
        (("pre-training", 2), [], EPOCHS + "with --resume", ["--resume"], "pre-training: 1 of 2"),
        (("cure", 1), [], PRETRAIN + "continues from it.", [], "pre-training: weights reused from"),
        (("cure", 2), [], EPOCHS + "with --resume cont", ["--resume"], "cure: 1 of 3 epochs"),
        (
            ("cure", "evaluation"),
            ["--overwrite"],
            EPOCHS + "with --resume in place of --overwrite",
            ["--resume"],
            "cure: 3 of 3 epochs",
        ),
        (("trades", 3), [], EPOCHS + "with --resume cont", ["--resume"], "trades: 2 of 3 epochs"),
    ],
    ids=["at once", "pre-training", "pre-trained", "cure", "cure is trained", "trades"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    within, first, said, then, reused, straight, tmp_path, capsys
):
    """By the command that the last line names, which tells the truth about what is saved."""
    out = tmp_path / "run"
    code, last = stopped(capsys, out, "--compare", *first, within=within)
    warm = "".join(map(str, tmp_path.glob("pretrained-*.pt")))
    assert code == 130
    assert last.startswith("\nstopped. " + said.format(out=out, warm=warm))
    run(out, "--compare", *then)
    assert reused in capsys.readouterr().out
    assert_same_run(straight, out)


def test_a_resumed_run_that_is_stopped_again(tmp_path, capsys):
    """What is right to say differs where --resume was given, or will find nothing."""
    out = tmp_path / "run"
    assert stopped(capsys, out, within=("pre-training", 2))[0] == 130
    _, said = stopped(capsys, out, "--resume", within=("cure", 1))
    assert "the same command without --resume continues from it." in said
    assert stopped(capsys, out, within=("cure", 2))[0] == 130
    assert "the same command continues" in stopped(capsys, out, "--resume", within=("cure", 3))[1]


def test_a_stopped_run_is_continued_as_it_was_begun(tmp_path, capsys):
    out = tmp_path / "run"
    stopped(capsys, out, within=("cure", 2))
    code, said = refused(capsys, out)
    assert code == 1
    assert "holds an unfinished run: add --resume" in said
    code, said = refused(capsys, out, "--resume", "--beta", "0.2")
    assert code == 1
    assert "other settings: beta was 2.0, is 0.2. Repeat its settings, or start over" in said
    assert "a run cannot be extended" in refused(capsys, out, "--resume", "--epochs", "9")[1]
    stopped(capsys, tmp_path / "other", "--seed", "1", within=("pre-training", 2))
    _, said = refused(capsys, tmp_path / "other", "--seed", "1", "--resume", "--eps", "0.2")
    assert "other settings: eps was 0.15, is 0.2" in said


def test_command_line_in_a_fresh_process(tmp_path):
    command = [sys.executable, "-W", "error", "-W", "ignore:BatchNorm", example.__file__]
    command += [*SMALL, "--out", tmp_path / "run", "--bf16", "--channels-last", "--scope", "global"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "cure 3/3" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--data", "cifar10"], 1, "/data: put the folder cifar-10-batches-py there, or add --d"),
        (["--resume"], 1, "nothing to resume in"),
        (["--train-size", "8"], 2, "8 training images are left, less than one batch of 16"),
        (["--horizon", "0.0001"], 2, "--rate, --horizon: `horizon` should span"),
        (["--lr", "1e30"], 1, "the loss is nan in epoch 1 of pre-training: lower --lr"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(flags, code, message, tmp_path, capsys):
    got, said = refused(capsys, tmp_path / "run", "--data-dir", str(tmp_path / "data"), *flags)
    assert got == code
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["checkpoint", "pre-training"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "foreign", "bit-flipped"])
def test_damaged_files_are_refused(kind, damage, tmp_path, capsys):
    """With the path and the way out; nothing is trained from half a file."""
    out = tmp_path / "run"
    stopped(capsys, out)
    (before,) = tmp_path.glob("pretrained-*.pt")
    file = out / "cure.pt" if kind == "checkpoint" else before
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    content = {"truncated": good[:-100], "empty": b"", "text": b"hello\n", "bit-flipped": flipped}
    if damage == "foreign":
        torch.save({"weights": torch.ones(3)}, file)
    else:
        file.write_bytes(content[damage])
    flag = "--resume" if kind == "checkpoint" else "--overwrite"
    _, said = refused(capsys, out, flag)
    assert f"{file} is damaged, or another kind of file: delete it" in said


def full(*_):
    raise OSError(28, "No space left on device", "cure.pt")


@pytest.mark.parametrize(
    ("owner", "name", "fails", "code", "message"),
    [
        (
            training,
            "load_digits",
            stop,
            130,
            "stopped. Training had not begun; the same command st",
        ),
        (training, "save_checked", full, 1, "error: cure.pt: No space left on device. Free space"),
    ],
)
def test_a_run_that_has_saved_nothing_starts_again(
    owner, name, fails, code, message, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        got, said = refused(capsys, tmp_path / "run")
    assert got == code
    assert message in said
    assert "the same command starts again." in said
    run(tmp_path / "run")


def test_a_finished_run_is_not_written_over_unasked(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, "--compare")
    before = (out / "results.json").read_bytes()
    for flags in (["--compare"], []):
        assert "finished run: add --overwrite to start over" in refused(capsys, out, *flags)[1]
        assert (out / "results.json").read_bytes() == before
        (out / "cure.pt").unlink(missing_ok=True)  # as one does to save space
    assert run(out, "--seed", "1", "--overwrite")["seed"] == 1
    assert not list(out.glob("trades*"))  # of another run than results.json


def test_trades_can_be_added_to_a_finished_run(straight, tmp_path, capsys):
    """By the same command with --compare; stopped, it goes on."""
    out = tmp_path / "run"
    run(out)
    code, said = refused(capsys, out, "--compare", "--eps", "0.2")
    assert code == 2
    assert "finished run with other settings (eps was 0.15, is 0.2): repeat its settings" in said
    _, said = stopped(capsys, out, "--compare", within=("trades", 2))
    assert EPOCHS.format(out=out) + "continues" in said
    capsys.readouterr()
    run(out, "--compare")
    printed = capsys.readouterr().out
    assert f"cure: 3 of 3 epochs reused from {out / 'cure.pt'}" in printed
    assert f"trades: 1 of 3 epochs reused from {out / 'trades.pt'}" in printed
    assert "cure 1/3" not in printed
    assert_same_run(straight, out)


@pytest.mark.parametrize(("split", "part"), [("train", "labels"), ("test", "pixels")])
def test_a_run_does_not_go_on_with_other_images(split, part, tmp_path, monkeypatch, capsys):
    run(tmp_path / "run")
    other_images(monkeypatch, split, part)
    for flag in ("--resume", "--compare"):
        _, said = refused(capsys, tmp_path / "run", flag)
        assert "made with other images: give the data it had" in said


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
        (["--pretrain-epochs", "-1"], "--pretrain-epochs: should be at least 0, not -1."),
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
        (["--scope", "layer"], "--scope: invalid choice: 'layer' (choose from"),
        (["--epoch-size", "3"], "unrecognized arguments: --epoch-size"),
    ],
)
def test_flags_are_checked_before_data_are_loaded(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "load_digits", stop)
    code, said = refused(capsys, tmp_path / "run", *flags)
    assert code == 2
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_published_settings_are_the_defaults_for_cifar10(tmp_path):
    args = example.parse(["--data", "cifar10", "--out", str(tmp_path)])
    published = dict(network="resnet18", epochs=200, batch_size=128, lr=0.1, momentum=0.9)
    published |= dict(update_fraction=0.7, alpha=0.1, gamma=1.0, rate=0.2, attack_steps=10)
    published |= dict(eps=8 / 255, step_size=None)  # None: eps / 4
    assert {name: getattr(args, name) for name in published} == published
    wide = example.parse(["--network", "wrn34-10", "--alpha", "0.2", "--out", str(tmp_path)])
    assert (wide.update_fraction, wide.alpha, wide.gamma, wide.beta) == (0.5, 0.2, 0.5, 2.0)


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
    assert (
        "updated 70% of each layer's weights.\nThe selection varies: 0.40%"
        in report.updated_text(updated, 0.004)
    )
    updated["stages.1.0.shortcut.0.weight"] = 0.25
    text = report.updated_text(updated, 0.004)
    assert "least in stages.1.0.shortcut.0, 25.0%; most in conv, 70.0%" in text
    assert max(map(len, text.splitlines())) <= 80
    assert report.updated_text({"fc.bias": 1.0}, 0.0) == "each step updated all weights."
