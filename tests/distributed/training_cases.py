"""Training compressed models by data parallelism."""

import copy

import torch
from models import mixed, pixels, tiny_vit
from torch.nn.parallel import DistributedDataParallel


IMAGES_PER_PROCESS = 4

MODELS = {layout: mixed(tiny_vit(), layout).train() for layout in ("factors", "pivoted")}


def trained(model, images, labels, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels).backward()
        optimizer.step()
    return model


def compare(processes, layout, parallelize):
    """Train on shares of the images in parallel, and on all of them in each process; return how far the results differ."""
    original, count = MODELS[layout], processes.count
    images, labels = pixels(IMAGES_PER_PROCESS * count), torch.arange(IMAGES_PER_PROCESS * count) % 5
    alone = trained(copy.deepcopy(original), images, labels)
    own = slice(processes.index * IMAGES_PER_PROCESS, (processes.index + 1) * IMAGES_PER_PROCESS)
    parallel = trained(parallelize(copy.deepcopy(original)), images[own], labels[own])
    found = [getattr(each, "full_tensor", lambda each=each: each)() for each in parallel.parameters()]
    pairs = list(zip(original.parameters(), alone.parameters(), found, strict=True))
    return {
        "moved": max(float((b - a).abs().max()) for a, b, _ in pairs if a.numel()),
        "difference": max(float((c - b).abs().max()) for a, b, c in pairs if a.numel()),
    }


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for block in [module for module in model.modules() if type(module).__name__ == "ViTLayer"]:
        fully_shard(block)
    return fully_shard(model)


def case_data_parallel_factors(processes, folder):
    return compare(processes, "factors", DistributedDataParallel)


def case_data_parallel_pivoted(processes, folder):
    return compare(processes, "pivoted", DistributedDataParallel)


def case_fully_sharded_factors(processes, folder):
    return compare(processes, "factors", sharded)


def case_fully_sharded_pivoted(processes, folder):
    return compare(processes, "pivoted", sharded)
