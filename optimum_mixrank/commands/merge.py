"""`optimum-cli mixrank merge`."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from .command import (
    MixRankSubcommand,
    add_hub_arguments,
    add_output_arguments,
    add_self_contained_argument,
    hub_arguments,
    load_checkpoint,
)


class MergeCommand(MixRankSubcommand):
    """Turn a compressed checkpoint into a dense one."""

    description = """Multiply the factors of a compressed checkpoint into a dense one that needs no plugin, or keep them
and add the code that opens them.

examples:
  optimum-cli mixrank merge --model out --output dense
  optimum-cli mixrank merge --model out --self-contained --output opens-anywhere
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="compressed checkpoint: local folder or Hub id")
        either = parser.add_mutually_exclusive_group()
        either.add_argument(
            "--keep-widths",
            action="store_true",
            help="keep MLPs that have lost units narrow, instead of filling them up with zeros; the checkpoint then "
            "needs no plugin if all blocks have kept the same number of units",
        )
        add_self_contained_argument(either)
        add_output_arguments(parser, "dense")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        from ..checkpoint.dense import to_dense
        from ..checkpoint.files import count_parameters, read_json
        from ..checkpoint.original import load_image_processor
        from ..checkpoint.saving import ORIGINAL, save_checkpoint, writable_directory
        from ..checkpoint.self_contained import needs_of

        writable_directory(args.output, args.overwrite, sources={ORIGINAL: [args.model]})
        model = load_checkpoint(args, args.model, complete=True)
        dense = not args.self_contained
        if dense:
            model = to_dense(model, args.keep_widths)
        image_processor = load_image_processor(args.model, hub_arguments(args))
        saving = {"dense": dense, "overwrite": args.overwrite, "self_contained": args.self_contained}
        save_checkpoint(model, args.output, image_processor, **saving)
        needs = needs_of(read_json(args.output.expanduser() / "config.json"))
        values = {
            "output": str(args.output),
            "parameters": count_parameters(model),
            "needs_plugin": needs == "plugin",
        }
        remarks = {
            "plugin": " (needs the plugin: blocks differ in their numbers of units)",
            "code": " (needs trust_remote_code=True, or the plugin)",
            "nothing": "",
        }
        return f"{values['parameters']:,} parameters: {args.output}{remarks[needs]}", values
