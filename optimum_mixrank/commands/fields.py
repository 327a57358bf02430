"""Options for the fields of `MixRankConfig`, listed here so that `--help` need not import it."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.recipes import RECIPES
from ..runtime.formatting import type_of
from .hub import hub_arguments
from .parsing import count, fraction, merged, pattern


if TYPE_CHECKING:
    import datasets

    from ..checkpoint.configuration import MixRankConfig
    from ..pipeline.compressor import MixRankCompressor


class Field(NamedTuple):
    """The option for a field: its name without dashes, the type of its values, and its help text."""

    option: str
    type: Callable[[str], Any]
    help: str


FIELDS: dict[str, Field] = {
    "compression_ratio": Field(
        "ratio", fraction, "fraction of parameters or of the --cost to remove, in (0, 1); default: 0.5"
    ),
    "compression_scope": Field("scope", str, "what the ratio refers to: model (default) or targets"),
    "target_parameters": Field(
        "target-parameters",
        count,
        "largest number of parameters of the compressed model, such as 22M; instead of --ratio",
    ),
    "like": Field(
        "like", str, "model whose number of parameters to match: local folder or Hub id; instead of --ratio"
    ),
    "recipe": Field("recipe", str, "best (default), distilled, fast, paper or paper_second_moment"),
    "metric": Field("metric", str, "kfac, second_moment, mean_input, diagonal or svd"),
    "allocation": Field("allocation", str, "global, greedy or uniform"),
    "layout": Field("layout", str, "pivoted or factors"),
    "compensation": Field(
        "compensation", list, "steps of repair: sequential, residual, blocks, distillation; or none"
    ),
    "structures": Field("structures", list, "what layers may become: rank, shared, width; default: set by the recipe"),
    "held_out_ratio": Field("held-out-ratio", float, "share of images held out to check compensation; default: 0.1"),
    "mirror": Field("mirror", bool, "also use mirrored images; default: yes"),
    "epochs": Field("epochs", int, "epochs of the steps that train; default: 10"),
    "learning_rate": Field("learning-rate", float, "relative learning rate of the steps that train; default: 5e-4"),
    "train_batch_size": Field("train-batch-size", int, "batch size of the steps that train; default: 64"),
    "view_scale": Field(
        "view-scale", float, "size of the images that are cropped, relative to the model's input; default: 2"
    ),
    "fisher_samples": Field("fisher-samples", int, "random probes per image for kfac; default: 1"),
    "probed_images": Field("probed-images", int, "number of images on which predicted losses are measured; 0: none"),
    "closed_form_images": Field(
        "closed-form-images",
        int,
        "number of images for statistics and layer-wise steps; default: all, or 2048 with --recipe distilled",
    ),
    "target_modules": Field("target-modules", list, "layers to compress; default: all linear layers of the encoder"),
    "include": Field(
        "include",
        list,
        "also compress patch_embedding, pointwise_convolutions, pooling, heads, projections; default: none",
    ),
    "exclude_modules": Field("exclude-modules", list, "layers not to compress"),
    "rank_pattern": Field("rank-pattern", pattern, "ranks of individual layers, such as query=64"),
    "ratio_pattern": Field("ratio-pattern", pattern, "ratios of individual layers, such as query=0.5"),
    "rank_multiple": Field(
        "rank-multiple", int, "make ranks multiples of this; default: 1, or as the latency table says"
    ),
    "min_rank": Field("min-rank", int, "smallest rank; default: 1"),
    "min_rank_ratio": Field("min-rank-ratio", float, "smallest rank as a share of the break-even rank"),
    "max_rank_ratio": Field("max-rank-ratio", float, "largest rank as a share of the break-even rank"),
    "output_names": Field(
        "output-names",
        list,
        "outputs of the model to compare, such as predicted_depth; default: those of its kind of model",
    ),
    "interpolate_pos_encoding": Field(
        "interpolate-pos-encoding",
        bool,
        "interpolate position embeddings, for images of another size than the model's",
    ),
    "cost": Field("cost", str, "what the budget counts: parameters (default), flops or latency"),
    "latency_table": Field("latency-table", str, "file written by `benchmark --table`, for --cost latency"),
    "target_latency": Field(
        "target-latency",
        fraction,
        "time that the compressed model may take, as a share of the original's; instead of --ratio",
    ),
    "dataset": Field("dataset", str, "images: local folder, parquet file or folder, or Hub id"),
    "num_samples": Field(
        "num-samples", int, "number of calibration images to draw; default: 512, or 10000 with --recipe distilled"
    ),
    "seed": Field("seed", int, "seed of all random numbers; default: 42"),
}
"""Options by the field they set."""

_ARGUMENTS: dict[Callable[[str], Any], dict[str, Any]] = {
    list: {"nargs": "+"},
    bool: {"action": BooleanOptionalAction},
    pattern: {"type": pattern, "nargs": "+", "metavar": "NAME=VALUE"},
}
"""Arguments of `add_argument` by type, where that is more than the type."""

_PATTERNS = tuple(name for name, field in FIELDS.items() if field.type is pattern)


def add_field_arguments(parser: ArgumentParser) -> None:
    """Declare the options for the fields, for a file of them, and for reading the dataset."""
    add = parser.add_argument
    add("--split", help="split of the dataset; default: train, or the only one")
    add("--image-column", help="column of the dataset; default: the only image column")
    add("--streaming", action="store_true", help="draw images from the Hub without downloading the whole dataset")
    add = parser.add_argument_group("method").add_argument
    add("--config", type=Path, help="YAML or JSON file with fields of MixRankConfig; options override it")
    for name, field in FIELDS.items():
        arguments = dict(_ARGUMENTS.get(field.type, {"type": field.type}))
        if name == "recipe":
            arguments["choices"] = tuple(RECIPES)
        # The name in Python is accepted too.
        options = dict.fromkeys((field.option, name.replace("_", "-")))
        add(*(f"--{option}" for option in options), dest=name, default=None, help=field.help, **arguments)


def configuration(args: Any) -> MixRankConfig:
    """Return the `MixRankConfig` of the options and the file.

    Raises:
        ValueError: for a file that cannot be read as fields, and as `MixRankConfig`.
        TypeError: for a field that does not exist.
    """
    from ..checkpoint.configuration import MixRankConfig

    fields = {} if args.config is None else _read(args.config)
    fields.update({name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None})
    fields.update({name: merged(fields[name]) for name in _PATTERNS if isinstance(fields.get(name), list)})
    if isinstance(fields.get("target_parameters"), str):
        fields["target_parameters"] = _count_in_file(fields["target_parameters"])
    if fields.get("compensation") == ["none"]:
        fields["compensation"] = []
    for name in ("target_modules", "exclude_modules"):
        # A single value is a string, as in PEFT: a regular expression, unless it is a plain name.
        if isinstance(fields.get(name), list) and len(fields[name]) == 1 and not fields[name][0].isidentifier():
            fields[name] = fields[name][0]
    config = MixRankConfig(**fields)
    for name in ("split", "image_column", "streaming"):
        if getattr(args, name) and config.dataset is None:
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect without --dataset; name a dataset, or leave it out."
            )
    return config


def calibration_images(args: Any, compressor: MixRankCompressor, config: MixRankConfig) -> datasets.Dataset:
    """Return the calibration images that the configuration and the options select."""
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


def _count_in_file(text: str) -> int:
    try:
        return count(text)
    except ArgumentTypeError as error:
        raise ValueError(f"target_parameters: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"--config {str(path)!r} is not a file; give a YAML or JSON file with fields of MixRankConfig."
        )
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"--config {str(path)!r} is neither YAML nor JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {str(path)!r} holds {type_of(content)}, not fields with values.")
    return content
