"""CURE in a plain loop on several processes: DistributedDataParallel, or FSDP2 with ``--fsdp``.

torchrun --nproc-per-node 2 examples/trainers/distributed_loop.py [--fsdp]
"""

import argparse

import torch.distributed as dist
from digits import accuracy, cure_losses, loader, network, optimizer
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from rgp_optim import ConsistencyReviser


def main(fsdp=False, epochs=3):
    batches = loader(sampler=DistributedSampler)
    model = network()
    reviser = ConsistencyReviser(model, rate=0.5, horizon=0.5, total_steps=epochs * len(batches))
    if fsdp:  # the reviser's copy is sharded as the model is
        model, _ = fully_shard(model), fully_shard(reviser.model)
    else:
        model = DistributedDataParallel(model)
    opt = optimizer(model, reviser)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            loss, scores = cure_losses(model, reviser, x, y)
            opt.zero_grad()
            opt.scored(loss, **scores).backward()
            opt.step()
    return accuracy(model, loader()), model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fsdp", action="store_true")
    dist.init_process_group("gloo")  # "nccl" on GPUs
    result, _ = main(**vars(parser.parse_args()))
    if dist.get_rank() == 0:
        print(f"natural accuracy {result:.1f} %")
    dist.destroy_process_group()
