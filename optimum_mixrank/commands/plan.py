"""`optimum-cli mixrank plan`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .command import MixRankSubcommand, add_hub_arguments, hub_arguments
from .compress import _default_device
from .fields import add_field_arguments, configuration


class PlanCommand(MixRankSubcommand):
    """Predicted losses over budgets."""

    description = """Ranks and predicted losses over many budgets, without compressing anything.

example:
  optimum-cli mixrank plan --model facebook/deit-base-patch16-224 --dataset path/to/images --ratios 0.4 0.5 0.6 0.7 \\
      --plot profile.png
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="local folder or Hub id")
        parser.add_argument("--statistics", type=Path, help="file of statistics: read if it is there, else written")
        parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7], help="budgets")
        parser.add_argument("--plot", type=Path, help="picture to write: .png, .svg or .pdf")
        parser.add_argument("--split", help="of the dataset; default: train, or the only one")
        parser.add_argument("--image-column", help="of the dataset; default: the one image column")
        parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass; default 32")
        parser.add_argument("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
        parser.add_argument("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")
        add_field_arguments(parser)
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        from ..calibration.result import Calibration
        from ..compressor import MixRankCompressor

        reuse = args.statistics is not None and args.statistics.is_file()
        if config.dataset is None and not reuse:
            raise ValueError("--dataset is missing: name a folder of images, or --statistics of an earlier run.")
        compressor = MixRankCompressor.from_pretrained(
            args.model, dtype=args.dtype, device=args.device or _default_device(), **hub_arguments(args)
        )
        if reuse:
            calibration = Calibration.load(args.statistics)
        else:
            images = compressor.get_calibration_dataset(
                config.dataset,
                num_samples=config.num_samples,
                split=args.split,
                image_column=args.image_column,
                seed=config.seed,
            )
            calibration = compressor.calibrate(
                images,
                config.metric,
                batch_size=args.batch_size,
                fisher_samples=config.fisher_samples,
                seed=config.seed,
            )
            if args.statistics is not None:
                calibration.save(args.statistics)
        profile = compressor.profile(calibration, config, args.ratios)
        if args.plot is not None:
            profile.plot(args.plot)
        return str(profile), dataclasses.asdict(profile)
