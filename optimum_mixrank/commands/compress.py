"""`optimum-cli mixrank compress`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import (
    MixRankSubcommand,
    add_hub_arguments,
    add_model_arguments,
    add_output_arguments,
    hub_arguments,
    open_compressor,
)
from .fields import add_field_arguments, calibration_images, configuration
from .statistics import add_statistics_argument, has_statistics, read_statistics, take_statistics


if TYPE_CHECKING:
    import torch


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
        parser.add_argument(
            "--save-dtype",
            default="auto",
            metavar="DTYPE",
            help="of the compressed checkpoint: float32, float16, bfloat16, or auto (default), that of the original or of "
            "--dtype, whichever is shorter",
        )
        parser.add_argument(
            "--max-memory",
            metavar="SIZE",
            help="most memory to use beside the model, 8GiB say; where more would be needed, several passes are made",
        )
        add_statistics_argument(parser)
        add_resume_arguments(parser)
        add_field_arguments(parser)
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        from ..checkpoint.saving import writable_directory
        from ..decomposition import METRICS
        from ..pipeline.unfinished import discard, has_saved
        from ..reporting import HTML_NAME, format_table

        run = unfinished_run(args)
        writable_directory(args.output, args.overwrite or (args.resume and has_saved(run, args.output)))
        reuse = has_statistics(args, config)
        if config.dataset is None and (config.compensation or (METRICS[config.metric].uses_data and not reuse)):
            others = (
                "--statistics of an earlier run --compensation none" if reuse else "--metric svd --compensation none"
            )
            raise ValueError(f"--dataset is missing: name a folder of images, or use {others}.")
        stored = dtype_to_save(args)
        compressor = open_compressor(args, args.model)
        images = None if config.dataset is None else calibration_images(args, compressor, config)
        with compressor.processes.raise_on_all_ranks():
            if run is not None and not args.resume and compressor.processes.is_main:
                discard(run)
        loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
        calibration = None
        if args.statistics is not None:
            if reuse:
                # Compensation compares the images itself.
                compared = None if config.compensation else images
                calibration = read_statistics(args, compressor, config, compared)
            else:
                calibration = take_statistics(args, compressor, config, images)
            images = images if config.compensation else None
        model = compressor.compress(
            config,
            images,
            calibration=calibration,
            max_memory=args.max_memory,
            resume_directory=run,
            save_interval=args.save_interval or 60.0,
            **loading,
        )
        computed = model.dtype
        if args.save_dtype == "auto" and (stored is None or stored.itemsize >= computed.itemsize):
            stored = computed
        # What is evaluated are the values that the files will hold.
        model.to(stored).to(computed)
        if args.evaluate_on is not None:
            compressor.evaluate(model, args.evaluate_on, split=args.evaluate_split, **loading)
        model.to(stored)
        compressor.save_pretrained(model, args.output, overwrite=args.overwrite, picture=True)
        report = compressor.report
        assert report is not None  # `compress` has made one
        if args.push_to_hub is not None:
            compressor.push_to_hub(model, args.push_to_hub, token=args.token)
        text = (
            f"{format_table(report)}\n\n"
            f"Checkpoint, report and picture of the ranks: {args.output}\n"
            f"The same to look at in a browser: {args.output / HTML_NAME}"
        )
        return text, {"output": str(args.output), **report.to_dict()}

    def advice(self) -> str:
        """See `MixRankSubcommand`."""
        run = unfinished_run(self.args)
        if run is None or not run.is_dir():
            return super().advice()
        return f"What was finished is kept in {str(run)!r}: the same command goes on from there."


def dtype_to_save(args: Any) -> torch.dtype | None:
    """The dtype that was asked for, or that of the original; None where neither its files nor its configuration tell.

    Raises:
        ValueError: if `--save-dtype` is no floating point dtype.
    """
    import torch
    from transformers import AutoConfig

    from ..checkpoint.files import stored_dtype
    from ..checkpoint.original import parse_dtype

    try:
        dtype = parse_dtype(args.save_dtype)
    except ValueError as error:
        raise ValueError(f"--save-{error}") from None
    if dtype != "auto":
        return dtype
    # A loaded model tells what it was loaded in.
    folder = Path(args.model).expanduser()
    if any(folder.glob("*.safetensors")):
        named = stored_dtype(folder)
    else:
        named = getattr(AutoConfig.from_pretrained(args.model, **hub_arguments(args)), "dtype", None)
    found = getattr(torch, named, None) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def add_resume_arguments(parser: ArgumentParser) -> None:
    """Options of runs that may be cut off."""
    group = parser.add_argument_group("interrupted runs")
    group.add_argument(
        "--resume",
        action=BooleanOptionalAction,
        default=True,
        help="go on where the same command was cut off (the default), or start anew",
    )
    group.add_argument(
        "--save-interval",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="between two savings of what is finished, in OUTPUT.unfinished beside the output; default 60, 0 for none",
    )


def unfinished_run(args: Any) -> Path | None:
    """The folder beside the output in which the run notes what it has finished; None if it is not to.

    Raises:
        ValueError: for a negative interval.
    """
    if args.save_interval < 0:
        raise ValueError(f"--save-interval {args.save_interval} is negative; give seconds, or 0 to save nothing.")
    output = args.output.expanduser().absolute()
    return output.with_name(f"{output.name}.unfinished") if args.save_interval else None
