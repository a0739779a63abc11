"""The methods of the table against their formulas, computed by hand; the runner; the report."""

import copy
import csv
import hashlib
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import Line
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = map(str, [ROOT / "examples", BENCHMARKS, BENCHMARKS / "robustness"])
pytest.importorskip("sklearn")

import captured  # noqa: E402
import evaluation  # noqa: E402
import run as robustness  # noqa: E402
import summary  # noqa: E402
import trainer  # noqa: E402
from harness import training  # noqa: E402
from methods import METHODS, ROWS, TABLE, Setting  # noqa: E402
from methods.act import act_losses, soft_kl  # noqa: E402
from methods.cure import CONTROLS, RANKING, REVISION, SCORES  # noqa: E402
from methods.fat import friendly_pgd  # noqa: E402
from methods.iad import iad_loss  # noqa: E402
from methods.las_at import LENGTHS, RADII, STEPS, smoothed_loss  # noqa: E402
from methods.mart import mart_loss  # noqa: E402
from methods.st_at import gap, squeeze_loss  # noqa: E402

Y = torch.tensor([0, 2, 1, 1])

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm has seen")  # short runs


def logits(seed):
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(4, 3, generator=g, dtype=torch.float64)


def p(z, temperature=1.0):
    """Softmax of each row, by hand."""
    e = np.exp(z.numpy() / temperature)
    return e / e.sum(1, keepdims=True)


def kl(a, b):
    return (a * np.log(a / b)).sum(1)


def ce(z):
    return -np.log(p(z)[np.arange(4), Y])


def clip(ahead, x, eps):
    return torch.min(torch.max(ahead, x - eps), x + eps).clamp(0, 1)


def close(a, b):
    assert math.isclose(float(a), float(b), rel_tol=1e-9), (a, b)


def test_mart():
    z, za = logits(0), logits(1)
    pa = p(za)
    wrong = [max(pa[i, j] for j in range(3) if j != Y[i]) for i in range(4)]
    true = p(z)[np.arange(4), Y]
    expected = ce(za).mean() - np.log(1.0001 - np.array(wrong)).mean()
    expected += 5 * (kl(p(z), pa) * (1.0000001 - true)).mean()
    close(mart_loss(z, za, Y, 5.0), expected)


def test_act():
    z, zn = logits(0), logits(1)
    robust, natural = act_losses(z, zn, Y, 0.9, 4.0)
    close(robust, 0.1 * ce(z).mean() + 0.9 * 16 * kl(p(zn, 4), p(z, 4)).mean())
    close(natural, 0.1 * ce(zn).mean() + 0.9 * 16 * kl(p(z, 4), p(zn, 4)).mean())
    z.requires_grad_()
    assert not act_losses(z, zn, Y, 0.9, 4.0)[1].requires_grad  # nothing goes into the other


def test_ard():
    teacher, student = logits(0), logits(1)
    close(soft_kl(teacher, student, 30.0), kl(p(teacher, 30), p(student, 30)).mean())
    _, s = setting()
    s = replace(s, teacher=lambda: lambda x: teacher)
    method = METHODS["ard"](nn.Linear(3, 3).double(), s)
    method.model = lambda x: student
    expected = 900 * kl(p(teacher, 30), p(student, 30)).sum() / (4 * 3)  # over images and classes
    close(method.loss(None, None, Y), expected)


def test_iad():
    z, za, t, ta = (logits(seed) for seed in range(4))
    q = p(ta)[np.arange(4), Y]
    expected = kl(p(t), p(za)).mean() + ((1 - q**0.1) * kl(p(z), p(za))).mean()
    close(iad_loss(z, za, t, ta, Y, 0.1), expected)
    _, s = setting(epochs=10)
    method = METHODS["iad"](nn.Linear(3, 3).double(), s)
    method.teacher, method.model = {0: t, 1: ta}.get, {0: z, 1: za}.get
    for epoch, value in ((2, kl(p(t), p(za)).mean()), (3, expected)):
        method.begin_epoch(epoch)
        close(method.loss(0, 1, Y), value)


def test_st_at():
    """Half of the distance of the extremes' predictions, pushing both together."""
    three, rows = [logits(seed) for seed in range(3)], np.arange(4)
    predictions = np.stack([p(z) for z in three])
    true = predictions[:, rows, Y]
    lowest, highest = true.argmin(0), true.argmax(0)
    low, high = predictions[lowest, rows], predictions[highest, rows]
    expected = (kl(high, low) + kl(low, high)).mean() / 2
    close(gap(three, Y), expected)
    close(squeeze_loss(three, Y, 6.0), ce(three[0]).mean() + 6 * expected)
    pushes = np.zeros_like(predictions)
    pushes[lowest, rows], pushes[highest, rows] = (low - high) / 8, (high - low) / 8
    found = torch.autograd.grad(gap([z.requires_grad_() for z in three], Y), three)
    np.testing.assert_allclose(np.stack(found), pushes, atol=1e-12)


