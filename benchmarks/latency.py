"""Latency of dense and compressed models, side by side in one process, beside the ratio of their multiply-adds.

    python benchmarks/latency.py --output results/latency --threads 1 --batch-sizes 1 8
    python benchmarks/latency.py --output results/vit-s --dense path/to/vit --models "best, 40 %=path/to/compressed"
    python benchmarks/latency.py --render results/latency.json

All variants of a model take turns in every repetition, in all runtimes, after a warm-up; the record holds every time. A
table shows medians, quartiles, and the median over repetitions of each ratio to the dense model in the same runtime.
Weights of `--shapes` are random. `benchmarks/structures.py` and `benchmarks/runtimes.py` say how to add a variant.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from runtimes import RUNTIMES, available, eager, prepared
from structures import STRUCTURES, compressed
from support import machine, random_images, random_model, table, write
from torch import nn
from transformers import AutoModelForImageClassification
from where_time_goes import milliseconds_by_kind

from optimum_mixrank.evaluation.flops import flops_per_image
from optimum_mixrank.evaluation.latency import measure_calls, time_ratio
from optimum_mixrank.evaluation.memory import activation_bytes, kept_bytes, weight_bytes


DENSE = "dense"
Variants = dict[str, nn.Module]


def main() -> None:
    args = arguments()
    if args.render is not None:
        print("\n".join(tables(json.loads(args.render.read_text()))))
        return
    torch.set_num_threads(args.threads)
    settings = {"threads": args.threads, "repeats": args.repeats, "dtype": "float32", "kept": args.kept}
    packages = ("onnxruntime", "optimum-mixrank")
    versions = {name: version for name in packages if (version := _version(name)) is not None}
    record = {"settings": settings, "environment": {**machine(), **versions}, "cases": []}
    for name, variants in cases(args):
        record["cases"].append(measured(name, variants, args))
        # After every case, so that an interrupted run is not lost.
        write(args.output, record, tables(record))
        del variants
        gc.collect()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["deit-s:112", "deit-b:224"], help="SHAPE:IMAGE_SIZE, random")
    parser.add_argument("--structures", nargs="*", default=list(STRUCTURES), help=f"of {', '.join(STRUCTURES)}")
    parser.add_argument(
        "--kept", type=float, nargs="*", default=[0.4], help="kept shares of the values of the encoder"
    )
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shapes have, for a trial")
    parser.add_argument("--dense", help="checkpoint that --models are compared to")
    parser.add_argument("--models", nargs="*", default=[], help="LABEL=CHECKPOINT")
    parser.add_argument("--runtimes", nargs="*", default=["PyTorch", "ONNX Runtime"], help=f"of {', '.join(RUNTIMES)}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--profile", action="store_true", help="also show where the time goes, in PyTorch")
    parser.add_argument("--output", type=Path, help="OUTPUT.md and OUTPUT.json are written")
    parser.add_argument("--render", type=Path, help="print the tables of this record and measure nothing")
    args = parser.parse_args()
    if args.output is None and args.render is None:
        parser.error("--output is missing")
    if args.models and args.dense is None:
        parser.error("--models needs --dense")
    args.runtimes = available(args.runtimes)
    return args


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Variants]]:
    """Yield groups of models that are compared: a description, and the models by label, the dense one first."""
    if args.dense is not None:
        variants = {DENSE: _load(args.dense)}
        for entry in args.models:
            label, _, path = entry.rpartition("=")
            variants[label or Path(path).name] = _load(path)
        yield Path(args.dense).name, variants
    for entry in args.shapes:
        shape, _, size = entry.partition(":")
        dense = random_model(shape, int(size or 224), args.blocks)
        variants = {DENSE: dense}
        for kept in args.kept:
            for structure in args.structures:
                variants[f"{structure}, {kept:.0%} kept"] = compressed(dense, structure, kept)
        yield f"{shape} shape, {int(size or 224)} px, random weights", variants


def measured(name: str, variants: Variants, args: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of one group of models, as JSON values."""
    dense_flops = flops_per_image(variants[DENSE])
    image = random_images(1, variants[DENSE])
    models = {
        label: {
            "flops": flops_per_image(model),
            "ideal": flops_per_image(model) / dense_flops,
            "weight_bytes": weight_bytes(model),
            "activation_bytes": activation_bytes(model, {"pixel_values": image}),
            "kept_bytes": kept_bytes(model),
        }
        for label, model in variants.items()
    }
    runs = [run for size in args.batch_sizes for run in _runs(variants, size, args)]
    return {"name": name, "models": models, "runs": runs}


