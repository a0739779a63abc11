"""The trainers people use: each run is a plain loop's, resumes, and accumulates as it does."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import same

FOLDER = Path(__file__).parents[2] / "examples" / "trainers"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("sklearn")
import digits  # noqa: E402

import rgp_optim  # noqa: E402
from rgp_optim import kl_attack  # noqa: E402

EPOCHS, FOUR_BATCHES = 2, (64, 256, None)
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",  # the trainers' advice on workers, loggers, devices
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
NO_LOGS = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
OPTIONS = {
    "lightning_loop": {"accelerator": "cpu", **dict.fromkeys(NO_LOGS, False)},
    "fabric_loop": {"accelerator": "cpu", "devices": 1},
    "accelerate_loop": {"cpu": True},
    "huggingface_trainer": {
        "use_cpu": True,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    },
    "timm_loop": {"dtype": torch.float32},
    "distributed_loop": {},
}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where trainers write
    monkeypatch.setattr(digits.loader, "__defaults__", FOUR_BATCHES)
    try:
        import timm.utils  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
        utils = types.SimpleNamespace(NativeScaler=NativeScaler)
        monkeypatch.setitem(sys.modules, "timm.utils", utils)


class NativeScaler:
    """Stands in for timm's: its interface, and the order of its calls, as documented."""

    def __init__(self, device="cuda"):
        self._scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    def __call__(self, loss, optimizer, clip_grad=None, *, parameters=None, need_update=True):
        self._scaler.scale(loss).backward()
        if need_update:
            if clip_grad is not None:
                self._scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


def script(name):
    """A script of the folder; skips where its package is missing."""
    module = pytest.importorskip(name)
    if name == "accelerate_loop":
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return module


def run(name, epochs=EPOCHS, **options):
    return script(name).main(epochs=epochs, **{**OPTIONS[name], **options})


def plain_loop(epochs=EPOCHS, every=1, clip=None, lr_step=None, divide=True):
    """CURE by hand, with the settings of the examples; ``divide``: a window's loss is its mean."""
    batches = digits.loader()
    model = digits.network()
    steps = epochs * len(batches)
    reviser = rgp_optim.ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=steps)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = rgp_optim.RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, lr_step or epochs)
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches, start=1):
            x_adv = kl_attack(model, x, eps=digits.EPS, steps=3)
            logits, logits_adv = model(x), model(x_adv)
            loss = rgp_optim.kl_adv_loss(logits, logits_adv, y, beta=2.0)
            loss = loss + reviser(x, x_adv, logits, logits_adv)
            nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            loss = opt.scored(loss, natural=nat, adversarial=adv)
            (loss / every if divide else loss).backward()
            if i % every == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                opt.zero_grad()
                reviser.update()
        scheduler.step()
    return values(model)


def values(model):
    """The weights of a network, or of the one inside, gathered."""
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().cpu().clone() for p in whole]


def manual(steps):
    """Lightning's module, stepping by itself."""
    import lightning_loop

    class Manual(lightning_loop.Cure):
        automatic_optimization = False

        def training_step(self, batch, i):
            loss = super().training_step(batch, i)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

        def on_train_epoch_end(self):
            self.lr_schedulers().step()

    return Manual(steps)


def network(result):
    """Of what a script returns; Lightning's module holds it."""
    return getattr(result[1], "net", result[1])