def test_st_at_goes_on_from_the_extremes():
    """Each of the two images steps from whichever of the three is the extreme now."""
    model, s = setting(eps=0.05)
    method = METHODS["st-at"](model.train(), s)
    x, y = data()
    g, rows = torch.Generator().manual_seed(0), torch.arange(12)
    found = method.extremes(x, y)
    assert model.training
    two = [x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(2)]
    for _ in range(3):
        images = torch.stack([x, *two]).requires_grad_()
        z = F.log_softmax(model(images.flatten(0, 1)), 1).view(3, 12, 3)
        ends = z[:, rows, y].argmin(0), z[:, rows, y].argmax(0)
        low, high = (z[end, rows] for end in ends)
        pairs = (low, high), (high, low)
        goal = sum((a.exp().detach() * (a.detach() - b)).sum() for a, b in pairs)
        (gradient,) = torch.autograd.grad(goal, images)
        ahead = clip(images.detach() + 0.04 * gradient.sign(), x, 0.05)
        two = [ahead[end, rows] for end in ends]
    torch.testing.assert_close(list(found), two, rtol=0, atol=1e-12)


def test_las_at():
    z = logits(0)
    target = np.full((4, 3), 0.15)
    target[np.arange(4), Y] = 0.7
    close(smoothed_loss(z, Y, 0.7), -(target * np.log(p(z))).sum(1).mean())


@pytest.mark.parametrize("reward", [0.01, 5.0])
def test_the_strategy_of_las_at_follows_the_whole_reward(reward):
    """REINFORCE by hand: one reward for the batch, no baseline, norm at most 1, no momentum."""
    model, s = setting()
    method = METHODS["las-at"](model, s)
    method.reward = lambda *_: torch.tensor(reward)
    x, y = data()
    for _ in range(2):
        expected = copy.deepcopy(method.strategy)
        draws = torch.Generator()
        draws.set_state(s.generator.get_state())
        _, log_p = expected.sample(x, draws)
        gradients = torch.autograd.grad((-reward * log_p).mean(), list(expected.parameters()))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        method.train_strategy(x, y)
        for w, old, g in zip(
            method.strategy.parameters(), expected.parameters(), gradients, strict=True
        ):
            torch.testing.assert_close(w, old - 1e-4 * g / max(norm, 1.0), rtol=0, atol=1e-9)
    assert (norm > 1) == (reward > 1)


