"""Compare all metrics and allocators on one model, with one calibration draw and one set of test images.

    python benchmarks/metrics_and_allocators.py --model MODEL --calibration-data IMAGES --test-data LABELLED_IMAGES \
        --ratios 0.5 0.6 --num-samples 512 --output results

writes `results.md` and `results.json`. Ratios are fractions removed of the encoder's linear layers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from support import table, write

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.allocation import ALLOCATORS
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.reporting.build import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration-data", required=True)
    parser.add_argument("--calibration-split", default=None)
    parser.add_argument("--test-data", required=True)
    parser.add_argument("--test-split", default=None)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATORS), choices=list(ALLOCATORS))
    parser.add_argument("--num-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    compressor = MixRankCompressor.from_pretrained(args.model)
    images = compressor.get_calibration_dataset(
        args.calibration_data, split=args.calibration_split, num_samples=args.num_samples, seed=args.seed
    )
    calibration = compressor.calibrate(images, args.metrics, batch_size=args.batch_size)
    rows = []
    for ratio in args.ratios:
        for metric in args.metrics:
            for allocation in args.allocations:
                start = time.perf_counter()
                config = MixRankConfig(
                    compression_ratio=ratio,
                    compression_scope="targets",
                    metric=metric,
                    allocation=allocation,
                    layout="factors",
                    structures=["rank"],
                    compensation=[],
                    min_rank_ratio=0.1,
                )
                model = compressor.compress(config, calibration=calibration)
                seconds = time.perf_counter() - start
                result = compressor.evaluate(model, args.test_data, split=args.test_split, batch_size=args.batch_size)
                rows.append(
                    {
                        "ratio": ratio,
                        "kept": compressor.report.kept_of_encoder,
                        "metric": metric,
                        "allocation": allocation,
                        "compress_seconds": round(seconds, 2),
                        **result.to_dict(),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)

    settings = {
        **{name: getattr(args, name) for name in ("num_samples", "batch_size", "seed")},
        "calibration_images": calibration.num_images,
        "calibration_seconds": round(calibration.seconds, 1),
        "test_images": rows[0]["num_images"],
        "dtype": str(compressor.model.dtype),
    }
    record = {"settings": settings, "environment": environment(), "rows": rows}
    write(args.output, record, markdown(record))


def markdown(record: dict) -> list[str]:
    """Lines of Markdown: the settings, and the record as a table."""
    described = [f"{key} {value}" for part in ("settings", "environment") for key, value in record[part].items()]
    first = record["rows"][0]
    header = ["kept of encoder linears", "metric", "allocation", "top-1", "agreement", "KL (nats)"]
    cells = [
        [
            f"{row['kept']:.1%}",
            f"`{row['metric']}`",
            f"`{row['allocation']}`",
            f"{row['top1']:.1%}",
            f"{row['agreement']:.1%}",
            f"{row['kl']:.3f}",
        ]
        for row in record["rows"]
    ]
    return [
        ", ".join(described) + ".",
        "",
        f"Original: top-1 {first['reference_top1']:.1%}, top-5 {first['reference_top5']:.1%}.",
        "",
        *table(header, cells),
    ]


if __name__ == "__main__":
    main()
