"""The rules for the fields of a `MixRankConfig`; `MixRankConfig.validate` applies them all.

Every check raises a `ValueError` that names the field, its value and the remedy. The configuration is annotated as `Any`
because its module imports this one.
"""

from __future__ import annotations

from typing import Any

from ..runtime.formatting import quote
from ..runtime.registry import ALLOCATORS, COMPENSATORS, METRICS
from .patterns import check_regex
from .rank_map import LAYOUT_NAMES, MAX_LAYERS, QUANT_METHOD, check_layout_version, parse_rank_map
from .recipes import RECIPES


STRUCTURES = ("rank", "shared", "width")
"""What layers may become; see `MixRankConfig`."""

INCLUDED = ("patch_embedding", "pointwise_convolutions", "pooling", "heads", "projections")
"""What can be compressed in addition to the linear layers of the blocks; see `MixRankConfig`."""

LARGEST_SEED = 2**64 - 1

MAX_PARAMETERS = 10**15
"""More than any model has."""


def check_method(config: Any) -> None:
    """Check what is to be removed, and by which method."""
    ratio = config.compression_ratio
    is_percentage = isinstance(ratio, int | float) and 5 <= ratio < 100
    meant = f"Did you mean {ratio / 100:g}? " if is_percentage else ""
    remedy = f"{meant}It is the fraction of parameters to remove: 0.6 removes 60 %."
    if ratio is not None or (config.target_parameters is None and config.like is None):
        _check_number("compression_ratio", ratio, "(0, 1)", remedy)
    check_choice("compression_scope", config.compression_scope, ("model", "targets"))
    check_choice("recipe", config.recipe, tuple(RECIPES))
    check_choice("metric", config.metric, tuple(METRICS))
    check_choice("allocation", config.allocation, tuple(ALLOCATORS))
    check_choice("layout", config.layout, LAYOUT_NAMES)
    structures = config.structures
    if not isinstance(structures, list) or not structures or not is_known(structures, STRUCTURES):
        raise ValueError(
            f"structures={quote(structures)} is not a list of {', '.join(map(repr, STRUCTURES))}; ['rank'] "
            "factorizes every layer by itself."
        )
    check_integer("probed_images", config.probed_images, 0)
    if config.closed_form_images is not None:
        check_integer("closed_form_images", config.closed_form_images, 1)
    steps, known = config.compensation, tuple(COMPENSATORS)
    if not isinstance(steps, list):
        raise ValueError(f"compensation={quote(steps)} is not a list; give the steps in their order, or [] for none.")
    if not is_known(steps, known):
        names = ", ".join(map(repr, known))
        raise ValueError(f"compensation={quote(steps)} has an unknown step; choose among {names}.")


def check_size(config: Any) -> None:
    """Check a size of the whole model that takes the place of a ratio, and that nothing else says how much to remove."""
    count, like = config.target_parameters, config.like
    if count is not None:
        if isinstance(count, float | str):
            raise ValueError(
                f"target_parameters={quote(count)} is not an integer; write the number out: 22 million are 22_000_000."
            )
        check_integer("target_parameters", count, 1, MAX_PARAMETERS)
    if like is not None and (not isinstance(like, str) or not like):
        raise ValueError(f"like={quote(like)} is not the Hub id or the folder of a model whose size is wanted.")
    if config.rank_map:
        # A checkpoint records what was asked for beside the ratio that it has come to.
        return
    names = ("compression_ratio", "target_parameters", "like", "target_latency")
    given = [f"{name}={quote(getattr(config, name))}" for name in names if getattr(config, name) is not None]
    if count is None and like is None:
        return
    if len(given) > 1:
        all_of_them = "both" if len(given) == 2 else "all"
        raise ValueError(
            f"{' and '.join(given)} {all_of_them} say how small the model is to become. Give only one of them."
        )
    if config.cost != "parameters" or config.compression_scope != "model":
        name, value = (
            ("cost", config.cost) if config.cost != "parameters" else ("compression_scope", config.compression_scope)
        )
        raise ValueError(
            f"{given[0]} counts the parameters of the whole model, which {name}={quote(value)} contradicts; leave one of "
            "the two out."
        )


