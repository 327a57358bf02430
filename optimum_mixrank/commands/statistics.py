"""`--statistics`: the file in which calibration statistics are kept for several budgets."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import reading_arguments


if TYPE_CHECKING:
    import datasets

    from ..calibration.result import Calibration
    from ..checkpoint.configuration import MixRankConfig
    from ..pipeline.compressor import MixRankCompressor


def add_statistics_argument(parser: ArgumentParser) -> None:
    """Declare the option."""
    kept = "safetensors file of calibration statistics: read if it exists, otherwise computed and written"
    parser.add_argument("--statistics", type=Path, metavar="FILE", help=kept)


def has_statistics(args: Any, config: MixRankConfig) -> bool:
    """Return whether a file of statistics is named and exists; raise a `ValueError` if it could not be used or written."""
    from ..decomposition import METRICS
    from ..runtime.files import check_writable_file

    if args.statistics is None:
        return False
    if not METRICS[config.metric].uses_data:
        raise ValueError(f"--statistics has no effect with metric={config.metric!r}, which needs none; leave it out.")
    if not args.statistics.expanduser().absolute().parent.is_dir():
        raise ValueError(f"--statistics {str(args.statistics)!r} is in a folder that does not exist; make it first.")
    found: bool = args.statistics.expanduser().is_file()
    if not found:
        check_writable_file(args.statistics)
    if not found and getattr(args, "max_memory", None) is not None:
        raise ValueError(
            f"--max-memory may need several passes over the images, but --statistics {str(args.statistics)!r} is written "
            "in a single one. Leave one of them out, or write the file with `optimum-cli mixrank plan`."
        )
    return found


def take_statistics(
    args: Any, compressor: MixRankCompressor, config: MixRankConfig, images: datasets.Dataset
) -> Calibration:
    """Compute statistics of all layers of the encoder, and write them to the file if one is named."""
    names = ("include", "fisher_samples", "seed", "output_names", "interpolate_pos_encoding", "structures")
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    calibration = compressor.calibrate(images, config.metric, **settings, **reading_arguments(args))
    with compressor.processes.raise_on_all_ranks():
        if args.statistics is not None and compressor.processes.is_main:
            calibration.save(args.statistics)
    return calibration


def read_statistics(
    args: Any, compressor: MixRankCompressor, config: MixRankConfig, images: datasets.Dataset | None
) -> Calibration:
    """Read the statistics; raise a `ValueError` if they are of another model, other images or another number of probes."""
    from ..calibration.result import Calibration

    calibration = Calibration.load(args.statistics)
    asked, made = config.fisher_samples, calibration.fisher_samples
    if made not in (None, asked) and (asked > 1 or args.fisher_samples is not None):
        raise ValueError(
            f"--statistics {str(args.statistics)!r} was made with --fisher-samples {made}, not {asked}; leave the option "
            "out, or name another file."
        )
    if images is not None:
        compressor.check_calibration(calibration, images, include=config.include, **reading_arguments(args))
    return calibration
