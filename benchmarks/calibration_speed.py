"""What calibration costs beside the plain passes of the same model over the same images, as ratios within one process.

    python benchmarks/calibration_speed.py --output results/calibration_speed

measures a model of DeiT-B's shape with random weights at 224 px; `--model` takes a checkpoint. Statistics of
`second_moment` stand beside a plain forward pass (evaluation mode, no gradients, no hooks), those of `kfac` beside a plain
forward and backward pass: once with gradients by activations alone, which is what the Fisher information needs, and once
with gradients of all parameters, as in training. Images are tensors in memory, passes take turns, and a ratio is the
median over the turns. A second figure decodes the images from JPEG files, on both sides of the ratio.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support import (
    add_model_arguments,
    described,
    interleaved,
    machine,
    open_model,
    random_images,
    ratio,
    table,
    write,
)
from transformers import PreTrainedModel, ViTImageProcessor

from optimum_mixrank.calibration.collect import collect_statistics
from optimum_mixrank.calibration.images.batches import Batch, ImageBatches
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.calibration.task import required_statistics
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.runtime.forward import activation_gradients


PAIRS = [
    ("second_moment", "forward", "at most 1.5"),
    ("second_moment, decoding", "forward, decoding", ""),
    ("kfac", "forward and backward, activations", ""),
    ("kfac", "forward and backward, parameters", "at most 1.4"),
]
"""Statistics, the plain pass that they stand beside, and the ratio that is wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--metrics", nargs="+", default=["second_moment", "kfac"], choices=["second_moment", "kfac"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    model, name = open_model(args)
    preloaded = random_images(args.images, model).to(args.device)
    batches = [Batch(part, index=index) for index, part in enumerate(preloaded.split(args.batch_size))]
    # Beforehand: to find the targets takes a pass of its own.
    targets = encoder_linears(model)
    required = {name: required_statistics([METRICS.create(name)], targets) for name in ("second_moment", "kfac")}
    with tempfile.TemporaryDirectory() as folder:
        from_files = decoded_anew(args, model, Path(folder))
        functions = {
            "forward": lambda: forward(model, batches),
            "second_moment": lambda: collect_statistics(model, batches, required["second_moment"]),
            "forward and backward, activations": lambda: forward_backward(model, batches, False),
            "forward and backward, parameters": lambda: forward_backward(model, batches, True),
            "kfac": lambda: collect_statistics(model, batches, required["kfac"]),
            "forward, decoding": lambda: forward(model, from_files),
            "second_moment, decoding": lambda: collect_statistics(model, from_files, required["second_moment"]),
        }
        pairs = [pair for pair in PAIRS if pair[0].split(",")[0] in args.metrics]
        needed = {name for what, plain, _ in pairs for name in (what, plain)}
        chosen = {name: function for name, function in functions.items() if name in needed}
        times = interleaved(chosen, args.repetitions, args.device)
    rows = []
    for what, plain, target in pairs:
        middle, least, most = ratio(times, what, plain)
        rows.append((f"`{what.split(',')[0]}`", plain, f"{middle:.2f}", f"{least:.2f} to {most:.2f}", target))
    settings = {
        "model": name,
        "images": args.images,
        "batch size": args.batch_size,
        "turns": args.repetitions,
        "dtype": "float32",
    }
    header = ("statistics of", "beside a plain pass", "ratio of times", "spread over turns", "wanted")
    lines = [described(settings, args.device), "", *table(header, rows)]
    write(args.output, {"settings": settings, "environment": machine(args.device), "seconds": times}, lines)


def forward(model: PreTrainedModel, batches: list[Batch] | ImageBatches) -> None:
    """Evaluation mode, no gradients, no hooks."""
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch.pixel_values.to(model.device))


def forward_backward(model: PreTrainedModel, batches: list[Batch], with_parameters: bool) -> None:
    """Gradients of the logits' log-likelihood of the likeliest class."""
    for batch in batches:
        if with_parameters:
            loss = likelihood(model(pixel_values=batch.pixel_values).logits)
            loss.backward()
            model.zero_grad()
        else:
            with activation_gradients(model):
                images = batch.pixel_values.detach().requires_grad_()
                torch.autograd.grad(likelihood(model(pixel_values=images).logits), images)


def likelihood(logits: torch.Tensor) -> torch.Tensor:
    """Summed over images."""
    return logits.log_softmax(dim=-1).amax(dim=-1).sum()


def decoded_anew(args: argparse.Namespace, model: PreTrainedModel, folder: Path) -> ImageBatches:
    """Batches that decode JPEG files of 500 by 375 pixels whenever they are iterated over."""
    generator = np.random.default_rng(0)
    files = []
    for index in range(args.images):
        # Smooth pictures with some noise compress about as photographs do.
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse, dtype=np.int16) + generator.normal(0, 8, (375, 500, 3)).astype(np.int16)
        files.append(folder / f"{index:05d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    size = model.config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    return ImageBatches([str(file) for file in files], image_processor=processor, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