def test_the_reward_of_las_at():
    model, s = setting(attack_steps=0)
    method = METHODS["las-at"](model, s)
    x, y = data()
    z = model(x).detach()
    copied = copy.deepcopy(model)
    smoothed_loss(copied(x), y, 0.7).backward()
    with torch.no_grad():
        for w in copied.parameters():
            w -= 0.1 * (w.grad + 5e-4 * w)
        right = (copied(x).argmax(1) == y).double().mean()
        start = METHODS["at"](copied, replace(s, generator=torch.Generator().manual_seed(0)))
        robust = (copied(start.perturb(x, y)).argmax(1) == y).double().mean()
    expected = F.cross_entropy(z, y) + 4 * robust + 2 * right
    close(method.reward(x, x, y), expected)


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_fat_stops_some_steps_after_the_first_mistake(tau):
    """One weight: each step moves by the step size, and the class changes at a known place."""
    x = torch.tensor([[0.42], [0.1]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    out = friendly_pgd(Line(), x, y, x.clone(), 0.3, 0.05, 10, tau)
    close(out[0], min(0.42 + 0.05 * (2 + tau), 0.72))  # wrong after two steps
    close(out[1], 0.4)  # never wrong: to the end of the ball
    g, again = (torch.Generator().manual_seed(0) for _ in range(2))
    noisy = friendly_pgd(Line(), x[:1], y[:1], x[:1].clone(), 0.3, 0.05, 1, tau, 0.001, g)
    draw = torch.randn(1, 1, generator=again, dtype=torch.float64)
    close(noisy, 0.42 + 0.05 + 0.001 * draw)


@pytest.mark.parametrize("saturated", [False, True])
@pytest.mark.parametrize("name", ["mart", "act"])
def test_attacks_pixel_for_pixel(name, saturated):
    """A start that is not clipped, then plain steps, from the same noise."""
    model, s = setting()
    method = METHODS[name](model, s)
    x, y = data()
    x = x.round() if saturated else 0.25 + x / 2
    g = torch.Generator().manual_seed(0)
    x_adv = x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype)
    for _ in range(3):
        x_adv.requires_grad_()
        z = F.log_softmax(model(x_adv), 1)
        nll = -z[torch.arange(12), y]
        if name == "mart":
            goal = nll.sum()
        else:
            q = F.softmax(method.natural(x), 1).detach()
            goal = 0.1 * nll.mean() + 0.9 * (q * (q.log() - z)).sum()
        (gradient,) = torch.autograd.grad(goal, x_adv)
        x_adv = clip(x_adv.detach() + 0.04 * gradient.sign(), x, 0.1)
    torch.testing.assert_close(method.perturb(x, y), x_adv, rtol=0, atol=1e-12)


def network():
    layers = nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def setting(**changes):
    torch.manual_seed(0)
    model = network()
    values = dict(eps=0.1, attack_steps=3, step_size=0.04, epochs=10, total_steps=100, seed=0)
    values |= dict(classes=3, generator=torch.Generator().manual_seed(0), new_network=network)
    values["new_optimizer"] = lambda params: torch.optim.SGD(params, lr=0.1)
    values["teacher"] = lambda: network().eval()
    return model, Setting(**{**values, **changes})


def data(n=12):
    g = torch.Generator().manual_seed(3)
    return torch.rand(n, 1, 4, 4, generator=g, dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_stays_in_the_ball(name):
    model, s = setting()
    method = METHODS[name](model, s)
    method.begin_epoch(0)
    x, y = data()
    if name not in ("st-at", "las-at"):
        x_adv = method.perturb(x, y)
        assert float((x_adv - x).abs().max()) <= 0.1 + 1e-12
        assert 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
        assert not x_adv.requires_grad
    losses = [float(method.step(x, y)["loss"]) for _ in range(60)]
    assert np.mean(losses[-5:]) < losses[0]


def test_every_image_of_las_at_has_its_own_attack():
    """Radius, steps and length by the strategy's draws; plain PGD of each image by itself."""
    model, s = setting()
    method = METHODS["las-at"](model.train(), s)
    x, y = data()
    choice, log_p = method.strategy.sample(x, s.generator)
    assert log_p.shape == (12,)
    for column, allowed in zip(choice.T, (RADII, STEPS, LENGTHS), strict=True):
        assert len(set(column.tolist())) > 1
        assert set(column.tolist()) <= set(allowed)
    draw = 2 * torch.rand(x.shape, generator=s.generator.clone_state(), dtype=x.dtype) - 1
    found = method.attack(x, y, choice)
    assert model.training
    for i, (radius, steps, length) in enumerate(choice.tolist()):
        image, ahead = x[i : i + 1], (x + 0.1 * draw).clamp(0, 1)[i : i + 1]
        for _ in range(max(1, round(0.3 * steps))):  # three steps, where the paper has ten
            ahead.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(ahead), y[i : i + 1]), ahead)
            ahead = ahead.detach() + length / 8 * 0.1 * gradient.sign()
            ahead = clip(ahead, image, radius / 8 * 0.1)
        torch.testing.assert_close(found[i], ahead[0], rtol=0, atol=1e-6)


def test_controls_differ_from_cure_in_one_thing():
    """The random mask without revision from that mask with it; rankings from CURE without it."""
    cure = METHODS["cure"]
    assert METHODS["released-rgp"].official["loss"] == "ce"
    for name, kind in {**CONTROLS, **RANKING, **REVISION}.items():
        if name.startswith("released"):
            assert kind.official["conserve"] == "gradients"
            continue
        apart = {"gamma", "score", "update_fraction"} if name in RANKING else {"horizon"}
        apart |= {"gamma"} if name == "random-no-revision" else set()
        changed = {k for k, v in kind.official.items() if cure.official[k] != v}
        assert len(changed - apart) <= 1, name
        assert changed, name
        assert kind.warm
        assert kind.official["beta"] == cure.official["beta"]
        for network, of_cure in cure.networks.items():
            left = {**kind.official, **kind.networks[network]}
            different = {k for k, v in {**cure.official, **of_cure}.items() if left[k] != v}
            assert different - {"update_fraction"} == changed - {"update_fraction"}
    assert METHODS["trades-pre"].official["beta"] == cure.official["beta"]
    assert METHODS["at-pre"].warm
    assert (len(TABLE), len(ROWS)) == (10, 23)


