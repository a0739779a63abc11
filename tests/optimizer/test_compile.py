"""`torch.compile`: of the model, in every order of the passes, and of the step."""

import os
import shutil
from functools import partial

import pytest
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from common import Run, backward, make_batch, make_net, same, sgd, snapshot, train, wrap
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from rgp_optim import ConsistencyReviser, kl_adv_loss, kl_attack

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Shared graphs are kept, as the README says."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with functorch.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def losses(called, x, x_adv, y):
    logits, logits_adv = called(x), called(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    return kl_adv_loss(logits, logits_adv, y, beta=2.0), nat, adv


def in_turn(called, opt, x, x_adv, y):
    """Each role with a forward pass of its own."""
    opt.zero_grad()
    for role, images in {"natural": x, "adversarial": x_adv}.items():
        loss = F.cross_entropy(called(images), y)
        opt.scored(loss, **{role: loss}).backward()


def together(called, opt, *batch, losses=losses, total=True):
    opt.zero_grad()
    loss, nat, adv = losses(called, *batch)
    backward(opt, loss if total else None, natural=nat, adversarial=adv)


def of_sum(called, opt, *batch):
    together(called, opt, *batch, total=False)


class Compiled(Run):
    """The model is called through ``compiler``."""

    def __init__(self, compiler=lambda model: model, passes=together):
        super().__init__(update_fraction=0.4)
        self.called, self.passes = compiler(self.model), passes

    def step(self, seed=0):
        self.passes(self.called, self.opt, *make_batch(seed))
        self.opt.step()


def aot(model, **options):
    return torch.compile(model, backend="aot_eager", **options)


ORDERS = {each: each for each in (together, of_sum, in_turn)}
ORDERS[partial(together, losses=aot(losses))] = together  # model and losses compiled together


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize(("passes", "plain"), ORDERS.items())
def test_a_compiled_model_trains_as_it_does_uncompiled(passes, plain, options):
    runs = Compiled(lambda model: aot(model, **options), passes), Compiled(passes=plain)
    train(3, *runs)
    assert same(*runs)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("donated", [True, False])
def test_a_shared_graph_that_was_compiled_for_one_pass_says_what_to_do(donated):
    """An ordinary backward pass, as of a warm-up, lets the compiler give its buffers away."""
    with functorch.patch(donated_buffer=donated):
        run, (x, _, y) = Compiled(aot), make_batch()
        F.cross_entropy(run.called(x), y).backward()
        if donated:
            with pytest.raises(RuntimeError, match=r"donated_buffer = False` and `torch.compiler"):
                run.step()
        else:
            run.step()


class Waves(nn.Module):
    """Compiled for one pass, its backward writes over what it has read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x):
        return self.second(self.first(x).sin()).cos()


@pytest.mark.skipif(os.name == "nt" or shutil.which("g++") is None, reason="the compiler needs g++")
def test_the_default_compiler_does_not_take_from_its_cache_what_was_compiled_for_one_pass():
    """Inductor's cache does not know the setting; with a tag of its own it does."""
    torch.manual_seed(0)
    model, x, tag = Waves(), torch.rand(64, 16), torch.compiler.config.patch
    opt, params = wrap(model, sgd(0.1)), list(model.parameters())
    grad = torch.autograd.grad

    def losses(called):
        nat, adv = (called(part).square().mean() for part in x.chunk(2))
        return nat, adv, nat + adv.square()

    with functorch.patch(donated_buffer=True), tag(cache_key_tag="rgp-optim, freed"):
        torch.compile(model)(x[:32]).square().mean().backward()
    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False), tag(cache_key_tag="rgp-optim, kept"):
        compiled = torch.compile(model)
        for _ in range(2):
            wanted = [grad(each, params, retain_graph=True) for each in losses(model)]
            opt.zero_grad()
            nat, adv, loss = losses(compiled)
            backward(opt, loss, natural=nat, adversarial=adv)
            found = [tuple(gradients.values()) for gradients in opt._holder.scores.taken.values()]
            found += [tuple(p.grad for p in params)]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)  # rounding
            opt.step()


def test_attack_and_reviser_with_a_compiled_model():
    revisers = {}

    def passes(called, opt, x, _, y):
        reviser = revisers.setdefault(called, ConsistencyReviser(called, rate=0.5, decay=0.5))
        x_adv = kl_attack(called, x, eps=0.1, steps=2, generator=0)
        logits, logits_adv = called(x), called(x_adv)
        loss = kl_adv_loss(logits, logits_adv, y) + reviser(x, x_adv, logits, logits_adv)
        nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
        opt.zero_grad()
        backward(opt, loss, natural=nat, adversarial=adv)
        reviser.update()

    runs = Compiled(aot, passes), Compiled(passes=passes)
    for run in runs:
        run.model.norm.num_batches_tracked.fill_(100)  # trained
    train(4, *runs)
    assert same(*runs)
    assert same(*(reviser.model for reviser in revisers.values()))


def test_an_attack_computes_no_gradients_of_the_weights():
    """A compiled backward pass computes all gradients that its parameters ask for."""
    outputs = []

    def backward_compiler(graph, _):
        (returned,) = (node for node in graph.graph.nodes if node.op == "output")
        outputs.append(sum(node is not None for node in returned.args[0]))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward_compiler
    )
    x, _, y = make_batch()
    for in_place in (False, True):
        torch._dynamo.reset()
        model = make_net()
        model.norm.weight.requires_grad_(False)
        want = kl_attack(model, x, eps=0.1, steps=3, generator=0)
        called = model if in_place else torch.compile(model, backend=backend)
        if in_place:
            model.compile(backend=backend)
        outputs.clear()
        assert torch.equal(kl_attack(called, x, eps=0.1, steps=3, generator=0), want)
        assert outputs == [1]
        with pytest.raises(RuntimeError, match="channels"):  # an attack that fails
            kl_attack(called, x[:, :1])
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [n for n, _ in model.named_parameters() if n != "norm.weight"]
        F.cross_entropy(called(x), y).backward()
        assert outputs == [1, 5]


def test_a_compiled_step_with_a_scheduler():
    runs = Compiled(), Compiled()
    schedulers = [torch.optim.lr_scheduler.StepLR(run.opt, 2, gamma=0.5) for run in runs]
    steps = torch.compile(lambda: runs[0].opt.step(), backend="eager"), runs[1].opt.step
    for seed in range(5):
        for run, step, scheduler in zip(runs, steps, schedulers, strict=True):
            together(run.model, run.opt, *make_batch(seed))
            step()
            scheduler.step()
    assert [run.opt.param_groups[0]["lr"] for run in runs] == [0.05 * 0.25] * 2
    assert same(*runs)


GRAPHS = []


def recorded(graph, _):
    GRAPHS.append(graph)
    return graph.forward


class CompiledStep(torch.optim.SGD):
    """As optimizers that compile their update."""

    update = staticmethod(torch.compile(lambda p, g: p.sub_(0.1 * g), backend=recorded))

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.update(p, p.grad)


def test_an_inner_optimizer_that_compiles_its_step():
    """It stays compiled under the wrapper."""
    GRAPHS.clear()
    runs = Run(CompiledStep), Run(sgd(0.1))
    train(2, *runs)
    torch.testing.assert_close(*(snapshot(run.model) for run in runs))
    assert GRAPHS
