"""`torch.compile`: of the model, in every order of the passes, and of the step."""

import os
import shutil

import pytest
import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from common import backward, make_batch, make_net, pool, seeded, snapshot
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Shared graphs are kept, as the README says."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with functorch.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def wrap(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return RGPSelectiveOptimizer(inner, update_fraction=0.4, **options)


def losses(called, x, x_adv, y):
    logits, logits_adv = called(x), called(x_adv)
    nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
    return kl_adv_loss(logits, logits_adv, y, beta=2.0), nat, adv


def passes(order, called, opt, data):
    opt.zero_grad()
    if order == "in turn":  # each role with a forward pass of its own
        x, x_adv, y = data
        nat = F.cross_entropy(called(x), y)
        opt.scored(nat, natural=nat).backward()
        adv = F.cross_entropy(called(x_adv), y)
        opt.scored(adv, adversarial=adv).backward()
        return
    loss, nat, adv = losses(called, *data)
    backward(opt, loss if order == "loss" else None, natural=nat, adversarial=adv)


def train(order, compiler, steps=3):
    model = make_net()
    called = compiler(model)
    opt = wrap(model)
    for step in range(steps):
        passes(order, called, opt, make_batch(step))
        opt.step()
    return snapshot(model)


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("order", ["loss", "sum", "in turn"])
def test_a_compiled_model_trains_as_it_does_uncompiled(order, options):
    compiler = lambda model: torch.compile(model, backend="aot_eager", **options)  # noqa: E731
    assert same(train(order, compiler), train(order, lambda model: model))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
@pytest.mark.skipif(os.name == "nt", reason="another compiler")
def test_the_default_compiler():
    compiled = train("loss", torch.compile)
    for p, q in zip(compiled, train("loss", lambda model: model), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # fused sums: some units of rounding


@pytest.mark.parametrize("donated", [True, False])
def test_a_shared_graph_that_was_compiled_for_one_pass_says_what_to_do(donated):
    """An ordinary backward pass, as of a warm-up, lets the compiler give its buffers away."""
    with functorch.patch(donated_buffer=donated):
        model = make_net()
        called = torch.compile(model, backend="aot_eager")
        opt = wrap(model)
        x, _, y = data = make_batch(0)
        F.cross_entropy(called(x), y).backward()
        if donated:
            with pytest.raises(RuntimeError, match=r"donated_buffer = False` and `torch.compiler"):
                passes("loss", called, opt, data)
            return
        passes("loss", called, opt, data)
        opt.step()


class Waves(torch.nn.Module):
    """Compiled for one pass, its backward writes over what it has read."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(16, 16, bias=False)
        self.second = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.second(self.first(x).sin()).cos()


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_code_that_was_compiled_for_one_pass_is_not_taken_from_the_cache():
    """Inductor's cache does not know the setting; with a tag of its own it does."""
    torch.manual_seed(0)
    model = Waves()
    x = torch.rand(32, 16)
    tag = torch.compiler.config.patch
    with functorch.patch(donated_buffer=True), tag(cache_key_tag="rgp-optim, freed"):
        torch.compile(model)(x).square().mean().backward()
    torch._dynamo.reset()
    opt = wrap(model)
    with functorch.patch(donated_buffer=False), tag(cache_key_tag="rgp-optim, kept"):
        compiled = torch.compile(model)
        for _ in range(2):
            wanted, found = [], []
            for called in (model, compiled):
                out = called(x).square()
                nat, adv = out[:16].mean(), out[16:].mean()
                if called is model:
                    params = list(model.parameters())
                    for loss in (nat, adv, nat + adv.square()):
                        wanted += torch.autograd.grad(loss, params, retain_graph=True)
            opt.zero_grad()
            backward(opt, nat + adv.square(), natural=nat, adversarial=adv)
            for role in ("natural", "adversarial"):
                found += opt._holder.scores.taken[role].values()
            found += [p.grad for p in model.parameters()]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)  # rounding
            opt.step()


def test_model_and_losses_compiled_together():
    found = []
    for compiled in (True, False):
        model = make_net()
        opt = wrap(model)

        def both(x, x_adv, y, model=model):
            return losses(model, x, x_adv, y)

        call = torch.compile(both, backend="aot_eager") if compiled else both
        for step in range(3):
            loss, nat, adv = call(*make_batch(step))
            opt.zero_grad()
            backward(opt, loss, natural=nat, adversarial=adv)
            opt.step()
        found.append(snapshot(model))
    assert same(*found)