def _runs(variants: Variants, batch_size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the times of all variants in all runtimes for one batch size."""
    pixel_values = random_images(batch_size, variants[DENSE])
    keys = [(runtime, label) for runtime in args.runtimes for label in variants]
    calls = {key: prepared(key[0], variants[key[1]], pixel_values) for key in keys}
    found = measure_calls(calls, batch_size, repeats=args.repeats)
    runs = []
    for runtime, label in keys:
        latency = found[runtime, label]
        runs.append(
            {
                "runtime": runtime,
                "batch_size": batch_size,
                "model": label,
                "seconds": list(latency.seconds),
                "median": latency.median,
                "quartiles": list(latency.quartiles),
                "ratio": dataclasses.asdict(time_ratio(latency, found[runtime, DENSE])),
            }
        )
        if args.profile and RUNTIMES[runtime] is eager:
            runs[-1]["milliseconds"] = milliseconds_by_kind(calls[runtime, label])
    return runs


def tables(record: dict[str, Any]) -> list[str]:
    """Return the lines of a record's tables in Markdown."""
    environment = record["environment"]
    what = ", ".join(f"{name} {_shown(value)}" for name, value in record["settings"].items())
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "transformers", "onnxruntime") if name in environment
    )
    lines = [f"{what}; {versions}; {environment['processor']}, {environment['cores']} cores.", ""]
    for case in record["cases"]:
        lines += [f"{case['name']}:", "", *_times(case), "", *_sizes(case), "", *_kinds(case)]
    return lines


def _times(case: dict[str, Any]) -> list[str]:
    header = (
        "model",
        "runtime",
        "batch",
        "ms (quartiles)",
        "time / dense (95 %)",
        "multiply-adds / dense",
        "of the ideal",
    )
    rows = []
    for run in case["runs"]:
        ideal, ratio = case["models"][run["model"]]["ideal"], run["ratio"]
        low, high = run["quartiles"]
        time = f"{1000 * run['median']:.1f} ({1000 * low:.1f} to {1000 * high:.1f})"
        figures = (f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})", f"{ideal:.2f}")
        share = f"{ideal / ratio['median']:.0%}"
        compared = ("", "", "") if run["model"] == DENSE else (*figures, share)
        rows.append((run["model"], run["runtime"], run["batch_size"], time, *compared))
    return table(header, rows)


def _sizes(case: dict[str, Any]) -> list[str]:
    header = ("model", "weights", "kept for inference", "activations, one image")
    keys = ("weight_bytes", "kept_bytes", "activation_bytes")
    rows = [(name, *(f"{model[key] / 1e6:.2f} MB" for key in keys)) for name, model in case["models"].items()]
    return table(header, rows)


def _kinds(case: dict[str, Any]) -> list[str]:
    """The tables of where the time goes, and the ideal if all but the products took as long as in the dense model."""
    runs = [run for run in case["runs"] if "milliseconds" in run]
    if not runs:
        return []
    header = ("model", "batch", *(f"{kind}, ms" for kind in runs[0]["milliseconds"]), "ideal with the other costs")
    dense = {run["batch_size"]: run["milliseconds"] for run in runs if run["model"] == DENSE}
    rows = []
    for run in runs:
        before, spent = dense[run["batch_size"]], run["milliseconds"]
        total = sum(before.values())
        other = total - before["products"]
        ideal = (other + before["products"] * case["models"][run["model"]]["ideal"]) / total
        rows.append((run["model"], run["batch_size"], *(f"{each:.2f}" for each in spent.values()), f"{ideal:.2f}"))
    return [*table(header, rows), ""]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _load(path: str) -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(path, dtype=torch.float32).eval()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
