"""Installed as `optimum/commands/register/register_mixrank.py`, where `optimum-cli` looks for commands."""

# Its copy is not in this package, so that the import has to be absolute.
from optimum_mixrank.commands.mixrank import MixRankCommand


REGISTER_COMMANDS = [MixRankCommand]