def test_attack_and_reviser_with_a_compiled_model():
    found = []
    for compiled in (True, False):
        model = make_net()
        model.norm.num_batches_tracked.fill_(100)  # trained
        called = torch.compile(model, backend="aot_eager") if compiled else model
        opt = wrap(model)
        reviser = ConsistencyReviser(called, rate=0.5, decay=0.5)
        for step in range(4):
            x, _, y = make_batch(step)
            x_adv = kl_attack(called, x, eps=0.1, steps=2, generator=seeded(step))
            logits, logits_adv = called(x), called(x_adv)
            loss = kl_adv_loss(logits, logits_adv, y) + reviser(x, x_adv, logits, logits_adv)
            nat, adv = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            opt.zero_grad()
            backward(opt, loss, natural=nat, adversarial=adv)
            opt.step()
            reviser.update()
        found.append(snapshot(model) + snapshot(reviser.model))
    assert same(*found)


def test_an_attack_computes_no_gradients_of_the_weights():
    """A compiled backward pass computes all gradients that its parameters ask for."""
    outputs = []

    def backward_compiler(graph, _):
        (returned,) = (node for node in graph.graph.nodes if node.op == "output")
        outputs.append([node for node in returned.args[0] if node is not None])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward_compiler
    )
    x, _, y = make_batch()
    for compile_ in (lambda m: torch.compile(m, backend=backend), in_place(backend)):
        torch._dynamo.reset()
        model = make_net()
        model.norm.weight.requires_grad_(False)
        draws = [seeded(0) for _ in range(2)]
        want = kl_attack(model, x, eps=0.1, steps=3, generator=draws[0])
        called = compile_(model)
        outputs.clear()
        assert torch.equal(kl_attack(called, x, eps=0.1, steps=3, generator=draws[1]), want)
        assert [len(each) for each in outputs] == [1]
        wanted = [p.requires_grad for p in model.parameters()]
        assert wanted == [name != "norm.weight" for name, _ in model.named_parameters()]
        outputs.clear()
        F.cross_entropy(called(x), y).backward()
        assert [len(each) for each in outputs] == [5]


def in_place(backend):
    def compile_(model):
        model.compile(backend=backend)
        return model

    return compile_


def test_an_attack_that_fails_leaves_the_parameters_as_they_were():
    def broken(x):
        raise KeyError("broken")

    model = make_net()
    called = torch.compile(model, backend="eager")
    model.head.forward = broken
    with pytest.raises(KeyError):
        kl_attack(called, make_batch()[0])
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


def test_a_compiled_step_with_a_scheduler():
    found = []
    for compiled in (True, False):
        model = make_net()
        opt = wrap(model)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
        call = (lambda opt=opt: opt.step()) if not compiled else None
        if compiled:
            call = torch.compile(lambda opt=opt: opt.step(), backend="eager")
        for step in range(5):
            passes("loss", model, opt, make_batch(step))
            call()
            scheduler.step()
        assert opt.param_groups[0]["lr"] == 0.1 * 0.25
        found.append(snapshot(model))
    assert same(*found)


def test_activation_checkpointing():
    found = []
    for kept in (True, False):
        model = make_net()
        opt = wrap(model)

        def called(x, model=model, kept=kept):
            if kept:
                return model(x)
            h = checkpoint(model.conv, x, use_reentrant=False)
            h = F.relu(model.norm(h))
            return model.head(pool(h).flatten(1))

        for step in range(3):
            passes("loss", called, opt, make_batch(step))
            opt.step()
        found.append(snapshot(model))
    assert same(*found)


COMPILED = []


def recorded(graph, _):
    COMPILED.append(graph)
    return graph.forward


class CompiledStep(torch.optim.SGD):
    """As optimizers that compile their update."""

    update = staticmethod(torch.compile(lambda p, g: p.sub_(0.1 * g), backend=recorded))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad)


def test_an_inner_optimizer_that_compiles_its_step():
    """It stays compiled under the wrapper."""
    found = []
    COMPILED.clear()
    for inner in (CompiledStep, torch.optim.SGD):
        model = make_net()
        opt = RGPSelectiveOptimizer(inner(model.parameters(), lr=0.1), update_fraction=0.4)
        for step in range(2):
            passes("loss", model, opt, make_batch(step))
            opt.step()
        found.append(snapshot(model))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
    assert COMPILED
