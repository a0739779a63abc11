"""What only a GPU can show: no waits for the host, CUDA graphs, scalers, streams."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import backward, losses, make_batch, make_net, same_bits, snapshot

from rgp_optim import RGPSelectiveOptimizer, functional, kl_attack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from captured import Captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton")


def build(model, backend="auto", **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return RGPSelectiveOptimizer(inner, update_fraction=0.4, backend=backend, **options)


def batch(seed):
    return [t.cuda() for t in make_batch(seed)]


def train(model, opt, steps, first=0):
    for seed in range(first, first + steps):
        loss, nat, adv = losses(model, *batch(seed))
        opt.zero_grad()
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()


def test_auto_takes_the_kernels():
    g = torch.randn(100, device="cuda")
    assert functional._module("auto", "select", [g]).__name__ == "rgp_optim._triton"
    assert functional._trusted[g.device]  # compared with the reference


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_step_does_not_wait_for_the_host(conserve, scope):
    model = make_net().cuda()
    opt = build(model, conserve=conserve, scope=scope)
    train(model, opt, 2)
    loss, nat, adv = losses(model, *batch(2))
    opt.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("conserve", ["weights", "gradients", "update"])
def test_a_captured_step_is_the_eager_step(conserve):
    model = make_net().cuda()
    other = copy.deepcopy(model)
    opt, reference = build(model, conserve=conserve), build(other, conserve=conserve)
    static = batch(0)

    def step():
        opt.zero_grad()
        loss, nat, adv = losses(model, *static)
        backward(opt, loss, natural=nat, adversarial=adv)
        opt.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    other.load_state_dict(model.state_dict())
    reference.load_state_dict(copy.deepcopy(opt.state_dict()))
    for seed in range(5):
        for mine, new in zip(static, batch(seed), strict=True):
            mine.copy_(new)
        graph.replay()
        train(other, reference, 1, first=seed)
    for got, want in zip(snapshot(model), snapshot(other), strict=True):
        torch.testing.assert_close(got, want)


class Bilinear:
    """Losses whose gradients are given tensors, exactly, whatever computes them."""

    def __init__(self, device):
        draw = torch.Generator().manual_seed(0)
        shapes = [(300, 40), (7,), (64, 32, 3, 3), (1, 1), (90_000, 1)]
        self.params = [torch.randn(s, generator=draw).to(device).requires_grad_() for s in shapes]
        self.given = [[torch.empty_like(p) for p in self.params] for _ in range(3)]
        inner = torch.optim.SGD(self.params, lr=0.01, momentum=0.9, weight_decay=0.01)
        self.opt = RGPSelectiveOptimizer(inner, update_fraction=0.4)

    def draw(self, seed):
        draw = torch.Generator(self.params[0].device).manual_seed(seed)
        for gradients in self.given:
            for g in gradients:
                g.normal_(generator=draw)

    def step(self):
        losses = [
            sum((p * g).sum() for p, g in zip(self.params, gradients, strict=True))
            for gradients in self.given
        ]
        self.opt.zero_grad()
        backward(self.opt, losses[0], natural=losses[1], adversarial=losses[2])
        self.opt.step()


def warmed_up(call, times=3):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)


def test_a_thousand_replays_are_a_thousand_steps():
    """Bit for bit: weights and momentum."""
    captured, eager = Bilinear("cuda"), Bilinear("cuda")
    for each in (captured, eager):
        each.draw(0)
    warmed_up(captured.step)
    for _ in range(3):
        eager.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(1000):
        captured.draw(seed)
        graph.replay()
        eager.draw(seed)
        eager.step()
    assert all(map(same_bits, captured.params, eager.params))
    for p, q in zip(captured.params, eager.params, strict=True):
        momenta = captured.opt.state[p], eager.opt.state[q]
        assert same_bits(*(state["momentum_buffer"] for state in momenta))


def test_two_streams_at_the_same_time():
    """Two optimizers of the same shapes share their tables, and nothing that is written."""
    alone = [Bilinear("cuda") for _ in range(2)]
    for i, each in enumerate(alone):
        for seed in range(50):
            each.draw(100 * i + seed)
            each.step()
    torch.cuda.synchronize()
    together = [Bilinear("cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for seed in range(50):
        for i, (each, stream) in enumerate(zip(together, streams, strict=True)):
            with torch.cuda.stream(stream):
                each.draw(100 * i + seed)
                each.step()
    torch.cuda.synchronize()
    for got, want in zip(together, alone, strict=True):
        assert all(map(same_bits, got.params, want.params))


def test_tables_that_are_thrown_away_are_still_read():
    """More shapes than tables are kept, on a stream that lags behind."""
    stream = torch.cuda.Stream()
    cases = [torch.randn(2, 20_000 + 64 * i, device="cuda") for i in range(24)]
    want = [
        functional.rgp_topk_masks([a], [b], alpha=0.1, update_fraction=0.5, backend="torch")[0]
        for a, b in cases
    ]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        got = [
            functional.rgp_topk_masks([a], [b], alpha=0.1, update_fraction=0.5, backend="triton")[0]
            for a, b in cases
        ]
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def test_a_replayed_attack_sees_the_weights_as_they_are():
    """Also under autocast, and draws as the eager one does."""
    model = make_net().cuda()
    x, _, _ = batch(0)
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
    model = make_net().cuda()
    other = copy.deepcopy(model)
    opt, reference = build(model), build(other)
    with functorch.patch(donated_buffer=False):
        called = torch.compile(model, fullgraph=fullgraph)
        for seed in range(3):
            for net, optimizer in ((called, opt), (other, reference)):
                loss, nat, adv = losses(net, *batch(seed))
                optimizer.zero_grad()
                backward(optimizer, loss, natural=nat, adversarial=adv)
                optimizer.step()
    for got, want in zip(snapshot(model), snapshot(other), strict=True):
        assert (got - want).abs().max() < 0.02
    torch._dynamo.reset()


def test_a_compiled_step():
    model = make_net().cuda()
    other = copy.deepcopy(model)
    opt, reference = build(model), build(other)
    call = torch.compile(lambda: opt.step())
    for seed in range(3):
        for net, optimizer, step in ((model, opt, call), (other, reference, reference.step)):
            loss, nat, adv = losses(net, *batch(seed))
            optimizer.zero_grad()
            backward(optimizer, loss, natural=nat, adversarial=adv)
            step()
    assert all(map(same_bits, snapshot(model), snapshot(other)))
    torch._dynamo.reset()


def test_the_first_step_of_a_process_cannot_be_captured(monkeypatch):
    """The kernels are compared with the reference before their first use."""
    monkeypatch.setattr(functional, "_trusted", {})
    g = torch.randn(77, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="Take one step before the capture"):
        with torch.cuda.graph(graph):
            functional.select([g], [g], [0.123], [0.5], [0])


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_and_a_fused_inner_optimizer(fused):
    model = make_net().cuda()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    opt = RGPSelectiveOptimizer(inner, update_fraction=0.4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for seed in range(3):
        x, x_adv, y = batch(seed)
        with torch.autocast("cuda", torch.float16):
            nat, adv = F.cross_entropy(model(x), y), F.cross_entropy(model(x_adv), y)
        opt.zero_grad()
        before = snapshot(model)
        backward(
            opt, scaler.scale(nat + adv), natural=scaler.scale(nat), adversarial=scaler.scale(adv)
        )
        scaler.step(opt)
        scaler.update()
        for p, old in zip(model.parameters(), before, strict=True):
            if p.dim() >= 2:
                assert int((p.detach() != old).sum()) <= round(0.4 * p.numel())


def test_on_another_stream():
    model = make_net().cuda()
    other = copy.deepcopy(model)
    train(other, build(other), 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(model, build(model), 3)
    stream.synchronize()
    assert all(map(same_bits, snapshot(model), snapshot(other)))


def test_launches_do_not_grow_with_the_tensors():
    from torch.profiler import ProfilerActivity, profile

    def launches(count):
        g = [torch.randn(300 + i, 70, device="cuda") for i in range(count)]
        settings = ([0.1] * count, [0.5] * count, list(range(count)))
        for _ in range(2):
            targets = [t.clone() for t in g]
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                masks = functional.select(g, g, *settings)
                saved = functional.zero_and_save_(masks, targets, g)
                functional.restore_(masks, g, saved)
                torch.cuda.synchronize()
        return sum("LaunchKernel" in e.name for e in profiler.events())

    assert launches(3) == launches(40) <= 8 + 2  # with the fills of two buffers
