"""What only a GPU can show: no waits for the host, CUDA graphs, streams, launches."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from common import backward, losses, make_batch, make_net, same_bits, sgd, snapshot, wrap

from rgp_optim import functional, kl_attack
from rgp_optim._reference import Entry

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from captured import Captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton", minversion="3.4")
CONSERVE = ["weights", "gradients", "update"]
INNER = sgd(0.1, momentum=0.9, weight_decay=0.01)


def batch(seed):
    return [t.cuda() for t in make_batch(seed)]


def twins(**options):
    """Two equal models, each with its optimizer."""
    models = [make_net().cuda() for _ in range(2)]
    return [(model, wrap(model, INNER, **options)) for model in models]


def passes(model, opt, seed=0, data=None):
    loss, nat, adv = losses(model, *(data or batch(seed)))
    opt.zero_grad()
    backward(opt, loss, natural=nat, adversarial=adv)


def train(model, opt, steps, first=0):
    for seed in range(first, first + steps):
        passes(model, opt, seed)
        opt.step()


def captured(step):
    """A CUDA graph of a step, after three steps on another stream as a warm-up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_auto_takes_the_kernels():
    g = torch.randn(100, device="cuda")
    assert functional._module("auto", "select", [g]).__name__ == "rgp_optim._triton"
    assert functional._faults["triton", g.device] is None  # compared with the reference


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", CONSERVE)
def test_step_does_not_wait_for_the_host(conserve, scope):
    (model, opt), _ = twins(conserve=conserve, scope=scope)
    train(model, opt, 2)
    loss, nat, adv = losses(model, *batch(2))
    opt.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("conserve", CONSERVE)
def test_a_captured_step_is_the_eager_step(conserve):
    (model, opt), (other, reference) = twins(conserve=conserve)
    static = batch(0)

    def step():
        passes(model, opt, data=static)
        opt.step()

    graph = captured(step)
    other.load_state_dict(model.state_dict())
    reference.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(5):
        for mine, new in zip(static, batch(seed), strict=True):
            mine.copy_(new)
        graph.replay()
        train(other, reference, 1, first=seed)
    torch.testing.assert_close(snapshot(model), snapshot(other))


class Bilinear:
    """Losses whose gradients are given tensors, exactly, whatever computes them."""

    def __init__(self):
        draw = torch.Generator().manual_seed(0)
        shapes = [(300, 40), (7,), (64, 32, 3, 3), (1, 1), (90_000, 1)]
        self.params = [torch.randn(s, generator=draw).cuda().requires_grad_() for s in shapes]
        self.given = [[torch.empty_like(p) for p in self.params] for _ in range(3)]
        self.opt = wrap(self.params, sgd(0.01, momentum=0.9, weight_decay=0.01))

    def draw(self, seed):
        draw = torch.Generator("cuda").manual_seed(seed)
        for gradients in self.given:
            for g in gradients:
                g.normal_(generator=draw)

    def step(self):
        loss, nat, adv = (
            sum((p * g).sum() for p, g in zip(self.params, gradients, strict=True))
            for gradients in self.given
        )
        self.opt.zero_grad()
        backward(self.opt, loss, natural=nat, adversarial=adv)
        self.opt.step()


def test_a_thousand_replays_are_a_thousand_steps():
    """Bit for bit: weights and momentum."""
    replayed, eager = Bilinear(), Bilinear()
    for each in (replayed, eager):
        each.draw(0)
    graph = captured(replayed.step)
    for _ in range(3):
        eager.step()
    for seed in range(1000):
        replayed.draw(seed)
        graph.replay()
        eager.draw(seed)
        eager.step()
    for p, q in zip(replayed.params, eager.params, strict=True):
        momenta = replayed.opt.state[p], eager.opt.state[q]
        assert same_bits(p.detach(), q.detach())
        assert same_bits(*(state["momentum_buffer"] for state in momenta))


def test_two_streams_at_the_same_time():
    """Two optimizers of the same shapes share their tables, and nothing that is written."""
    alone, together = ([Bilinear() for _ in range(2)] for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]

    def step(each, seed):
        each.draw(seed)
        each.step()

    for i, each in enumerate(alone):
        for seed in range(50):
            step(each, 100 * i + seed)
    torch.cuda.synchronize()
    for seed in range(50):
        for i, (each, stream) in enumerate(zip(together, streams, strict=True)):
            with torch.cuda.stream(stream):
                step(each, 100 * i + seed)
    torch.cuda.synchronize()
    for got, want in zip(together, alone, strict=True):
        assert all(map(same_bits, got.params, want.params))


