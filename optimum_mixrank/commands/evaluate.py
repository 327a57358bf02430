"""`optimum-cli mixrank evaluate`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from typing import Any

from .command import MixRankSubcommand, add_model_arguments, hub_arguments, open_compressor, reading_arguments


class EvaluateCommand(MixRankSubcommand):
    """Compare the predictions of a checkpoint with those of another."""

    description = """Compare a compressed checkpoint with its original: accuracy, agreement and Kullback-Leibler divergence.

example:
  optimum-cli mixrank evaluate --model out --reference facebook/deit-base-patch16-224 --dataset path/to/labelled/images
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add("--model", required=True, help="compressed (or any) checkpoint: local folder or Hub id")
        add("--reference", required=True, help="the original: local folder or Hub id")
        add("--dataset", required=True, help="images, with labels if accuracy is to be measured")
        add("--split", help="default: validation, test, or the only one")
        add("--image-column", help="default: the only image column")
        add("--label-column", help="default: label or labels, if there is one")
        add("--num-samples", type=int, help="number of images to draw; default: all")
        add("--seed", type=int, default=42, help="seed of that draw; default: 42")
        add("--output-names", nargs="+", help="outputs to compare, such as predicted_depth; default: by structure")
        add("--interpolate-pos-encoding", action="store_true", help="for images of another size than the models'")
        add_model_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        compressor = open_compressor(args, args.reference)
        original = compressor.model
        model = type(original).from_pretrained(args.model, dtype=original.dtype, **hub_arguments(args))
        names = ("split", "image_column", "label_column", "num_samples", "seed")
        settings = {name: getattr(args, name) for name in (*names, "output_names", "interpolate_pos_encoding")}
        model = model.to(original.device)
        result = compressor.evaluate(model, args.dataset, **settings, **reading_arguments(args))
        values = {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
        text = "\n".join(
            f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value:,}"
            for name, value in values.items()
        )
        return text, values
