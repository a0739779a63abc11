"""CURE with Lightning Fabric: `fabric.backward` in place of `.backward`; try ``--devices 2``."""

import argparse

import lightning as L
from digits import accuracy, cure_losses, loader, network, optimizer

from rgp_optim import ConsistencyReviser


def setup(fabric, steps, batches):
    model = network()
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=steps)
    model, opt = fabric.setup(model, optimizer(model, reviser))
    return model, opt, reviser, fabric.setup_dataloaders(batches)


def train(fabric, model, opt, reviser, batches):
    for x, y in batches:
        loss, scores = cure_losses(model, reviser, x, y, attacked=model.module)
        opt.zero_grad()
        fabric.backward(opt.scored(loss, **scores))
        opt.step()


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
