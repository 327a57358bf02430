"""`optimum-cli mixrank compress`."""

from __future__ import annotations

import hashlib
import os
import shlex
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import (
    MixRankSubcommand,
    add_model_arguments,
    add_output_arguments,
    add_self_contained_argument,
    hub_arguments,
    open_compressor,
    reading_arguments,
)
from .fields import add_field_arguments, calibration_images, configuration
from .statistics import add_statistics_argument, has_statistics, read_statistics, take_statistics


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..checkpoint.configuration import MixRankConfig
    from ..pipeline.compressor import MixRankCompressor


class CompressCommand(MixRankSubcommand):
    """Compress a model, using a folder of images."""

    description = """Compress a Vision Transformer. This needs images, but no labels.

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
        add = parser.add_argument
        add("--model", required=True, help="local folder or Hub id")
        add_output_arguments(parser, "compressed")
        add_model_arguments(parser)
        add("--evaluate-on", metavar="DATASET", help="labelled images on which to evaluate the result")
        add("--evaluate-split", metavar="SPLIT", help="default: validation, test, or the only one")
        add_self_contained_argument(parser)
        add("--push-to-hub", metavar="REPO", help="upload the result to this repository")
        dtypes = "float32, float16, bfloat16, or auto (default): the original's or --dtype, whichever has fewer bits"
        add("--save-dtype", default="auto", metavar="DTYPE", help=f"dtype of the compressed checkpoint: {dtypes}")
        limit = "limit on memory in addition to the model, such as 8GiB; takes several passes if one would need more"
        add("--max-memory", metavar="SIZE", help=limit)
        add_statistics_argument(parser)
        add = parser.add_argument_group("interrupted runs").add_argument
        resume = "continue where the same command was interrupted (default), or start over"
        add("--resume", action=BooleanOptionalAction, default=True, help=resume)
        save = "how often to save progress, in OUTPUT.unfinished next to the output; default: 60; 0: never"
        add("--save-interval", type=float, default=60.0, metavar="SECONDS", help=save)
        add_field_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        config = configuration(args)
        if args.evaluate_split is not None and args.evaluate_on is None:
            raise ValueError("--evaluate-split has no effect without --evaluate-on; name a dataset, or leave it out.")
        from ..pipeline.unfinished import discard
        from ..reporting import HTML_NAME, format_table

        run = unfinished_run(args)
        check_places(args, config, run)
        reuse = has_statistics(args, config)
        check_images(config, reuse)
        saved_dtype = dtype_to_save(args)
        compressor = open_compressor(args, args.model)
        images = None if config.dataset is None else calibration_images(args, compressor, config)
        with compressor.processes.raise_on_all_ranks():
            if args.self_contained:
                from ..checkpoint.self_contained import auto_map

                auto_map(compressor.model)
            if args.evaluate_on is not None:
                # A mistake in images or labels must not come to light after all the work.
                try:
                    compressor.check_evaluation(args.evaluate_on, split=args.evaluate_split)
                except ValueError as error:
                    message = str(error).replace("`split`", "`evaluate_split`").replace("split=", "evaluate_split=", 1)
                    raise ValueError(message) from error
            if run is not None and not args.resume and compressor.processes.is_main:
                discard(run)
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
            **reading_arguments(args),
        )
        self._round_and_evaluate(compressor, model, saved_dtype, config)
        saving = {"self_contained": args.self_contained}
        compressor.save_pretrained(model, args.output, overwrite=args.overwrite, picture=True, checked=True, **saving)
        self.written = f"The checkpoint in {str(args.output)!r} is complete."
        report = compressor.report
        assert report is not None  # `compress` has made one
        if args.push_to_hub is not None:
            self._push(compressor, model, saving)
        text = (
            f"{format_table(report)}\n\n"
            f"Checkpoint, report and plot of the ranks: {args.output}\n"
            f"The same as a web page: {args.output / HTML_NAME}{_remark(args.output)}"
        )
        return text, {"output": str(args.output), **report.to_dict()}

    def _round_and_evaluate(
        self, compressor: MixRankCompressor, model: PreTrainedModel, dtype: torch.dtype | None, config: MixRankConfig
    ) -> None:
        """Round the model to the dtype that it is saved in, and evaluate the rounded values if asked to."""
        args, computed = self.args, model.dtype
        if dtype is None or (args.save_dtype == "auto" and dtype.itemsize >= computed.itemsize):
            dtype = computed
        model.to(dtype).to(computed)
        if args.evaluate_on is not None:
            call = {name: getattr(config, name) for name in ("output_names", "interpolate_pos_encoding")}
            compressor.evaluate(model, args.evaluate_on, split=args.evaluate_split, **call, **reading_arguments(args))
        model.to(dtype)

    def _push(self, compressor: MixRankCompressor, model: PreTrainedModel, saving: dict[str, Any]) -> None:
        """Upload the model; an error says that the checkpoint on the disk is complete."""
        output, repo = str(self.args.output), self.args.push_to_hub
        by_hand = f"`{shlex.join(['hf', 'upload', repo, output])}` uploads it."
        self.written += f" It was not uploaded: {by_hand}"
        try:
            compressor.push_to_hub(model, repo, token=self.args.token, **saving)
        except Exception as error:
            reason = str(error).strip().rstrip(".")
            raise OSError(
                f"The checkpoint in {output!r} is complete, but was not uploaded to {repo!r}: {reason}. Later, {by_hand}"
            ) from error
        self.written = f"The checkpoint in {output!r} is complete, and it was uploaded."

    def advice(self) -> str:
        """See `MixRankSubcommand`."""
        if self.written:
            return self.written
        run = unfinished_run(self.args)
        if run is None or not run.is_dir():
            return super().advice()
        return f"What was finished is kept in {str(run)!r}: the same command continues from there."


def _remark(output: Path) -> str:
    """Return how the checkpoint opens without the plugin, if it does."""
    from ..checkpoint.files import read_json
    from ..checkpoint.self_contained import needs_of

    remarks = {
        "plugin": "",
        "code": "\nThe checkpoint brings its code: `from_pretrained(…, trust_remote_code=True)` needs no plugin.",
        "nothing": "\nAll MLPs have the same width: the checkpoint is an ordinary one, which needs no plugin.",
    }
    return remarks[needs_of(read_json(output.expanduser() / "config.json"))]


def check_images(config: MixRankConfig, reuse: bool) -> None:
    """Raise a `ValueError` if images are needed and none are named; `reuse` says whether statistics are at hand."""
    from ..decomposition import METRICS

    if config.dataset is None and (config.compensation or (METRICS[config.metric].uses_data and not reuse)):
        if reuse:
            raise ValueError(
                "--dataset is missing: name a folder of images, or add --compensation none to use --statistics alone, "
                "which loses more accuracy."
            )
        raise ValueError(
            "--dataset is missing: name a folder of images, which need no labels. Without images, only --metric svd "
            "--compensation none works, which hardly ever leaves a usable model: with half of its parameters, a ViT-S "
            "falls from 87.4 % to 10 % top-1."
        )


def dtype_to_save(args: Any) -> torch.dtype | None:
    """Return the dtype of `--save-dtype`, or the original's for `auto`; None if neither its files nor its config tell."""
    import torch

    from ..checkpoint.architecture import read_config
    from ..checkpoint.files import stored_dtype
    from ..checkpoint.original import parse_dtype

    try:
        dtype = parse_dtype(args.save_dtype)
    except ValueError as error:
        message = str(error).replace(f"dtype={args.save_dtype!r}", f"--save-dtype {args.save_dtype}", 1)
        raise ValueError(message) from None
    if dtype != "auto":
        return dtype
    # From the files, because a loaded model has the dtype that it was loaded in.
    folder = Path(args.model).expanduser()
    if any(folder.glob("*.safetensors")):
        named = stored_dtype(folder)
    else:
        named = getattr(read_config(args.model, hub_arguments(args)), "dtype", None)
    found = getattr(torch, named, None) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def unfinished_run(args: Any) -> Path | None:
    """Return the folder beside the output in which the run saves its progress, or None if it saves none."""
    if args.save_interval < 0:
        raise ValueError(f"--save-interval {args.save_interval} is negative; give seconds, or 0 to save nothing.")
    if not args.save_interval:
        return None
    from ..runtime.folders import can_be_renamed, resolved

    output = resolved(args.output)
    if not output.name:
        return None  # the root of the file system, which is refused
    # File systems have names of 255 bytes at most.
    is_long = len(os.fsencode(output.name)) > 240
    name = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:32] if is_long else output.name
    beside, inside = output.with_name(f"{name}.unfinished"), output / "mixrank.unfinished"
    if os.path.lexists(inside):
        return inside
    return beside if os.path.lexists(beside) or not output.is_dir() or can_be_renamed(output) else inside


