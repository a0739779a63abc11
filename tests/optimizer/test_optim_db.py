"""Every optimizer and setting in torch's own table of them."""

import copy

import pytest
import torch
from common import cpu_only, same_bits

from rgp_optim import RGPSelectiveOptimizer

pytest.importorskip("expecttest")  # of the table's module
common_optimizers = pytest.importorskip("torch.testing._internal.common_optimizers")

pytestmark = [
    cpu_only("the table's tensors"),
    # Of optimizers that have not stepped yet, and of scalars in newer versions.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
REFUSED = {"LBFGS"}


def table():
    """Name, class, and the options of each error-free input."""
    rows = []
    for info in common_optimizers.optim_db:
        if info.only_supports_sparse_grads or info.optim_cls.__name__ in REFUSED:
            continue
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):
            desc = (given.desc or "default").replace(" ", "-")
            name = f"{info.optim_cls.__name__}-{i}-{desc}"
            rows.append(pytest.param(info.optim_cls, given, id=name))
    return rows


def make(cls, given):
    """An optimizer of matrices, which all of them take, and its parameters."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3, 7), (1, 1)]
    params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in shapes]
    # The learning rate may be a tensor, which some settings change.
    return cls(params, **copy.deepcopy(given.kwargs)), params


def losses(params, seed):
    draw = torch.Generator().manual_seed(seed)
    targets = [[torch.randn(p.shape, generator=draw) for p in params] for _ in range(2)]
    nat, adv = (
        sum(((p - t) ** 2).sum() for p, t in zip(params, each, strict=True)) for each in targets
    )
    return nat + 0.5 * adv, nat, adv


def step(opt, params, seed, scored):
    loss, nat, adv = losses(params, seed)
    if scored:
        loss = opt.scored(loss, natural=nat, adversarial=adv)
    opt.zero_grad()
    loss.backward()
    opt.step()


def refused(given):
    return bool(given.kwargs.get("differentiable"))


def test_the_table_is_there():
    assert len({row.values[0] for row in table()}) >= 12


@pytest.mark.parametrize(("cls", "given"), table())
def test_updating_all_weights_is_the_plain_optimizer(cls, given):
    plain, params = make(cls, given)
    inner, others = make(cls, given)
    if refused(given):
        with pytest.raises(ValueError, match="differentiable"):
            RGPSelectiveOptimizer(inner)
        return
    opt = RGPSelectiveOptimizer(inner, update_fraction=1.0)
    for seed in range(4):
        step(plain, params, seed, False)
        step(opt, others, seed, True)
        assert all(map(same_bits, params, others))
    for p, q in zip(params, others, strict=True):
        assert plain.state[p].keys() == opt.state[q].keys()
        for key, value in plain.state[p].items():
            assert same_bits(*map(torch.as_tensor, (value, opt.state[q][key]))) or value is None


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
@pytest.mark.parametrize(("cls", "given"), [r for r in table() if not refused(r.values[1])])
def test_conserved_weights_keep_their_bits(cls, given, conserve):
    inner, params = make(cls, given)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.5, conserve=conserve)
    for seed in range(4):
        before = [p.detach().clone() for p in params]
        step(opt, params, seed, True)
        masks = opt.masks()
        assert [int(masks[p].sum()) for p in params] == [10, 10, 1]
        if conserve != "gradients":
            for p, old in zip(params, before, strict=True):
                assert same_bits(p.detach()[~masks[p]], old[~masks[p]])


def test_lbfgs_is_refused():
    params = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(TypeError, match="evaluate its closure once per step"):
        RGPSelectiveOptimizer(torch.optim.LBFGS(params))
