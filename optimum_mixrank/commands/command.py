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

from ..runtime.access import hub_reached_by
from .hub import add_hub_arguments, hub_arguments
from .parsing import CommandParser, name_values, printable, short_usage


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..pipeline.compressor import MixRankCompressor

FAILED, INTERRUPTED = 1, 130

GRACE_SECONDS = 30.0
"""How long the other processes wait for the main one to report an error before they report their own."""


class MixRankSubcommand(BaseOptimumCLICommand):
    """A command with the common options.

    Attributes:
        description: Text for `--help`, with examples.
        shares_work: Whether several processes, as `accelerate launch` starts them, share the work; otherwise only the
            main process works.
        written: What to say after an interruption, once something was written.
        exit_code: Exit status of a command that ran through; one that has found something wrong sets it.
    """

    description: ClassVar[str]
    shares_work: ClassVar[bool] = False
    written: str = ""
    exit_code: int = 0

    @classmethod
    @abstractmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """Declare the command's own options."""

    @abstractmethod
    def execute(self) -> tuple[str, dict[str, Any]]:
        """Do the work, and return the result as text and as JSON values."""

    def advice(self) -> str:
        """Return what to tell the user after an interruption."""
        return self.written or "Nothing was overwritten."

    def parse_args(self, parser: ArgumentParser) -> None:
        """See `BaseOptimumCLICommand`."""
        CommandParser.adopt(parser)
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = self.description
        self.add_arguments(parser)
        add = parser.add_argument_group("output").add_argument
        add("--json", action="store_true", help="print the result as JSON, and nothing else, to stdout")
        add("--quiet", action="store_true", help="show errors only, and no progress bars")
        add("--verbose", action="store_true", help="show more messages, including those of Transformers")
        add("--debug", action="store_true", help="show the traceback of an error")
        name_values(parser)
        parser.usage = short_usage(parser)

    def run(self) -> None:
        """Execute the command; an error becomes one sentence on stderr and exit code 1, an interruption code 130."""
        from ..runtime.distributed import disconnect, launched_index

        index = launched_index()
        if index and not self.shares_work:
            return
        self._set_verbosity(index == 0)
        with suppress(ValueError):  # not in the main thread
            # Schedulers send SIGTERM before they kill a job.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            # A configuration may name other repositories than that of the model.
            with hub_reached_by(hub_arguments(self.args)):
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
                # The main process usually reports the same error, and the launcher then ends all of them.
                with suppress(ValueError):
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(GRACE_SECONDS)
            from .wording import in_words_of_the_command_line

            message = in_words_of_the_command_line(_sentence(error))
            print(printable(f"Error: {message}", sys.stderr), file=sys.stderr)
            sys.exit(FAILED)
        disconnect()
        if index == 0:
            result = json.dumps(values, indent=2, ensure_ascii=False) if self.args.json else text
            print(printable(result, sys.stdout))
        if self.exit_code:
            sys.exit(self.exit_code)

    def _set_verbosity(self, is_main: bool) -> None:
        import datasets
        from transformers.utils import logging

        quiet = self.args.quiet or not is_main
        if quiet or self.args.verbose:
            for library in (logging, datasets.utils.logging):
                library.set_verbosity(logging.ERROR if quiet else logging.INFO)
        # At INFO the package logs a line per phase.
        level = logging.ERROR if quiet else logging.DEBUG if self.args.verbose else logging.INFO
        python_logging.getLogger("optimum_mixrank").setLevel(level)
        if quiet or not sys.stderr.isatty():
            logging.disable_progress_bar()
            datasets.disable_progress_bars()


def _sentence(error: Exception) -> str:
    """Return the message of an error; some have none, or one that says nothing without the kind of the error."""
    if isinstance(error, MemoryError):
        reason = str(error) or "MemoryError"
        return f"There is not enough memory ({reason}). Use a smaller --batch-size, or set --max-memory."
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {error}"
    return str(error).strip() or f"{type(error).__name__} without a message; --debug shows where it comes from."


