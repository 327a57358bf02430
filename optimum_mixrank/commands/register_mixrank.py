"""Installed as `optimum/commands/register/register_mixrank.py`, where `optimum-cli` looks for commands."""

from optimum_mixrank.commands.mixrank import MixRankCommand


REGISTER_COMMANDS = [MixRankCommand]
