"""Installed as `optimum/commands/register/register_mixrank.py`, where `optimum-cli` looks for commands."""

from __future__ import annotations

from .mixrank import MixRankCommand


REGISTER_COMMANDS = [MixRankCommand]
