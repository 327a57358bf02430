"""`optimum-cli mixrank plan`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import MixRankSubcommand, add_model_arguments, open_compressor, reading_arguments
from .fields import add_field_arguments, calibration_images, configuration
from .parsing import fraction
from .statistics import add_statistics_argument, has_statistics, read_statistics, take_statistics


if TYPE_CHECKING:
    from ..checkpoint.configuration import MixRankConfig

RATIOS = [0.3, 0.4, 0.5, 0.6, 0.7]

PICTURE_FORMATS = (".png", ".svg", ".pdf")


class PlanCommand(MixRankSubcommand):
    """Predict the loss at several budgets."""

    description = """Show predicted losses and what every block becomes at several budgets, without compressing.

example:
  optimum-cli mixrank plan --model facebook/deit-base-patch16-224 --dataset path/to/images --ratios 0.4 0.5 0.6 0.7 \\
      --plot profile.png
  optimum-cli mixrank plan --model facebook/deit-base-patch16-224 --dataset path/to/images --cost latency \\
      --latency-table latencies.json --ratios 0.3 0.4 0.5
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add("--model", required=True, help="local folder or Hub id")
        add_statistics_argument(parser)
        ratios = (
            "fractions of parameters, or of the --cost, to remove; default: that of --ratio, --target-parameters, --like "
            "or --target-latency, else 0.3 0.4 0.5 0.6 0.7"
        )
        add("--ratios", type=fraction, nargs="+", help=ratios)
        measure = "compress by this ratio, in memory, and estimate agreement and KL at all ratios from the result"
        add("--measure", type=fraction, metavar="RATIO", help=measure)
        add("--plot", type=Path, help="plot to write: .png, .svg or .pdf")
        add_model_arguments(parser)
        add_field_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        named = {
            "--ratio": args.compression_ratio,
            "--target-parameters": config.target_parameters,
            "--like": config.like,
        }
        if args.ratios and any(each is not None for each in named.values()):
            option = next(name for name, value in named.items() if value is not None)
            raise ValueError(f"--ratios and {option} both say how much to remove. Give only one of them.")
        from ..calibration.result import Calibration
        from ..decomposition import METRICS
        from ..pipeline.costs import with_ratio
        from ..pipeline.profile import check_ratios, reachable_ratios
        from ..pipeline.size import with_known_ratio
        from ..runtime.files import check_writable_file

        if args.plot is not None:
            if args.plot.suffix.lower() not in PICTURE_FORMATS:
                raise ValueError(
                    f"--plot {str(args.plot)!r} must end in one of {', '.join(PICTURE_FORMATS)}; rename it."
                )
            check_writable_file(args.plot)
        reuse = has_statistics(args, config)
        needed = METRICS[config.metric].uses_data and not reuse
        if config.dataset is None and args.measure is not None:
            raise ValueError("--measure needs --dataset: name a folder of images to compress and to compare with.")
        if config.dataset is None and needed:
            raise ValueError("--dataset is missing: name a folder of images, or the --statistics of an earlier run.")
        compressor = open_compressor(args, args.model)
        images = None if config.dataset is None else calibration_images(args, compressor, config)
        with compressor.processes.raise_on_all_ranks():
            sized = with_known_ratio(compressor.model, config)
            is_named = sized is not config or any(
                each is not None for each in (args.compression_ratio, config.target_latency)
            )
            asked = args.ratios or ([sized.compression_ratio] if is_named else [])
            measured = [] if args.measure is None else [args.measure]
            check_ratios(compressor.model, config, [*asked, *measured])
            ratios = asked or reachable_ratios(compressor.model, config, RATIOS)
        calibration = Calibration({}, 0)
        if needed:
            calibration = take_statistics(args, compressor, config, images)
            if args.statistics is not None:
                self.written = (
                    f"The statistics are in {str(args.statistics)!r}, which the same command reads next time."
                )
        elif reuse:
            calibration = read_statistics(args, compressor, config, images)
        profile = compressor.profile(calibration, config, sorted({*ratios, *measured}))
        if measured:
            compressor.compress(with_ratio(config, args.measure), images, **reading_arguments(args))
            assert compressor.report is not None
            profile = profile.calibrated(compressor.report)
        if args.plot is not None and compressor.processes.is_main:
            profile.plot(args.plot)
        return f"{_heading(sized)}{profile}", {"target_parameters": sized.target_parameters, **profile.to_dict()}


def _heading(config: MixRankConfig) -> str:
    """Return what a size of the whole model means as a ratio."""
    if config.target_parameters is None:
        return ""
    like = f", the size of {config.like}" if config.like else ""
    return f"A ratio of {config.compression_ratio:.1%} leaves {config.target_parameters:,} parameters{like}.\n\n"
