"""CURE with Hugging Face Accelerate.

`accelerate launch examples/trainers/accelerate_loop.py`. Score with the optimizer of your own, for
the prepared one has no other methods than torch's; step the prepared one, which knows about
accumulation and scalers.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import EPS, accuracy, loader, network

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


def setup(accelerator, steps, batches):
    model = network()
    raw = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    raw = RGPSelectiveOptimizer(raw, update_fraction=0.7, alpha=0.1)
    model, opt, batches = accelerator.prepare(model, raw, batches)
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=steps)
    accelerator.register_for_checkpointing(reviser)
    return model, raw, opt, reviser, batches


def train(accelerator, model, raw, opt, reviser, batches):
    for x, y in batches:
        with accelerator.accumulate(model):
            x_adv = kl_attack(model, x, eps=EPS, steps=3)
            logits, logits_adv = model(x), model(x_adv)
            loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
            loss = loss + reviser(x, x_adv, logits, logits_adv)
            with raw.score("natural"):
                accelerator.backward(F.cross_entropy(logits, y), retain_graph=True)
            with raw.score("adversarial"):
                accelerator.backward(F.cross_entropy(logits_adv, y), retain_graph=True)
            accelerator.backward(loss)
            opt.step()
            opt.zero_grad()
            if accelerator.sync_gradients:  # a step was taken
                reviser.update()


def main(epochs=3, **options):
    accelerator = Accelerator(**options)
    batches = loader()
    parts = setup(accelerator, epochs * len(batches), batches)
    for _ in range(epochs):
        train(accelerator, *parts)
    model = accelerator.unwrap_model(parts[0]).cpu()
    result = accuracy(model, loader())
    accelerator.print(f"natural accuracy {result:.1f} %")  # once
    return result, model


if __name__ == "__main__":
    main()
