"""Options of checkpoints that may come from the Hub."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any


def add_hub_arguments(parser: ArgumentParser, runs_code: bool = True) -> None:
    """Declare the options of checkpoints that may come from the Hub."""
    add = parser.add_argument_group("Hub").add_argument
    add("--revision", help="branch, tag or commit of the model")
    add("--token", help="access token; not needed after `hf auth login`")
    add("--cache-dir", help="folder for downloads")
    if runs_code:
        named = (
            "class that opens the checkpoint: one of Transformers, or package.module.Class; default: as in config.json"
        )
        add("--auto-class", metavar="CLASS", help=named)
        add("--trust-remote-code", action="store_true", help="run the code that comes with the checkpoint")


def hub_arguments(args: Any) -> dict[str, Any]:
    """Return the options of `add_hub_arguments` that were given, as arguments of `from_pretrained`."""
    names = ("revision", "token", "cache_dir", "trust_remote_code")
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}
