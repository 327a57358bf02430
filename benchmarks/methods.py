"""Compare compression methods on one model: accuracy and KL over parameters kept, with one split and one seed for all.

    python benchmarks/methods.py --model MODEL --calibration-data IMAGES --test-data LABELLED_IMAGES \
        --calibration-split train --test-split validation --kept 0.5 0.4 --seeds 0 1 2 --num-samples 1024 --output results

writes `results.md`, `results.json` and `results.png`. `--kept` counts all linear weights of the encoder. Without
arguments for model and data it runs on the Fashion-MNIST model of this repository. Labels are used to measure accuracy,
never to compress. Rows that `results.json` holds already are not measured again, so that a run that was cut off goes on
where it stopped; other settings need another `--output`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from peak_memory import PeakMemory
from support import seconds_of
from transformers import PreTrainedModel

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset
from optimum_mixrank.calibration.images.batches import ImageBatches
from optimum_mixrank.compensation.held_out import model_outputs
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.evaluation.labels import find_label_column, map_labels
from optimum_mixrank.reporting.build import environment
from optimum_mixrank.runtime.fidelity import agreement, kl_divergence
from optimum_mixrank.runtime.formatting import format_percent
from optimum_mixrank.runtime.intervals import paired_interval


SHIPPED = Path(__file__).parent.parent / "examples" / "fashion_mnist"

RANKS = {"structures": ["rank"], "probed_images": 0}
ONE_SHOT = {"allocation": "uniform", "layout": "factors", "compensation": [], **RANKS}
METHODS: dict[str, dict] = {
    "svd": {"metric": "svd", **ONE_SHOT},
    "asvd-like": {"metric": "diagonal", **ONE_SHOT},
    "second moment": {"metric": "second_moment", **ONE_SHOT},
    "paper": {"recipe": "paper"},
    "paper, second moment": {"recipe": "paper_second_moment"},
    "fast": {"recipe": "fast"},
    "kfac, uniform": {"metric": "kfac", **ONE_SHOT},
    "kfac": {"metric": "kfac", "allocation": "global", "layout": "factors", "compensation": [], **RANKS},
    "kfac, pivoted": {"metric": "kfac", "allocation": "global", "layout": "pivoted", "compensation": [], **RANKS},
    "kfac, sequential": {
        "metric": "kfac",
        "allocation": "global",
        "layout": "factors",
        "compensation": ["sequential"],
        **RANKS,
    },
    "kfac, pivoted, sequential": {
        "metric": "kfac",
        "allocation": "global",
        "layout": "pivoted",
        "compensation": ["sequential"],
        **RANKS,
    },
    "kfac, pivoted, sequential, blocks": {
        "metric": "kfac",
        "allocation": "global",
        "layout": "pivoted",
        "compensation": ["sequential", "blocks"],
        **RANKS,
    },
    "kfac, pivoted, sequential, distillation": {
        "metric": "kfac",
        "allocation": "global",
        "layout": "pivoted",
        "compensation": ["sequential", "distillation"],
        **RANKS,
    },
    "best": {"recipe": "best"},
    "distilled": {"recipe": "distilled"},
}
"""Configurations by the name of the method: the baselines, then ours with one step more each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED / "model"))
    parser.add_argument("--calibration-data", default=str(SHIPPED / "data"))
    parser.add_argument("--calibration-split", default="calibration")
    parser.add_argument("--test-data", default=str(SHIPPED / "data"))
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields for every method, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--save", type=Path, metavar="FOLDER", help="also save every model, as FOLDER/method-kept-seed"
    )
    args = parser.parse_args()
    fields = {name: json.loads(value) for name, value in (entry.split("=", 1) for entry in args.set)}

    compressor = MixRankCompressor.from_pretrained(args.model)
    test_batches, labels = load_test(compressor, args)
    original = logits_of(compressor.model, test_batches)
    rows = earlier_rows(args, settings_of(args, compressor, original, fields))
    for seed in args.seeds:
        todo = [
            (method, kept)
            for method in args.methods
            for kept in args.kept
            if not any((row["method"], row["asked"], row["seed"]) == (method, kept, seed) for row in rows)
        ]
        if not todo:
            continue
        dataset = compressor.get_calibration_dataset(
            args.calibration_data, split=args.calibration_split, num_samples=args.num_samples, seed=seed
        )
        batches = ImageBatches(dataset, image_processor=compressor.image_processor, batch_size=args.batch_size)
        images = [batch.pixel_values for batch in batches]
        forward_seconds = seconds_of(lambda images=images: model_outputs(compressor.model, images))
        calibrations = {}
        for method, kept in todo:
            config = MixRankConfig(
                compression_ratio=1 - kept, compression_scope="targets", seed=seed, **{**METHODS[method], **fields}
            )
            twin = next(
                (row for row in rows if row["seed"] == seed and row["configuration"] == parts_of(config)), None
            )
            if twin is not None:
                rows.append({**twin, "method": method})
            else:
                rows.append(measure(method, kept, config, compressor, images, calibrations, args, forward_seconds))
                model = rows[-1].pop("model")
                if args.save is not None:
                    name = f"{method}-{kept:.0%}-{seed}".translate(str.maketrans(", ", "__", "%"))
                    compressor.save_pretrained(model, args.save / name, overwrite=True)
                rows[-1].update(compare(original, logits_of(model, test_batches), labels))
            line = {
                key: rows[-1][key] for key in ("method", "seed", "kept", "top1", "kl", "seconds", "forward_passes")
            }
            print(json.dumps(line), flush=True)
            write(args, compressor, original, labels, fields, rows)


