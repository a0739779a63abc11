"""CURE with timm's `NativeScaler`: backward, unscaling, clipping and step in one call."""

import torch
from digits import accuracy, cure_losses, loader, network, optimizer
from timm.utils import NativeScaler

from rgp_optim import ConsistencyReviser


def main(epochs=3, device="cpu", dtype=torch.bfloat16, every=1):
    batches = loader()
    model = network().to(device)
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=epochs * len(batches))
    opt = optimizer(model, reviser)
    loss_scaler = NativeScaler(device=device)
    for n in range(epochs):
        for i, (x, y) in enumerate(batches, start=n * len(batches) + 1):
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, dtype):
                loss, scores = cure_losses(model, reviser, x, y)
            steps = i % every == 0
            loss = opt.scored(loss, **scores)
            loss_scaler(loss, opt, 1.0, parameters=model.parameters(), need_update=steps)
            if steps:
                opt.zero_grad()
    return accuracy(model.cpu(), batches), model


if __name__ == "__main__":
    result, _ = main()
    print(f"natural accuracy {result:.1f} %")
