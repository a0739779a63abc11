"""The trainers people use: each run is a plain loop's, resumes, and accumulates as it does."""

import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "trainers"
sys.path.insert(0, str(FOLDER))

pytest.importorskip("sklearn")
import digits  # noqa: E402

from rgp_optim import (  # noqa: E402
    ConsistencyReviser,
    RGPSelectiveOptimizer,
    kl_adv_loss,
    kl_attack,
)

EPOCHS, IMAGES = 2, 256  # four batches an epoch
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",  # the trainers' advice on workers, loggers, devices
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


@pytest.fixture(autouse=True)
def small_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where trainers write
    _small_data()
    yield
    digits.loader.__defaults__ = (64, 512, None)


def _small_data():
    digits.loader.__defaults__ = (64, IMAGES, None)


def plain_loop(epochs=EPOCHS, every=1, clip=None, lr_step=None, divide=True):
    """CURE by hand, with the settings of the examples; ``divide``: a window's loss is its mean."""
    batches = digits.loader()
    model = digits.network()
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=epochs * len(batches))
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, lr_step) if lr_step else None
    opt.zero_grad()
    count = 0
    for _ in range(epochs):
        for x, y in batches:
            x_adv = kl_attack(model, x, eps=digits.EPS, steps=3)
            logits, logits_adv = model(x), model(x_adv)
            loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
            loss = loss + reviser(x, x_adv, logits, logits_adv)
            nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            loss = opt.scored(loss, natural=nat, adversarial=adv)
            (loss / every if divide else loss).backward()
            count += 1
            if count % every == 0:
                if clip:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                opt.zero_grad()
                reviser.update()
        if scheduler:
            scheduler.step()
    return values(model)


def values(model):
    return [p.detach().cpu().numpy().copy() for p in model.parameters()]


def same(a, b):
    return len(a) == len(b) > 0 and all(map(np.array_equal, a, b))


# Lightning.

TRAINER = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def manual():
    """The same module, stepping by itself."""
    import lightning_loop

    class Manual(lightning_loop.Cure):
        automatic_optimization = False

        def training_step(self, batch, i):
            loss = super().training_step(batch, i)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            self.reviser.update()

        def on_train_epoch_end(self):
            self.lr_schedulers().step()

    return Manual


@pytest.fixture(params=["automatic", "manual"])
def make(request):
    pytest.importorskip("lightning")
    import lightning_loop

    return lightning_loop.Cure if request.param == "automatic" else manual()


def test_lightning_is_a_plain_loop(make):
    import lightning_loop

    _, module, _ = lightning_loop.main(EPOCHS, make=make, **TRAINER)
    assert same(values(module.net), plain_loop(lr_step=2))


