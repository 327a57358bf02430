"""What all commands share: common options, errors in one sentence, results as text or JSON."""

from __future__ import annotations

import json
import logging as python_logging
import signal
import sys
import time
from abc import abstractmethod
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum.commands.base import BaseOptimumCLICommand


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..pipeline.compressor import MixRankCompressor

FAILED, INTERRUPTED = 1, 130

GRACE_SECONDS = 30.0
"""How long a process beside the main one waits for it to report the same error, before it reports its own."""


class MixRankSubcommand(BaseOptimumCLICommand):
    """A command with the options that all have.

    Attributes:
        description: For `--help`, with examples.
        shares_work: Whether several processes, as `accelerate launch` starts them, share its work; of other commands
            they leave all to the main one.
    """

    description: ClassVar[str]
    shares_work: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Declare the command's own options."""

    @abstractmethod
    def execute(self) -> tuple[str, dict[str, Any]]:
        """Do the work.

        Returns:
            The result as text, and as JSON values.
        """

    def advice(self) -> str:
        """What to tell after an interruption."""
        return "Nothing was written over."

    def parse_args(self, parser: ArgumentParser) -> None:
        """See `BaseOptimumCLICommand`."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = self.description
        self.add_arguments(parser)
        common = parser.add_argument_group("output")
        common.add_argument(
            "--json", action="store_true", help="print the result as JSON, and nothing else, to stdout"
        )
        common.add_argument("--quiet", action="store_true", help="no progress bars and no messages below errors")
        common.add_argument("--verbose", action="store_true", help="more messages, those of Transformers too")
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def run(self) -> None:
        """Execute; an error is one sentence on stderr and exit code 1, an interruption 130."""
        from ..runtime.distributed import disconnect, launched_index

        index = launched_index()
        if index and not self.shares_work:
            return
        self._set_verbosity(index == 0)
        with suppress(ValueError):  # not in the main thread
            # Those who end a job ask first, by SIGTERM.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            text, values = self.execute()
        except KeyboardInterrupt:
            if self.args.debug:
                raise
            if index == 0:
                print(f"Interrupted. {self.advice()}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if self.args.debug:
                raise
            if index:
                # Mostly the main process has the same error, and its end is the end of all.
                with suppress(ValueError):
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(GRACE_SECONDS)
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(FAILED)
        disconnect()
        if index == 0:
            print(json.dumps(values, indent=2, ensure_ascii=False) if self.args.json else text)

    def _set_verbosity(self, is_main: bool) -> None:
        import datasets
        from transformers.utils import logging

        if self.args.quiet or not is_main:
            level = logging.ERROR
            logging.set_verbosity_error()
            datasets.utils.logging.set_verbosity_error()
        elif self.args.verbose:
            level = logging.DEBUG
            logging.set_verbosity_info()
            datasets.utils.logging.set_verbosity_info()
        else:
            level = logging.INFO  # a line per phase
        python_logging.getLogger("optimum_mixrank").setLevel(level)
        if self.args.quiet or not is_main or not sys.stderr.isatty():
            logging.disable_progress_bar()
            datasets.disable_progress_bars()


def add_model_arguments(parser: ArgumentParser) -> None:
    """Options of what `open_compressor` opens and runs."""
    parser.add_argument("--batch-size", type=int, default=32, help="images per forward pass; default 32")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images ahead; default 0")
    parser.add_argument("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")


def open_compressor(args: Any, model: str) -> MixRankCompressor:
    """The compressor of a model that is named on the command line, on the device and in the dtype asked for."""
    from ..pipeline.compressor import MixRankCompressor
    from ..runtime.distributed import find_processes

    # Each of several processes has a GPU of its own, which "cuda" then means.
    processes = find_processes()
    device = args.device or (default_device() if processes.is_single else processes.device)
    return MixRankCompressor.from_pretrained(model, dtype=args.dtype, device=device, **hub_arguments(args))


def load_checkpoint(args: Any, model: str, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A checkpoint that is named on the command line, dense or compressed, with the class that it names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, **hub_arguments(args))
    architectures = getattr(config, "architectures", None) or ["AutoModel"]
    model_class = getattr(transformers, architectures[0], transformers.AutoModel)
    return model_class.from_pretrained(model, dtype=dtype, **hub_arguments(args))


def add_output_arguments(parser: ArgumentParser, what: str) -> None:
    """Options of a folder to write to."""
    parser.add_argument("--output", type=Path, required=True, help=f"folder of the {what} checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="the output folder may hold files; they are replaced")


def default_device() -> str:
    """A GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def add_hub_arguments(parser: ArgumentParser, runs_code: bool = True) -> None:
    """Options of everything that may come from the Hub."""
    group = parser.add_argument_group("Hub")
    group.add_argument("--revision", help="branch, tag or commit of the model")
    group.add_argument("--token", help="access token, or `hf auth login` beforehand")
    group.add_argument("--cache-dir", help="where downloads are kept")
    if runs_code:
        group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def hub_arguments(args: Any) -> dict[str, Any]:
    """Those that were given, as `from_pretrained` takes them."""
    names = ("revision", "token", "cache_dir", "trust_remote_code")
    return {name: getattr(args, name) for name in names if getattr(args, name, None)}
