"""`optimum-cli mixrank evaluate`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any

from .command import (
    MixRankSubcommand,
    add_model_arguments,
    load_checkpoint,
    open_compressor,
    place_of,
    reading_arguments,
)
from .hub import hub_arguments


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..pipeline.compressor import MixRankCompressor


class EvaluateCommand(MixRankSubcommand):
    """Compare the predictions of a checkpoint with those of another."""

    description = """Compare a compressed checkpoint with its original by what the models return: classes, boxes, masks,
depth, embeddings or features. Accuracy needs labels; everything else needs images alone.

example:
  optimum-cli mixrank evaluate --model out --reference facebook/deit-base-patch16-224 --dataset path/to/labelled/images

Two compressed checkpoints can be compared in the same way.
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add("--model", required=True, help="checkpoint to evaluate, usually a compressed one: local folder or Hub id")
        add(
            "--reference",
            required=True,
            help="checkpoint to compare it with, usually the original: local folder or Hub id",
        )
        add(
            "--dataset",
            required=True,
            help="images: local folder, parquet file or folder, or Hub id; with labels to measure accuracy",
        )
        add("--split", help="split of the dataset; default: validation, test, or the only one")
        add("--image-column", help="column of the images; default: the only image column")
        add("--label-column", help="column of the labels; default: label or labels, if there is one")
        add("--num-samples", type=int, help="number of images to draw; default: all")
        add("--seed", type=int, default=42, help="seed of that draw; default: 42")
        add(
            "--output-names",
            nargs="+",
            help="outputs to compare, such as predicted_depth; default: those of its kind of model",
        )
        add(
            "--interpolate-pos-encoding",
            action="store_true",
            help="interpolate position embeddings, for images of another size than the models'",
        )
        add_model_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        from ..reporting.table import evaluation_lines

        args = self.args
        compressor, model = self._models()
        names = ("split", "image_column", "label_column", "num_samples", "seed")
        settings = {name: getattr(args, name) for name in (*names, "output_names", "interpolate_pos_encoding")}
        result = compressor.evaluate(model, args.dataset, **settings, **reading_arguments(args))
        values = {name: value for name, value in result.to_dict().items() if value is not None}
        return "\n".join(evaluation_lines(values)), {**values, "intervals": result.intervals()}

    def _models(self) -> tuple[MixRankCompressor, PreTrainedModel]:
        """Return the compressor of the reference, and the model."""
        from ..checkpoint.architecture import is_compressed_checkpoint
        from ..checkpoint.original import load_image_processor, parse_dtype
        from ..pipeline.compressor import MixRankCompressor

        args, hub = self.args, hub_arguments(self.args)
        # Both before either is loaded.
        is_compressed, is_other = (is_compressed_checkpoint(each, hub) for each in (args.model, args.reference))
        if not is_other:
            compressor = open_compressor(args, args.reference)
        elif not is_compressed:
            raise ValueError(
                f"--reference {args.reference!r} is compressed and --model {args.model!r} is not: swap the two."
            )
        else:
            reference = load_checkpoint(args, args.reference, parse_dtype(args.dtype)).to(place_of(args))
            compressor = MixRankCompressor(reference, load_image_processor(args.reference, hub))
        original = compressor.model
        model = type(original).from_pretrained(args.model, dtype=original.dtype, **hub)
        return compressor, model.to(original.device)
