"""Compress models of known shapes from end to end: seconds by phase, peak memory, and scaling over processes.

    python benchmarks/end_to_end.py --shapes deit-b --recipes fast best --output results/end_to_end
    python benchmarks/end_to_end.py --shapes deit-b --recipes fast --device cuda --output results/end_to_end_gpu
    python benchmarks/end_to_end.py --shapes deit-s --recipes best --processes 1 2 --output results/scaling

Weights and images are random, which does for timing. With `--processes`, this file starts itself by `accelerate launch`,
every process with the same number of threads (strong scaling: the work stays, its share shrinks). `--paper` adds a model
on paper, no measurement: the time for N processes and `--paper-images` from the measured parts of one process, as

    images  * (1 + ceil((B - 1) / N)) / B     what is done for B batches, of which one process runs the first alone
    + layers / N                              decompositions and factors
    + serial parts
    + 2 (N - 1) / N * bytes that are exchanged / bandwidth

with `--bandwidth` in GB/s between processes. Where two processes were measured, the model's time for them stands beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from support import SHAPES, described, machine, random_images, random_model, table, write

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.calibration.task import required_statistics
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.pipeline.memory import decomposition_bytes, statistics_bytes
from optimum_mixrank.pipeline.memory_probe import probe_model
from optimum_mixrank.runtime.distributed import disconnect, find_processes
from optimum_mixrank.runtime.formatting import format_bytes


PHASES = ("calibrate", "decompose", "allocate", "profile", "factorize", "compensate")
BY_IMAGES = ("calibrate", "compensate")
BY_LAYERS = ("decompose", "factorize")
"""Phases whose images or layers are shared out over processes."""

MARK = "result: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["deit-b"], choices=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", default=["fast", "best"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shapes have, for a trial")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=0, help="of each process; default: cores / most processes")
    parser.add_argument("--paper", type=int, nargs="*", default=[], help="numbers of processes")
    parser.add_argument("--paper-images", type=int, help="default: --images")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s between processes, for --paper")
    parser.add_argument("--one", action="store_true", help="measure the first shape and recipe in this process")
    parser.add_argument("--output", type=Path, help="OUTPUT.md and OUTPUT.json are written")
    args = parser.parse_args()
    if args.one:
        found = measured(args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(MARK + json.dumps(found), flush=True)
        disconnect()
        return
    if args.output is None:
        parser.error("--output is missing")
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // max(args.processes))
    records = [
        {"shape": shape, "recipe": recipe, "processes": processes, **launched(args, shape, recipe, processes, threads)}
        for shape in args.shapes
        for recipe in args.recipes
        for processes in args.processes
    ]
    torch.set_num_threads(threads)
    settings = {
        "random weights, image size": args.image_size,
        "images": args.images,
        "batch size": args.batch_size,
        "ratio": args.ratio,
        "blocks": args.blocks or "all",
        "threads of each process": threads,
        "dtype": "float32",
    }
    lines = [described(settings, args.device), "", *measurements(records)]
    if args.paper:
        lines += ["", *on_paper(records, args)]
    write(args.output, {"settings": settings, "environment": machine(args.device), "rows": records}, lines)


def launched(args: argparse.Namespace, shape: str, recipe: str, processes: int, threads: int) -> dict:
    """Measure in new processes."""
    own = ["--one", "--shapes", shape, "--recipes", recipe, "--device", args.device]
    for name in ("images", "batch_size", "image_size", "ratio", "blocks"):
        value = getattr(args, name)
        own += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command = [sys.executable, __file__, *own]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if processes > 1:
        # The one way to several processes on one machine; without GPUs they are connected by gloo.
        options = {
            "num_processes": processes,
            "num_machines": 1,
            "mixed_precision": "no",
            "dynamo_backend": "no",
            "num_cpu_threads_per_process": threads,
            "main_process_port": 0,
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command = [*launcher, *(f"--{name}={value}" for name, value in options.items()), *command[1:]]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    [found] = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    return json.loads(found)


def measured(args: argparse.Namespace) -> dict:
    """Seconds and bytes of one compression."""
    model = random_model(args.shapes[0], args.image_size, args.blocks)
    batches = list(random_images(args.images, model).split(args.batch_size))
    config = MixRankConfig(recipe=args.recipes[0], compression_ratio=args.ratio)
    processes = find_processes()
    compressor = MixRankCompressor(model.to(args.device if processes.is_single else processes.device))
    targets = encoder_linears(model)
    required = required_statistics([METRICS.create(config.metric)], targets)
    layers = probe_model(model, targets, False).layers
    start = time.perf_counter()
    compressor.compress(config, batches, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    assert compressor.report is not None  # `compress` has made one
    return {
        "total": seconds,
        "seconds": compressor.report.seconds,
        "memory": compressor.report.memory,
        "exchanged_bytes": {
            "statistics": statistics_bytes(layers, required),
            "decompositions": sum(decomposition_bytes(target.shape, config.layout) for target in targets),
            # Covariances of inputs and of targets with them, in float64, of every layer-wise step.
            "compensation": len(config.compensation)
            * sum(8 * n * (m + n) for m, n in (each.shape for each in targets)),
        },
    }


def measurements(records: list[dict]) -> list[str]:
    """A table of what was measured; speed-ups are over one process of the same setting."""
    alone = {(row["shape"], row["recipe"]): row["total"] for row in records if row["processes"] == 1}
    rows = []
    for row in records:
        one = alone.get((row["shape"], row["recipe"]))
        peaks = [peak for peak in row["memory"]["peak_bytes"].values() if peak is not None]
        rows.append(
            (
                row["shape"],
                f"`{row['recipe']}`",
                row["processes"],
                *(f"{row['seconds'][phase]:.1f} s" for phase in PHASES),
                f"{row['total']:.1f} s",
                "" if one is None else f"{one / row['total']:.2f}",
                format_bytes(max(peaks)) if peaks else "not measured",
            )
        )
    return table(
        ("shape", "recipe", "processes", *PHASES, "in all", "speed-up", "peak in addition to the model"), rows
    )


def on_paper(records: list[dict], args: argparse.Namespace) -> list[str]:
    """A table of times from the model of this file's description."""
    images = args.paper_images or args.images
    measured_for = {(row["shape"], row["recipe"], row["processes"]): row["total"] for row in records}
    rows = []
    for row in records:
        if row["processes"] != 1:
            continue
        name = row["shape"], row["recipe"]
        settings = [(count, images) for count in dict.fromkeys((1, *args.paper))]
        # Beside what was measured, for the same images.
        settings = [
            (count, args.images) for count in args.processes if count > 1 and (*name, count) in measured_for
        ] + settings
        for count, number in settings:
            parts = modelled(row, count, args.images, number, args.batch_size, args.bandwidth)
            total, alone = sum(parts), sum(modelled(row, 1, args.images, number, args.batch_size, args.bandwidth))
            measured = measured_for.get((*name, count)) if number == args.images else None
            rows.append(
                (
                    row["shape"],
                    f"`{row['recipe']}`",
                    f"{number:,}",
                    count,
                    *(f"{part:.1f} s" for part in parts),
                    f"{total:.1f} s",
                    f"{alone / total:.1f}",
                    "" if measured is None else f"{measured:.1f} s",
                )
            )
    header = ("shape", "recipe", "images", "processes", "images' part", "layers' part", "serial parts", "exchange")
    return [
        f"A model on paper, no measurement: measured parts of one process, {args.bandwidth:g} GB/s between processes.",
        "",
        *table((*header, "in all", "speed-up", "measured"), rows),
    ]


def modelled(
    row: dict, processes: int, images: int, wanted: int, batch_size: int, bandwidth: float
) -> tuple[float, float, float, float]:
    """Seconds of the parts for some processes and `wanted` images, from those of one process and `images`."""
    batches = math.ceil(wanted / batch_size)
    share = (1 + math.ceil((batches - 1) / processes)) / batches
    by_images = sum(row["seconds"][phase] for phase in BY_IMAGES)
    by_layers = sum(row["seconds"][phase] for phase in BY_LAYERS)
    wire = 2 * (processes - 1) / processes * sum(row["exchanged_bytes"].values()) / (bandwidth * 1e9)
    return by_images * wanted / images * share, by_layers / processes, row["total"] - by_images - by_layers, wire


if __name__ == "__main__":
    main()