def parts_of(config: MixRankConfig) -> dict:
    """What a configuration asks for, whatever the recipe is called that filled it."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "recipe"}


def measure(
    method: str,
    kept: float,
    config: MixRankConfig,
    compressor: MixRankCompressor,
    images: list[torch.Tensor],
    calibrations: dict,
    args: argparse.Namespace,
    forward_seconds: float,
) -> dict:
    """Compress once; statistics are shared between methods, their time counts for each."""
    peak = PeakMemory()
    if METRICS[config.metric].uses_data and config.metric not in calibrations:
        calibrations[config.metric] = compressor.calibrate(
            images,
            config.metric,
            batch_size=args.batch_size,
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            fisher_samples=config.fisher_samples,
            seed=config.seed,
        )
    calibration = calibrations.get(config.metric)
    start = time.perf_counter()
    model = compressor.compress(config, images, calibration=calibration, batch_size=args.batch_size)
    seconds = time.perf_counter() - start + (calibration.seconds if calibration else 0.0)
    return {
        "method": method,
        "seed": config.seed,
        "kept": compressor.report.kept_of_encoder,
        "asked": kept,
        "model": model,
        "seconds": round(seconds, 1),
        "forward_passes": round(seconds / forward_seconds, 1),
        # Of the whole process while it worked on this row: images, statistics and both models included.
        "peak_memory_mib": peak_memory_mib(peak),
        "compensation": compressor.report.compensation,
        "configuration": parts_of(config),
    }


def peak_memory_mib(peak: PeakMemory) -> int:
    """Largest resident memory of the process since `peak` was made; elsewhere than on Linux, since its start."""
    if peak.resident is not None:
        return peak.resident // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def settings_of(args: argparse.Namespace, compressor: MixRankCompressor, original: torch.Tensor, fields: dict) -> dict:
    """What all rows of a file have in common."""
    return {
        "model": Path(args.model).name,
        "calibration_data": f"{Path(args.calibration_data).name}, {args.calibration_split}",
        "test_data": f"{Path(args.test_data).name}, {args.test_split}",
        "num_samples": args.num_samples,
        "batch_size": args.batch_size,
        "test_images": len(original),
        "dtype": str(next(compressor.model.parameters()).dtype),
        "mixed_precision": compressor.processes.mixed_precision,
        "fields": fields,
    }


def earlier_rows(args: argparse.Namespace, settings: dict) -> list[dict]:
    """Rows of a run that was cut off.

    Raises:
        SystemExit: if they were measured with other settings.
    """
    path = args.output.with_suffix(".json")
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} holds results with {record['settings']}, not {settings}; give another --output.")
    return record["rows"]


def write(
    args: argparse.Namespace,
    compressor: MixRankCompressor,
    original: torch.Tensor,
    labels: torch.Tensor,
    fields: dict,
    rows: list[dict],
) -> None:
    """Write what was measured so far, so that a run that is cut off loses nothing."""
    record = {
        "settings": settings_of(args, compressor, original, fields),
        "original_top1": accuracy(original, labels),
        "original_correct": outcomes(original, labels),
        "environment": environment(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(record))
    plot(record, args.output.with_suffix(".png"))


def load_test(compressor: MixRankCompressor, args: argparse.Namespace) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Test images as the model sees them, and their labels by index."""
    dataset = load_image_dataset(
        args.test_data, split=args.test_split, default_splits=("validation", "test"), num_samples=None
    )
    column = find_label_column(dataset)
    batches = list(
        ImageBatches(
            dataset,
            image_processor=compressor.image_processor,
            batch_size=args.batch_size,
            label_column=column,
            label_map=map_labels(dataset, column, compressor.model.config.id2label),
        )
    )
    return [batch.pixel_values for batch in batches], torch.cat([batch.labels for batch in batches])


def logits_of(model: PreTrainedModel, batches: list[torch.Tensor]) -> torch.Tensor:
    """`[images, classes]`."""
    return torch.cat([output.logits for output in model_outputs(model, batches)])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose class comes first."""
    return float((logits.argmax(dim=1) == labels).float().mean())


def compare(original: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Top-1, its paired change per image, agreement and KL."""
    correct = outcomes(logits, labels)
    return {
        "top1": accuracy(logits, labels),
        "agreement": float(agreement(original, logits).float().mean()),
        "kl": float(kl_divergence(original, logits).mean()),
        "correct": correct,
        "change": paired_change(outcomes(original, labels), correct),
    }


