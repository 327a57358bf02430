"""A budget of time beside budgets of parameters: what each loses at the time that its model takes.

    python benchmarks/latency_budget.py --model path/to/vit --images path/to/images --output results/vit_s_latency_budget

The table of latencies is measured first (or read, with --table), then the model is compressed under each budget from the
same statistics, and all results are timed in turns with the dense model, in one process. "At equal time" is the KL of the
parameter budgets at the measured time of a row, interpolated between the two nearest of them (its logarithm, linearly).
The images are a folder with the splits `train`, for calibration, and `validation`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from support import described, machine, table, write

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.evaluation.latency import measure_latency, time_ratio
from optimum_mixrank.evaluation.latency_table import load_latency_table, measure_latency_table, save_latency_table
from optimum_mixrank.runtime.forward import configured_shape


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    compressor = MixRankCompressor.from_pretrained(args.model, device=args.device)
    path = args.table or args.output.with_name(f"{args.output.name}_table.json")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_latency_table(measure_latency_table(compressor.model, args.batch_size), path)
    images = compressor.get_calibration_dataset(
        args.images, split="train", num_samples=args.num_samples, seed=args.seed
    )
    calibration = compressor.calibrate(images, "kfac", seed=args.seed)
    models, records = {"dense": compressor.model}, []
    for kind, value in [
        *(("latency", each) for each in args.targets),
        *(("parameters", each) for each in args.ratios),
    ]:
        config = configuration(args, kind, value, path)
        model = compressor.compress(config, images if config.compensation else None, calibration=calibration)
        name = f"{kind} {value:g}"
        result = compressor.evaluate(
            model, args.images, split="validation", num_samples=args.num_evaluated, seed=args.seed
        )
        models[name] = model
        records.append(record_of(name, kind, value, compressor.report, result))
        print(records[-1], flush=True)
    ratios = timed(models, args)
    for record in records:
        record.update(ratios[record["name"]])
    for record in records:
        record["kl_of_parameters_at_equal_time"] = at_equal_time(record, records)
    write_report(args, path, records)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of a classifier")
    parser.add_argument("--images", required=True, help="folder of labelled images with train and validation")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.6, 0.5], help="values of target_latency")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="compression_ratio")
    parser.add_argument("--num-samples", type=int, default=1024, help="calibration images")
    parser.add_argument("--num-evaluated", type=int, help="images to evaluate on; default: all")
    parser.add_argument("--compensation", nargs="*", default=["sequential"])
    parser.add_argument("--layout", default="pivoted", choices=["pivoted", "factors"])
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images per forward pass, in the table and at the end"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", type=Path, help="table that was measured before; default: one beside the output")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.md and OUTPUT.json are written")
    return parser.parse_args()


def configuration(args: argparse.Namespace, kind: str, value: float, path: Path) -> MixRankConfig:
    """The configuration of one budget; all else is the same."""
    common = {"compensation": args.compensation, "layout": args.layout, "seed": args.seed}
    if kind == "parameters":
        return MixRankConfig(compression_ratio=value, **common)
    return MixRankConfig(cost="latency", latency_table=str(path), target_latency=value, **common)


def record_of(name: str, kind: str, value: float, report: Any, result: Any) -> dict[str, Any]:
    """What one budget gives, as JSON values."""
    return {
        "name": name,
        "kind": kind,
        "value": value,
        "parameters_kept": 1 - report.removed_of_model,
        "flops_kept": report.flops_after / report.flops_before,
        "predicted_share": report.latency.get("predicted_share"),
        "kl": result.kl,
        "top1": result.top1,
        "reference_top1": result.reference_top1,
        "seconds": dict(report.seconds),
    }


def timed(models: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time all models in turns; return the share of the dense model's time and its 95 % interval, by name."""
    shape = configured_shape(models["dense"])
    images = torch.randn(args.batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    found = measure_latency(models, {"pixel_values": images}, repeats=args.repeats)
    ratios = {name: time_ratio(latency, found["dense"]) for name, latency in found.items()}
    return {
        name: {"measured_share": each.median, "measured_low": each.low, "measured_high": each.high}
        for name, each in ratios.items()
    }


def at_equal_time(record: dict[str, Any], records: list[dict[str, Any]]) -> float | None:
    """The KL of the parameter budgets at the measured time of a latency budget, or None if they do not enclose it."""
    if record["kind"] == "parameters":
        return None
    time = record["measured_share"]
    others = sorted((each["measured_share"], each["kl"]) for each in records if each["kind"] == "parameters")
    slower = [each for each in others if each[0] >= time]
    faster = [each for each in others if each[0] < time]
    if not slower or not faster:
        return None
    (low, below), (high, above) = faster[-1], slower[0]
    weight = (time - low) / (high - low)
    return math.exp((1 - weight) * math.log(below) + weight * math.log(above))


def write_report(args: argparse.Namespace, path: Path, records: list[dict[str, Any]]) -> None:
    """Write the records and the table."""
    latencies = load_latency_table(path)
    settings = {
        "model": Path(args.model).name,
        "calibration images": args.num_samples,
        "evaluated images": args.num_evaluated or "all",
        "seed": args.seed,
        "compensation": args.compensation,
        "layout": args.layout,
        "batch size": args.batch_size,
        "repetitions": args.repeats,
        "multiple of ranks by the table": latencies.rank_multiple,
    }
    header = ("budget", "parameters kept", "multiply-adds kept", "time, predicted", "time, measured", "KL")
    header += ("KL of parameters at equal time", "top-1")
    lines = [described(settings, args.device), "", *table(header, [row_of(each) for each in records])]
    conditions = dict(latencies.conditions)
    write(
        args.output,
        {"settings": settings, "environment": machine(args.device), "table": conditions, "rows": records},
        lines,
    )


def row_of(record: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    predicted, equal = record["predicted_share"], record["kl_of_parameters_at_equal_time"]
    what = "target_latency" if record["kind"] == "latency" else "compression_ratio"
    return (
        f"`{what}={record['value']:g}`",
        f"{record['parameters_kept']:.1%}",
        f"{record['flops_kept']:.1%}",
        "" if predicted is None else f"{predicted:.3f}",
        f"{record['measured_share']:.3f} ({record['measured_low']:.3f} to {record['measured_high']:.3f})",
        f"{record['kl']:.4f}",
        "" if equal is None else f"{equal:.4f}",
        f"{record['top1']:.1%}",
    )


if __name__ == "__main__":
    main()
