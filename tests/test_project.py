"""The house: import arrows, public names, what importing costs, README and changelog."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rgp_optim

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rgp_optim"

# Three floors: public modules, the score and the processes, the backends and their specification.
ARROWS = {
    "__init__": {"optimizer", "groups", "reviser", "losses", "attacks", "functional"},
    "optimizer": {"functional", "groups", "_distributed", "_scores", "_reference"},
    "reviser": {"losses", "_distributed"},
    "attacks": {"losses", "_distributed"},
    "losses": set(),
    "groups": set(),
    "functional": {"_reference"},
    "_scores": {"_distributed", "_reference"},
    "_distributed": set(),
    "_cpu": {"_reference"},
    "_triton": {"_reference"},
    "_reference": set(),
    "_checks": set(),
}
LINES, LONGEST = 3245, 70  # of the package; statements of a function, in lines


def imported(module):
    """Modules of the package that a module names in an import, also inside functions."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and "rgp_optim" in node.module:
            if node.module == "rgp_optim":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        assert not (isinstance(node, ast.ImportFrom) and node.level), "relative import"


@pytest.mark.parametrize("module", sorted(p.stem for p in PACKAGE.glob("*.py")))
def test_import_arrows_go_down(module):
    assert set(imported(module)) - {"_checks"} <= ARROWS[module]


def test_sizes():
    """A stranger reads the package in an hour."""
    modules = sorted(PACKAGE.glob("*.py"))
    assert {m.stem for m in modules} == set(ARROWS)
    assert sum(len(m.read_text().splitlines()) for m in modules) <= LINES
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= LONGEST, f"{module.stem}.{node.name}"


def test_public_names():
    for name in rgp_optim.__all__:
        thing = getattr(rgp_optim, name)
        assert inspect.getdoc(thing) or name == "__version__", name
    for name in rgp_optim.functional.__all__:
        assert hasattr(rgp_optim.functional, name)
    assert (PACKAGE / "py.typed").exists()


def test_importing_needs_torch_and_nothing_else():
    code = (
        "import sys, torch; before = set(sys.modules); import rgp_optim; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    for optional in ("triton", "numpy", "sklearn"):  # as on a machine without them
        code = f"import sys; sys.modules[{optional!r}] = None; " + code
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    new = set(ast.literal_eval(out))
    assert "rgp_optim" in new
    assert not new & {"triton", "numpy", "sklearn", "matplotlib"}


def test_version_is_in_the_changelog_and_the_citation():
    assert f"## {rgp_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {rgp_optim.__version__}" in (ROOT / "CITATION.cff").read_text()


def readme_blocks(language, page="README.md"):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def environment():
    """What the README's snippets take for granted: a model, its losses, an optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 3))
    batches = [(torch.rand(4, 3, 2, 2), torch.randint(0, 3, (4,))) for _ in range(2)]
    return dict(model=model, loader=batches, gamma=1.0, epochs=100)


def sides_of_the_diff():
    (diff,) = readme_blocks("diff")
    sides = {"+": [], "-": []}
    for line in diff.splitlines():
        for side, lines in sides.items():
            if line[:1] in (side, " "):
                lines.append(line[1:])
    return ["\n".join(lines) for lines in sides.values()]


def test_readme_diff_is_the_loop_that_runs():
    """The diff's new side is a program; its old side is plain adversarial training."""
    for program in sides_of_the_diff():
        names = environment()
        start = [p.detach().clone() for p in names["model"].parameters()]
        exec(program, names)
        now = names["model"].parameters()
        assert any(not torch.equal(p, q) for p, q in zip(now, start, strict=True))


@pytest.mark.parametrize("number", range(5))
def test_readme_recipes_run(number):
    """Each in the place of the loop's last lines."""
    blocks = readme_blocks("python")
    assert len(blocks) == 5
    names = environment()
    exec(sides_of_the_diff()[0], names)
    model, x, y, x_adv = (names[name] for name in ("model", "x", "y", "x_adv"))
    names |= {"n": 2, "scaler": torch.amp.GradScaler("cpu")}
    names["inner"] = torch.optim.SGD(model.parameters(), lr=0.1)
    names["natural"] = torch.nn.functional.cross_entropy(model(x), y)
    names["adversarial"] = torch.nn.functional.cross_entropy(model(x_adv), y)
    names["loss"] = names["natural"] + names["adversarial"]
    names["opt"].zero_grad()
    exec(blocks[number], names)


class Transformer(torch.nn.Module):
    """The parameters of a vision transformer that have three dimensions."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 5, 8))
        self.head = torch.nn.Linear(8, 3)


class Text(torch.nn.Module):
    """A mean of embeddings, classified."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 3)

    def classify(self, embedded):
        return self.head(embedded.mean(1))


@pytest.mark.parametrize("number", range(11))
def test_recipes_run(number):
    """Each after a step of the loop, with every public name imported."""
    blocks = readme_blocks("python", "examples/RECIPES.md")
    assert len(blocks) == 11
    names = environment()
    exec(sides_of_the_diff()[0], names)
    names |= {name: getattr(rgp_optim, name) for name in rgp_optim.__all__}
    names |= {"ViT": Transformer, "text_model": Text(), "pgd_attack": rgp_optim.pgd_attack}
    names["inner"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    exec(blocks[number], names)
    if "vit" in names:
        selected = names["opt"].param_groups[0]["params"]
        assert [id(p) for p in selected] == [id(names["vit"].head.weight)]
    if "fraction" in names:
        assert 0.6 < float(names["fraction"]) < 0.8


PAGES = ["README.md", "CONTRIBUTING.md", "examples/RECIPES.md"]
PAGES += [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("benchmarks/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    file = ROOT / page
    text = file.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (file.parent / link).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks|rgp_optim|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220
    assert max(map(len, lines)) <= 240


def printed_by(script, *words):
    """What a script of the benchmarks prints."""
    command = [sys.executable, ROOT / "benchmarks" / script, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("preset", ["digits", "cpu"])
def test_tables_of_all_methods_are_those_of_the_committed_runs(preset):
    report = printed_by("robustness/run.py", "--preset", preset, "--report")
    table = report.split("Last epoch:\n\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 20
    assert table in (ROOT / "benchmarks" / "robustness" / "RESULTS.md").read_text()


def test_speeds_are_those_of_the_committed_rows():
    """The page has the tables whole, the README the first row of each."""
    pytest.importorskip("matplotlib")
    printed = printed_by("speed/plot.py", ROOT / "benchmarks" / "speed" / "results.csv", "--table")
    page, readme = ((ROOT / p).read_text() for p in ("benchmarks/README.md", "README.md"))
    assert "| resnet18 |" in printed
    for table in printed.split("\n\n"):
        assert table in page
        first = table.splitlines()[2].strip("| ").split(" | ")
        assert all(time in readme for time in first[-4:])


def test_versions_in_the_readme_are_the_pinned_ones():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    text = (ROOT / "README.md").read_text()
    for package in ("torch", "lightning", "accelerate", "transformers"):
        assert pinned[package] in text, package
