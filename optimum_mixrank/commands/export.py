"""`optimum-cli mixrank export`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .command import MixRankSubcommand, add_hub_arguments, hub_arguments, load_checkpoint
from .images import add_image_arguments, add_image_size_argument, check_image_size, named_shape, read_images


class ExportCommand(MixRankSubcommand):
    """Write a checkpoint for another runtime."""

    description = """Export a checkpoint, compressed or dense, to ONNX Runtime, OpenVINO, ExecuTorch or torch.export.

The file takes batches of any size, and the configurations of the model and of its image processor are written next to it.
With --int8, weights are stored in 8 bits; with --dataset, activations are quantized too, to ranges found on its images.

examples:
  optimum-cli mixrank export --model out --output out-onnx
  optimum-cli mixrank export --model out --output out-int8 --int8
  optimum-cli mixrank export --model out --output out-openvino --runtime openvino --int8 --dataset path/to/images
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        from ..runtime.registry import RUNTIMES

        add = parser.add_argument
        add("--model", required=True, help="checkpoint: local folder or Hub id")
        add("--output", type=Path, required=True, help="folder for the exported model")
        add("--runtime", default="onnx", help=f"{', '.join(RUNTIMES)}; default: onnx")
        add("--int8", action="store_true", help="store weights in 8 bits (onnx and openvino)")
        add(
            "--plain-factors",
            action="store_true",
            help="export pivoted layers as plain factors, which are faster and larger",
        )
        add("--overwrite", action="store_true", help="replace what the output folder holds")
        add_image_size_argument(parser)
        add_image_arguments(parser, "for the ranges of 8-bit activations", 128, "train, validation")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        import torch

        from ..checkpoint.original import load_image_processor
        from ..checkpoint.saving import ORIGINAL, writable_directory
        from ..deployment.export import checked_runtime, export_model

        if args.dataset is not None and not args.int8:
            raise ValueError(
                "--dataset names images for the ranges of 8-bit activations; add --int8, or leave it out."
            )
        check_image_size(args)
        checked_runtime(args.runtime, args.int8)
        writable_directory(args.output, args.overwrite, sources={ORIGINAL: [args.model]})
        model = load_checkpoint(args, args.model, torch.float32, complete=True)
        shape = named_shape(args, model)
        image_processor = load_image_processor(args.model, hub_arguments(args))
        calibration = None
        if args.dataset is not None:
            batches = read_images(args, model, image_processor, ("train", "validation"), labelled=False)
            calibration = (batch.pixel_values for batch in batches)
        result = export_model(
            model,
            args.output,
            args.runtime,
            int8=args.int8,
            calibration=calibration,
            plain_factors=args.plain_factors,
            image_processor=image_processor,
            pixel_values_shape=shape,
            overwrite=args.overwrite,
        )
        values = {
            "output": str(args.output),
            "file": str(result.file),
            "runtime": result.runtime,
            "quantized": result.quantized,
            "bytes": result.num_bytes,
        }
        remark = "" if result.quantized is None else f", 8 bits for {result.quantized}"
        return f"{result.num_bytes:,} bytes{remark}: {result.file}", values
