"""Time of decomposition over the size of layers, with the exponent of its growth, and of all layers of one model.

    python benchmarks/decomposition_speed.py --output results/decomposition_speed

decomposes square layers and both layers of an MLP (four times as wide) of widths 256 to 1024 under `second_moment` and
`kfac`, with random statistics of full rank, and then all 72 layers of a model of DeiT-B's shape (`--shape vit-l` for 144
of ViT-L's). Images play no part: statistics are drawn from random tokens.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import torch
from support import SHAPES, described, machine, random_model, seconds_of, table, write

from optimum_mixrank.calibration.result import Calibration
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.decomposition import METRICS, LayerStatistics, Metric, Statistic
from optimum_mixrank.pipeline.decompose import decompose_layers


KINDS = {"square": (1, 1), "first of an MLP": (4, 1), "second of an MLP": (1, 4)}
"""Outputs and inputs of a layer in widths."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--metrics", nargs="+", default=["second_moment", "kfac"], choices=["second_moment", "kfac"])
    parser.add_argument("--shape", default="deit-b", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has, for a trial")
    parser.add_argument("--layout", default="pivoted", choices=["factors", "pivoted"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.md and OUTPUT.json are written")
    args = parser.parse_args()

    layers = []
    for metric in map(METRICS.create, args.metrics):
        for kind, (outputs, inputs) in KINDS.items():
            seconds = {
                width: time_of_layer(metric, outputs * width, inputs * width, args.repetitions, args.device)
                for width in args.widths
            }
            layers.append({"metric": metric.name, "layer": kind, "seconds": seconds, "exponent": exponent(seconds)})
    model = random_model(args.shape, blocks=args.blocks).to(args.device)
    targets = encoder_linears(model)
    models = []
    for metric in map(METRICS.create, args.metrics):
        calibration = random_calibration(metric, model, args.device)
        times = [
            seconds_of(lambda m=metric, c=calibration: decompose_layers(m, targets, c, args.layout), args.device)
            for _ in range(args.repetitions)
        ]
        models.append({"metric": metric.name, "layers": len(targets), "seconds": times})

    settings = {"repetitions": args.repetitions, "layout": args.layout, "dtype": "float64"}
    header = ("metric", "layer", *(f"width {width}" for width in args.widths), "exponent")
    rows = [
        (f"`{row['metric']}`", row["layer"], *(f"{1000 * s:.0f} ms" for s in row["seconds"].values()), row["exponent"])
        for row in layers
    ]
    name = f"{args.shape} shape, {model.config.num_hidden_layers} blocks, random weights"
    totals = [
        (name, row["layers"], f"`{row['metric']}`", f"{statistics.median(row['seconds']):.1f} s") for row in models
    ]
    lines = [
        described(settings, args.device),
        "",
        *table(header, rows),
        "",
        *table(("model", "layers", "metric", "all layers"), totals),
    ]
    record = {"settings": {**settings, "model": name}, "environment": machine(args.device)}
    write(args.output, {**record, "layers": layers, "models": models}, lines)


def time_of_layer(metric: Metric, m: int, n: int, repetitions: int, device: str) -> float:
    """Median of the times of one layer, `[m, n]`; a first run is not measured."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64).to(device)
    found = random_statistics(metric, weight, generator)
    times = [seconds_of(lambda: metric.decompose(weight, found), device) for _ in range(repetitions + 1)]
    return statistics.median(times[1:])


def random_statistics(metric: Metric, weight: torch.Tensor, generator: torch.Generator) -> LayerStatistics:
    """Statistics that `metric` needs, consistent with one another, of full rank."""
    m, n = weight.shape
    required = metric.required_statistics(m, n)
    values: dict[str, torch.Tensor] = {"input_mean": torch.zeros(n, dtype=torch.float64, device=weight.device)}
    if Statistic.INPUT_COVARIANCE in required:
        values["input_covariance"] = moment(n, generator, weight)
    if Statistic.OUTPUT_COVARIANCE in required:
        values["output_covariance"] = moment(m, generator, weight)
    if Statistic.GRADIENT_MOMENT in required:
        values["gradient_moment"] = moment(m, generator, weight)
    if Statistic.INPUT_GRADIENT_MOMENT in required:
        roots = torch.randn(2 * n, m, generator=generator, dtype=torch.float64).to(weight) @ weight
        values["input_gradient_moment"] = roots.T @ roots / len(roots)
        values["gradient_energy"] = values["input_gradient_moment"].new_tensor(float(m))
    return LayerStatistics(num_tokens=2 * max(m, n), num_images=1, **values)


def moment(size: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Covariance of random vectors whose spread falls over three orders of magnitude, `[size, size]`."""
    spread = torch.logspace(0, -3, size, dtype=torch.float64)
    vectors = (torch.randn(2 * size, size, generator=generator, dtype=torch.float64) * spread).to(like)
    return vectors.T @ vectors / len(vectors)


def random_calibration(metric: Metric, model: torch.nn.Module, device: str) -> Calibration:
    """Statistics of all layers; those of one shape share theirs, which saves time before the measurement."""
    generator = torch.Generator().manual_seed(0)
    by_shape: dict[tuple[int, int], LayerStatistics] = {}
    layers = {}
    for target in encoder_linears(model):
        if target.shape not in by_shape:
            weight = target.module.weight.detach().to(device, torch.float64)
            by_shape[target.shape] = random_statistics(metric, weight, generator)
        layers[target.name] = by_shape[target.shape]
    return Calibration(layers, 1)


def exponent(seconds: dict[int, float]) -> str:
    """Slope of log time over log width, by least squares."""
    if len(seconds) < 2:
        return ""
    slope = statistics.linear_regression(
        [math.log(width) for width in seconds], [math.log(each) for each in seconds.values()]
    ).slope
    return f"{slope:.2f}"


if __name__ == "__main__":
    main()
