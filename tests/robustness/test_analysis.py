"""The analyses against closed forms, plain loops and known networks."""

import json
import math
import sys
from itertools import permutations
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

from analysis import blocks, corruptions, layers, smallest  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm has seen")  # short runs


def images(n=3, channels=3, size=32):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, channels, size, size, generator=g)


# Corruptions.


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions_are_images_and_get_worse(name, channels):
    if name in ("JPEG", "pixelate"):
        pytest.importorskip("PIL")
    x = images(channels=channels)
    x = F.avg_pool2d(F.pad(x, [2] * 4, mode="replicate"), 5, 1)  # with structure to lose
    far = []
    for severity in range(1, 6):
        out = corruptions.corrupt(x, name, severity)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert 0 <= float(out.min()) <= float(out.max()) <= 1
        assert torch.equal(out, corruptions.corrupt(x, name, severity))
        far.append(float((out - x).square().mean()))
    assert far[0] > 0
    assert far[4] > far[0]


def test_noise_has_its_size():
    x = torch.full((4, 3, 64, 64), 0.5)
    g = torch.Generator().manual_seed(0)
    gaussian = corruptions.gaussian_noise(x, 0.08, g) - x
    assert float(gaussian.std()) == pytest.approx(0.08, rel=0.02)
    speckle = corruptions.speckle_noise(x, 0.12, g) - x
    assert float(speckle.std()) == pytest.approx(0.06, rel=0.02)
    shot = corruptions.shot_noise(x, 100, g)
    assert float(shot.var()) == pytest.approx(0.5 / 100, rel=0.05)
    hit = corruptions.impulse_noise(x, 0.05, g)
    assert float((hit != 0.5).float().mean()) == pytest.approx(0.05, rel=0.05)
    assert set(hit.unique().tolist()) == {0.0, 0.5, 1.0}


def test_contrast_brightness_and_pixels():
    x = images()
    g = torch.Generator()
    mean = x.mean((2, 3), keepdim=True)
    out = corruptions.contrast(x, 0.4, g)
    torch.testing.assert_close(out - mean, 0.4 * (x - mean))
    bright = corruptions.brightness(x, 0.1, g)
    torch.testing.assert_close(bright.amax(1), (x.amax(1) + 0.1).clamp(max=1))
    torch.testing.assert_close(bright / bright.amax(1, keepdim=True), x / x.amax(1, keepdim=True))
    flat = torch.full((1, 3, 32, 32), 0.3)
    for name in ("gaussian blur", "zoom blur"):
        torch.testing.assert_close(corruptions.corrupt(flat, name, 5), flat)


