"""CURE with Lightning Fabric: `fabric.backward` in place of `.backward`, or `--devices 2`."""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from digits import EPS, accuracy, loader, network

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


def setup(fabric, steps, batches):
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
    model, opt = fabric.setup(model, opt)
    reviser = ConsistencyReviser(model.module, rate=0.5, horizon=0.5, total_steps=steps)
    return model, opt, reviser, fabric.setup_dataloaders(batches)


def train(fabric, model, opt, reviser, batches):
    for x, y in batches:
        x_adv = kl_attack(model.module, x, eps=EPS, steps=3)
        logits, logits_adv = model(x), model(x_adv)
        loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
        loss = loss + reviser(x, x_adv, logits, logits_adv)
        opt.zero_grad()
        with opt.score("natural"):
            fabric.backward(F.cross_entropy(logits, y), retain_graph=True)
        with opt.score("adversarial"):
            fabric.backward(F.cross_entropy(logits_adv, y), retain_graph=True)
        fabric.backward(loss)
        opt.step()
        reviser.update()


def main(epochs=3, **options):
    fabric = L.Fabric(**options)
    fabric.launch()
    batches = loader()
    parts = setup(fabric, epochs * len(batches), batches)
    for _ in range(epochs):
        train(fabric, *parts)
    model = parts[0].module.cpu()
    result = accuracy(model, loader())
    fabric.print(f"natural accuracy {result:.1f} %")  # once
    return result, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    main(accelerator="auto", **vars(parser.parse_args()))
