"""The parent of all commands."""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..runtime.version import __version__
from .benchmark import BenchmarkCommand
from .compress import CompressCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .inspect import InspectCommand
from .merge import MergeCommand
from .parsing import CommandParser
from .plan import PlanCommand
from .verify import VerifyCommand


class MixRankCommand(BaseOptimumCLICommand):
    """`optimum-cli mixrank`."""

    COMMAND = CommandInfo("mixrank", "Compress Vision Transformers by activation-aware mixed-rank factorization.")
    DESCRIPTION = """Make Vision Transformers smaller and faster, using a folder of unlabelled images.

Start with `compress`; then `inspect`, `evaluate` and `benchmark` show the result."""
    SUBCOMMANDS = (
        CommandInfo("compress", "Compress a model, using a folder of images.", CompressCommand),
        CommandInfo("plan", "Predict the loss at several ratios without compressing.", PlanCommand),
        CommandInfo("evaluate", "Compare the predictions of a compressed model with the original's.", EvaluateCommand),
        CommandInfo("benchmark", "Compare a compressed model with a dense one in time and memory.", BenchmarkCommand),
        CommandInfo(
            "inspect", "Show what a compressed checkpoint holds, without loading its weights.", InspectCommand
        ),
        CommandInfo("merge", "Turn a compressed checkpoint into a dense one that needs no plugin.", MergeCommand),
        CommandInfo("export", "Export to ONNX Runtime, OpenVINO, ExecuTorch or torch.export.", ExportCommand),
        CommandInfo("verify", "Check that an exported model gives the outputs of its checkpoint.", VerifyCommand),
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `BaseOptimumCLICommand`."""
        CommandParser.adopt(parser)
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = MixRankCommand.DESCRIPTION
        parser.add_argument("--version", action="version", version=f"optimum-mixrank {__version__}")
