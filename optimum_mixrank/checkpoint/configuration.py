"""`MixRankConfig`: what was asked of a compression, and the rank map that a compressed checkpoint needs."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..runtime.logging import get_logger
from ..runtime.registry import ALLOCATORS, COMPENSATORS, METRICS
from ..runtime.version import __version__
from . import validation
from .rank_map import LAYOUT_VERSION, QUANT_METHOD, FactoredLayer, parse_rank_map
from .recipes import RECIPES


logger = get_logger(__name__)

Scope = Literal["model", "targets"]
Recipe = Literal["best", "fast", "paper"]
Metric = Literal["svd", "diagonal", "mean_input", "second_moment", "kfac"]
Allocation = Literal["uniform", "greedy", "global"]
Layout = Literal["factors", "pivoted"]
Cost = Literal["parameters", "flops"]

_BY_RECIPE: Any = None
"""Default of the fields that the recipe fills."""


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
    compression_scope: Scope = "model"
    recipe: Recipe = "best"
    metric: Metric | str = _BY_RECIPE
    allocation: Allocation | str = _BY_RECIPE
    layout: Layout = _BY_RECIPE
    compensation: list[str] = _BY_RECIPE
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
    min_rank_ratio: float = _BY_RECIPE
    max_rank_ratio: float | None = None
    cost: Cost = "parameters"
    dataset: str | None = None
    num_samples: int = 512
    seed: int = 42
    rank_map: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout_version: int = LAYOUT_VERSION
    library_version: str = __version__

    def __post_init__(self) -> None:
        validation.check_choice("recipe", self.recipe, tuple(RECIPES))
        for field_name, value in RECIPES[self.recipe].items():
            if getattr(self, field_name) is None:
                setattr(self, field_name, copy.copy(value))
        self.validate()

    def validate(self) -> None:
        """Check every field on its own and against the others; called on construction.

        Raises:
            ValueError: names the field, its value and the remedy.
        """
        validation.check_method(self)
        validation.check_ranks(self)
        validation.check_training(self)
        validation.check_data(self)
        if not self.rank_map:
            # A checkpoint can be opened whatever it was made with, and without importing it.
            validation.check_steps(self)
        validation.check_checkpoint(self)

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
        choices = {"recipe": RECIPES, "metric": METRICS, "allocation": ALLOCATORS, "compensation": COMPENSATORS}
        foreign = {
            key: stored.pop(key)
            for key, names in choices.items()
            if stored.get(key) is not None and not validation.is_known(stored[key], tuple(names))
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


def _refusing_unknown_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """An `__init__` that answers an argument that does not exist with the name that was probably meant."""

    @functools.wraps(init)
    def wrapped(self: MixRankConfig, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in dataclasses.fields(self)]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(known)}."
                raise TypeError(f"MixRankConfig has no argument `{name}`; {hint}")
        init(self, *args, **kwargs)

    return wrapped


setattr(MixRankConfig, "__init__", _refusing_unknown_arguments(MixRankConfig.__init__))  # noqa: B010 - mypy's rule
