"""Compressions by one layer-wise step, and the activations of their layers."""

from __future__ import annotations

import torch
from compensation.cases import FAMILIES, config, images

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.compensation.held_out import split_batches


SEED = 5


def run(family, step, **changes):
    """Return both models, the result of the step, and the images it learned from with their mirror images."""
    original = FAMILIES[family]()
    fields = {"compensation": [step], "metric": "second_moment", "layout": "factors", "seed": SEED}
    settings = config(**{**fields, **changes})
    compressor = MixRankCompressor(original)
    batches = list(images(256).split(32))
    compressed = compressor.compress(settings, batches)
    [result] = compressor.report.compensation
    learn, _ = split_batches(dict(enumerate(batches)), settings.held_out_ratio, SEED)
    seen = torch.cat(list(learn.values()))
    return original.eval(), compressed.eval(), result, torch.cat([seen, seen.flip(-1)])


@torch.no_grad()
def activations(model, name, pixels):
    """Return the inputs and outputs of a layer, `[tokens, n]` and `[tokens, m]`, float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    model(pixel_values=pixels)
    handle.remove()
    [(inputs, outputs)] = seen
    return inputs.double().flatten(0, -2), outputs.double().flatten(0, -2)
