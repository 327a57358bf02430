"""`optimum-cli mixrank evaluate`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from typing import Any

from .command import MixRankSubcommand, add_hub_arguments, add_model_arguments, hub_arguments, open_compressor


class EvaluateCommand(MixRankSubcommand):
    """Accuracy, agreement and KL against the original."""

    description = """Measure what a checkpoint has lost against another: accuracy, agreement and KL.

example:
  optimum-cli mixrank evaluate --model out --reference facebook/deit-base-patch16-224 --dataset path/to/labelled/images
"""
    shares_work = True

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="compressed (or any) checkpoint: local folder or Hub id")
        parser.add_argument("--reference", required=True, help="the original: local folder or Hub id")
        parser.add_argument("--dataset", required=True, help="images, with labels for accuracy")
        parser.add_argument("--split", help="default: validation, test, or the only one")
        parser.add_argument("--image-column", help="default: the one image column")
        parser.add_argument("--label-column", help="default: label or labels, where there is one")
        parser.add_argument("--num-samples", type=int, help="draw so many images; default: all")
        parser.add_argument("--seed", type=int, default=42, help="of that draw; default 42")
        add_model_arguments(parser)
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        compressor = open_compressor(args, args.reference)
        model = (
            type(compressor.model)
            .from_pretrained(args.model, dtype=compressor.model.dtype, **hub_arguments(args))
            .to(compressor.model.device)
        )
        result = compressor.evaluate(
            model,
            args.dataset,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            split=args.split,
            image_column=args.image_column,
            label_column=args.label_column,
            num_samples=args.num_samples,
            seed=args.seed,
        )
        values = {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
        text = "\n".join(
            f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value:,}"
            for name, value in values.items()
        )
        return text, values
