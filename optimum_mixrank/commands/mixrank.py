"""The parent of all commands."""

from __future__ import annotations

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .benchmark import BenchmarkCommand
from .compress import CompressCommand
from .evaluate import EvaluateCommand
from .inspect import InspectCommand
from .merge import MergeCommand
from .plan import PlanCommand


class MixRankCommand(BaseOptimumCLICommand):
    """`optimum-cli mixrank`."""

    COMMAND = CommandInfo(name="mixrank", help="Compress Vision Transformers by activation-aware mixed-rank factors.")
    SUBCOMMANDS = (
        CommandInfo("compress", "Compress a model with a folder of images.", CompressCommand),
        CommandInfo("plan", "What would a budget cost? Predicted losses, without compressing.", PlanCommand),
        CommandInfo(
            "evaluate", "Accuracy, agreement and KL of a compressed model against its original.", EvaluateCommand
        ),
        CommandInfo("benchmark", "Time and memory of a compressed model against a dense one.", BenchmarkCommand),
        CommandInfo("inspect", "What is inside a compressed checkpoint, without loading its weights.", InspectCommand),
        CommandInfo("merge", "Turn a compressed checkpoint into a dense one that needs no plugin.", MergeCommand),
    )