def add_model_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `open_compressor` and `reading_arguments`."""
    add = parser.add_argument
    add("--batch-size", type=int, default=32, help="images per forward pass; default: 32")
    add("--num-workers", type=int, default=0, help="processes that decode images; default: 0")
    add("--max-broken-share", type=float, default=0.05, help="share of images that may be broken; default: 0.05")
    pixels = "images with more pixels than this count as broken; default: Pillow's limit, 89 million"
    add("--max-image-pixels", type=int, help=pixels)
    add("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
    add("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")
    add_hub_arguments(parser)


def reading_arguments(args: Any) -> dict[str, Any]:
    """Return the options for reading images, as keyword arguments."""
    return {
        name: getattr(args, name) for name in ("batch_size", "num_workers", "max_broken_share", "max_image_pixels")
    }


def open_compressor(args: Any, model: str) -> MixRankCompressor:
    """Return the compressor of a named model, on the device and in the dtype of the options."""
    from ..pipeline.compressor import MixRankCompressor

    return MixRankCompressor.from_pretrained(
        model, dtype=args.dtype, device=place_of(args), auto_class=named_auto_class(args), **hub_arguments(args)
    )


def place_of(args: Any) -> str | torch.device:
    """Return the device of the options, or the one that this process has."""
    from ..runtime.distributed import find_processes

    # Each of several processes has its own GPU, which "cuda" then refers to.
    processes = find_processes()
    if args.device is None:
        return default_device() if processes.is_single else processes.device
    return checked_device(args.device)


def load_checkpoint(
    args: Any, model: str, dtype: str | torch.dtype = "auto", complete: bool = False
) -> PreTrainedModel:
    """Return a checkpoint, dense or compressed, loaded with the class that the options or the checkpoint name."""
    from ..checkpoint.architecture import load_named, read_config

    hub_kwargs = hub_arguments(args)
    config = read_config(model, hub_kwargs)
    return load_named(model, config, named_auto_class(args), complete=complete, dtype=dtype, **hub_kwargs)


def named_auto_class(args: Any) -> Any:
    """Return the class that `--auto-class` names, or None."""
    from ..checkpoint.architecture import import_class

    return None if args.auto_class is None else import_class(args.auto_class)


def add_output_arguments(parser: ArgumentParser, what: str) -> None:
    """Declare the options of the folder to write to."""
    parser.add_argument("--output", type=Path, required=True, help=f"folder for the {what} checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


def add_self_contained_argument(parser: Any) -> None:
    """Declare the option of checkpoints that bring the code that opens them."""
    code = (
        "store the code that opens the checkpoint in it: `from_pretrained(…, trust_remote_code=True)` needs no plugin"
    )
    parser.add_argument("--self-contained", action="store_true", help=code)


def checked_device(name: str) -> str:
    """Return a device of `--device`.

    Raises:
        ValueError: if there is no such device, PyTorch cannot use it on this machine, or it holds no values.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown; choose cpu, cuda, cuda:1 or mps, or leave it out.") from None
    if device.type == "meta":
        raise ValueError(f"--device {name} holds no values to compute with; choose cpu, or leave it out.")
    backend = _backend(device.type)
    if backend is None or not backend.is_available():
        raise ValueError(
            f"--device {name} is not available: PyTorch {torch.__version__} finds no such device on this machine. Choose "
            "cpu, or install the build of PyTorch for your GPU."
        )
    count = 1 if device.type == "mps" else backend.device_count()
    if device.type != "cpu" and device.index is not None and device.index >= count:
        only = f"{device.type}:0" if count == 1 else f"{device.type}:0 to {device.type}:{count - 1}"
        raise ValueError(f"--device {name} does not exist: this machine has {only}.")
    return name


def _backend(kind: str) -> Any:
    """Return PyTorch's module for a kind of device, or None if this build has none."""
    import torch

    if kind == "mps":
        return torch.backends.mps
    try:
        return torch.get_device_module(kind)
    except RuntimeError:
        return None


def default_device() -> str:
    """Return the GPU if there is one, otherwise the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
