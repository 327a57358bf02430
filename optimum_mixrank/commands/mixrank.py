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
    DESCRIPTION = """Make Vision Transformers smaller, given a folder of images without labels.

Start with `compress`; `inspect`, `evaluate` and `benchmark` show what came out."""
    SUBCOMMANDS = (
        CommandInfo("compress", "Compress a model, given a folder of images.", CompressCommand),
        CommandInfo("plan", "Predict the loss at several budgets, without compressing.", PlanCommand),
        CommandInfo("evaluate", "Compare the predictions of a compressed model with the original's.", EvaluateCommand),
        CommandInfo("benchmark", "Compare time and memory of a compressed model with a dense one.", BenchmarkCommand),
        CommandInfo(
            "inspect", "Show what a compressed checkpoint holds, without loading its weights.", InspectCommand
        ),
        CommandInfo("merge", "Turn a compressed checkpoint into a dense one that needs no plugin.", MergeCommand),
        CommandInfo("export", "Write a file for ONNX Runtime or OpenVINO, in float32 or int8.", ExportCommand),
        CommandInfo("verify", "Check that an exported model computes what its source does.", VerifyCommand),
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """See `BaseOptimumCLICommand`."""
        CommandParser.adopt(parser)
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = MixRankCommand.DESCRIPTION
        parser.add_argument("--version", action="version", version=f"optimum-mixrank {__version__}")
