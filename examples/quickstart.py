"""All the steps with the small model of this repository: compress, reload, evaluate, draw.

    python examples/quickstart.py

The same script works with another model and other images, which are arguments:

    python examples/quickstart.py --model google/vit-base-patch16-224 \
        --calibration-data path/to/images --test-data path/to/labelled/images --ratio 0.5 --output vit-base-50
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.reporting import format_table, plot_ranks


SHIPPED = Path(__file__).parent / "fashion_mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED / "model"), help="local folder or Hub id")
    parser.add_argument("--calibration-data", default=str(SHIPPED / "data"), help="local folder or Hub id")
    parser.add_argument("--calibration-split", default=None)
    parser.add_argument("--test-data", default=str(SHIPPED / "data"), help="local folder or Hub id, with labels")
    parser.add_argument("--test-split", default=None)
    parser.add_argument("--num-samples", type=int, default=512, help="calibration images")
    parser.add_argument("--ratio", type=float, default=0.6, help="fraction of parameters to remove")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.calibration_data == str(SHIPPED / "data"):
        args.calibration_split = args.calibration_split or "calibration"
    if args.test_data == str(SHIPPED / "data"):
        args.test_split = args.test_split or "test"

    start = time.perf_counter()
    compressor = MixRankCompressor.from_pretrained(args.model)
    images = compressor.get_calibration_dataset(
        args.calibration_data, split=args.calibration_split, num_samples=args.num_samples, seed=args.seed
    )
    config = MixRankConfig(compression_ratio=args.ratio, seed=args.seed)
    compressor.compress(config, images, save_directory=args.output, overwrite=True)

    # From here on, plain Transformers, as any user of the checkpoint would.
    from transformers import AutoModelForImageClassification

    reloaded = AutoModelForImageClassification.from_pretrained(args.output)
    compressor.evaluate(reloaded, args.test_data, split=args.test_split)
    compressor.report.save(args.output)
    page = compressor.report.save_html(args.output)
    plot_ranks(compressor.report, args.output / "ranks.png")

    print(format_table(compressor.report))
    print(f"Checkpoint, report and picture of the ranks: {args.output}/ ({time.perf_counter() - start:.0f} s)")
    print(f"The report as a page: {page}")


if __name__ == "__main__":
    main()