def outcomes(logits: torch.Tensor, labels: torch.Tensor) -> str:
    """One digit per image: 1 if its class comes first, otherwise 0."""
    return "".join(map(str, (logits.argmax(dim=1) == labels).int().tolist()))


def paired_change(original: str, compressed: str) -> list[float]:
    """Change of top-1 against the original and half of its 95 % interval, from the `outcomes` of both."""
    pairs = Counter(zip(original, compressed, strict=True))
    count, gained, lost = len(original), pairs["0", "1"], pairs["1", "0"]
    low, high = paired_interval(gained / count, lost / count, count)
    return [(gained - lost) / count, (high - low) / 2]


def summary(record: dict) -> list[dict]:
    """Means and spreads over seeds, by method and budget, in the order of `METHODS` whenever they were measured."""
    groups: dict[tuple, list[dict]] = {}
    order = {method: index for index, method in enumerate(METHODS)}
    # Files may hold methods that are not compared any more.
    for row in sorted(record["rows"], key=lambda row: (order.get(row["method"], len(order)), -row["asked"])):
        groups.setdefault((row["method"], row["asked"]), []).append(row)
    return [
        {
            "method": method,
            "kept": statistics.mean(row["kept"] for row in rows),
            "top1": [row["top1"] for row in rows],
            "kl": [row["kl"] for row in rows],
            "change": statistics.mean(row["change"][0] for row in rows),
            "half": statistics.mean(row["change"][1] for row in rows),
            "forward_passes": average([row["forward_passes"] for row in rows]),
            "peak_memory_mib": max(row["peak_memory_mib"] for row in rows),
        }
        for (method, _), rows in groups.items()
    ]


def average(costs: list[float | None]) -> float | None:
    """Of those that say something: a run that was stopped in between, or disturbed, has none (null in the file)."""
    measured = [cost for cost in costs if cost is not None]
    return statistics.mean(measured) if measured else None


def markdown(record: dict) -> str:
    """The record as a Markdown table, with its settings above it."""
    settings, machine = record["settings"], record["environment"]
    seeds = sorted({row["seed"] for row in record["rows"]})
    lines = [
        f"{settings['model']}: {settings['num_samples']} calibration images ({settings['calibration_data']}), "
        f"{settings['test_images']} test images ({settings['test_data']}), seeds "
        f"{seeds}, batch size {settings['batch_size']}, {settings['dtype']}, mixed precision "
        f"{settings['mixed_precision']}, fields {settings['fields']}; "
        f"PyTorch {machine['torch']}, Transformers {machine['transformers']}, {machine['device']}, "
        f"{machine['threads']} threads. Original: {format_percent(record['original_top1'])} top-1.",
        "",
        "| method | kept | top-1 (spread) | change, paired 95 % interval | KL (spread) | cost in forward passes | peak |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in summary(record):
        top1, kl = row["top1"], row["kl"]
        cost = "—" if row["forward_passes"] is None else f"{row['forward_passes']:.0f}"
        lines.append(
            f"| {row['method']} | {format_percent(row['kept'])} "
            f"| {format_percent(statistics.mean(top1))} ({format_percent(min(top1))} to {format_percent(max(top1))}) "
            f"| {100 * row['change']:+.1f} ± {100 * row['half']:.1f} points "
            f"| {nats(statistics.mean(kl))} ({nats(min(kl))} to {nats(max(kl))}) | {cost} "
            f"| {row['peak_memory_mib'] / 1024:.1f} GiB |"
        )
    # Plain spaces before percent signs too, so that a search finds them.
    return "\n".join(lines).replace("\u00a0", " ") + "\n"


def nats(kl: float) -> str:
    """Three decimals, or more where they would say too little."""
    return f"{kl:.3f}" if kl >= 0.01 else f"{kl:.5f}"


def plot(record: dict, path: Path) -> None:
    """Accuracy and KL over the share of parameters kept."""
    from matplotlib import colormaps, cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = summary(record)
    # There are ten colours, and more methods.
    styles = cycler(marker=list("os^"), linestyle=["-", "--", ":"]) * cycler(color=colormaps["tab10"].colors)
    for axes in (left, right):
        axes.set_prop_cycle(styles)
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["kept"])
        kept = [100 * row["kept"] for row in mine]
        left.plot(kept, [100 * statistics.mean(row["top1"]) for row in mine], label=method)
        right.plot(kept, [statistics.mean(row["kl"]) for row in mine])
    left.axhline(100 * record["original_top1"], color="gray", linestyle=":", label="original")
    left.set(xlabel="encoder parameters kept (%)", ylabel="top-1 (%)")
    right.set(xlabel="encoder parameters kept (%)", ylabel="KL from the original (nats)", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