MANUAL, TWO = {"make": manual}, {"gradient_accumulation_steps": 2}
CLIPPED = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("lightning_loop", {}, {"lr_step": 2}),
        ("lightning_loop", MANUAL, {"lr_step": 2}),
        ("lightning_loop", CLIPPED, {"lr_step": 2, "every": 2, "clip": 0.1}),
        ("fabric_loop", {}, {}),
        ("huggingface_trainer", {}, {}),
        ("huggingface_trainer", TWO, {"every": 2}),
        ("huggingface_trainer", {**TWO, "max_grad_norm": 0.1}, {"every": 2, "clip": 0.1}),
        ("accelerate_loop", {}, {}),
        ("accelerate_loop", TWO, {"every": 2}),
        ("timm_loop", {}, {"clip": 1.0, "divide": False}),
        ("timm_loop", {"every": 2}, {"every": 2, "clip": 1.0, "divide": False}),
    ],
)
def test_a_trainer_is_a_plain_loop(name, options, plain, monkeypatch):
    """Micro-batches of a window are scored together."""
    if name == "huggingface_trainer":  # it draws between the batches: an attack that does not
        for module in (digits, sys.modules[__name__]):
            monkeypatch.setattr(module, "kl_attack", lambda model, x, **_: (x + 0.05).clamp(0, 1))
    assert same(values(network(run(name, **options))), plain_loop(**plain))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lightning_loop", {"precision": "bf16-mixed"}),
        ("lightning_loop", {"precision": "bf16-mixed", **MANUAL}),
        ("lightning_loop", {"plugins": "16-mixed"}),
        ("lightning_loop", {"plugins": "16-mixed", **MANUAL}),
        ("fabric_loop", {"precision": "bf16-mixed"}),
        ("accelerate_loop", {"mixed_precision": "bf16"}),
        ("huggingface_trainer", {"bf16": True}),
        ("timm_loop", {"dtype": torch.bfloat16}),
    ],
)
def test_half_precision(name, options):
    whole = values(network(run(name, 3)))
    if "plugins" in options:  # Lightning offers fp16 for GPUs; the same code, with a CPU scaler
        from lightning.pytorch.plugins.precision import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options = {**options, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    result = run(name, 3, **options)
    assert result[0] > 60.0
    assert not same(values(network(result)), whole)  # it did run in half precision


@pytest.mark.parametrize("make", ["automatic", "manual"])
def test_lightning_resumes(make, tmp_path):
    """With random draws of the attack that do not depend on what was run before."""
    cure, lightning = script("lightning_loop").Cure, pytest.importorskip("lightning")

    class Seed(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.manual_seed(trainer.global_step)

    def fit(epochs, **options):
        options |= {"make": lambda steps: manual(8) if make == "manual" else cure(8)}
        return run("lightning_loop", epochs, callbacks=[Seed()], **options)[1:]

    whole, _ = fit(2)
    fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert same(values(whole.net), values(resumed.net))
    assert same(values(whole.reviser.model), values(resumed.reviser.model))


def test_hugging_face_trainer_resumes():
    """The weights, the optimizer, the reviser's copy and the random draws."""
    _, model, trainer = run("huggingface_trainer", save_strategy="epoch")
    _, resumed, again = run("huggingface_trainer", ckpt_path="trainer_output/checkpoint-4")
    assert again.state.global_step == 8
    assert same(values(model), values(resumed))
    assert same(values(trainer.reviser.model), values(again.reviser.model))
    assert "eval_loss" in trainer.evaluate()  # without a graph
    counts = [int(m.sum()) / m.numel() for m in trainer.raw.masks().values()]
    assert counts == pytest.approx([0.7] * 3, abs=0.01)


def some_epochs(name, epochs, folder, load):
    """Train on from what a folder holds, or leave it there."""
    loop, fabric = script(name), name == "fabric_loop"
    owner = loop.L.Fabric(**OPTIONS[name]) if fabric else loop.Accelerator(cpu=True)
    parts = model, opt, *_, reviser, _ = loop.setup(owner, 8, digits.loader())
    file, state = folder / "half.ckpt", {"model": model, "opt": opt}
    if load and fabric:
        owner.load(file, state)
    elif load:
        owner.load_state(folder)
    for epoch in epochs:
        torch.manual_seed(epoch)
        loop.train(owner, *parts)
    if fabric and not load:
        owner.save(file, state)
    elif not load:
        owner.save_state(folder)
    return values(model) + values(reviser.model)


@pytest.mark.parametrize("name", ["accelerate_loop", "fabric_loop"])
def test_accelerate_and_fabric_resume(name, tmp_path):
    whole = some_epochs(name, [0, 1], tmp_path / "whole", load=False)
    some_epochs(name, [0], tmp_path / "half", load=False)
    assert same(whole, some_epochs(name, [1], tmp_path / "half", load=True))


def test_a_prepared_optimizer_cannot_be_wrapped():
    accelerator = script("accelerate_loop").Accelerator(cpu=True)
    inner = torch.optim.SGD(digits.network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Wrap your own optimizer, then prepare the wrapper"):
        rgp_optim.RGPSelectiveOptimizer(accelerator.prepare(inner))


def run_script(rank, name, options):
    os.environ.update(MASTER_PORT="29777", TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")
    sys.path.insert(0, str(FOLDER))
    digits.loader.__defaults__ = FOUR_BATCHES
    if each := options.get("gradient_accumulation_plugin"):
        from accelerate.utils import GradientAccumulationPlugin

        options = {**options, "gradient_accumulation_plugin": GradientAccumulationPlugin(**each)}
    result = __import__(name).main(epochs=EPOCHS, **{**OPTIONS[name], **options})
    return result[0], values(network(result))


DDP = {"strategy": "ddp", "devices": 2}
EACH_REDUCED = {"num_steps": 2, "sync_each_batch": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("distributed_loop", {}),
        ("distributed_loop", {"fsdp": True}),
        ("lightning_loop", DDP),
        ("lightning_loop", {**DDP, "accumulate_grad_batches": 2}),
        ("fabric_loop", DDP),
        ("accelerate_loop", {}),
        ("accelerate_loop", TWO),
        ("accelerate_loop", {"gradient_accumulation_plugin": EACH_REDUCED}),
        ("huggingface_trainer", {}),
        ("huggingface_trainer", TWO),
    ],
)
def test_the_scripts_with_two_processes(two, name, options):
    """Bit-identical replicas; the fingerprint of the first steps has passed on the way."""
    script(name)
    (accuracy, weights), (_, other) = two.run(run_script, name, options)
    assert same(weights, other)
    assert not same(weights, values(digits.network()))
    assert accuracy > 20.0


def test_a_script_prints_its_result():
    """Under torchrun, as the README says."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", FOLDER / "distributed_loop.py"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.count("natural accuracy") == 1
