"""`optimum-cli mixrank inspect`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from .command import MixRankSubcommand


class InspectCommand(MixRankSubcommand):
    """What is inside a compressed checkpoint."""

    description = """Show the settings, ranks and sizes of a compressed checkpoint without loading its weights.

example:
  optimum-cli mixrank inspect out
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("checkpoint", type=Path, help="local folder")

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        import json

        from ..configuration import MixRankConfig
        from ..evaluation.size import safetensors_bytes, stored_values
        from ..reporting import CompressionReport, format_table

        folder = self.args.checkpoint
        file = folder / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no config.json; name the folder of a checkpoint.")
        content = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        if not isinstance(content, dict) or content.get("quant_method") != "mixrank":
            raise ValueError(f"{str(folder)!r} is no checkpoint that optimum-mixrank has compressed.")
        config = MixRankConfig.from_dict(content)
        tensors = stored_values(folder)
        values: dict[str, Any] = {
            "config": config.to_dict(),
            "stored_values": sum(tensor.num_values for tensor in tensors.values()),
            "bytes_on_disk": safetensors_bytes(folder),
        }
        try:
            report = CompressionReport.load(folder)
        except FileNotFoundError:
            lines = [f"{name}: rank {layer.rank}, {layer.layout}" for name, layer in config.factored_layers.items()]
            text = "\n".join([*lines, "", "The folder holds no report of the compression."])
        else:
            values["report"] = report.to_dict()
            text = format_table(report)
        size = f"{values['stored_values']:,} stored values, {values['bytes_on_disk']:,} bytes"
        return f"{text}\n\n{size}", values