def test_tables_that_are_thrown_away_are_still_read():
    """The memory of tables is used again, on a stream that lags behind."""
    cases = [torch.randn(2, 20_000 + 64 * i, device="cuda") for i in range(24)]

    def masks(backend):
        options = dict(alpha=0.1, update_fraction=0.5, backend=backend)
        return [functional.rgp_topk_masks([a], [b], **options)[0] for a, b in cases]

    want = masks("torch")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        got = masks("triton")
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def test_a_replayed_attack_sees_the_weights_as_they_are():
    """Also under autocast, and draws as the eager one does."""
    model, (x, _, _) = make_net().cuda(), batch(0)
    draws = [torch.Generator("cuda").manual_seed(0) for _ in range(2)]

    def attack(x, generator, cache):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=cache):
            return kl_attack(model, x, eps=0.1, steps=5, generator=generator)

    replayed = Captured(lambda x: attack(x, draws[0], False), [draws[0]])
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(-1.1)
        got, want = replayed(x + 0.01 * step), attack(x + 0.01 * step, draws[1], True)
        assert (got != want).float().mean() < 0.02  # signs of gradients near 0 may differ
        assert (got != x).any()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model(fullgraph):
    """The default compiler; its sums are in another order."""
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    (model, opt), (other, reference) = twins()
    with functorch.patch(donated_buffer=False):
        train(torch.compile(model, fullgraph=fullgraph), opt, 3)
        train(other, reference, 3)
    for got, want in zip(snapshot(model), snapshot(other), strict=True):
        assert (got - want).abs().max() < 0.02
    torch._dynamo.reset()


def test_a_compiled_step():
    (model, opt), (other, reference) = twins()
    call = torch.compile(lambda: opt.step())
    for seed in range(3):
        passes(model, opt, seed)
        call()
    train(other, reference, 3)
    assert all(map(same_bits, snapshot(model), snapshot(other)))
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_and_a_fused_inner_optimizer(fused):
    model = make_net().cuda()
    opt = wrap(model, lambda params: torch.optim.AdamW(params, lr=0.01, fused=fused))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for seed in range(3):
        with torch.autocast("cuda", torch.float16):
            loss, nat, adv = losses(model, *batch(seed))
        before = snapshot(model)
        opt.zero_grad()
        scaler.scale(opt.scored(loss, natural=nat, adversarial=adv)).backward()
        scaler.step(opt)
        scaler.update()
        for p, old in zip(model.parameters(), before, strict=True):
            if p.dim() >= 2:
                assert int((p.detach() != old).sum()) <= round(0.3 * p.numel())


def test_on_another_stream():
    (model, opt), (other, reference) = twins()
    train(other, reference, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(model, opt, 3)
    stream.synchronize()
    assert all(map(same_bits, snapshot(model), snapshot(other)))


def test_kernels_are_not_captured():
    """Their tables are freed before a replay: a graph holds the reference, kernels are refused."""
    g = torch.randn(77, device="cuda")
    want = functional.select([Entry(g, g, 0.123, 0.5)])[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = functional.select([Entry(g, g, 0.123, 0.5)])[0]
        with pytest.raises(RuntimeError, match="a stream under CUDA graph capture"):
            functional.select([Entry(g, g, 0.123, 0.5)], backend="triton")
    graph.replay()
    assert torch.equal(got, want)


def test_launches_do_not_grow_with_the_tensors():
    from torch.profiler import ProfilerActivity, profile

    def launches(count):
        g = [torch.randn(300 + i, 70, device="cuda") for i in range(count)]
        for _ in range(2):
            targets = [t.clone() for t in g]
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                masks = functional.select([Entry(t, t, 0.1, 0.5, i) for i, t in enumerate(g)])
                saved = functional.zero_and_save_(list(zip(masks, targets, g, strict=True)))
                functional.restore_(list(zip(masks, g, saved, strict=True)))
                torch.cuda.synchronize()
        return sum("LaunchKernel" in e.name for e in profiler.events())

    assert launches(3) == launches(40) <= 8 + 2  # with the fills of two buffers