def _warn_without_token(args: Any) -> None:
    """Say before the work that an upload will need a token; there may be one when the work is done."""
    from huggingface_hub import get_token

    from ..runtime.distributed import launched_index
    from ..runtime.logging import get_logger

    if not args.token and get_token() is None and launched_index() == 0:
        get_logger(__name__).warning(
            f"--push-to-hub {args.push_to_hub} needs an access token, and none is known yet; run `hf auth login` before "
            "the compression ends, or give --token."
        )


def check_places(args: Any, config: MixRankConfig, run: Path | None) -> None:
    """Raise an error if the result or the progress could not be written, or would be written over what is read."""
    from ..checkpoint.saving import IMAGES, ORIGINAL, check_apart, writable_directory
    from ..pipeline.saving import check_repo_id
    from ..pipeline.unfinished import check_progress, has_saved
    from ..runtime.folders import resolved

    images = [each for each in (config.dataset, args.evaluate_on) if each is not None]
    sources: dict[str, list[Any]] = {ORIGINAL: [args.model], IMAGES: images}
    if args.push_to_hub is not None:
        check_repo_id(args.push_to_hub)
        _warn_without_token(args)
    overwrite = args.overwrite or (args.resume and has_saved(run, args.output))
    writable_directory(args.output, overwrite, run, sources)
    if run is not None:
        check_apart(run, sources, "OUTPUT.unfinished")
        check_progress(run)
    if args.statistics is not None and resolved(args.statistics).is_relative_to(resolved(args.output)):
        raise ValueError(
            f"--statistics {str(args.statistics)!r} is inside --output {str(args.output)!r}, which is for the checkpoint "
            "alone; name another file."
        )