def check_cost(config: Any) -> None:
    """Check what the budget counts, and the settings of a budget of time."""
    check_choice("cost", config.cost, ("parameters", "flops", "latency"))
    table, target = config.latency_table, config.target_latency
    if config.cost != "latency":
        for name, value in (("latency_table", table), ("target_latency", target)):
            if value is not None:
                raise ValueError(
                    f"{name}={quote(value)} has no effect with cost={quote(config.cost)}; add cost='latency', or leave it "
                    "out."
                )
        return
    if not isinstance(table, str) or not table:
        raise ValueError(
            f"latency_table={quote(table)} is not the path of a file, which cost='latency' needs: measure one on the "
            "device that will run the model with `optimum-cli mixrank benchmark --model … --table latencies.json`."
        )
    if target is None:
        return
    _check_number(
        "target_latency", target, "(0, 1)", "It is the share of the dense model's time to keep: 0.6 is 60 %."
    )
    if config.compression_scope != "model":
        raise ValueError(
            f"target_latency={quote(target)} is a share of the whole model's time, which "
            f"compression_scope={quote(config.compression_scope)} contradicts; leave the scope out."
        )
    if abs(1 - target - config.compression_ratio) > 1e-9:
        raise ValueError(
            f"target_latency={quote(target)} keeps that share of the time, so that {quote(round(1 - target, 6))} of it is "
            f"removed; compression_ratio={quote(config.compression_ratio)} says something else. Give only one of the two."
        )


