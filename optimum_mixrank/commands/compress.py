"""`optimum-cli mixrank compress`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from .command import (
    MixRankSubcommand,
    add_hub_arguments,
    add_model_arguments,
    add_output_arguments,
    open_compressor,
)
from .fields import add_field_arguments, calibration_images, configuration


class CompressCommand(MixRankSubcommand):
    """Compress a model with a folder of images."""

    description = """Compress a ViT, DeiT or Swin. Images are needed, labels are not.

examples:
  optimum-cli mixrank compress --model facebook/deit-base-patch16-224 --dataset path/to/images --ratio 0.6 --output out
  optimum-cli mixrank compress --model path/to/vit --dataset imagenet-1k --split train --num-samples 1024 \\
      --recipe fast --evaluate-on path/to/labelled/images --output out

on several GPUs:
  accelerate launch -m optimum.commands.optimum_cli mixrank compress --model …
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="local folder or Hub id")
        add_output_arguments(parser, "compressed")
        add_model_arguments(parser)
        parser.add_argument("--evaluate-on", help="labelled images to measure the loss on")
        parser.add_argument("--evaluate-split", help="default: validation, test, or the only one")
        parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository")
        add_field_arguments(parser)
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        from ..checkpoint import writable_directory
        from ..decomposition import METRICS
        from ..reporting import HTML_NAME, format_table, plot_ranks

        writable_directory(args.output, args.overwrite)
        if config.dataset is None and (config.compensation or METRICS[config.metric].uses_data):
            raise ValueError("--dataset is missing: name a folder of images, or use --metric svd --compensation none.")
        compressor = open_compressor(args, args.model)
        images = None if config.dataset is None else calibration_images(args, compressor, config)
        model = compressor.compress(config, images, batch_size=args.batch_size)
        if args.evaluate_on is not None:
            compressor.evaluate(model, args.evaluate_on, split=args.evaluate_split, batch_size=args.batch_size)
        compressor.save_pretrained(model, args.output, overwrite=args.overwrite)
        report = compressor.report
        assert report is not None  # `compress` has made one
        if compressor.processes.is_main:
            plot_ranks(report, args.output / "ranks.png")
        if args.push_to_hub is not None:
            compressor.push_to_hub(model, args.push_to_hub, token=args.token)
        text = (
            f"{format_table(report)}\n\n"
            f"Checkpoint, report and picture of the ranks: {args.output}\n"
            f"The same to look at in a browser: {args.output / HTML_NAME}"
        )
        return text, {"output": str(args.output), **report.to_dict()}
