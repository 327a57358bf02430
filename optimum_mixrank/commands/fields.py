"""Options for the fields of `MixRankConfig`, declared here so that `--help` need not import it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .command import hub_arguments


if TYPE_CHECKING:
    import datasets

    from ..checkpoint.configuration import MixRankConfig
    from ..pipeline.compressor import MixRankCompressor


class Field(NamedTuple):
    """An option.

    Attributes:
        option: Without dashes.
        kind: `int`, `float`, `str`, `bool`, `list` (names, one or more) or `json`.
        help: For `--help`.
    """

    option: str
    kind: str
    help: str


FIELDS: dict[str, Field] = {
    "compression_ratio": Field("ratio", "float", "fraction of parameters to remove, in (0, 1); default 0.5"),
    "compression_scope": Field("scope", "str", "what the ratio counts: model (default) or targets"),
    "recipe": Field("recipe", "str", "best (default), fast or paper; fills what is not given"),
    "metric": Field("metric", "str", "kfac, second_moment, mean_input, diagonal or svd"),
    "allocation": Field("allocation", "str", "global, greedy or uniform"),
    "layout": Field("layout", "str", "pivoted or factors"),
    "compensation": Field("compensation", "list", "steps: sequential, residual, blocks, distillation, or none"),
    "held_out_ratio": Field("held-out-ratio", "float", "share of the images that decide what is kept; default 0.1"),
    "mirror": Field("mirror", "bool", "learn from mirrored images too; default yes"),
    "epochs": Field("epochs", "int", "of steps that train; default 10"),
    "learning_rate": Field("learning-rate", "float", "of steps that train, relative to the factors; default 5e-4"),
    "train_batch_size": Field("train-batch-size", "int", "of steps that train; default 64"),
    "view_scale": Field(
        "view-scale", "float", "size of the images that distillation crops from, beside the model's input; default 2"
    ),
    "fisher_samples": Field("fisher-samples", "int", "random probes per image for kfac; default 1"),
    "target_modules": Field("target-modules", "list", "layers to compress; default: all linears of the encoder"),
    "exclude_modules": Field("exclude-modules", "list", "layers to leave alone"),
    "rank_pattern": Field("rank-pattern", "json", "ranks of single layers, '{\"query\": 64}'"),
    "ratio_pattern": Field("ratio-pattern", "json", "fractions to remove of single layers, '{\"query\": 0.5}'"),
    "rank_multiple": Field("rank-multiple", "int", "ranks are multiples of this; default 1"),
    "min_rank": Field("min-rank", "int", "smallest rank; default 1"),
    "min_rank_ratio": Field("min-rank-ratio", "float", "smallest share of the break-even rank"),
    "max_rank_ratio": Field("max-rank-ratio", "float", "largest share of the break-even rank"),
    "cost": Field("cost", "str", "what the budget counts: parameters (default) or flops"),
    "dataset": Field("dataset", "str", "images: local folder, parquet file or folder, or Hub id"),
    "num_samples": Field("num-samples", "int", "calibration images to draw; default 512"),
    "seed": Field("seed", "int", "of the draw and of all random numbers; default 42"),
}
"""Options by the field they set."""


def add_field_arguments(parser: ArgumentParser) -> None:
    """Declare an option for every field, `--config` for a file of them, and how to read the dataset."""
    parser.add_argument("--split", help="of the dataset; default: train, or the only one")
    parser.add_argument("--image-column", help="of the dataset; default: the one image column")
    parser.add_argument(
        "--streaming", action="store_true", help="draw images from the Hub without downloading all of the dataset"
    )
    group = parser.add_argument_group("method")
    group.add_argument(
        "--config", type=Path, help="YAML or JSON file with fields of MixRankConfig; options override it"
    )
    kinds: dict[str, dict[str, Any]] = {
        "int": {"type": int},
        "float": {"type": float},
        "str": {},
        "list": {"nargs": "+"},
        "json": {"type": json.loads, "metavar": "JSON"},
        "bool": {"action": BooleanOptionalAction},
    }
    for name, field in FIELDS.items():
        group.add_argument(f"--{field.option}", dest=name, default=None, help=field.help, **kinds[field.kind])


def configuration(args: Any) -> MixRankConfig:
    """The `MixRankConfig` of the options and the file.

    Raises:
        ValueError: for a file that cannot be read as fields, and as `MixRankConfig`.
        TypeError: for a field that does not exist.
    """
    from ..checkpoint.configuration import MixRankConfig

    fields = {} if args.config is None else _read(args.config)
    fields.update({name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None})
    if fields.get("compensation") == ["none"]:
        fields["compensation"] = []
    for name in ("target_modules", "exclude_modules"):
        # A single word is a regular expression or a name, as in PEFT a string is.
        if isinstance(fields.get(name), list) and len(fields[name]) == 1 and not fields[name][0].isidentifier():
            fields[name] = fields[name][0]
    return MixRankConfig(**fields)


def calibration_images(args: Any, compressor: MixRankCompressor, config: MixRankConfig) -> datasets.Dataset:
    """The images that the configuration's `dataset` names, drawn as it says."""
    hub = {name: value for name, value in hub_arguments(args).items() if name in ("token", "cache_dir")}
    return compressor.get_calibration_dataset(
        config.dataset,
        num_samples=config.num_samples,
        split=args.split,
        image_column=args.image_column,
        seed=config.seed,
        **({"streaming": True} if args.streaming else {}),
        **hub,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {str(path)!r} is no file; give a YAML or JSON file with fields of MixRankConfig.")
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"--config {str(path)!r} is neither YAML nor JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {str(path)!r} holds a {type(content).__name__}, not fields with values.")
    return content