def test_pixelate_takes_whole_pixels():
    """Every second pixel of a checkerboard of 2 x 2 squares at half the size."""
    pytest.importorskip("PIL")
    squares = (torch.arange(16) // 2 % 2).float()
    x = (squares[:, None] + squares[None]).remainder(2).expand(1, 3, 16, 16).contiguous()
    g = torch.Generator()
    torch.testing.assert_close(corruptions.pixelate(x, 0.5, g), x)
    shifted = x.roll(1, 3)[..., 2:14, 2:14].contiguous()  # boxes now cover two squares
    half = torch.full_like(shifted, 128 / 255)
    torch.testing.assert_close(corruptions.pixelate(shifted, 0.5, g), half, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("limit", [1.06, 1.16, 1.26])
def test_zoom_blur_is_the_mean_of_enlargements(limit):
    """The original enlarges by splines of order 1, `scipy.ndimage.zoom`."""
    zoom_of = pytest.importorskip("scipy.ndimage").zoom
    x = images(1).double()
    total, factors = x[0].numpy().copy(), np.arange(1, limit, 0.01)
    for factor in factors:
        side = math.ceil(32 / factor)
        first = (32 - side) // 2
        part = x[0, :, first : first + side, first : first + side].numpy()
        large = zoom_of(part, (1, factor, factor), order=1)
        trim = (large.shape[1] - 32) // 2
        total += large[:, trim : trim + 32, trim : trim + 32]
    out = corruptions.zoom_blur(x, limit, torch.Generator())[0]
    np.testing.assert_allclose(out.numpy(), total / (len(factors) + 1), atol=1e-10)


def test_blur_is_a_convolution_with_a_gaussian():
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    out = corruptions.gaussian_blur(x, 1.0, torch.Generator())[0, 0]
    at = torch.arange(21) - 10
    weights = torch.exp(-(at.double() ** 2) / 2) * (at.abs() <= 4)
    expected = torch.outer(weights, weights) / weights.sum() ** 2
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)


def test_accuracies_of_a_network_that_sees_brightness_only():
    x = torch.stack([torch.full((3, 8, 8), v) for v in (0.1, 0.45, 0.9)])
    y = torch.tensor([0, 0, 1])
    pytest.importorskip("PIL")
    out = corruptions.accuracies(Line(), x, y)
    assert list(out) == list(corruptions.CORRUPTIONS)
    assert out["contrast"] == [100.0] * 5
    other = pytest.approx(200 / 3)  # 0.45 + 0.1 is the other class
    assert out["brightness"] == [100.0, other, other, other, other]


# The smallest perturbation.


def test_smallest_radius_is_the_distance_to_the_line():
    values = torch.tensor([0.5 - d for d in (0.05, 0.02, 0.11, 0.4)] + [0.6])
    x = values.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    y = torch.zeros(5, dtype=torch.int64)
    most = 0.2
    radius, fooled = smallest.smallest_radius(Line(), x, y, most=most)
    for found, distance in zip(radius[:3].tolist(), (0.05, 0.02, 0.11), strict=True):
        assert distance <= found <= distance + 2 * most / 2**7
    assert radius[3] == torch.inf  # out of reach
    assert radius[4] == 0  # wrong already
    assert bool((Line()(fooled[:3]).argmax(1) != 0).all())
    far = (fooled - x).abs().flatten(1).amax(1)
    assert bool((far[:3] <= radius[:3] + 1e-6).all())
    assert torch.equal(fooled[4], x[4])


# Layers.


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def test_cka_of_each_pair_of_layers_over_batches():
    """The estimator's definition, a loop over distinct indices, summed over the batches."""
    model, names = network(), ["1", "3"]
    batches = [(x, x.flip(1) ** 2) for x in images(12, 3, 2).split(6)]

    def hsic(k, m):
        quadruples = permutations(range(6), 4)
        return np.mean([k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in quadruples])

    def grams(end, which):
        features = [model[:end](pair[which]).detach().double() for pair in batches]
        return [(f @ f.T).numpy() for f in features]

    def summed(first, second):
        return sum(hsic(k, m) for k, m in zip(first, second, strict=True))

    found = layers.cka(model, batches, names)
    for row, natural in zip(found, [grams(end, 0) for end in (2, 4)], strict=True):
        for value, attacked in zip(row, [grams(end, 1) for end in (2, 4)], strict=True):
            own = summed(natural, natural) * summed(attacked, attacked)
            assert math.isclose(value, summed(natural, attacked) / math.sqrt(own), rel_tol=1e-6)
    same = layers.cka(model, [(x, x) for x, _ in batches], names)
    assert [same[0][0], same[1][1]] == pytest.approx([1.0, 1.0])
    assert found[0][1] != pytest.approx(found[1][0])  # rows are not columns


def test_gradient_sizes():
    model = network()
    x, y = images(8, 3, 2), torch.arange(8) % 3
    out = layers.gradient_sizes(model, x, x + 0.1, y)
    F.cross_entropy(model(x + 0.1), y).backward()
    assert list(out) == ["1.weight", "3.weight"]
    assert math.isclose(out["1.weight"][1], float(model[1].weight.grad.abs().mean()), rel_tol=1e-6)


def test_updated_early_and_late():
    history = [{"updated": {"a": i / 10, "b": 0.7}} for i in range(10)]
    out = layers.updated_early_and_late(history, 0.2)
    assert out["a"] == pytest.approx((0.05, 0.85))
    assert out["b"] == pytest.approx((0.7, 0.7))
    assert layers.updated_early_and_late([{}]) == {}


# Blocks.


COMBINATIONS = {
    "none": (), "stem": ("conv.", "norm."), "1": ("stages.0.",), "2": ("stages.1.",),
    "3": ("stages.2.",), "4": ("fc.",), "12": ("stages.0.", "stages.1."),
    "23": ("stages.1.", "stages.2."), "34": ("stages.2.", "fc."), "all": ("",),
}  # fmt: skip


@pytest.mark.parametrize("label", COMBINATIONS)
def test_only_the_blocks_that_learn_begin_anew_and_change(label):
    from harness.networks import NETWORKS

    torch.manual_seed(0)
    model = NETWORKS["resnet8"](channels=1)
    parts = blocks.blocks_of(model)
    learn = blocks.combinations(list(parts))
    assert list(learn) == list(COMBINATIONS)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    mine = {name for name in before if name.startswith(COMBINATIONS[label])}
    mine -= {"mean", "std"}  # of the images
    blocks.prepare(model, parts, learn[label])
    for name, p in model.named_parameters():
        assert bool((p == 3).all()) != (name in mine), name
        assert p.requires_grad == (name in mine), name
    assert {id(p) for part in parts.values() for p in part.parameters()} == {
        id(p) for p in model.parameters()
    }
    if label == "none":
        return
    g = torch.Generator().manual_seed(0)
    data = [(torch.rand(8, 1, 8, 8, generator=g), torch.arange(8)) for _ in range(2)]
    attack = {"eps": 0.1, "steps": 1, "step_size": 0.1}
    blocks.train(model, learn[label], lambda: data, epochs=1, lr=0.1, attack=attack)
    for name, now in model.state_dict().items():
        assert torch.equal(before[name], now) != (name in mine), name
    assert all(p.requires_grad for p in model.parameters())


def test_analyse_draws_what_was_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import analyse
    import run as robustness

    where = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "r")]
    common = ["--preset", "test", *where, "--device", "cpu"]
    robustness.main([*common, "--methods", "at,cure-global", "--seeds", "0,1", "--quiet"])
    analyse.main([*common, "--methods", "at,cure-global", "--seeds", "0,1"])
    out = tmp_path / "r" / "analysis"
    drawn = {file.name for file in out.iterdir()}
    names = ("corruptions", "smallest", "similarity", "gradients", "updated", "perturbations")
    assert drawn == {"analysis.json", *(f"{n}.{kind}" for n in names for kind in ("png", "svg"))}
    assert np.all([(out / f"{name}.png").stat().st_size > 5000 for name in names])
    found = json.loads((out / "analysis.json").read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert [len(each) for each in found["methods"].values()] == [2, 2]
    first, last = ([one["measures"] for one in each] for each in found["methods"].values())
    key = "accuracy under corruptions, %"
    lead = [b[key] - a[key] for a, b in zip(first, last, strict=True)]
    half = 12.706 * abs(lead[0] - lead[1]) / 2  # t with one degree of freedom, two seeds
    said = f"{sum(lead) / 2:+.2g} ± {half:.2g}"
    assert said in capsys.readouterr().out
    analyse.main([*common, "--seeds", "0,1", "--blocks", "1"])
    assert drawn | {"blocks.json", "blocks.png", "blocks.svg"} == {f.name for f in out.iterdir()}
    study = json.loads((out / "blocks.json").read_text())
    assert (study["epochs"], study["versions"]) == (1, found["versions"])
    assert list(study["rows"]) == [f"U-{label}" for label in COMBINATIONS]
    assert all(len(rows) == 2 and "pgd20" in rows[0] for rows in study["rows"].values())


def test_intervals_are_those_of_student():
    from analysis import figure

    assert figure.interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert figure.interval([[1, 5], [3, 5]]) == pytest.approx([12.706, 0], rel=1e-3)


def test_every_method_has_a_colour_of_its_own():
    from analysis.figure import COLOR
    from methods import METHODS

    rows = [name for name in COLOR if name in METHODS and name != "none"]
    assert set(list(METHODS)[:23]) <= set(rows)
    assert len({COLOR[name] for name in rows}) == len(rows)


@pytest.mark.parametrize("preset", ["digits", "cpu"])
def test_the_figure_of_all_methods_has_their_means_beside_their_names(preset, tmp_path):
    pytest.importorskip("matplotlib")
    import summary
    from analysis import figure
    from methods import METHODS

    runs, found = summary.read(ROOT / "benchmarks" / "robustness" / "results" / preset), {}

    def draw(canvas):
        figure.draw_methods(canvas, runs)
        names = [label.get_text() for label in canvas.axes[0].get_yticklabels()]
        for axis, column in zip(canvas.axes, ("pgd20", "natural"), strict=True):
            points = [bar.lines[0].get_xydata()[0] for bar in axis.containers]
            found[column] = {names[int(y)]: float(x) for x, y in points}

    figure.save(tmp_path / "f.png", draw, (10, 6.5))
    for column, means in found.items():
        for name, of in runs.items():
            values = [run["results"]["last"][column] for run in of.values()]
            assert means.pop(METHODS[name].title) == pytest.approx(sum(values) / len(values))
        assert not means
