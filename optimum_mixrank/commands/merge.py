"""`optimum-cli mixrank merge`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from .command import MixRankSubcommand, add_hub_arguments, add_output_arguments, hub_arguments, load_checkpoint


class MergeCommand(MixRankSubcommand):
    """Turn a compressed checkpoint into a dense one."""

    description = """Multiply the factors of a compressed checkpoint into a dense one that needs no plugin.

examples:
  optimum-cli mixrank merge --model out --output dense
  optimum-cli mixrank merge --model out --output narrow --keep-widths
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="compressed checkpoint: local folder or Hub id")
        add_output_arguments(parser, "dense")
        parser.add_argument(
            "--keep-widths",
            action="store_true",
            help="leave MLPs that have lost hidden units narrow; needs no plugin only if all have the same width",
        )
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        from ..checkpoint.dense import to_dense
        from ..checkpoint.entries import compressed_layers
        from ..checkpoint.original import load_image_processor
        from ..checkpoint.saving import ORIGINAL, save_checkpoint, writable_directory

        writable_directory(args.output, args.overwrite, sources={ORIGINAL: [args.model]})
        model = to_dense(load_checkpoint(args, args.model, complete=True), keep_widths=args.keep_widths)
        image_processor = load_image_processor(args.model, hub_arguments(args))
        save_checkpoint(model, args.output, image_processor, dense=True, overwrite=args.overwrite)
        values = {
            "output": str(args.output),
            "parameters": sum(each.numel() for each in model.parameters()),
            "needs_plugin": bool(compressed_layers(model)),
        }
        hint = "; the widths of its MLPs differ, so that it opens with the plugin only" * values["needs_plugin"]
        return f"{values['parameters']:,} parameters: {args.output}{hint}", values