def test_experiments_have_the_rows_and_settings_they_are_named_for():
    used = {name: rows for name, (_, rows, _) in trainer.EXPERIMENTS.items()}
    assert [len(rows) for rows in used.values()] == [21, 11, 2, 16, 3, 2, 12, 3, 5, 8]
    assert all(set(rows) <= set(METHODS) for rows in used.values())
    betas = {"ranking-digits": 6.0, "shuffled-digits": 6.0, "start-digits": 6.0}
    betas |= {"ranking-digits-beta2": 2.0, "revision-digits": 2.0}
    for name, rows in used.items():
        for row in rows:
            kind = METHODS[row]
            options = {**kind.official, **trainer.options_of(trainer.PRESETS[name], row)}
            if "-beta" in row:
                assert options["beta"] == float(row.partition("-beta")[2])
            elif not row.startswith("at"):
                assert options["beta"] == betas.get(name, 5.0)
            score, _, share = row.partition("-")
            if "beta" in share and score == "rgp":
                assert (options["update_fraction"], options["gamma"]) == (0.7, 0.0)
            if score in (*SCORES, "shuffled") and share[:2] == "0.":
                found = options["score"], options["update_fraction"], options["gamma"]
                assert found == (score, float(share), 0.0)
    assert all(trainer.PRESETS[name].lr_warmup == 0.1 for name in ("digits", "cpu", "gpu-short"))
    assert (trainer.PRESETS["paper"].lr_warmup, trainer.PRESETS["start-digits"].lr_warmup) == (0, 1)
    plain = trainer.PRESETS["overfitting-plain"]
    assert [name for name, each in trainer.PRESETS.items() if not each.augment] == [
        "overfitting-plain"
    ]
    assert replace(plain, augment=True) == trainer.PRESETS["overfitting"]


@pytest.mark.parametrize("score", [*SCORES, "shuffled"])
def test_scores_of_the_ranking_by_hand(score):
    """One step without momentum: which weights move, and how long the gradient was."""
    model, s = setting(new_optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    method = METHODS[f"{score}-0.3"](model, s)
    x, y = data()
    x_adv = METHODS["trades-pre"](*setting()).perturb(x, y)
    method.perturb = lambda *_: x_adv
    before = copy.deepcopy(model)
    z, za = before(x), before(x_adv)
    weights = [w for w in before.parameters() if w.dim() > 1]
    natural, adversarial = (
        torch.autograd.grad(F.cross_entropy(each, y), weights, retain_graph=True)
        for each in (z, za)
    )
    q, qa = F.softmax(z, 1), F.log_softmax(za, 1)
    loss = F.cross_entropy(z, y) + 5 * (q * (F.log_softmax(z, 1) - qa)).sum(1).mean()
    gradients = torch.autograd.grad(loss, weights)
    method.step(x, y)
    after = [w for w in model.parameters() if w.dim() > 1]
    rows = zip(weights, after, gradients, natural, adversarial, strict=True)
    for place, (w, now, g, n, a) in enumerate(rows):
        k = max(1, round(0.3 * w.numel()))
        step, rgp = (w - now).detach(), 0.1 * n.abs() + 0.9 * a.abs()
        moved, top = step != 0, torch.zeros(w.numel(), dtype=torch.bool)
        top[rgp.flatten().topk(k).indices] = True
        top = top.view_as(w)
        if score == "rgp":
            assert torch.equal(moved, top)
        elif score == "gradient":
            assert g.abs()[moved].min() > g.abs()[~moved].max()
        elif score == "inverse":
            least = torch.zeros(w.numel(), dtype=torch.bool)
            least[rgp.flatten().topk(k, largest=False).indices] = True
            assert torch.equal(moved, least.view_as(w) & (rgp > 0))
        elif score == "shuffled":
            draw = torch.Generator().manual_seed(s.seed * 1_000_003 + place)
            others = top.flatten()[torch.randperm(w.numel(), generator=draw)]
            assert torch.equal(moved, others.view_as(w) & (g != 0))
        if score not in ("matched", "shuffled"):
            torch.testing.assert_close(step, g * moved, rtol=0, atol=1e-12)
            continue
        close(step.norm(), (g * top).norm())
        share = step[moved] / g[moved]
        torch.testing.assert_close(share, share[0].expand_as(share))
        assert not torch.equal(moved, top)


def test_published_settings_of_each_network():
    """Table 9 of the paper; p there is the fraction that is conserved."""
    published = {"resnet18": (30, 0.1, 1.0), "wrn34-10": (50, 0.3, 0.5)}
    published["preactresnet18"] = (20, 0.2, 1.0)
    for network, (conserved, alpha, gamma) in published.items():
        preset = replace(trainer.PRESETS["paper"], network=network)
        used = {**METHODS["cure"].official, **trainer.options_of(preset, "cure")}
        assert used["update_fraction"] == 1 - conserved / 100
        assert (used["alpha"], used["gamma"]) == (alpha, gamma)
        shared = (preset.epochs, preset.batch_size, preset.lr, preset.momentum)
        assert shared == (200, 128, 0.1, 0.9)


def test_published_numbers_agree_with_each_other():
    """NRR is the harmonic mean of natural and C&W accuracy, cut or rounded; if not, a note."""
    with summary.PUBLISHED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with_nrr = [row for row in rows if row["nrr"]]
    assert len(with_nrr) == 17
    for row in with_nrr:
        natural, cw = float(row["natural"]), float(row["cw"])
        expected = 2 / (1 / natural + 1 / cw)
        assert (abs(float(row["nrr"]) - expected) < 0.01) != ("NRR" in row["note"]), row


def test_a_run_too_short_for_its_method_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "pretrain", lambda self, *_: None)
    monkeypatch.setattr(robustness, "needs", lambda *_: ())
    words = ["--epochs", "1", "--methods", "cure", "--seeds", "0", "--no-table"]
    with pytest.raises(SystemExit, match=r"error: cure-seed0, 35 steps: `horizon` should span"):
        run(tmp_path, *words, preset="digits")


