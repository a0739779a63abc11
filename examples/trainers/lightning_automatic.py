"""CURE in PyTorch Lightning, automatic optimization.

Lightning calls ``zero_grad`` between `training_step` and `backward`, so the scores are taken in
`backward`. Clipping, accumulation, precision and strategies are the Trainer's.
"""

import lightning as L
import torch
import torch.nn.functional as F
from digits import EPS, accuracy, loader, network

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


class Cure(L.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.net = network()
        self.reviser = ConsistencyReviser(self.net, rate=0.5, horizon=0.5, total_steps=steps)

    def configure_optimizers(self):
        opt = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 2)]

    def training_step(self, batch, _):
        x, y = batch
        x_adv = kl_attack(self.net, x, eps=EPS, steps=3)
        logits, logits_adv = self.net(x), self.net(x_adv)
        self.natural = F.cross_entropy(logits, y)
        self.adversarial = F.cross_entropy(logits_adv, y)
        loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
        return loss + self.reviser(x, x_adv, logits, logits_adv)

    def backward(self, loss):
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # "16-mixed" has one
        scale = scaler.scale if scaler else lambda each: each  # the loss is scaled already
        natural, adversarial = scale(self.natural), scale(self.adversarial)
        self.optimizers().backward(loss, natural=natural, adversarial=adversarial)

    def optimizer_step(self, *args, **kwargs):  # once for each step, not for each micro-batch
        super().optimizer_step(*args, **kwargs)
        self.reviser.update()

    def on_fit_start(self):
        self.reviser.model.to(self.device)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["reviser"] = self.reviser.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.reviser.load_state_dict(checkpoint["reviser"])


def main(epochs=3, ckpt_path=None, **trainer_options):
    batches = loader()
    module = Cure(steps=epochs * len(batches))
    trainer = L.Trainer(max_epochs=epochs, **trainer_options)
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    return accuracy(module.net.cpu(), batches), module, trainer


if __name__ == "__main__":
    result, *_ = main()
    print(f"natural accuracy {result:.1f} %")
