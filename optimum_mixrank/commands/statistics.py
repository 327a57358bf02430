"""`--statistics`: taken once, kept in a file, and used again for other budgets."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets

    from ..calibration.result import Calibration
    from ..checkpoint.configuration import MixRankConfig
    from ..pipeline.compressor import MixRankCompressor


def add_statistics_argument(parser: ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="safetensors file of statistics: read if it is there, else taken from the images and written",
    )


def has_statistics(args: Any, config: MixRankConfig) -> bool:
    """Whether there is a file of statistics already.

    Raises:
        ValueError: for a metric that needs none, for a file in a folder that does not exist, and for a limit on memory
            beside a file that is to be made.
    """
    from ..decomposition import METRICS

    if args.statistics is None:
        return False
    if not METRICS[config.metric].uses_data:
        raise ValueError(f"--statistics has no use with metric={config.metric!r}, which needs none; leave it out.")
    if not args.statistics.expanduser().absolute().parent.is_dir():
        raise ValueError(f"--statistics {str(args.statistics)!r} is in no folder that exists; make it first.")
    found: bool = args.statistics.expanduser().is_file()
    if not found and getattr(args, "max_memory", None) is not None:
        raise ValueError(
            f"--max-memory may need several passes over the images, and --statistics {str(args.statistics)!r} is made in "
            "one. Leave one of them out, or make the file with `optimum-cli mixrank plan`."
        )
    return found


def take_statistics(
    args: Any, compressor: MixRankCompressor, config: MixRankConfig, images: datasets.Dataset
) -> Calibration:
    """Statistics of all layers of the encoder, written to the file if one is named."""
    calibration = compressor.calibrate(
        images,
        config.metric,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        fisher_samples=config.fisher_samples,
        seed=config.seed,
    )
    with compressor.processes.raise_on_all_ranks():
        if args.statistics is not None and compressor.processes.is_main:
            calibration.save(args.statistics)
    return calibration


def read_statistics(
    args: Any, compressor: MixRankCompressor, config: MixRankConfig, images: datasets.Dataset | None
) -> Calibration:
    """Those of the file.

    Raises:
        ValueError: if the file is no such one, is of another model or of other images than those that are given, or was
            made with another number of probes than is asked for.
    """
    from ..calibration.result import Calibration

    calibration = Calibration.load(args.statistics)
    asked, made = config.fisher_samples, calibration.fisher_samples
    if made not in (None, asked) and (asked > 1 or args.fisher_samples is not None):
        raise ValueError(
            f"--statistics {str(args.statistics)!r} was made with --fisher-samples {made}, not {asked}; leave the option "
            "out, or name another file."
        )
    if images is not None:
        reading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        compressor.check_calibration(calibration, images, **reading)
    return calibration
