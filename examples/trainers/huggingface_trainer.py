"""CURE with Hugging Face's `Trainer`: `compute_loss` returns the scored loss."""

import tempfile

import torch
import torch.nn.functional as F
from digits import accuracy, cure_losses, loader, network, optimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from rgp_optim import ConsistencyReviser


class Model(nn.Module):
    """The network, with inputs and outputs as `Trainer` names them."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Update(TrainerCallback):
    def __init__(self, reviser):
        self.reviser = reviser

    def on_step_end(self, args, state, control, **kwargs):
        self.reviser.update()


class CureTrainer(Trainer):
    def __init__(self, *args, raw, reviser, **kwargs):
        super().__init__(*args, optimizers=(raw, None), callbacks=[Update(reviser)], **kwargs)
        self.raw, self.reviser = raw, reviser

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        loss, scores = cure_losses(self.model.net, self.reviser, inputs["x"], inputs["labels"])
        return self.raw.scored(loss, **scores)


def collate(rows):
    x, labels = zip(*rows, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(labels)}


def main(epochs=3, **options):
    batches = loader()
    model = Model()
    steps = epochs * len(batches)
    reviser = ConsistencyReviser(model.net, rate=0.5, horizon=0.5, total_steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            **options,
        )
        trainer = CureTrainer(
            model,
            args,
            train_dataset=batches.dataset,
            eval_dataset=batches.dataset,
            data_collator=collate,
            raw=optimizer(model),
            reviser=reviser,
        )
        trainer.train()
    return accuracy(model.net.cpu(), batches), model.net, trainer


if __name__ == "__main__":
    result, *_ = main()
    print(f"natural accuracy {result:.1f} %")
