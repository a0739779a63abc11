"""CURE in one file, to be copied: natural training, CURE, natural accuracy and PGD-20.

    python examples/quickstart.py                         # about a minute on a CPU
    python examples/quickstart.py --checkpoint run.pt     # interrupted, the same command resumes

Requires PyTorch, scikit-learn and this library. For other data replace `load_data`, `network` and
`EPS`: too large a radius for the data ruins both accuracies.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack, pgd_attack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 0.15  # how far the attacks may move a pixel, of images in [0, 1]
BETA = 6.0  # weight of the KL term, which trades natural accuracy for robustness
GAMMA = 1.0  # weight of the consistency loss
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def load_data():
    """Return batches for training and for testing: images, [batch, 1, 8, 8], and labels."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target)
    test = torch.arange(len(y)) % 4 == 3
    train_set, test_set = TensorDataset(x[~test], y[~test]), TensorDataset(x[test], y[test])
    return DataLoader(train_set, 64, shuffle=True, drop_last=True), DataLoader(test_set, 500)


def network():
    layers = []
    for c_in, c_out, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
        conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


@torch.no_grad()
def evaluate(model, batches):
    """Return the accuracy on natural images and under PGD-20, as text."""
    model.eval()
    natural = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]
    attacked = [(pgd_attack(model, x, y, eps=EPS, generator=0), y) for x, y in natural]
    right = (torch.cat([model(x).argmax(1) == y for x, y in part]) for part in (natural, attacked))
    return "natural {:.1%}, PGD-20 {:.1%}".format(*(part.float().mean() for part in right))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="epochs of CURE (20)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--checkpoint", type=Path, help="saved after each epoch, and resumed from")
    args = parser.parse_args(argv)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.bf16)
    torch.manual_seed(0)
    (train, test), model = load_data(), network().to(DEVICE)
    steps = args.epochs * len(train)
    try:  # the averaged copy, which follows the model until CURE's first step
        reviser = ConsistencyReviser(model, horizon=0.064, total_steps=steps)
    except ValueError as error:
        parser.error(f"--epochs {args.epochs} are too few: {error}")
    opt = torch.optim.SGD(model.parameters(), **SGD)
    opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1, reviser=reviser)
    # The learning rate rises over a tenth of the steps: without that the run ends lower.
    scheduler = OneCycleLR(opt, SGD["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False)
    saved, done = {"model": model, "opt": opt, "scheduler": scheduler}, 0

    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=DEVICE)
        if state["flags"] != (args.epochs, args.bf16):
            found = "has --epochs {}, bf16 {}.".format(*state["flags"])
            parser.error(f"{args.checkpoint}: {found} Give the same flags, or another file.")
        for name, part in saved.items():  # the model first; the optimizer's has the averaged copy
            part.load_state_dict(state[name])
        done = state["epoch"]
    else:  # CURE starts from a network trained on natural images
        plain = torch.optim.SGD(model.parameters(), **SGD)
        for x, y in (batch for _ in range(8) for batch in train):
            with autocast:
                loss = F.cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))
            plain.zero_grad()
            loss.backward()
            plain.step()
        print(f"natural training: test images {evaluate(model, test)}", flush=True)

    for epoch in range(done, args.epochs):
        torch.manual_seed(epoch + 1)  # a resumed run draws as an uninterrupted one
        model.train()
        for x, y in train:
            x, y = x.to(DEVICE), y.to(DEVICE)
            with autocast:
                x_adv = kl_attack(model, x, eps=EPS, steps=7)
                logits, logits_adv = model(x), model(x_adv)
                loss = kl_adv_loss(logits, logits_adv, y, beta=BETA)
                loss = loss + GAMMA * reviser(x, x_adv, logits, logits_adv)
                natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            loss = opt.scored(loss, natural=natural, adversarial=adversarial)
            opt.zero_grad()
            loss.backward()
            opt.step()  # moves the averaged copy, too
            scheduler.step()
        print(f"CURE {epoch + 1}/{args.epochs}: loss {loss.item():.3f}", flush=True)
        if args.checkpoint:
            state = {name: part.state_dict() for name, part in saved.items()}
            state |= {"epoch": epoch + 1, "flags": (args.epochs, args.bf16)}
            torch.save(state, args.checkpoint)
    print(f"CURE: test images {evaluate(model, test)}")


if __name__ == "__main__":
    main()
