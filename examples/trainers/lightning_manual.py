"""CURE in PyTorch Lightning, manual optimization: every backward pass is `manual_backward`."""

import lightning as L
import torch
import torch.nn.functional as F
from digits import EPS, accuracy, loader, network

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


class Cure(L.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.automatic_optimization = False
        self.net = network()
        self.reviser = ConsistencyReviser(self.net, rate=0.5, horizon=0.5, total_steps=steps)

    def configure_optimizers(self):
        opt = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)

    def training_step(self, batch, _):
        opt = self.optimizers()
        x, y = batch
        x_adv = kl_attack(self.net, x, eps=EPS, steps=3)
        logits, logits_adv = self.net(x), self.net(x_adv)
        loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
        loss = loss + self.reviser(x, x_adv, logits, logits_adv)
        opt.zero_grad()
        with opt.score("natural"):
            self.manual_backward(F.cross_entropy(logits, y), retain_graph=True)
        with opt.score("adversarial"):
            self.manual_backward(F.cross_entropy(logits_adv, y), retain_graph=True)
        self.manual_backward(loss)
        opt.step()
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
