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
RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = ROOT / "rgp_optim"

# Each module may import those to its right. `_checks` is everyone's.
ARROWS = {
    "__init__": {"optimizer", "groups", "reviser", "losses", "attacks", "functional", "scores"},
    "optimizer": {"functional", "groups", "scores", "_bits", "_slots", "_tracking", "_distributed"},
    "groups": set(),
    "scores": {"_reference", "_slots", "_distributed"},
    "reviser": {"losses", "_distributed"},
    "attacks": {"losses", "_distributed"},
    "losses": set(),
    "functional": {"_reference"},
    "_slots": {"_distributed"},
    "_distributed": {"_reference", "_bits"},
    "_tracking": {"_distributed"},
    "_reference": set(),
    "_cpu": {"_reference"},
    "_triton": {"_kernels", "_reference"},
    "_kernels": set(),
    "_bits": set(),
    "_checks": set(),
}


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


def readme_blocks(language):
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def environment():
    """What the README's snippets take for granted: a model, a loader, an optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 3))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = [(torch.rand(4, 3, 2, 2), torch.randint(0, 3, (4,))) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu")
    return dict(
        torch=torch,
        F=torch.nn.functional,
        model=model,
        loader=batches,
        inner=inner,
        scaler=scaler,
        gamma=1.0,
        epochs=100,
    )


def test_readme_code_runs():
    blocks = readme_blocks("python")
    assert len(blocks) == 2
    names = environment()
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_readme_diff_is_the_loop_that_runs():
    """The diff's new side is a program; its old side is plain adversarial training."""
    (diff,) = readme_blocks("diff")
    sides = {"+": [], "-": []}
    for line in diff.splitlines():
        for side, lines in sides.items():
            if line[:1] in (side, " "):
                lines.append(line[1:])
    for lines in sides.values():
        names = environment()
        exec("from rgp_optim import *", names)
        start = [p.detach().clone() for p in names["model"].parameters()]
        exec("\n".join(lines), names)
        now = names["model"].parameters()
        assert any(not torch.equal(p, q) for p, q in zip(now, start, strict=True))


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in ROOT.glob("benchmarks/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    file = ROOT / page if (ROOT / page).exists() else ROOT / "benchmarks" / page
    text = file.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (file.parent / link).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks|rgp_optim|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def printed_by(script, *words):
    """What a script of the benchmarks prints."""
    command = [sys.executable, ROOT / "benchmarks" / script, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_readme_tables_are_those_of_the_committed_results():
    printed = printed_by("summarise.py")
    text = (ROOT / "README.md").read_text()
    assert printed.count("| cure |") == 2
    for table in printed.split("\n\n"):
        assert table in text


@pytest.mark.parametrize("preset", ["digits", "cpu"])
def test_tables_of_all_methods_are_those_of_the_committed_runs(preset):
    report = printed_by("robustness.py", "--preset", preset, "--report")
    table = report.split("Last epoch:\n\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 20
    assert table in (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_crosscheck_is_that_of_the_committed_rows():
    pytest.importorskip("foolbox")
    pytest.importorskip("sklearn")
    table = printed_by("crosscheck.py", "--table", RESULTS / "crosscheck-digits.json")
    assert len(table.splitlines()) == 2 + 3
    assert table in (ROOT / "benchmarks" / "RESULTS.md").read_text()


def compatibility():
    """Rows of the README's table of what the library works with."""
    text = (ROOT / "README.md").read_text()
    part = text.split("## Works with")[1].split("## Several processes")[0]
    return [line.split("|")[1:-1] for line in part.splitlines() if line.startswith("| ")][1:]


def test_each_compatibility_row_has_tests_and_the_versions_they_run_with():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    rows = compatibility()
    assert len(rows) >= 10
    for name, versions, _, _, tests in rows:
        files = re.findall(r"`(test_\w+\.py)`", tests)
        assert files, name
        assert all((ROOT / "tests" / file).exists() for file in files)
        for package, version in re.findall(r"(torch|lightning|accelerate) (\d[\d.]*\d)", versions):
            assert pinned[package] == version, name


def test_bytes_are_those_of_the_committed_rows():
    printed = printed_by("collectives.py", "--table", RESULTS / "collectives.csv")
    assert printed.count("\n") == 11
    assert printed in (ROOT / "benchmarks" / "COLLECTIVES.md").read_text()


def test_readme_speeds_are_those_of_the_committed_rows():
    pytest.importorskip("matplotlib")
    printed = printed_by("plot.py", RESULTS / "speed.csv", "--table")
    text = (ROOT / "README.md").read_text()
    assert "| resnet18 |" in printed
    for table in printed.split("\n\n"):
        assert table in text