def test_released_rules_select_where_the_released_code_does():
    from harness.networks import NETWORKS

    network = NETWORKS["resnet8"](channels=1)
    kinds = nn.Conv2d | nn.Linear
    layers = [name for name, m in network.named_modules() if isinstance(m, kinds)]
    left = METHODS["cure-signed"](network, setting()[1]).left_out()
    assert {name.split(".")[-1] for name in layers if name not in left} == {"conv1"}
    assert METHODS["cure-loss"](network, setting()[1]).left_out() == ["fc"]


def test_the_released_mode_rgp_by_hand():
    """Gradients of a CE + (1 - a) CE_adv at or above its quantile in each tensor, the rest zero."""
    model, s = setting()
    model[1].bias.data += 2  # every unit is active: no gradient of a bias is 0
    method = METHODS["released-rgp"](model, s, gamma=0.0)
    assert all("param_names" in group for group in method.optimizer.param_groups)
    x, y = data()
    x_adv = METHODS["released-rgp"](model, s, gamma=0.0).perturb(x, y)
    method.perturb = lambda *_: x_adv
    expected = copy.deepcopy(model)
    loss = 0.1 * F.cross_entropy(expected(x), y) + 0.9 * F.cross_entropy(expected(x_adv), y)
    loss.backward()
    method.step(x, y)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        gradient = theirs.grad
        if not name.startswith("3"):  # all but the head, biases too
            k = math.ceil(0.7 * gradient.numel() - 1e-9)
            least = gradient.abs().flatten().sort(descending=True).values[k - 1]
            gradient = gradient * (gradient.abs() >= least)
        torch.testing.assert_close(ours, theirs - 0.1 * gradient, rtol=0, atol=1e-12)


def test_an_unknown_option_is_refused():
    model, s = setting()
    with pytest.raises(ValueError, match="AT has no option beta"):
        METHODS["at"](model, s, beta=1.0)


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
@pytest.mark.parametrize("lr_warmup", [0.0, 0.1, 0.25])
def test_the_learning_rate_rises_and_falls_in_closed_form(schedule, lr_warmup):
    """Against torch's schedulers, times a line; none of it in the natural phase."""
    preset = replace(trainer.PRESETS["test"], schedule=schedule, lr_warmup=lr_warmup)
    setup = training.Setup(preset, 0, "cpu", training.load_digits())
    steps, names = 40, ("method", "pre-training")
    for name in names:
        opts = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3) for _ in range(2)]
        kinds = torch.optim.lr_scheduler
        plain = (
            kinds.CosineAnnealingLR(opts[1], steps)
            if schedule == "cosine"
            else kinds.MultiStepLR(opts[1], [20, 30])
        )
        phase = training.Phase(setup, name, nn.Linear(1, 1), opts[0], 20, Path("none"))
        assert setup.steps_an_epoch * 20 == steps
        rise = round(lr_warmup * steps) if name == "method" else 0
        for t in range(steps):
            expected = opts[1].param_groups[0]["lr"] * (min(1.0, (t + 1) / rise) if rise else 1.0)
            assert opts[0].param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
            for opt, scheduler in zip(opts, (phase.scheduler, plain), strict=True):
                opt.step()
                scheduler.step()


# Evaluation.


