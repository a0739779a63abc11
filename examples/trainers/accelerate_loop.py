"""CURE with Hugging Face Accelerate: ``accelerate launch examples/trainers/accelerate_loop.py``.

Score with your own wrapper, step the prepared one, which knows about accumulation and scalers.
"""

from accelerate import Accelerator
from digits import accuracy, cure_losses, loader, network, optimizer

from rgp_optim import ConsistencyReviser


def setup(accelerator, steps, batches):
    model = network()
    raw = optimizer(model)
    model, opt, batches = accelerator.prepare(model, raw, batches)
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=steps)
    raw.reviser = reviser
    return model, raw, opt, reviser, batches


def train(accelerator, model, raw, opt, reviser, batches):
    for x, y in batches:
        with accelerator.accumulate(model):
            loss, scores = cure_losses(model, reviser, x, y)
            accelerator.backward(raw.scored(loss, **scores))
            opt.step()
            opt.zero_grad()


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
