"""`optimum-cli mixrank plan`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .command import MixRankSubcommand, add_hub_arguments, add_model_arguments, open_compressor
from .fields import add_field_arguments, calibration_images, configuration


class PlanCommand(MixRankSubcommand):
    """Predicted losses over budgets."""

    description = """Ranks and predicted losses over many budgets, without compressing anything.

example:
  optimum-cli mixrank plan --model facebook/deit-base-patch16-224 --dataset path/to/images --ratios 0.4 0.5 0.6 0.7 \\
      --plot profile.png
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="local folder or Hub id")
        parser.add_argument("--statistics", type=Path, help="file of statistics: read if it is there, else written")
        parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="budgets")
        parser.add_argument("--plot", type=Path, help="picture to write: .png, .svg or .pdf")
        add_model_arguments(parser)
        add_field_arguments(parser)
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        from ..calibration.result import Calibration

        reuse = args.statistics is not None and args.statistics.is_file()
        if config.dataset is None and not reuse:
            raise ValueError("--dataset is missing: name a folder of images, or --statistics of an earlier run.")
        compressor = open_compressor(args, args.model)
        if reuse:
            calibration = Calibration.load(args.statistics)
        else:
            calibration = compressor.calibrate(
                calibration_images(args, compressor, config),
                config.metric,
                batch_size=args.batch_size,
                num_workers=args.num_workers,
                fisher_samples=config.fisher_samples,
                seed=config.seed,
            )
            if args.statistics is not None and compressor.processes.is_main:
                calibration.save(args.statistics)
        profile = compressor.profile(calibration, config, args.ratios)
        if args.plot is not None and compressor.processes.is_main:
            profile.plot(args.plot)
        return str(profile), dataclasses.asdict(profile)
