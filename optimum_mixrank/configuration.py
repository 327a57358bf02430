"""`MixRankConfig`: what was asked of a compression, and the rank map that a compressed checkpoint needs."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ._registration import QUANT_METHOD
from .layout import LAYOUT_NAMES, LAYOUT_VERSION, FactoredLayer, parse_rank_map
from .messages import get_logger
from .recipes import RECIPES
from .version import __version__


logger = get_logger(__name__)

SCOPES = ("model", "targets")


@dataclass(kw_only=True, repr=False)
class MixRankConfig(QuantizationConfigMixin):
    """Configuration of a mixed-rank compression, stored as `quantization_config` in a checkpoint's `config.json`.

    Args:
        compression_ratio (`float`): Fraction of parameters to **remove**, in (0, 1).
        compression_scope (`str`): What the ratio counts: `"model"` counts all parameters of the model, as the paper's
            headline does; `"targets"` counts the weights of the targeted layers alone.
        recipe (`str`): Named choice of `metric`, `allocation`, `layout`, `compensation` and `min_rank_ratio`:
            `"best"`, `"fast"` (one forward pass, closed form) or `"paper"`. What is given too overrides the recipe.
        metric (`str`, *optional*): How the error of a layer is measured: `"svd"`, `"diagonal"`, `"mean_input"` (the
            paper's representative input), `"second_moment"` or `"kfac"` (predicted loss of the whole model). See
            `optimum_mixrank.decomposition`.
        allocation (`str`, *optional*): How ranks are distributed: `"uniform"`, `"greedy"` (the paper's gradual search)
            or `"global"` (a global optimum of the summed losses). See `optimum_mixrank.allocation`.
        layout (`str`, *optional*): How factors are stored: `"factors"` stores `r (m + n)` values; `"pivoted"` stores the
            same product in `r (m + n) - r²`, so that the same budget buys higher ranks, at the price of bringing
            outputs or rows into order at every step.
        compensation (`list[str]`, *optional*): Steps that repair what the compression has broken, in this order. Each
            is kept only if it lowers the error on held-out images. See `optimum_mixrank.compensation`.
        held_out_ratio (`float`): Share of the calibration images that compensation learns nothing from, in (0, 1).
        mirror (`bool`): Whether layer-wise compensation sees every calibration image mirrored too, which halves what
            it learns by heart and doubles its time.
        epochs (`int`): Passes over the calibration images of steps that train (`"distillation"`, `"blocks"`).
        learning_rate (`float`): Of these steps, the peak of a cosine schedule, relative to the size of the factors in
            whitened coordinates; see `optimum_mixrank.compensation.whitening`.
        train_batch_size (`int`): Images per step of training.
        view_scale (`float`): `"distillation"` draws its random views from images this many times as large on each side
            as the model sees, where the source gives images rather than tensors; 1 takes those that the model sees.
        fisher_samples (`int`): Random probes per image for the Fisher information of `metric="kfac"`; each costs a
            backward pass.
        target_modules (`str`, `list[str]`, *optional*): Layers to compress, as in PEFT: a string is a regular
            expression that must match the whole name; a list holds names or their last parts. Names of Transformers
            4.x (`attention.attention.query`) and 5.x (`attention.q_proj`) both match. Default: all linear layers of
            the encoder.
        exclude_modules (`str`, `list[str]`, *optional*): Layers to leave alone, in the same form.
        rank_pattern (`dict[str, int]`): Ranks of single layers; keys are names, last parts of names or regular
            expressions, as in PEFT. The first matching key wins.
        ratio_pattern (`dict[str, float]`): Fraction of the layer's own parameters to remove, in [0, 1), for single
            layers; 0 leaves a layer dense.
        rank_multiple (`int`): Ranks are multiples of this number (hardware likes 8, 16 or 32).
        min_rank (`int`): No layer gets a smaller rank.
        min_rank_ratio (`float`, *optional*): No layer gets less than this share of its break-even rank, in [0, 1].
            Break-even is `mn / (m + n)` for two factors, `min(m, n)` for a pivoted layer.
        max_rank_ratio (`float`, *optional*): No factored layer gets more than this share of its break-even rank, in
            (0, 1]; a layer may still stay dense.
        cost (`str`): What the budget counts: `"parameters"`, or `"flops"`, the multiply-adds for one image. They
            differ where layers see different numbers of tokens, as in Swin.
        dataset (`str`, *optional*): Folder of images, parquet file or Hub id of the calibration images, for compressing
            while loading: `from_pretrained(id, quantization_config=MixRankConfig(dataset=...))`.
        num_samples (`int`): Number of calibration images to draw where a dataset is named rather than passed.
        seed (`int`): Seed of that draw and of all random numbers of the compression.
        rank_map (`dict[str, dict]`): Written by the compressor: the factored layers by their canonical name (relative
            to the base model, in the names that checkpoints have on disk), each `{"rank": int, "bias": bool,
            "layout": str}`. Do not set it by hand.
        layout_version (`int`): Version of the stored layout.
        library_version (`str`): Version of optimum-mixrank that wrote the checkpoint.

    Raises:
        TypeError: for an argument that does not exist.
        ValueError: for a value that cannot be right; the message names field, value and remedy.
    """

    quant_method: str = QUANT_METHOD
    compression_ratio: float = 0.5
    compression_scope: str = "model"
    recipe: str = "best"
    metric: str = None  # type: ignore[assignment]  # filled by the recipe
    allocation: str = None  # type: ignore[assignment]
    layout: str = None  # type: ignore[assignment]
    compensation: list[str] = None  # type: ignore[assignment]
    held_out_ratio: float = 0.1
    mirror: bool = True
    epochs: int = 10
    learning_rate: float = 5e-4
    train_batch_size: int = 64
    view_scale: float = 2.0
    fisher_samples: int = 1
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    ratio_pattern: dict[str, float] = field(default_factory=dict)
    rank_multiple: int = 1
    min_rank: int = 1
    min_rank_ratio: float = None  # type: ignore[assignment]
    max_rank_ratio: float | None = None
    cost: str = "parameters"
    dataset: str | None = None
    num_samples: int = 512
    seed: int = 42
    rank_map: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout_version: int = LAYOUT_VERSION
    library_version: str = __version__

    def __new__(cls, *args: object, **kwargs: object) -> MixRankConfig:
        """Refuse unknown arguments with the name that was probably meant."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(known)}."
                raise TypeError(f"MixRankConfig has no argument `{name}`; {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _check_choice("recipe", self.recipe, tuple(RECIPES))
        for field_name, value in RECIPES[self.recipe].items():
            if getattr(self, field_name) is None:
                setattr(self, field_name, copy.copy(value))
        self.validate()

    def validate(self) -> None:
        """Check every field on its own and against the others; called on construction.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method={self.quant_method!r} is not {QUANT_METHOD!r}; leave the field out.")
        _check_fraction(
            "compression_ratio", self.compression_ratio, "It is the fraction of parameters to remove, 0.6 for -60 %."
        )
        _check_choice("compression_scope", self.compression_scope, SCOPES)
        _check_choice("recipe", self.recipe, tuple(RECIPES))
        _check_choice("metric", self.metric, _metric_names())
        _check_choice("allocation", self.allocation, _allocator_names())
        _check_choice("layout", self.layout, LAYOUT_NAMES)
        _check_steps("compensation", self.compensation, _compensator_names())
        _check_order(self.compensation)
        if not self.rank_map:
            # A checkpoint that was made with such a thing can still be opened.
            _check_use(self)
        _check_fraction("held_out_ratio", self.held_out_ratio, "It is a share of the calibration images.")
        if not isinstance(self.mirror, bool):
            raise ValueError(f"mirror={self.mirror!r} is neither True nor False.")
        _check_integer("epochs", self.epochs, 1)
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate!r} is not in (0, 1); the default is 5e-4.")
        _check_integer("train_batch_size", self.train_batch_size, 1)
        if not _is_number(self.view_scale) or not 1 <= self.view_scale <= 8:
            raise ValueError(
                f"view_scale={self.view_scale!r} is not in [1, 8]; it is how much larger than the model's input images "
                "are decoded to draw views from, on each side, 2 is usual."
            )
        _check_integer("fisher_samples", self.fisher_samples, 1)
        _check_patterns("target_modules", self.target_modules)
        _check_patterns("exclude_modules", self.exclude_modules)
        _check_mapping("rank_pattern", self.rank_pattern)
        for key, rank in self.rank_pattern.items():
            _check_integer(f"rank_pattern[{key!r}]", rank, 1)
        _check_mapping("ratio_pattern", self.ratio_pattern)
        for key, ratio in self.ratio_pattern.items():
            if not _is_number(ratio) or not 0 <= ratio < 1:
                raise ValueError(
                    f"ratio_pattern[{key!r}]={ratio!r} is not in [0, 1); it is the fraction of the layer's parameters "
                    "to remove, 0 leaves the layer dense."
                )
        _check_integer("rank_multiple", self.rank_multiple, 1)
        _check_integer("min_rank", self.min_rank, 1)
        if not _is_number(self.min_rank_ratio) or not 0 <= self.min_rank_ratio <= 1:
            raise ValueError(
                f"min_rank_ratio={self.min_rank_ratio!r} is not in [0, 1]; it is a share of the break-even rank, "
                "0.05 is usual."
            )
        if self.max_rank_ratio is not None and not (
            _is_number(self.max_rank_ratio) and max(0, self.min_rank_ratio) < self.max_rank_ratio <= 1
        ):
            raise ValueError(
                f"max_rank_ratio={self.max_rank_ratio!r} is not in (min_rank_ratio, 1]; it is a share of the break-even "
                f"rank, min_rank_ratio is {self.min_rank_ratio!r}."
            )
        _check_choice("cost", self.cost, ("parameters", "flops"))
        if self.dataset is not None and not isinstance(self.dataset, str):
            raise ValueError(
                f"dataset={type(self.dataset).__name__} is no str; name a folder or a Hub id here, and pass images in "
                "memory to `MixRankCompressor.compress`."
            )
        _check_integer("num_samples", self.num_samples, 1)
        _check_integer("seed", self.seed, 0)
        if self.layout_version != LAYOUT_VERSION:
            raise ValueError(
                f"layout_version={self.layout_version!r} is unknown to optimum-mixrank {__version__}, which reads "
                f"version {LAYOUT_VERSION}. The checkpoint was written by optimum-mixrank {self.library_version!r}; "
                "upgrade with `pip install --upgrade optimum-mixrank`."
            )
        parse_rank_map(self.rank_map)

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields, as `to_dict` gives them; the base class asks for it in `repr` and lacks it in 4.57."""
        return self.to_dict()

    @property
    def factored_layers(self) -> dict[str, FactoredLayer]:
        """The rank map as objects, by canonical name."""
        return parse_rank_map(self.rank_map)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a stored configuration, which may come from another version of this library.

        Keys that this version does not know are dropped with one warning that names them; a metric or allocator that
        it does not know is kept with a warning; an unknown layout version is refused, since its weights would be
        misread.

        Raises:
            ValueError: for an unknown `layout_version` or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(config_dict) - known)
        stored = {key: value for key, value in config_dict.items() if key in known}
        # How a checkpoint was made need not be known to open it; the name is kept for the record.
        foreign = {
            key: stored.pop(key)
            for key, names in (
                ("recipe", tuple(RECIPES)),
                ("metric", _metric_names()),
                ("allocation", _allocator_names()),
                ("compensation", _compensator_names()),
            )
            if stored.get(key) is not None and not _known(stored[key], names)
        }
        config = cls(**stored)
        for key, value in foreign.items():
            logger.warning(
                f"The checkpoint was made with {key}={value!r}, which optimum-mixrank {__version__} does not know "
                f"(it was written by {config.library_version}). It can be used, but not made again with this version."
            )
        if unknown:
            logger.warning(
                f"Dropped keys of the stored MixRankConfig that optimum-mixrank {__version__} does not know: "
                f"{', '.join(unknown)}. The checkpoint was written by optimum-mixrank {config.library_version}; "
                "upgrade with `pip install --upgrade optimum-mixrank` if you miss something."
            )
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
        if overrides:
            config = dataclasses.replace(config, **overrides)
        for key, value in foreign.items():
            if key not in overrides:
                setattr(config, key, value)
        return (config, kwargs) if return_unused_kwargs else config


def _metric_names() -> tuple[str, ...]:
    from .decomposition import METRICS

    return tuple(METRICS)


def _allocator_names() -> tuple[str, ...]:
    from .allocation import ALLOCATORS

    return tuple(ALLOCATORS)


def _compensator_names() -> tuple[str, ...]:
    from .compensation import COMPENSATORS

    return tuple(COMPENSATORS)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _known(value: object, names: tuple[str, ...]) -> bool:
    return all(each in names for each in (value if isinstance(value, list) else [value]))


def _check_fraction(name: str, value: object, remedy: str) -> None:
    if not _is_number(value) or not 0 < value < 1:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} is not in (0, 1). {remedy}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _check_steps(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, list):
        raise ValueError(f"{name}={value!r} is not a list; give the steps in their order, or [] for none.")
    if not _known(value, choices):
        raise ValueError(f"{name}={value!r} has an unknown step; choose among {', '.join(map(repr, choices))}.")


def _check_order(steps: list[str]) -> None:
    from .compensation import COMPENSATORS
    from .compensation.layerwise import LayerwiseCompensator

    layerwise = [issubclass(COMPENSATORS[step], LayerwiseCompensator) for step in steps]
    if sum(layerwise) > 1 or any(layerwise[1:]):
        raise ValueError(
            f"compensation={steps!r}: a layer-wise step ('sequential' or 'residual') makes every layer anew from the "
            "original, so whatever comes before it is lost. Put one of them first, or none."
        )


def _check_use(config: MixRankConfig) -> None:
    from .decomposition import METRICS
    from .decomposition.statistics import GRADIENT_STATISTICS

    for step in config.compensation:
        if config.compensation.count(step) > 1:
            raise ValueError(
                f"compensation={config.compensation!r} names {step!r} twice; raise `epochs` to train longer."
            )
    required = METRICS.create(config.metric).required_statistics(2, 2)
    if config.fisher_samples > 1 and not required & GRADIENT_STATISTICS:
        raise ValueError(
            f"fisher_samples={config.fisher_samples} has no use with metric={config.metric!r}, which takes no gradients; "
            "leave it out, or use metric='kfac'."
        )


def _check_integer(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} is not an integer of at least {minimum}.")


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}={value!r} is not a dict with layer names or regular expressions as keys.")
    for key in value:
        _check_regex(name, key)


def _check_patterns(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, str):
        _check_regex(name, value)
    elif not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
        raise ValueError(
            f"{name}={value!r} is neither None, a regular expression nor a non-empty list of layer names."
        )


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} has {pattern!r}, which is no valid regular expression: {error}.") from error
