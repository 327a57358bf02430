"""`optimum-cli mixrank inspect`."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .command import MixRankSubcommand, add_hub_arguments, hub_arguments


if TYPE_CHECKING:
    from ..checkpoint.files import StoredTensor
    from ..checkpoint.rank_map import FactoredLayer


class InspectCommand(MixRankSubcommand):
    """Show what a compressed checkpoint holds."""

    description = """Show the settings, ranks and sizes of a compressed checkpoint without loading its weights.

examples:
  optimum-cli mixrank inspect --model out
  optimum-cli mixrank inspect --model someone/deit-base-mixrank --json
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("checkpoint", nargs="?", help="the same as --model")
        parser.add_argument("--model", help="local folder or Hub id")
        add_hub_arguments(parser, runs_code=False)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        from ..checkpoint.configuration import MixRankConfig
        from ..checkpoint.contents import contents_of
        from ..checkpoint.files import read_json
        from ..checkpoint.rank_map import QUANT_METHOD, quantization_method
        from ..reporting import REPORT_NAME, CompressionReport, format_table
        from ..runtime.formatting import shorten

        name = self.args.model or self.args.checkpoint
        if name is None or None not in (self.args.model, self.args.checkpoint):
            raise ValueError("Name one checkpoint: optimum-cli mixrank inspect --model CHECKPOINT.")
        contents = contents_of(name, [REPORT_NAME], **hub_arguments(self.args))
        stored = read_json(contents.folder / "config.json")
        content = stored.get("quantization_config") if isinstance(stored, dict) else None
        if not isinstance(content, dict) or quantization_method(content) != QUANT_METHOD:
            raise ValueError(f"{name!r} is not a checkpoint that optimum-mixrank has compressed.")
        config = MixRankConfig.from_dict(content)
        values: dict[str, Any] = {
            "config": config.to_dict(),
            "stored_values": sum(tensor.num_values for tensor in contents.tensors.values()),
            "bytes_on_disk": contents.num_bytes,
        }
        try:
            report = CompressionReport.load(contents.folder)
        except FileNotFoundError:
            lines = [f"{shorten(name)}: {_described(layer)}" for name, layer in config.factored_layers.items()]
            held = _values_of(config.factored_layers, contents.tensors)
            values["compressed_share"] = share = held / max(values["stored_values"], 1)
            remark = (
                f"There is no report of the compression. The compressed layers hold {share:.1%} of the stored values."
            )
            text = "\n".join([*lines, "", remark])
        else:
            values["report"] = report.to_dict()
            text = format_table(report)
        return f"{text}\n\n{values['stored_values']:,} stored values, {values['bytes_on_disk']:,} bytes", values


def _values_of(layers: Iterable[str], tensors: Mapping[str, StoredTensor]) -> int:
    """Return how many values a checkpoint stores for these layers; names of tensors may begin with that of the encoder."""
    ends = [f".{layer}." for layer in layers]
    return sum(tensor.num_values for name, tensor in tensors.items() if any(end in f".{name}" for end in ends))


def _described(layer: FactoredLayer) -> str:
    """Describe what a layer has become, as in `rank 8, pivoted, shared by query, key, value`."""
    from ..runtime.formatting import shorten

    parts = [layer.layout] if layer.rank is None else [f"rank {layer.rank}", layer.layout]
    if layer.members is not None:
        parts.append(f"shared by {', '.join(shorten(name.rpartition('.')[2]) for name in layer.members)}")
    if layer.shape is not None and layer.dense_shape is not None:
        parts.append(f"{list(layer.shape)} of {list(layer.dense_shape)}")
    return ", ".join(parts)
