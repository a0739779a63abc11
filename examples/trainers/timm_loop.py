"""CURE with timm's `NativeScaler`: backward, unscaling, clipping and step in one call."""

import torch
import torch.nn.functional as F
from digits import EPS, accuracy, loader, network
from timm.utils import NativeScaler

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


def main(epochs=3, device="cpu", dtype=torch.bfloat16, every=1):
    batches = loader()
    model = network().to(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=epochs * len(batches))
    loss_scaler = NativeScaler(device=device)
    scaler = loss_scaler._scaler  # both scores on the scale of the loss
    for n in range(epochs):
        for i, (x, y) in enumerate(batches, start=n * len(batches) + 1):
            x, y = x.to(device), y.to(device)
            with torch.autocast(device, dtype):
                x_adv = kl_attack(model, x, eps=EPS, steps=3)
                logits, logits_adv = model(x), model(x_adv)
                loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
                loss = loss + reviser(x, x_adv, logits, logits_adv)
                natural = F.cross_entropy(logits, y)
                adversarial = F.cross_entropy(logits_adv, y)
            with opt.score("natural"):
                scaler.scale(natural).backward(retain_graph=True)
            with opt.score("adversarial"):
                scaler.scale(adversarial).backward(retain_graph=True)
            steps = i % every == 0
            loss_scaler(loss, opt, 1.0, parameters=model.parameters(), need_update=steps)
            if steps:
                opt.zero_grad()
                reviser.update()
    return accuracy(model.cpu(), batches), model


if __name__ == "__main__":
    result, _ = main()
    print(f"natural accuracy {result:.1f} %")
