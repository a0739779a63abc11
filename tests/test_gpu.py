"""What only a GPU can show: no waits for the host, CUDA graphs, scalers, streams."""

import copy

import pytest
import torch
import torch.nn.functional as F
from common import losses, make_batch, make_net, same_bits, snapshot

from rgp_optim import RGPSelectiveOptimizer, functional

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
        opt.backward(loss, natural=nat, adversarial=adv)
        opt.step()


def test_auto_takes_the_kernels():
    g = torch.randn(100, device="cuda")
    assert functional._provider("auto", [g]).__name__ == "rgp_optim._triton"


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
        opt.backward(loss, natural=nat, adversarial=adv)
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
        opt.backward(loss, natural=nat, adversarial=adv)
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


def test_a_first_step_cannot_be_captured():
    g = torch.randn(77, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run a few steps before the capture"):
        with torch.cuda.graph(graph):
            functional.select([g], [g], [0.123], [0.5], [0], "triton")


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
        opt.backward(
            scaler.scale(nat + adv), natural=scaler.scale(nat), adversarial=scaler.scale(adv)
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
        saved = [torch.empty_like(t) for t in g]
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                selection = functional.select(g, g, *settings)
                selection.apply_([t.clone() for t in g], g, saved)
                selection.conserve_(g, saved)
                torch.cuda.synchronize()
        events = [e for e in profiler.events() if "LaunchKernel" in e.name]
        return len(events) - count  # the clones

    assert launches(3) == launches(40) <= 4
