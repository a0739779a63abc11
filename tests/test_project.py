"""Code layout: import arrows, public names, what importing costs, README and changelog."""

import ast
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import rgp_optim
from rgp_optim._distributed import _nodes

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rgp_optim"
README = (ROOT / "README.md").read_text()

# Three floors: public modules, the score and the processes, the backends and their specification.
ARROWS = {
    "__init__": {"optimizer", "groups", "reviser", "losses", "attacks", "functional"},
    "optimizer": {"functional", "groups", "reviser", "_distributed", "_scores", "_reference"},
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
LINES, LONGEST = 3300, 70  # of the package; statements of a function, in lines


def imported(module):
    """Modules of the package that a module names in an import, also inside functions."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            package, *inside = node.module.split(".")
            if package == "rgp_optim":
                yield from inside[:1] or (alias.name for alias in node.names)


@pytest.mark.parametrize("module", sorted(p.stem for p in PACKAGE.glob("*.py")))
def test_import_arrows_go_down(module):
    assert set(imported(module)) - {"_checks"} <= ARROWS[module]


def test_sizes():
    """A stranger reads the package in an hour."""
    modules = sorted(PACKAGE.glob("*.py"))
    assert {m.stem for m in modules} == set(ARROWS)
    assert sum(len(m.read_text().splitlines()) for m in modules) <= LINES
    for node in (node for m in modules for node in ast.walk(ast.parse(m.read_text()))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= LONGEST, node.name


def test_public_names():
    for name in rgp_optim.__all__:
        thing = getattr(rgp_optim, name)
        assert inspect.getdoc(thing) or name == "__version__", name
    for name in rgp_optim.functional.__all__:
        assert hasattr(rgp_optim.functional, name)
    assert (PACKAGE / "py.typed").exists()


def printed_by(*command):
    command = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


IMPORT = """
import sys
sys.modules |= dict.fromkeys(("triton", "numpy", "sklearn"))  # as on a machine without them
import torch
before = set(sys.modules)
import rgp_optim
print({name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_importing_needs_torch_and_nothing_else():
    new = ast.literal_eval(printed_by("-c", IMPORT))
    assert "rgp_optim" in new
    assert not new & {"triton", "numpy", "sklearn", "matplotlib"}


def test_version_is_in_the_changelog_and_the_citation():
    assert f"## {rgp_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {rgp_optim.__version__}" in (ROOT / "CITATION.cff").read_text()


# What the package reads of torch by a string or with a default: gone, it would not be missed.


@pytest.mark.filterwarnings("ignore")  # of checkpoints
def test_private_names_of_torch_exist():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True)
    assert type(out.grad_fn).__name__ == "CheckpointFunctionBackward"
    assert {n.variable for n in _nodes(layer(x).grad_fn) if hasattr(n, "variable")} == {
        x,
        *layer.parameters(),
    }
    seen = []
    x.register_hook(lambda g: seen.append(torch._C._current_graph_task_id()))
    x.sum().backward()
    assert torch._C._current_graph_task_id() == -1 != seen[0]
    assert torch.optim.SGD([x], fused=True)._step_supports_amp_scaling
    assert hasattr(torch.optim.SGD([x]), "_optimizer_step_pre_hooks")
    assert torch.compile(layer)._orig_mod is layer
    assert layer._compiled_call_impl is None
    layer.compile()
    assert layer._compiled_call_impl is not None


@pytest.mark.filterwarnings("ignore")  # of FSDP1
def test_private_names_of_torch_distributed_exist():
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def layer():
        return torch.nn.Linear(2, 2, device="cpu")

    x = torch.ones(1, 2, device="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(layer(), static_graph=True)
        owners = [n.ddp_weakref() for n in _nodes(ddp(x).grad_fn) if hasattr(n, "ddp_weakref")]
        assert owners == [ddp]
        assert ddp._join_config.enable is False
        assert ddp._static_graph_delay_allreduce_enqueued is False
        for whole, name in ((False, "_is_flat_param"), (True, "_fsdp_flattened")):
            fsdp1 = FullyShardedDataParallel(layer(), use_orig_params=whole, device_id=x.device)
            assert all(getattr(p, name) for p in fsdp1.parameters())
        fsdp2 = fully_shard(layer(), mesh=dist.init_device_mesh("cpu", (1,)))
        fsdp2(x)
        assert fsdp2 in _module_state_mapping
        state = fsdp2._get_fsdp_state()
        assert hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group")
        (group,) = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        assert hasattr(group, "_partial_reduce_output")
        for p in group.fsdp_params:
            assert hasattr(p, "_unsharded_param")
            assert hasattr(p, "unsharded_accumulated_grad")
            assert all(hasattr(p.sharded_param, name) for name in ("to_local", "placements"))
    finally:
        dist.destroy_process_group()


def blocks(language, page="README.md"):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def environment():
    """What the README's snippets take for granted: a model, its losses, an optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.Linear(8, 3))
    batches = [(torch.rand(4, 3, 2, 2), torch.randint(0, 3, (4,))) for _ in range(2)]
    return dict(model=model, loader=batches, gamma=1.0, epochs=100)


def after_the_loop(side="+"):
    """The names after a side of the README's diff has run."""
    (diff,) = blocks("diff")
    names = environment()
    exec("\n".join(line[1:] for line in diff.splitlines() if line[:1] in (side, " ")), names)
    names["inner"] = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    return names


@pytest.mark.parametrize("side", ["+", "-"])
def test_readme_diff_is_the_loop_that_runs(side):
    """The diff's new side is a program; its old side is plain adversarial training."""
    now, start = (names["model"].parameters() for names in (after_the_loop(side), environment()))
    assert any(not torch.equal(p, q) for p, q in zip(now, start, strict=True))


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


class Pair(torch.nn.Module):
    """Returns its logits in a tuple."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x), None


class Accelerator:
    """The two methods of Accelerate's that the recipe calls; the trainers' tests run it itself."""

    def prepare(self, model, opt):
        return model, types.SimpleNamespace(step=opt.step, zero_grad=opt.zero_grad)

    def backward(self, loss):
        loss.backward()


class Writer:
    """TensorBoard's, as far as a recipe calls it."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = float(value)


def attack_and_loss(model, x, y):
    logits, logits_adv = model(x), model(x + 0.01)
    return rgp_optim.kl_adv_loss(logits, logits_adv, y), logits, logits_adv


RECIPES = {"README.md": 3, "examples/RECIPES.md": 22}


@pytest.mark.parametrize(
    ("page", "number"), [(page, i) for page, count in RECIPES.items() for i in range(count)]
)
def test_recipes_run(page, number, monkeypatch, tmp_path):
    """Each in the place of the loop's last lines, with every public name imported."""
    monkeypatch.chdir(tmp_path)  # where one saves its checkpoint
    recipes, names = blocks("python", page), after_the_loop()
    assert len(recipes) == RECIPES[page]
    names |= {name: getattr(rgp_optim, name) for name in rgp_optim.__all__}
    names |= {"ViT": Transformer, "text_model": Text(), "tuple_model": Pair(names["model"])}
    names |= {"accelerator": Accelerator(), "writer": Writer(), "step": 3, "rising_steps": 100}
    names["masks"] = {p: ~mask for p, mask in names["opt"].masks().items()}
    names |= {"attack_and_loss": attack_and_loss}
    names |= {"n": 2, "scaler": torch.amp.GradScaler("cpu")}
    model, x, y, x_adv = (names[name] for name in ("model", "x", "y", "x_adv"))
    names["natural"] = torch.nn.functional.cross_entropy(model(x), y)
    names["adversarial"] = torch.nn.functional.cross_entropy(model(x_adv), y)
    names["loss"] = names["natural"] + names["adversarial"]
    exec(recipes[number], names)
    if "vit" in names:
        selected = names["opt"].param_groups[0]["params"]
        assert [id(p) for p in selected] == [id(names["vit"].head.weight)]
    if "changed" in names:
        assert names["writer"].scalars == {("changed/1.weight", 3): 1, ("changed/2.weight", 3): 1}
    if "last" in names:
        assert torch.equal(names["last"]["x"], x + 0.01)
    if "fraction" in names:
        assert 0.6 < float(names["fraction"]) < 0.8


PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", "examples/RECIPES.md"]
PAGES += [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("benchmarks/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_files_that_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:examples|benchmarks|rgp_optim|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_readme_is_short():
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize(("preset", "methods"), [("digits", 23), ("cpu", 23)])
def test_tables_of_all_methods_are_those_of_the_committed_runs(preset, methods):
    report = printed_by("benchmarks/robustness/run.py", "--preset", preset, "--report").strip()
    table = report.split("Last epoch:\n\n")[1].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + methods
    assert table in (ROOT / "benchmarks" / "robustness" / "RESULTS.md").read_text()
    if preset == "digits":
        last = report.split("| best epoch, points")[0]
        rows = [line.strip("| ").split(" | ") for line in last.replace("**", "").splitlines()]
        gap = {row[0]: row[2:5] for row in rows if " - " in row[0]}
        natural, pgd20, aa = gap["cure - trades-pre"]
        said = f"from the same start is {natural} on natural images, {pgd20} under PGD-20 and {aa}"
        assert said in README
        assert (
            f"from random weights {', '.join(gap['cure - at'][:2])} and {gap['cure - at'][2]}"
            in README
        )


def test_speeds_are_those_of_the_committed_rows():
    """The page has the tables whole, the README the first row of each."""
    pytest.importorskip("matplotlib")
    speed = "benchmarks/speed/"
    printed = printed_by(f"{speed}plot.py", f"{speed}results.csv", "--table").strip()
    assert "| resnet18 |" in printed
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for table in printed.split("\n\n"):
        assert table in page
        first = table.splitlines()[2].strip("| ").split(" | ")
        assert all(time in README for time in first[-4:])


def test_the_first_screen_is_the_committed_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from harness.report import table

    run = json.loads((ROOT / "examples" / "compare.json").read_text())
    assert table(run["results"]) in README


def test_versions_in_the_readme_are_the_pinned_ones():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for package in ("torch", "lightning", "accelerate", "transformers"):
        assert pinned[package] in README, package
