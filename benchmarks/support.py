"""What the benchmarks of speed and memory share: models of known shapes, timing, and tables with their settings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from optimum_mixrank.reporting.build import environment


SHAPES: dict[str, dict[str, int]] = {
    "deit-s": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6},
    "deit-b": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-l": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
"""Encoders by name, all with patches of 16 pixels."""


def add_model_arguments(parser: argparse.ArgumentParser, shape: str = "deit-b") -> None:
    """Options of `open_model` and of what all benchmarks write."""
    parser.add_argument("--model", help="checkpoint; default: random weights of --shape")
    parser.add_argument("--shape", default=shape, choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has, for a trial")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.md and OUTPUT.json are written")


def open_model(args: argparse.Namespace) -> tuple[PreTrainedModel, str]:
    """The model that the options name, in float32 and evaluation mode, and its description."""
    if args.model is not None:
        model = AutoModelForImageClassification.from_pretrained(args.model, dtype=torch.float32)
        return model.to(args.device).eval(), Path(args.model).name
    model = random_model(args.shape, args.image_size, args.blocks)
    blocks = model.config.num_hidden_layers
    name = f"{args.shape} shape at {args.image_size} px, {blocks} blocks, random weights"
    return model.to(args.device), name


def random_model(shape: str, image_size: int = 224, blocks: int | None = None) -> PreTrainedModel:
    """A ViT with random weights and 1,000 classes, in evaluation mode."""
    torch.manual_seed(0)
    sizes = dict(SHAPES[shape])
    if blocks is not None:
        sizes["num_hidden_layers"] = blocks
    return ViTForImageClassification(ViTConfig(image_size=image_size, patch_size=16, num_labels=1000, **sizes)).eval()


def random_images(count: int, model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """`[count, 3, height, width]`, normally distributed, on the host."""
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seconds_of(function: Callable[[], Any], device: str = "cpu") -> float:
    """Wall time of a call, with all that it has started on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repetitions: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Wall times of several functions that take turns, so that what else the machine does falls on all alike.

    Each runs once beforehand, unmeasured.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions):
        # A B, then B A: none always comes after the same other.
        names = list(functions) if repetition % 2 == 0 else list(functions)[::-1]
        for name in names:
            times[name].append(seconds_of(functions[name], device))
    return times


def ratio(times: Mapping[str, Sequence[float]], what: str, plain: str) -> tuple[float, float, float]:
    """Median of the ratios of neighbours in one round, the lowest and the highest."""
    ratios = [ours / theirs for ours, theirs in zip(times[what], times[plain], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware and threads."""
    found = environment(torch.device(device))
    return {**found, "processor": _processor(), "cores": len(os.sched_getaffinity(0))}


def described(settings: Mapping[str, Any], device: str = "cpu") -> str:
    """A sentence of settings, one of the machine."""
    here = machine(device)
    what = ", ".join(f"{name} {value}" for name, value in settings.items())
    accelerator = f", {here['device']}" if device.startswith("cuda") else ""
    return (
        f"{what}; PyTorch {here['torch']}, Transformers {here['transformers']}, {here['processor']}{accelerator}, "
        f"{here['cores']} cores, {here['threads']} threads."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows)]


def write(output: Path, record: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Write the record as JSON and the lines as Markdown, and print these."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