def test_accuracy_under_attack_is_that_of_the_margin():
    x = torch.linspace(0.05, 0.95, 19).view(-1, 1, 1, 1)
    y = (x.flatten() > 0.5).long()
    eps = 0.12
    expected = 100 * float(((x.flatten() - 0.5).abs() > eps).float().mean())
    batches = lambda: [(x[:9], y[:9]), (x[9:], y[9:])]  # noqa: E731
    for loss in ("cross_entropy", "margin"):
        got = training.accuracy(Line(), batches, loss=loss, **training.pgd20(eps))
        assert abs(got - expected) <= 100 / 19  # the point on the line
    row = evaluation.masking(Line(), batches, eps, surrogate=Line())
    assert evaluation.is_masked(row) == []
    assert row["large_eps"] < 6.0


def test_masked_gradients_are_noticed():
    assert evaluation.is_masked({"pgd20": 50, "pgd100": 40, "large_eps": 0, "transfer": 60})
    assert evaluation.is_masked({"pgd20": 50, "pgd100": 50, "large_eps": 20, "transfer": 60})
    assert evaluation.is_masked({"pgd20": 50, "pgd100": 50, "large_eps": 0, "transfer": 40})
    assert not evaluation.is_masked({"pgd20": 50, "pgd100": 49, "large_eps": 0, "transfer": 60})


def test_auto_attack_leaves_the_network_as_it_was():
    pytest.importorskip("pyautoattack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)).eval()
    x, y = data(6)
    got = evaluation.auto_attack(model, x.float(), y, 0.05, whole=False)
    pgd = training.accuracy(model, lambda: [(x.float(), y)], **training.pgd20(0.05))
    assert 0 <= got <= pgd  # two of its attacks cannot be weaker than one of them
    assert all(q.requires_grad and q.grad is None for q in model.parameters())


# The runner.


def run(tmp_path, *words, preset="test"):
    place = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "r"), "--device", "cpu"]
    robustness.main(["--preset", preset, *place, *words])


def train(folder, name, report=lambda text: None, **changes):
    """Train by AT, then by a method; return its weights."""
    preset = replace(trainer.PRESETS["test"], **changes)
    place = trainer.Place(folder, folder / "r")
    for each in dict.fromkeys(("at", name)):
        run = trainer.Trainer(each, 0, preset, place)
        run.run(report if each == name else lambda text: None)
    return torch.load(folder / f"{name}-seed0-last.pt", weights_only=True)


def test_the_runner_skips_what_is_done_and_reports(tmp_path, capsys):
    run(tmp_path, "--methods", "cure,trades-pre", "--seeds", "0", "--quiet")
    out = capsys.readouterr().out
    assert " 1/1: loss" not in out  # no line for an epoch, of the pre-training either
    assert "at-seed0 done" in out  # needed by the others
    assert "| CURE | cure | natural |" in out
    assert "*TRADES, pre-trained*" in out
    before = {file: file.read_bytes() for file in (tmp_path / "r").iterdir()}
    run(tmp_path, "--methods", "cure,trades-pre", "--seeds", "0")
    assert "3 of 3 runs are done already" in capsys.readouterr().out
    assert before == {file: file.read_bytes() for file in (tmp_path / "r").iterdir()}
    content = json.loads((tmp_path / "r" / "cure-seed0.json").read_text())
    assert content["start"] == "natural weights"
    assert content["options"]["beta"] == METHODS["cure"].official["beta"]
    assert set(content["results"]["last"]) >= {"natural", "pgd20", "cw", "nrr"}
    assert "| cure - trades-pre | 1 | - |" in out  # no interval of one seed
    pytest.importorskip("matplotlib")
    figures = {"--figure": tmp_path / "table.png", "--curves": tmp_path / "curves.png"}
    run(tmp_path, "--report", *(str(word) for pair in figures.items() for word in pair))
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in figures.values())
    assert all(b"<svg" in file.with_suffix(".svg").read_bytes() for file in figures.values())
    file = tmp_path / "runs" / "cure-seed0-last.pt"
    assert content["weights"]["last"] == {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def test_at_comes_first_where_it_is_needed():
    """By methods that it teaches; by all others where masked gradients are looked for with it."""
    alone = replace(trainer.PRESETS["test"], surrogate=False)
    names = ["trades-pre", "iad"]
    assert robustness.ordered(names, trainer.PRESETS["test"]) == ["at", *names]
    assert robustness.ordered(names, alone) == ["trades-pre", "at", "iad"]
    assert robustness.ordered(["cure"], alone) == ["cure"]


def test_a_run_without_autoattack_says_so_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="AutoAttack needs `pip install pyautoattack`"):
        run(tmp_path, "--methods", "at", preset="digits")
    assert robustness.preset_of(robustness.parse(["--auto-attack", "0"])).auto_attack == 0


def test_attacks_run_as_the_preset_says(monkeypatch):
    """Every way is the same attack; what a graph replays on a GPU, a CPU runs."""
    x, _ = data()
    found = []
    for way in captured.WAYS:
        monkeypatch.setattr(torch, "compile", lambda model: model)
        model, s = setting(attack=way)
        found.append(METHODS["trades-pre"](model, s).perturb(x, _))
    assert all(torch.equal(found[0], each) for each in found)