def test_lightning_clips_and_accumulates():
    pytest.importorskip("lightning")
    import lightning_loop

    options = {**TRAINER, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    _, module, _ = lightning_loop.main(EPOCHS, **options)
    assert same(values(module.net), plain_loop(every=2, clip=0.1, lr_step=2))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_in_half_precision(make, precision):
    import lightning_loop
    from lightning.pytorch.plugins.precision import MixedPrecision

    options = dict(TRAINER)
    if precision == "16-mixed":  # which Lightning offers for GPUs; the same code, with a CPU scaler
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    accuracy, module, _ = lightning_loop.main(3, make=make, **options)
    assert accuracy > 60.0
    assert not same(values(module.net), plain_loop(3, lr_step=2))  # it did run in half precision


def test_lightning_resumes(make, tmp_path):
    """With random draws of the attack that do not depend on what was run before."""
    lightning = pytest.importorskip("lightning")

    class Seed(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            torch.manual_seed(trainer.global_step)

    def fit(epochs, **options):
        module = make(steps=8)
        trainer = lightning.Trainer(max_epochs=epochs, callbacks=[Seed()], **TRAINER)
        trainer.fit(module, digits.loader(), **options)
        return module, trainer

    whole, _ = fit(2)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(2, ckpt_path=tmp_path / "half.ckpt")
    assert same(values(whole.net), values(resumed.net))
    assert same(values(whole.reviser.model), values(resumed.reviser.model))


# Hugging Face.


def hugging_face(epochs=EPOCHS, **options):
    pytest.importorskip("transformers")
    import huggingface_trainer

    return huggingface_trainer.main(epochs, **{**HUGGING_FACE, **options})


HUGGING_FACE = {
    "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
}


@pytest.mark.parametrize(("every", "clip"), [(1, None), (2, None), (2, 0.1)])
def test_hugging_face_trainer_is_a_plain_loop(every, clip, monkeypatch):
    """With an attack that draws nothing: the Trainer draws between the batches."""
    for module in (digits, sys.modules[__name__]):
        monkeypatch.setattr(module, "kl_attack", lambda model, x, **_: (x + 0.05).clamp(0, 1))
    options = {"gradient_accumulation_steps": every, "max_grad_norm": clip or 0.0}
    _, model, trainer = hugging_face(**options)
    assert same(values(model), plain_loop(every=every, clip=clip))
    assert "eval_loss" in trainer.evaluate()  # without a graph
    counts = [int(m.sum()) / m.numel() for m in trainer.raw.masks().values()]
    assert counts == pytest.approx([0.7] * 3, abs=0.01)


def test_hugging_face_trainer_in_half_precision():
    accuracy, model, _ = hugging_face(3, bf16=True)
    assert accuracy > 60.0
    assert not same(values(model), values(hugging_face(3)[1]))


def test_hugging_face_trainer_resumes():
    """The weights, the optimizer, the reviser's copy and the random draws."""
    _, model, trainer = hugging_face(save_strategy="epoch")
    _, resumed, again = hugging_face(ckpt_path="trainer_output/checkpoint-4")
    assert again.state.global_step == 8
    assert same(values(model), values(resumed))
    assert same(values(trainer.reviser.model), values(again.reviser.model))


# Accelerate.


def accelerate_run(epochs, every=1, stop=None, folder=None, start=0):
    import accelerate_loop
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
    batches = digits.loader()
    parts = accelerate_loop.setup(accelerator, EPOCHS * len(batches), batches)
    if start:
        accelerator.load_state(folder)
    for epoch in range(start, epochs):
        set_seed(epoch)
        accelerate_loop.train(accelerator, *parts)
    if stop:
        accelerator.save_state(folder)
    return values(accelerator.unwrap_model(parts[0])), values(parts[3].model), parts


@pytest.fixture
def accelerate():
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_is_a_plain_loop(accelerate):
    import accelerate_loop

    _, model = accelerate_loop.main(EPOCHS, cpu=True)
    assert same(values(model), plain_loop())


def test_accelerate_accumulates(accelerate):
    """The score of a window is that of its micro-batches together."""
    import accelerate_loop

    _, model = accelerate_loop.main(EPOCHS, cpu=True, gradient_accumulation_steps=2)
    assert same(values(model), plain_loop(every=2))


def test_accelerate_in_half_precision(accelerate):
    import accelerate_loop

    accuracy, model = accelerate_loop.main(3, cpu=True, mixed_precision="bf16")
    assert accuracy > 60.0
    assert not same(values(model), plain_loop(3))


def test_accelerate_resumes(accelerate, tmp_path):
    whole = accelerate_run(2)
    accelerate_run(1, stop=True, folder=tmp_path)
    resumed = accelerate_run(2, folder=tmp_path, start=1)
    assert same(whole[0], resumed[0])
    assert same(whole[1], resumed[1])


def test_a_prepared_optimizer_cannot_be_wrapped(accelerate):
    from accelerate import Accelerator

    inner = torch.optim.SGD(digits.network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Wrap your own optimizer, then prepare the wrapper"):
        RGPSelectiveOptimizer(Accelerator(cpu=True).prepare(inner))


# Fabric.


def fabric_run(epochs, start=0, file=None, save=False, **options):
    lightning = pytest.importorskip("lightning")
    import fabric_loop

    fabric = lightning.Fabric(accelerator="cpu", devices=1, **options)
    batches = digits.loader()
    parts = fabric_loop.setup(fabric, EPOCHS * len(batches), batches)
    state = {"model": parts[0], "opt": parts[1], "reviser": parts[2]}
    if start:
        parts[2].load_state_dict(fabric.load(file, {"model": parts[0], "opt": parts[1]})["reviser"])
    for epoch in range(start, epochs):
        torch.manual_seed(epoch)
        fabric_loop.train(fabric, *parts)
    if save:
        fabric.save(file, {**state, "reviser": parts[2].state_dict()})
    return values(parts[0].module), values(parts[2].model), parts


def test_fabric_is_a_plain_loop():
    pytest.importorskip("lightning")
    import fabric_loop

    _, model = fabric_loop.main(EPOCHS, accelerator="cpu", devices=1)
    assert same(values(model), plain_loop())


def test_fabric_in_half_precision():
    weights, *_ = fabric_run(2, precision="bf16-mixed")
    assert not same(weights, fabric_run(2)[0])


def test_fabric_resumes(tmp_path):
    whole = fabric_run(2)
    fabric_run(1, file=tmp_path / "half.ckpt", save=True)
    resumed = fabric_run(2, start=1, file=tmp_path / "half.ckpt")
    assert same(whole[0], resumed[0])
    assert same(whole[1], resumed[1])


# timm.


class NativeScaler:
    """Stands in for timm's: its interface, and the order of its calls, as documented."""

    state_dict_key = "amp_scaler"

    def __init__(self, device="cuda"):
        self._scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    def __call__(
        self,
        loss,
        optimizer,
        clip_grad=None,
        clip_mode="norm",
        parameters=None,
        create_graph=False,
        need_update=True,
    ):
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if need_update:
            if clip_grad is not None:
                assert parameters is not None
                self._scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
            self._scaler.step(optimizer)
            self._scaler.update()


@pytest.fixture
def timm(monkeypatch):
    """The package itself where it is installed."""
    try:
        import timm.utils  # noqa: F401
    except ImportError:
        package, utils = types.ModuleType("timm"), types.ModuleType("timm.utils")
        utils.NativeScaler = NativeScaler
        monkeypatch.setitem(sys.modules, "timm", package)
        monkeypatch.setitem(sys.modules, "timm.utils", utils)
    sys.modules.pop("timm_loop", None)


@pytest.mark.parametrize("every", [1, 2])
def test_timm_scaler_is_a_plain_loop(timm, every):
    import timm_loop

    _, model = timm_loop.main(EPOCHS, dtype=torch.float32, every=every)
    assert same(values(model), plain_loop(every=every, clip=1.0, divide=False))


def test_timm_in_half_precision(timm):
    import timm_loop

    accuracy, _ = timm_loop.main(3, dtype=torch.bfloat16)
    assert accuracy > 60.0


# Several processes: the same scripts.


def run_script(rank, size, name, options, port):
    _small_data()
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test", GROUP_RANK="0")
    sys.path.insert(0, str(FOLDER))
    if each := options.get("gradient_accumulation_plugin"):
        from accelerate.utils import GradientAccumulationPlugin

        options = {**options, "gradient_accumulation_plugin": GradientAccumulationPlugin(**each)}
    result = __import__(name).main(epochs=EPOCHS, **options)
    model = result[1]
    net = getattr(model, "net", model)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return result[0], [p.detach().numpy().copy() for p in whole]


SEVERAL = {
    "plain DDP": ("distributed_loop", {}),
    "FSDP2": ("distributed_loop", {"fsdp": True}),
    "Lightning": ("lightning_loop", {**TRAINER, "strategy": "ddp", "devices": 2}),
    "Lightning, accumulating": (
        "lightning_loop",
        {**TRAINER, "strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2},
    ),
    "Fabric": ("fabric_loop", {"accelerator": "cpu", "strategy": "ddp", "devices": 2}),
    "Accelerate": ("accelerate_loop", {"cpu": True}),
    "Accelerate, accumulating": (
        "accelerate_loop",
        {"cpu": True, "gradient_accumulation_steps": 2},
    ),
    "Accelerate, reducing each micro-batch": (
        "accelerate_loop",
        {"cpu": True, "gradient_accumulation_plugin": {"num_steps": 2, "sync_each_batch": True}},
    ),
    "Hugging Face": ("huggingface_trainer", HUGGING_FACE),
    "Hugging Face, accumulating": (
        "huggingface_trainer",
        {**HUGGING_FACE, "gradient_accumulation_steps": 2},
    ),
}


@pytest.mark.parametrize(("name", "options"), SEVERAL.values(), ids=SEVERAL)
def test_the_scripts_with_two_processes(two, name, options):
    """Bit-identical replicas; the fingerprint of the first steps has passed on the way."""
    if "lightning" in name or "fabric" in name:
        pytest.importorskip("lightning")
    if "accelerate" in name:
        pytest.importorskip("accelerate")
    if "huggingface" in name:
        pytest.importorskip("transformers")
    (accuracy, mine), (_, other) = two.run(run_script, 2, name, options, 29777)
    assert same(mine, other)
    assert not same(mine, values(digits.network()))
    assert accuracy > 20.0


def test_a_script_prints_its_result():
    """Under torchrun, as the README says."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--standalone", "--nproc-per-node", "2", FOLDER / "distributed_loop.py"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.count("natural accuracy") == 1
