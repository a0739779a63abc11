"""What several test files share: small networks, every inner optimizer, training."""

import importlib
import io
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rgp_optim import RGPSelectiveOptimizer

if module := os.environ.get("RGP_TEST_DEVICE_MODULE"):  # of a device that torch does not know
    importlib.import_module(module)
DEVICE = torch.device(os.environ.get("RGP_TEST_DEVICE", "cpu"))  # the default one in every test


def cpu_only(reason):
    """Skip on other devices."""
    return pytest.mark.skipif(DEVICE.type != "cpu", reason=f"on the CPU only: {reason}")


SPECIAL = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # abstract; refused; sparse only; 2-D only


def sgd(lr=1.0, **options):
    """With learning rate 1 a selected weight moves by its gradient."""
    return partial(torch.optim.SGD, lr=lr, **options)


INNER = {
    name: partial(cls, lr=0.05)
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in SPECIAL
}
INNER |= {
    "SGD momentum wd": sgd(0.05, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD maximize": sgd(0.05, maximize=True),
    "SGD fused": sgd(0.05, momentum=0.9, fused=True),
    "Adam amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
    "AdamW single-tensor": partial(torch.optim.AdamW, lr=0.05, foreach=False),
}


class Net(nn.Module):
    """Convolution, normalisation, a linear layer: weights of 4, 1 and 2 dimensions."""

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4, classes)

    def forward(self, x):
        h = F.relu(self.norm(self.conv(x)))
        return self.head(pool(h).flatten(1))


def pool(h):
    """Four overlapping means; adaptive pooling would add their gradients in any order on a GPU."""
    return F.avg_pool2d(h, 3, 2)


def make_net(seed=0, dtype=torch.float32):
    """The same weights on every device."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        return Net().to(DEVICE, dtype)


def make_batch(seed=0, dtype=torch.float32, n=8):
    """Images, perturbed images, labels; the same on every device."""
    g = torch.Generator("cpu").manual_seed(seed)
    with torch.device("cpu"):
        x = torch.rand(n, 2, 5, 5, generator=g, dtype=torch.float64).to(dtype)
        d = torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype)
        y = torch.randint(0, 3, (n,), generator=g)
        return tuple(each.to(DEVICE) for each in (x, x + 0.1 * d, y))


def seeded(seed):
    """A generator on the device of the tests."""
    return torch.Generator(DEVICE).manual_seed(seed)


def rng_states():
    """The state of torch's own generators: the CPU's, and the device's."""
    others = [] if DEVICE.type == "cpu" else [torch.get_device_module(DEVICE).get_rng_state()]
    return [torch.get_rng_state(), *others]


def from_numpy(array):
    return torch.from_numpy(array).to(DEVICE)


def to_numpy(tensor):
    return tensor.cpu().numpy()


def losses(model, x, x_adv, y):
    """Total, natural and adversarial loss, on one shared graph."""
    nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x_adv), y)
    return nat + 0.5 * adv.square(), nat, adv


def make_inner(inner, params):
    """An inner optimizer by its name in `INNER`, or by a factory."""
    return (INNER[inner] if isinstance(inner, str) else inner)(params)


def wrap(params, inner="SGD momentum wd", **options):
    """A wrapped optimizer of a model, of parameters or of groups."""
    params = params.parameters() if isinstance(params, nn.Module) else params
    options = {"update_fraction": 0.3, **options}
    return RGPSelectiveOptimizer(make_inner(inner, params), **options)


class Run:
    """A small network in training: by a wrapped optimizer, or by a plain one."""

    def __init__(
        self, inner="SGD momentum wd", *, plain=False, seed=0, dtype=torch.float32, **options
    ):
        self.model, self.dtype = make_net(seed, dtype), dtype
        params = self.model.parameters()
        self.opt = make_inner(inner, params) if plain else wrap(params, inner, **options)
        self.mark()

    def backward(self, seed=0):
        """The README's loop up to the step, on a batch drawn from ``seed``."""
        loss, nat, adv = losses(self.model, *make_batch(seed, self.dtype))
        if isinstance(self.opt, RGPSelectiveOptimizer):
            loss = self.opt.scored(loss, natural=nat, adversarial=adv)
        self.opt.zero_grad()
        loss.backward()
        return loss

    def step(self, seed=0):
        self.backward(seed)
        self.opt.step()

    def mark(self):
        """Take the weights for the start of what `moved` shows."""
        self.start = snapshot(self.model)

    def moved(self):
        return moved(self.model, self.start)

    def stays(self):
        return same(self, self.start)


def train(steps, *runs):
    """The same batches for each run."""
    for seed in range(steps):
        for run in runs:
            run.step(seed)


def backward(opt, loss=None, *, natural=None, adversarial=None):
    """The backward pass of a scored loss: by default of the sum, or of one that scores itself."""
    if natural is None and adversarial is None:
        natural = adversarial = loss
    loss = natural + adversarial if loss is None else loss
    opt.scored(loss, natural=natural, adversarial=adversarial).backward()


def step_on(opt, loss):
    """One step down a loss that scores itself."""
    backward(opt, loss)
    opt.step()


def moved(model, before):
    """Where the weights differ from a snapshot."""
    return [p.detach() != old for p, old in zip(model.parameters(), before, strict=True)]


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def disk(state_dict):
    """Through a file, as a safe loader reads it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_bits(a, b):
    """Equality that tells -0.0 from 0.0 and takes NaN for itself."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))


def same(a, b):
    """Whether two runs, models or snapshots have the same bits."""
    a, b = (getattr(each, "model", each) for each in (a, b))
    a, b = (snapshot(each) if isinstance(each, nn.Module) else each for each in (a, b))
    return all(same_bits(p, q) for p, q in zip(a, b, strict=True))


def numpy_topk(scores, k):
    """The rule, by Python's sort: NaN first, then the highest, ties to the first, no zeros."""
    flat = np.asarray(scores).reshape(-1)
    nans = [i for i in range(flat.size) if np.isnan(flat[i])]
    rest = [i for i in range(flat.size) if not np.isnan(flat[i])]
    order = nans + sorted(rest, key=lambda i: (-flat[i], i))
    mask = np.zeros(flat.size, dtype=bool)
    mask[order[:k]] = True
    return (mask & (flat != 0)).reshape(np.shape(scores))


def numpy_masks(scores, fractions, pools):
    """The rule over tensors; those with the same pool number share a threshold."""
    masks = {}
    for pool in set(pools):
        members = [i for i, number in enumerate(pools) if number == pool]
        joined = np.concatenate([scores[i].reshape(-1) for i in members])
        fraction = fractions[members[0]]
        k = max(1, round(fraction * joined.size)) if fraction else 0
        flat = numpy_topk(joined, k) | (fraction == 1)
        ends = np.cumsum([scores[i].size for i in members])
        for i, part in zip(members, np.split(flat, ends[:-1]), strict=True):
            masks[i] = part.reshape(scores[i].shape)
    return [masks[i] for i in range(len(scores))]


class Line(nn.Module):
    """Class 1 if an image is brighter than a half: what fools it is known."""

    def forward(self, x):
        x = x.flatten(1).mean(1, keepdim=True)
        return torch.cat([0.5 - x, x - 0.5], 1)


class LowRank(nn.Linear):
    """Adds a product of low rank to its weight in eval mode, as layers for adaptation do."""

    def __init__(self):
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4, 1))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.down.T @ self.up.T)
