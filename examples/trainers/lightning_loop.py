"""CURE in PyTorch Lightning, automatic optimization: `training_step` returns the scored loss.

Clipping, accumulation, precision, strategies and checkpoints are the Trainer's.
"""

import lightning as L
import torch
from digits import accuracy, cure_losses, loader, network, optimizer

from rgp_optim import ConsistencyReviser


class Cure(L.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.net = network()
        self.reviser = ConsistencyReviser(self.net, rate=0.5, horizon=0.5, total_steps=steps)

    def configure_optimizers(self):
        opt = optimizer(self, self.reviser)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 2)]

    def training_step(self, batch, _):
        loss, scores = cure_losses(self.net, self.reviser, *batch)
        return self.optimizers().scored(loss, **scores)


def main(epochs=3, ckpt_path=None, make=Cure, **trainer_options):
    batches = loader()
    module = make(steps=epochs * len(batches))
    trainer = L.Trainer(max_epochs=epochs, **trainer_options)
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    return accuracy(module.net.cpu(), batches), module, trainer


if __name__ == "__main__":
    result, *_ = main()
    print(f"natural accuracy {result:.1f} %")
