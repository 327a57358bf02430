"""What `gpu.py` measures: each part in a process of its own, which keeps every figure as soon as it has it."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from calibration_speed import forward, forward_backward
from decomposition_speed import random_calibration
from gpu import KEPT, LAYOUTS
from support import interleaved, random_images, random_model, ratio, seconds_of
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig, ViTForImageClassification

from optimum_mixrank import LowRankLinear, MixRankCompressor, MixRankConfig, PivotedLinear
from optimum_mixrank.calibration.collect import collect_statistics
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.calibration.task import required_statistics
from optimum_mixrank.checkpoint.factorize import insert_layer, rank_map_of
from optimum_mixrank.checkpoint.names import Target
from optimum_mixrank.checkpoint.quantizer import attach_configuration
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.evaluation.flops import flops_per_image
from optimum_mixrank.evaluation.latency import measure_latency, time_ratio
from optimum_mixrank.pipeline.decompose import decompose_layers
from optimum_mixrank.runtime.distributed import disconnect, find_processes


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILATION = 45
"""Seconds that have to be left before three models are compiled."""

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass
class Setting:
    """How to measure.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        tiny: Whether tiny models stand in for the real ones, to try the script.
        until: When the part has to end, by `time.time()`.
        path: Where the figures are kept.
        figures: What was found so far, by name.
    """

    device: str
    tiny: bool
    until: float
    path: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def keep(self, name: str, value: Any) -> None:
        """Add a figure and write all of them, so that they outlive this process."""
        self.figures[name] = value
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.figures))
        temporary.replace(self.path)

    def has_time(self, seconds: float = 0) -> bool:
        """Return whether so many seconds are left."""
        return time.time() + seconds < self.until

    def shapes(self, *names: str) -> list[str]:
        """Return names of shapes; of the tiny one alone in a trial."""
        return ["tiny"] if self.tiny else list(names)

    def model(self, shape: str, blocks: int | None = None) -> PreTrainedModel:
        """Return a dense model with random weights on the CPU."""
        if shape != "tiny":
            return random_model(shape, blocks=blocks)
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=10, **TINY)).eval()

    def attempt(self, name: str, measure: Callable[[], Any]) -> None:
        """Keep what a measurement returns, or the error that it ends with; running out of memory is no reason to stop."""
        try:
            self.keep(name, measure())
        except Exception as error:
            self.keep(
                name, {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
            )
            if self.device == "cuda":
                torch.cuda.empty_cache()


def factored(model: PreTrainedModel, layout: str) -> PreTrainedModel:
    """Return a copy of a model whose linear layers keep `KEPT` of their weights, as random factors of this layout."""
    model = copy.deepcopy(model)
    targets = encoder_linears(model)
    generator = torch.Generator().manual_seed(0)
    for target in targets:
        insert_layer(model, target, _random_layer(target, layout, generator))
    rank_map = {name: entry.to_dict() for name, entry in rank_map_of(model, targets).items()}
    attach_configuration(model, MixRankConfig(layout=layout, rank_map=rank_map))
    return model.eval()


def _random_layer(target: Target, layout: str, generator: torch.Generator) -> torch.nn.Module:
    (m, n), bias = target.shape, target.module.bias
    if layout == "factors":
        rank = max(1, int(KEPT * m * n / (m + n)))
    else:
        # r (m + n) - r² values.
        rank = max(1, int(((m + n) - math.sqrt((m + n) ** 2 - 4 * KEPT * m * n)) / 2))
    A = 0.02 * torch.randn(rank, n, generator=generator)
    if layout == "factors":
        return LowRankLinear.from_factors(A, torch.randn(m, rank, generator=generator) / math.sqrt(rank), bias)
    pivots = torch.randperm(m, generator=generator)[:rank].sort().values
    C = torch.randn(m - rank, rank, generator=generator) / math.sqrt(rank)
    return PivotedLinear.from_pivots(A, C, pivots, bias)


def variants(setting: Setting, shape: str) -> dict[str, PreTrainedModel]:
    """Return the dense model and its compressed forms, on the CPU in float32."""
    dense = setting.model(shape)
    return {"dense": dense, **{layout: factored(dense, layout) for layout in LAYOUTS}}


@torch.no_grad()
def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=images).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest value."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def agreement(setting: Setting) -> None:
    """Logits, statistics and whole compressions on the device and on the CPU, in float32."""
    for shape in setting.shapes("deit-s", "deit-b"):
        for name, model in variants(setting, shape).items():
            images = random_images(4, model)
            expected = logits(model, images)
            found = logits(model.to(setting.device), images.to(setting.device))
            setting.keep(f"{shape}, {name}: logits", relative(found, expected))
    shape = setting.shapes("deit-s")[0]
    made = {}
    for device in ("cpu", setting.device):
        model = setting.model(shape, blocks=3)
        images = random_images(16, model)
        compressor = MixRankCompressor(model.to(device))
        config = MixRankConfig(recipe="fast", structures=["rank"], compression_ratio=0.4, compression_scope="targets")
        result = compressor.compress(config, [images])
        ranks = {name: entry["rank"] for name, entry in result.config.quantization_config.rank_map.items()}
        made[device] = ranks, logits(result, images.to(device))
    (ranks, expected), (found_ranks, found) = made["cpu"], made[setting.device]
    same = [ranks.get(name) == rank for name, rank in found_ranks.items()]
    setting.keep(f"{shape}, 3 blocks compressed on both: share of equal ranks", sum(same) / len(same))
    setting.keep(f"{shape}, 3 blocks compressed on both: logits", relative(found, expected))


def reload(setting: Setting) -> None:
    """A saved model, opened on the device again: largest difference of the logits, which has to be 0."""
    dense = setting.model(setting.shapes("deit-s")[0])
    for layout, (dtype, kind) in itertools.product(LAYOUTS, DTYPES.items()):
        model = factored(dense, layout).to(setting.device, kind)
        images = random_images(4, model).to(setting.device, kind)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = AutoModelForImageClassification.from_pretrained(
                folder, dtype=kind, device_map=setting.device
            ).eval()
        difference = (logits(again, images).float() - logits(model, images).float()).abs().max().item()
        setting.keep(f"{layout}, {dtype}", difference)


def calibration(setting: Setting) -> None:
    """The time of a calibration pass over that of a plain pass."""
    count, size, turns = (8, 4, 2) if setting.tiny else (128, 32, 5)
    shape = setting.shapes("deit-b")[0]
    model = setting.model(shape).to(setting.device)
    images = random_images(count, model).to(setting.device)
    batches = [Batch(part, index=index) for index, part in enumerate(images.split(size))]
    targets = encoder_linears(model)
    required = {name: required_statistics([METRICS.create(name)], targets) for name in ("second_moment", "kfac")}
    plain = {
        "second_moment": ("forward pass", lambda: forward(model, batches)),
        "kfac": ("forward and backward pass", lambda: forward_backward(model, batches, True)),
    }
    for metric, (what, function) in plain.items():
        functions = {"plain": function, "ours": lambda m=metric: collect_statistics(model, batches, required[m])}
        times = interleaved(functions, turns, setting.device)
        middle, low, high = ratio(times, "ours", "plain")
        values = {
            "ratio": middle,
            "low": low,
            "high": high,
            "images per second": count / statistics.median(times["ours"]),
        }
        setting.keep(f"{shape}, {metric} against a {what}", values)


def decomposition(setting: Setting) -> None:
    """Seconds for all layers of a model, in float64."""
    for shape in setting.shapes("deit-b", "vit-l"):
        model = setting.model(shape).to(setting.device)
        targets = encoder_linears(model)
        for name in ("second_moment", "kfac"):
            metric = METRICS.create(name)
            work = functools.partial(
                decompose_layers, metric, targets, random_calibration(metric, model, setting.device), "pivoted"
            )
            setting.keep(f"{shape}, {len(targets)} layers, {name}, seconds", seconds_of(work, setting.device))


def compile_(setting: Setting) -> None:
    """`torch.compile(fullgraph=True)`: the difference from eager mode, and the seconds of the first call."""
    for name, model in variants(setting, setting.shapes("deit-s")[0]).items():
        model.to(setting.device)
        images = random_images(8, model).to(setting.device)

        def measure(model: PreTrainedModel = model, images: torch.Tensor = images) -> dict[str, float]:
            torch._dynamo.reset()
            compiled = compiled_form(setting, model)
            start = time.perf_counter()
            found = logits(compiled, images).cpu()
            return {"seconds": time.perf_counter() - start, "difference": relative(found, logits(model, images))}

        setting.attempt(name, measure)


def compiled_form(setting: Setting, model: PreTrainedModel) -> Any:
    """Return a compiled model; a trial traces it without making kernels, which takes a compiler for C++."""
    return torch.compile(model, fullgraph=True, dynamic=False, backend="eager" if setting.tiny else "inductor")


def latency(setting: Setting) -> None:
    """Dense and compressed models in turns, in one process: first all of eager mode, then compiled as time allows."""
    sizes = (1, 2) if setting.tiny else (1, 8, 64)
    built = {shape: variants(setting, shape) for shape in setting.shapes("deit-s", "deit-b", "vit-l")}
    for shape, models in built.items():
        flops = {name: flops_per_image(model) for name, model in models.items()}
        setting.keep(f"{shape}, ideal", {name: flops[name] / flops["dense"] for name in LAYOUTS})
    for (shape, models), dtype in itertools.product(built.items(), DTYPES):
        for model in models.values():
            model.to(setting.device, DTYPES[dtype])
        for size in sizes:
            _time(setting, f"{shape}, eager, {dtype}, batch {size}", models, size)
    for dtype, size, (shape, models) in itertools.product(("bf16", "fp16", "fp32"), sizes, built.items()):
        name = f"{shape}, compiled, {dtype}, batch {size}"
        if not setting.has_time(0 if setting.tiny else COMPILATION):
            setting.keep(name, {"error": "not reached within the time of this part"})
            continue
        torch._dynamo.reset()
        compiled = {
            each: compiled_form(setting, model.to(setting.device, DTYPES[dtype])) for each, model in models.items()
        }
        _time(setting, name, compiled, size)


def _time(setting: Setting, name: str, models: Mapping[str, torch.nn.Module], size: int) -> None:
    def measure() -> dict[str, Any]:
        first = next(iter(models.values()))
        images = random_images(size, first).to(setting.device, next(first.parameters()).dtype)
        turns = {"repeats": 6, "min_seconds": 0.0} if setting.tiny else {"repeats": 11, "min_seconds": 0.02}
        found = measure_latency(models, {"pixel_values": images}, **turns)
        values: dict[str, Any] = {"dense ms": 1000 * found["dense"].median}
        for layout in LAYOUTS:
            against = time_ratio(found[layout], found["dense"])
            values[layout] = {"ratio": against.median, "low": against.low, "high": against.high}
        return values

    setting.attempt(name, measure)


def nccl(setting: Setting) -> None:
    """Two processes, each with a GPU, compress one model together; compared with what one does alone."""
    if setting.device != "cuda" or torch.cuda.device_count() < 2:
        setting.keep("skipped", "needs two CUDA devices")
        return
    alone = _compress_for_nccl()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "together.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, str(Path(__file__)), str(output)]
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"})
        together = torch.load(output, weights_only=True)
    setting.keep("seconds alone", alone["seconds"])
    setting.keep("seconds of two processes", together["seconds"])
    setting.keep("logits", relative(together["logits"], alone["logits"]))


def _compress_for_nccl() -> dict[str, Any]:
    processes = find_processes()
    torch.cuda.set_device(processes.device)
    model = random_model("deit-s", blocks=4)
    images = random_images(64, model)
    compressor = MixRankCompressor(model.to(processes.device))
    config = MixRankConfig(recipe="fast", compression_ratio=0.4)
    start = time.perf_counter()
    result = compressor.compress(config, list(images.split(8)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "logits": logits(result, images[:8].to(result.device)).cpu()}


PARTS: dict[str, Callable[[Setting], None]] = {
    "agreement": agreement,
    "reload": reload,
    "calibration": calibration,
    "decomposition": decomposition,
    "compile": compile_,
    "nccl": nccl,
    "latency": latency,
}


if __name__ == "__main__":
    found = _compress_for_nccl()
    if find_processes().is_main:
        torch.save(found, sys.argv[1])
    disconnect()
