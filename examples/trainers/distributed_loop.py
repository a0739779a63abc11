"""CURE in a plain loop on several processes: DistributedDataParallel, or FSDP2 with ``--fsdp``.

torchrun --nproc-per-node 2 examples/trainers/distributed_loop.py [--fsdp]
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import EPS, accuracy, loader, network
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from rgp_optim import ConsistencyReviser, RGPSelectiveOptimizer, kl_adv_loss, kl_attack


def main(fsdp=False, epochs=3):
    batches = loader(sampler=DistributedSampler)
    model = network()
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=epochs * len(batches))
    if fsdp:  # the reviser's copy is sharded as the model is
        model, _ = fully_shard(model), fully_shard(reviser.model)
    else:
        model = DistributedDataParallel(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = RGPSelectiveOptimizer(opt, update_fraction=0.7, alpha=0.1)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            x_adv = kl_attack(model, x, eps=EPS, steps=3)
            logits, logits_adv = model(x), model(x_adv)
            loss = kl_adv_loss(logits, logits_adv, y, beta=2.0)
            loss = loss + reviser(x, x_adv, logits, logits_adv)
            natural, adversarial = F.cross_entropy(logits, y), F.cross_entropy(logits_adv, y)
            opt.zero_grad()
            opt.backward(loss, natural=natural, adversarial=adversarial)
            opt.step()
            reviser.update()
    return accuracy(model, loader()), model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fsdp", action="store_true")
    dist.init_process_group("gloo")  # "nccl" on GPUs
    result, _ = main(**vars(parser.parse_args()))
    if dist.get_rank() == 0:
        print(f"natural accuracy {result:.1f} %")
    dist.destroy_process_group()