def test_crosscheck_of_a_trained_network(tmp_path, capsys):
    pytest.importorskip("pyautoattack")
    pytest.importorskip("foolbox")
    import crosscheck

    words = ["--preset", "test", "--runs", str(tmp_path), "--images", "8"]
    with pytest.raises(SystemExit, match=r"at-seed0-last\.pt is missing: run the method"):
        crosscheck.main([*words, "--methods", "at"])
    train(tmp_path, "at")
    capsys.readouterr()
    crosscheck.main([*words, "--methods", "at", "--json", str(tmp_path / "c.json")])
    out = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert row["ours"] == row["foolbox"]
    assert row["same"] == 100.0
    assert row["aa"] <= row["aa_two"] <= row["natural"]
    assert out.startswith("| network | Natural | PGD-20 |")


def test_natural_weights_of_other_settings_are_refused(tmp_path):
    place, preset = trainer.Place(tmp_path, tmp_path / "r"), trainer.PRESETS["test"]
    trainer.Trainer("cure", 0, preset, place).start(warm=True)
    other = trainer.Trainer("cure", 0, replace(preset, lr=0.1), place)
    with pytest.raises(training.DataError, match=r"natural-seed0.pt was pre-trained with other"):
        other.start(warm=True)


@pytest.mark.parametrize("name", ["cure", "act", "las-at", "cure-random", "released-rgp"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, name):
    def stop(text):
        if " 2/3" in text:
            raise KeyboardInterrupt

    whole = train(tmp_path / "a", name, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", name, stop, epochs=3)
    torch.manual_seed(99)
    resumed = train(tmp_path / "b", name, epochs=3)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_jobs_at_the_same_time(tmp_path, capsys):
    run(tmp_path, "--methods", "trades", "--seeds", "0,1", "--jobs", "2")
    assert "| TRADES | trades | scratch |" in capsys.readouterr().out
    found = sorted(file.name for file in (tmp_path / "r").iterdir())
    assert found == [f"{name}-seed{seed}.json" for name in ("at", "trades") for seed in (0, 1)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "best"], "no method best"),
        (["--seeds", "a"], "comma-separated integers"),
        (["--epochs", "0"], "--epochs: should be at least 1"),
    ],
)
def test_bad_flags_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        robustness.parse(words)
    assert said in capsys.readouterr().err


# The report.


def result(method, seed, natural, pgd20, course=(90.0, 95.0)):
    """Return what the report reads of a run."""
    found = {"natural": natural, "pgd20": pgd20, "cw": pgd20, "nrr": natural, "epoch": 1}
    preset = {"data": "digits", "network": "resnet8", "eps": 0.1, "epochs": 2}
    return {
        "method": method, "title": method, "data": "digits", "seed": seed, "preset": preset,
        "options": {"beta": 6.0}, "images": {"train": 4, "val": 2, "test": 3}, "auto_attack": None,
        "results": {"last": found, "best": found}, "masking": {"suspicions": []},
        "history": [{"loss": 1.0, "natural": n, "robust": n} for n in course],
    }  # fmt: skip


def experiment(*rows):
    """Return runs of methods, which are wide apart, in three seeds."""
    shift = {name: 5.0 * i for i, name in enumerate(rows)}
    return {
        name: {seed: result(name, seed, 50 + shift[name], shift[name] + seed) for seed in range(3)}
        for name in rows
    }


def test_intervals_are_those_of_the_t_distribution():
    """Against the 97.5 % quantiles of the tables: 4.303 for three values, 2.776 for five."""
    assert summary.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    values = [0.0, 1.0, 0.0, 1.0, 0.5]
    assert summary.interval(values) == pytest.approx(2.7764 * 0.5 / math.sqrt(5), rel=1e-4)