def is_share(value: object) -> bool:
    """Return whether a value is a number between 0 and 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def check_ranks(config: Any) -> None:
    """Check which layers are selected, and the bounds of their ranks."""
    _check_include(config)
    if config.include and config.cost == "latency":
        raise ValueError(
            f"include={quote(config.include)} names layers of which a table of latencies holds no times; leave it out with "
            "cost='latency'."
        )
    _check_patterns("target_modules", config.target_modules)
    _check_patterns("exclude_modules", config.exclude_modules)
    _check_mapping("rank_pattern", config.rank_pattern)
    for key, rank in config.rank_pattern.items():
        check_integer(f"rank_pattern[{quote(key)}]", rank, 1)
    _check_mapping("ratio_pattern", config.ratio_pattern)
    for key, ratio in config.ratio_pattern.items():
        remedy = "It is the fraction of the layer's parameters to remove; 0 leaves the layer dense."
        _check_number(f"ratio_pattern[{quote(key)}]", ratio, "[0, 1)", remedy)
    if config.rank_multiple is not None or config.cost != "latency":
        check_integer("rank_multiple", config.rank_multiple, 1)
    check_integer("min_rank", config.min_rank, 1)
    remedy = "It is a share of the break-even rank; 0.05 is usual."
    _check_number("min_rank_ratio", config.min_rank_ratio, "[0, 1]", remedy)
    if config.max_rank_ratio is not None:
        interval = f"({config.min_rank_ratio}, 1]"
        remedy = f"It is a share of the break-even rank, above min_rank_ratio={quote(config.min_rank_ratio)}."
        _check_number("max_rank_ratio", config.max_rank_ratio, interval, remedy)


def _check_include(config: Any) -> None:
    """Check what is compressed in addition to the linear layers of the blocks."""
    include = config.include
    if not isinstance(include, list) or not all(isinstance(each, str) for each in include):
        raise ValueError(
            f"include={quote(include)} is not a list; name what to compress in addition to the blocks: {_INCLUDED}."
        )
    unknown = [each for each in include if each not in INCLUDED]
    # A checkpoint of a later version opens; the rank map says what is compressed.
    if unknown and not config.rank_map:
        raise ValueError(f"include has {quote(unknown[0])}, which is unknown; choose among {_INCLUDED}.")


_INCLUDED = ", ".join(map(repr, INCLUDED))


def check_training(config: Any) -> None:
    """Check the settings of compensation."""
    _check_number("held_out_ratio", config.held_out_ratio, "(0, 1)", "It is a share of the calibration images.")
    if not isinstance(config.mirror, bool):
        raise ValueError(f"mirror={quote(config.mirror)} is neither True nor False.")
    check_integer("epochs", config.epochs, 1)
    _check_number("learning_rate", config.learning_rate, "(0, 1)", "The default is 5e-4.")
    check_integer("train_batch_size", config.train_batch_size, 1)
    remedy = "It is how many times larger than the model's input, on each side, images are decoded; 2 is usual."
    _check_number("view_scale", config.view_scale, "[1, 8]", remedy)


def fields_without_effect(config: Any) -> set[str]:
    """Return the settings of steps that a configuration does not use.

    Steps and metrics of other packages may use any of them.
    """
    steps = set(config.compensation)
    if not steps <= {"sequential", "residual", "blocks", "distillation"}:
        return set()
    unused = set()
    if not steps:
        unused |= {"held_out_ratio"}
    if not steps & {"sequential", "residual"}:
        unused |= {"mirror"}
    if not steps & {"blocks", "distillation"}:
        unused |= {"epochs", "learning_rate", "train_batch_size"}
    if "distillation" not in steps:
        unused |= {"view_scale"}
    if config.metric in ("svd", "diagonal", "mean_input", "second_moment"):
        unused |= {"fisher_samples", "probed_images"}
    return unused


def check_data(config: Any) -> None:
    """Check which images are drawn, and the random numbers."""
    check_integer("fisher_samples", config.fisher_samples, 1)
    _check_call(config)
    if config.dataset is not None and not isinstance(config.dataset, str):
        raise ValueError(
            f"dataset={type(config.dataset).__name__} is not a str; name a folder or a Hub id here, and pass images in "
            "memory to `MixRankCompressor.compress`."
        )
    check_integer("num_samples", config.num_samples, 1)
    check_seed(config.seed)


def _check_call(config: Any) -> None:
    """Check how the model is called, and what is compared of its output."""
    names = [config.output_names] if isinstance(config.output_names, str) else config.output_names
    if names is not None and not (
        isinstance(names, list) and names and all(isinstance(each, str) and each for each in names)
    ):
        raise ValueError(
            f"output_names={config.output_names!r} is neither None, the name of an output nor a non-empty list of names."
        )
    if not isinstance(config.interpolate_pos_encoding, bool):
        raise ValueError(f"interpolate_pos_encoding={config.interpolate_pos_encoding!r} is neither True nor False.")


def check_steps(config: Any) -> None:
    """Check that the steps fit together; this imports the classes behind their names."""
    steps = config.compensation
    if any(COMPENSATORS[step].starts_anew for step in steps[1:]):
        raise ValueError(
            f"compensation={quote(steps)}: a layer-wise step ('sequential' or 'residual') recomputes every layer from the "
            "original and discards what comes before it. Put one of them first, or none."
        )
    first = COMPENSATORS[steps[0]] if steps else None
    if "width" in config.structures and first is not None and first.starts_anew and not first.chooses_units:
        raise ValueError(
            f"compensation={quote(steps)}: {quote(steps[0])} cannot choose the hidden units that an MLP keeps; use "
            "'sequential', or structures without 'width'."
        )
    for step in steps:
        if steps.count(step) > 1:
            raise ValueError(f"compensation={quote(steps)} names {quote(step)} twice; raise `epochs` to train longer.")
    if config.fisher_samples > 1 and not METRICS.create(config.metric).uses_gradients:
        raise ValueError(
            f"fisher_samples={config.fisher_samples} has no effect with metric={quote(config.metric)}, which uses no "
            "gradients; leave it out, or use metric='kfac'."
        )


def check_checkpoint(config: Any) -> None:
    """Check the fields that describe a checkpoint."""
    if config.quant_method != QUANT_METHOD:
        raise ValueError(f"quant_method={quote(config.quant_method)} is not {QUANT_METHOD!r}; leave the field out.")
    check_layout_version(config.layout_version, config.library_version)
    parse_rank_map(config.rank_map)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={quote(value)} is unknown; choose one of {', '.join(map(repr, choices))}.")


def is_name(value: object) -> bool:
    """Return whether a value is a string, or a list of strings."""
    return all(isinstance(each, str) for each in (value if isinstance(value, list) else [value]))


def is_known(value: object, names: tuple[str, ...]) -> bool:
    """Return whether a name, or every name of a list, is among those given."""
    return all(each in names for each in (value if isinstance(value, list) else [value]))


def _check_number(name: str, value: object, interval: str, remedy: str) -> None:
    """Check that a value is a number in an interval such as `"[0, 1)"`."""
    low, high = map(float, interval[1:-1].split(", "))
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not is_number or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        raise ValueError(f"{name}={quote(value)} is not in {interval}. {remedy}")


def check_integer(name: str, value: object, minimum: int, maximum: int = 2**31 - 1) -> None:
    """Check that a value is an integer in a range."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={quote(value)} is not an integer of at least {minimum}.")
    if value > maximum:
        raise ValueError(f"{name}={quote(value)} is too large; the largest value is {maximum}.")


def check_seed(value: object) -> None:
    """Check that a value can start a generator of random numbers."""
    check_integer("seed", value, 0, LARGEST_SEED)


def _check_mapping(name: str, value: object) -> None:
    _check_length(name, value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={quote(value)} is not a dict with layer names or regular expressions as keys.")
    for key in value:
        check_regex(name, key)


def _check_patterns(name: str, value: object) -> None:
    _check_length(name, value)
    if isinstance(value, str):
        check_regex(name, value)
    elif value is not None and not (
        isinstance(value, list) and value and all(isinstance(each, str) for each in value)
    ):
        raise ValueError(
            f"{name}={quote(value)} is neither None, a regular expression nor a non-empty list of layer names."
        )


def _check_length(name: str, value: object) -> None:
    if isinstance(value, list | dict) and len(value) > MAX_LAYERS:
        raise ValueError(
            f"{name} has {len(value):,} entries, more than any model has layers; {MAX_LAYERS:,} are allowed."
        )
