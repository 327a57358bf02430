"""`optimum-cli mixrank verify`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .command import FAILED, MixRankSubcommand, add_hub_arguments, hub_arguments, load_checkpoint
from .images import add_image_arguments, add_image_size_argument, check_image_size, named_shape, read_images


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ..calibration.images.batches import Batch
    from ..deployment.verify import Verification


class VerifyCommand(MixRankSubcommand):
    """Compare an exported model with its source."""

    description = """Compare an exported model with the checkpoint that it was made from.

The exit code is 1 if the exported model is broken: if an output is NaN or Inf, or differs by more than rounding explains:
by more than 1e-4 in float32; in half precision and int8, the predictions decide. With --dtype instead of --exported, the
checkpoint is compared with itself in half precision; if that overflows, the first layer to do so is named.

examples:
  optimum-cli mixrank verify --model out --exported out-onnx --dataset path/to/labelled/images
  optimum-cli mixrank verify --model out --dtype float16 --dataset path/to/labelled/images
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add("--model", required=True, help="checkpoint that was exported: local folder or Hub id")
        what = "exported model: .onnx, OpenVINO's .xml, .pte, .pt2 (which can run code: open only what you trust), "
        add("--exported", help=what + "a folder with one of them, or a checkpoint")
        add(
            "--dtype",
            help="float16 or bfloat16: compare the checkpoint with itself in half precision, instead of with --exported",
        )
        add("--max-difference", type=float, help="largest difference, absolute or relative to the largest output")
        add("--min-agreement", type=float, help="smallest share of images with the same predicted class")
        add("--max-kl", type=float, help="largest mean KL divergence, in nats; defaults depend on the precision")
        add_image_size_argument(parser)
        add_image_arguments(parser, "to compare on; default: random pixels", 256, "validation, test")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        import torch

        from ..checkpoint.original import load_image_processor
        from ..deployment.preprocessing import preprocessing_problems
        from ..deployment.verify import LIMITS, Limits, precision_of, verify_model

        args = self.args
        if args.exported is not None and args.dtype is not None:
            raise ValueError(
                "--exported and --dtype name two things to compare the checkpoint with; leave one of them out."
            )
        if args.exported is None and args.dtype is None:
            raise ValueError("Name what to compare the checkpoint with: --exported, or --dtype float16 or bfloat16.")
        check_image_size(args)
        if args.dataset is not None and args.image_size is not None:
            raise ValueError(
                "--image-size has no effect with --dataset, whose images the image processor prepares; leave it out."
            )
        self._check_limits()
        source = load_checkpoint(args, args.model, torch.float32, complete=True).eval()
        exported = self._exported()
        given = (args.max_difference, args.min_agreement, args.max_kl)
        limits = LIMITS[precision_of(exported)] if given == (None, None, None) else Limits(*given)
        processor = load_image_processor(args.model, hub_arguments(args), needed=args.dataset is not None)
        others = () if args.exported is None else preprocessing_problems(processor, args.exported)
        result = verify_model(source, exported, self._batches(source, processor), limits=limits)
        result = replace(result, problems=(*result.problems, *others))
        values, lines = result.to_dict(), _lines(result)
        if args.dtype is not None:
            found = self._range(source, exported, processor)
            values |= found
            lines += [f"{name.replace('_', ' '):<22}{value}" for name, value in found.items()]
        self.exit_code = 0 if result.is_ok else FAILED
        verdict = "ok" if result.is_ok else f"broken: {'; '.join(result.problems)}"
        return "\n".join([*lines, verdict]), values

    def _check_limits(self) -> None:
        args = self.args
        for option, value in (("--max-difference", args.max_difference), ("--max-kl", args.max_kl)):
            # Written so that NaN fails too.
            if value is not None and not value >= 0:
                raise ValueError(f"{option} {value:g} is not a number of at least 0.")
        share = args.min_agreement
        if share is not None and not 0 <= share <= 1:
            hint = f": did you mean {share / 100:g}?" if 1 < share <= 100 else ", a share of the images."
            raise ValueError(f"--min-agreement {share:g} is not in [0, 1]{hint}")

    def _exported(self) -> nn.Module:
        from ..checkpoint.original import parse_dtype
        from ..deployment.opening import find_exported, open_exported

        args = self.args
        if args.dtype is not None:
            dtype = parse_dtype(args.dtype)
            if str(dtype) not in ("torch.float16", "torch.bfloat16"):
                raise ValueError(f"--dtype {args.dtype} is not half precision; choose float16 or bfloat16.")
            return load_checkpoint(args, args.model, dtype).eval()
        if find_exported(args.exported) is not None:
            return open_exported(args.exported)
        return load_checkpoint(args, args.exported, "auto", complete=True).eval()

    def _batches(self, source: PreTrainedModel, processor: Any) -> Iterable[Batch]:
        """Return the images that the options name, or random pixels."""
        from ..calibration.images.batches import Batch
        from ..deployment.image_part import image_shape
        from ..deployment.verify import random_pixels
        from ..runtime.logging import get_logger

        args = self.args
        if args.dataset is not None:
            return read_images(args, source, processor, ("validation", "test"))
        get_logger(__name__).warning(
            "Comparing on random pixels, which say little about half precision and int8; name images with --dataset."
        )
        shape = image_shape(source, processor, named_shape(args, source))
        return [Batch(part) for part in random_pixels(source, pixel_values_shape=shape).split(args.batch_size)]

    def _range(self, source: PreTrainedModel, half: nn.Module, processor: Any) -> dict[str, Any]:
        """Return where half precision overflows, and how much of its range is used."""
        import torch

        from ..deployment.overflow import find_largest_activation, find_overflow

        batch = next(iter(self._batches(source, processor))).pixel_values
        dtype = next(each.dtype for each in half.parameters() if each.is_floating_point())
        largest = find_largest_activation(source, batch)
        share = largest.value / torch.finfo(dtype).max
        return {
            "first_overflow": find_overflow(half, batch.to(dtype)) or "none",
            "largest_activation": f"{largest.value:,.4g} in `{largest.layer}`, {share:.2%} of the range",
        }


def _lines(result: Verification) -> list[str]:
    rows = {name: value for name, value in result.to_dict().items() if name not in ("ok", "problems")}
    return [
        f"{name.replace('_', ' '):<22}{value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' '):<22}{value}"
        for name, value in rows.items()
    ]