def test_differences_are_paired_and_bold_if_their_interval_leaves_out_zero():
    runs = experiment("cure", "trades-pre", "none", "rgp-0.7")
    pgd = [(5.0, 4.0), (1.0, 2.0), (9.0, 6.0)]  # differences 1, -1, 3: mean 1, s = 2
    for seed, (a, b) in enumerate(pgd):
        runs["cure"][seed] = result("cure", seed, 60.0 + seed, a)
        runs["trades-pre"][seed] = result("trades-pre", seed, 58.5 + 1.25 * seed, b)
    runs["cure"][7] = result("cure", 7, 0.0, 0.0)  # has no partner
    table = summary.intervals(runs)
    half = 4.3027 * 2 / math.sqrt(3)
    assert f"| cure - trades-pre | 3 | **+1.2 ± 0.6** | +1.0 ± {half:.1f} |" in table
    assert "| rgp-0.7 - none | 3 |" in table
    assert "gradient" not in table
    for name, shift in (("none", 0.0), ("cure", 3.0)):
        for seed, (a, b) in enumerate(pgd):
            best, last = {"natural": 6.0, "pgd20": a + shift}, {"natural": 5, "pgd20": b}
            runs[name][seed]["results"] = {"best": best, "last": last}
    lost = summary.declines(runs)
    assert f"| none | 3 | **+1.0 ± 0.0** | +1.0 ± {half:.1f} | **-3.0 ± 0.0** |" in lost
    assert re.search(r"\| cure \| 4 \|.* \| - \|", lost)


def differences(lines):
    """Return the rows of differences in Markdown tables, each with its table's epoch."""
    found, epoch = set(), ""
    for line in lines:
        if head := re.match(r"\| (last|best) epoch, points \|", line):
            epoch = head[1]
        elif re.match(r"\| \S+ - \S+ \|", line):
            found.add((epoch, line))
    return found


def test_the_page_has_the_differences_of_the_committed_runs():
    folder = BENCHMARKS / "robustness"
    page, printed = (folder / "RESULTS.md").read_text(), []
    runs = summary.read(folder / "results" / "ranking-digits")
    assert {name: len(of) for name, of in runs.items()} == dict.fromkeys(["none", *RANKING], 8)
    assert summary.intervals(runs) in page
    for preset in ("digits", "digits-beta6", "cpu", *trainer.EXPERIMENTS):
        names = preset, *trainer.EXPERIMENTS.get(preset, ("", (), ()))[2]
        if runs := summary.read(*(folder / "results" / name for name in names)):
            printed += summary.intervals(runs).splitlines()
            printed += summary.intervals(runs, "best").splitlines()
            printed += summary.table(runs, "resnet18").splitlines()
            printed += summary.declines(runs).splitlines()
    assert differences(page.splitlines()) <= differences(printed)
    digits, before = (
        summary.read(folder / "results" / name) for name in ("digits-beta6", "digits-no-warmup")
    )
    for name in ("cure", "trades-pre"):  # their first epoch breaks nothing
        runs = summary.read(folder / "results" / "digits")[name].values()
        assert min(run["history"][0]["natural"] for run in runs) >= 90, name
    for name in ("cure", "trades-pre"):  # with the learning rate's warm-up minus without
        printed.append(summary.intervals({"cure": digits[name], "trades-pre": before[name]}))
    analysis = json.loads((folder / "results/digits/analysis/analysis.json").read_text())
    for other, key in itertools.product(
        ("at", "trades-pre"), analysis["methods"]["at"][0]["measures"]
    ):
        pairs = zip(*(analysis["methods"][name] for name in ("cure", other)), strict=True)
        printed.append(summary.gap([a["measures"][key] - b["measures"][key] for a, b in pairs]))
    size = re.compile(r"\d+\.\d ± \d+\.\d")
    for prose in (page, (BENCHMARKS.parent / "README.md").read_text()):
        assert set(size.findall(" ".join(prose.split()))) <= set(size.findall("\n".join(printed)))


def test_a_collapse_is_said():
    runs = experiment("at", "cure", "trades-pre")
    runs["cure"][0] = result("cure", 0, 90.0, 50.0, (67.0, 85.0, 96.0))
    runs["cure"][2] = result("cure", 2, 90.0, 50.0, (70.5, 85.0, 96.0))
    runs["at"][0] = result("at", 0, 90.0, 50.0, (10.0, 90.0))  # from scratch
    assert "(seeds): cure (2: 67 to 70 %).\n" in summary.report(runs)
    assert summary.collapses(experiment("cure")).startswith("No run from natural")


@pytest.mark.parametrize("preset", ["ranking-digits", "front-digits", "overfitting"])
def test_figures_of_experiments(tmp_path, preset):
    pytest.importorskip("matplotlib")
    _, rows, beside = trainer.EXPERIMENTS[preset]
    folders = {preset: rows} | {each: ["none", "rgp-0.7", "cure"] for each in beside}
    for folder, names in folders.items():
        (tmp_path / folder).mkdir()
        for name, of in experiment(*names).items():
            for seed, content in of.items():
                (tmp_path / folder / f"{name}-seed{seed}.json").write_text(json.dumps(content))
    words = ["--preset", preset, "--results", str(tmp_path / preset), "--report"]
    robustness.main(
        [*words, "--figure", str(tmp_path / "f.png"), "--curves", str(tmp_path / "c.png")]
    )
    for name in ("f", "c"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
