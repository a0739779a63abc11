"""CURE with Hugging Face's `Trainer`: `compute_loss` returns the scored loss.

It calls the model that it is given, which applies the Trainer's precision and
DistributedDataParallel, and scores with your own wrapper, since the Trainer replaces
`self.optimizer`.
"""

import torch
import torch.nn.functional as F
from digits import accuracy, cure_losses, loader, network, optimizer
from transformers import Trainer, TrainingArguments

from rgp_optim import ConsistencyReviser


class Model(torch.nn.Module):
    """The network; with labels, the outputs that `Trainer` evaluates."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CureTrainer(Trainer):
    def __init__(self, model, args, steps, **kwargs):
        self.raw = optimizer(model)
        super().__init__(model, args, optimizers=(self.raw, None), **kwargs)
        # On the model's device: Trainer has moved it.
        self.reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=steps)
        self.raw.reviser = self.reviser

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        loss, scores = cure_losses(model, self.reviser, inputs["x"], inputs["labels"])
        return self.raw.scored(loss, **scores)


def main(epochs=3, ckpt_path=None, **options):
    batches = loader()
    data = [{"x": x, "labels": y} for x, y in batches.dataset]
    size = {"per_device_train_batch_size": batches.batch_size, "num_train_epochs": epochs}
    args = TrainingArguments(**size, **options)
    steps = epochs * len(batches)
    trainer = CureTrainer(Model(), args, steps, train_dataset=data, eval_dataset=data)
    trainer.train(ckpt_path)
    return accuracy(trainer.model.cpu(), batches), trainer.model, trainer


if __name__ == "__main__":
    result, *_ = main()
    print(f"natural accuracy {result:.1f} %")
