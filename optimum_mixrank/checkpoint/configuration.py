"""`MixRankConfig`: the settings of a compression, and the rank map that loading its result needs."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..runtime.formatting import quote, shorten
from ..runtime.logging import get_logger
from ..runtime.registry import ALLOCATORS, COMPENSATORS, METRICS
from ..runtime.version import __version__
from . import validation
from .rank_map import LAYOUT_VERSION, QUANT_METHOD, FactoredLayer, parse_rank_map
from .recipes import RECIPES


if TYPE_CHECKING:
    from ..runtime.outputs import ModelCall


logger = get_logger(__name__)

Scope = Literal["model", "targets"]
Recipe = Literal["best", "distilled", "fast", "paper", "paper_second_moment"]
Metric = Literal["svd", "diagonal", "mean_input", "second_moment", "kfac"]
Allocation = Literal["uniform", "greedy", "global"]
Layout = Literal["factors", "pivoted"]
Cost = Literal["parameters", "flops", "latency"]

_BY_RECIPE: Any = None
"""Default of the fields that the recipe fills in."""

_BY_COST: Any = None
"""Default of the fields that depend on what the budget counts."""


@dataclass(kw_only=True, repr=False)
class MixRankConfig(QuantizationConfigMixin):
    """Configuration of a mixed-rank compression, stored as `quantization_config` in a checkpoint's `config.json`.

    Args:
        compression_ratio (`float`): Fraction of the parameters to **remove**, in (0, 1), or of what else `cost` names.
            With `target_parameters`, `like` or `target_latency` it is left out.
        compression_scope (`str`): What the ratio refers to: `"model"`, all parameters of the model, as in the paper's
            headline; `"targets"`, the weights of the targeted layers alone.
        target_parameters (`int`, *optional*): Parameters that the whole compressed model may have, instead of a ratio: it
            gets at most this many, and as many as the steps between ranks allow.
        like (`str`, *optional*): Hub id or folder of a smaller model, instead of a ratio: the compressed model gets at
            most as many parameters as that one. Only its configuration is read, and no code that comes with it is run.
        recipe (`str`): Named choice of the fields from `metric` to `min_rank_ratio` that are optional: `"best"`,
            `"distilled"` (the same, then distillation; for a few thousand images or more), `"fast"` (one forward pass,
            closed form), `"paper"` (arXiv 2402.06004) or `"paper_second_moment"` (the same with that metric). Each of
            these fields can be overridden.
        metric (`str`, *optional*): How the error of a layer is measured: `"svd"`, `"diagonal"`, `"mean_input"` (the
            paper's representative input), `"second_moment"` or `"kfac"` (predicted loss of the whole model). See
            `optimum_mixrank.decomposition`.
        allocation (`str`, *optional*): How ranks are distributed: `"uniform"`, `"greedy"` (the paper's gradual search)
            or `"global"` (the global optimum of the summed losses). See `optimum_mixrank.allocation`.
        layout (`str`, *optional*): How factors are stored: `"factors"`, `r (m + n)` values; `"pivoted"`, the same
            product in `r (m + n) - r²`, so that a budget buys higher ranks, but every forward pass has to reorder rows.
        compensation (`list[str]`, *optional*): Steps that repair what the compression has damaged, in this order. Held-out
            images decide which of them stay. See `optimum_mixrank.compensation`.
        structures (`list[str]`, *optional*): What layers may become, the best of which is chosen in every block:
            `"rank"`, two factors for each; `"shared"`, one first factor for all layers with the same input, such as query,
            key and value; `"width"`, an MLP with fewer hidden units, whose layers may be factored too. The last two need a
            metric whose losses have a common unit (`"kfac"`); with another metric than the recipe's, `["rank"]` is the
            default.
        held_out_ratio (`float`): Share of the calibration images held out from compensation, in (0, 1).
        mirror (`bool`): Whether layer-wise compensation also sees every calibration image mirrored, which reduces
            overfitting and doubles its time.
        epochs (`int`): Passes over the calibration images in steps that train (`"distillation"`, `"blocks"`).
        learning_rate (`float`): Peak of the cosine schedule in steps that train, relative to the size of the factors in
            whitened coordinates; see `optimum_mixrank.compensation.training.whitening`.
        train_batch_size (`int`): Batch size in steps that train.
        view_scale (`float`): Side of the images from which `"distillation"` crops random views, as a multiple of that of
            the model's inputs; 1, and a source that gives tensors, leaves the inputs themselves.
        output_names (`str`, `list[str]`, *optional*): Which outputs of the model are compared with the original's, such as
            `"predicted_depth"`. Default: logits of one softmax, else feature maps, the last hidden state or whatever the
            head gives.
        interpolate_pos_encoding (`bool`): Whether position embeddings are interpolated, for images of another size than
            the model's configuration names.
        fisher_samples (`int`): Random probes per image, a backward pass each, for the Fisher information of `"kfac"`.
        probed_images (`int`, *optional*): Number of calibration images on which the loss of one structure per layer and
            block is measured, by which predicted losses are scaled; 0 takes them as they are. Has an effect with `"kfac"`
            and compensation.
        closed_form_images (`int`, *optional*): About how many of the calibration images statistics and layer-wise steps
            use, in whole batches spread over all of them; steps that train use all. Default: by the recipe. Has an effect
            with compensation.
        target_modules (`str`, `list[str]`, *optional*): Layers to compress, as in PEFT: a regular expression that must
            match the whole name, or a list of names or their last parts, as in Transformers 4.x
            (`attention.attention.query`) or 5.x (`attention.q_proj`). Default: all linear layers of the encoder.
        include (`list[str]`): What to compress in addition to the linear layers of the blocks: `"patch_embedding"`,
            convolutions whose patches do not overlap, and linear layers before the blocks; `"pointwise_convolutions"`,
            those of single pixels; `"pooling"`, linear layers that follow the blocks inside the base model; `"heads"`,
            those outside of it; `"projections"`, those of either kind that are called so, as in CLIP and LLaVA. Default:
            none of them.
        exclude_modules (`str`, `list[str]`, *optional*): Layers not to compress, in the same form.
        rank_pattern (`dict[str, int]`): Ranks of individual layers; keys are names, last parts of names or regular
            expressions, as in PEFT. The first matching key applies.
        ratio_pattern (`dict[str, float]`): Fractions of parameters to remove from individual layers, in [0, 1); 0
            leaves a layer dense.
        rank_multiple (`int`, *optional*): Ranks and widths are multiples of this number (hardware likes 8, 16 or 32).
            Default: 1; with `cost="latency"`, what the table says.
        min_rank (`int`): Lower bound of every rank.
        min_rank_ratio (`float`, *optional*): Lower bound of every rank as a share of the layer's break-even rank, in
            [0, 1]. Break-even is `mn / (m + n)` for two factors, `min(m, n)` for a pivoted layer.
        max_rank_ratio (`float`, *optional*): Upper bound of the rank of a factored layer as a share of its break-even
            rank, in (0, 1]; a layer may still stay dense.
        cost (`str`): What the budget counts: `"parameters"`; `"flops"`, the multiply-adds for one image, which differ
            where layers see different numbers of tokens, as in Swin; or `"latency"`, measured time.
        latency_table (`str`, *optional*): File with the table of latencies for `cost="latency"`, as
            `optimum-cli mixrank benchmark --table` and `measure_latency_table` make it on the device that will run the
            model.
        target_latency (`float`, *optional*): With `cost="latency"`, the most time that the whole compressed model may
            take, by the table, as a share of the dense model's, in (0, 1). It takes the place of `compression_ratio`,
            which becomes the rest, the share of the time to remove.
        dataset (`str`, *optional*): Folder of images, parquet file or Hub id of the calibration images, for compressing
            while loading: `from_pretrained(id, quantization_config=MixRankConfig(dataset=...))`.
        num_samples (`int`, *optional*): Number of calibration images to draw from a named dataset.
        seed (`int`): Seed of that draw and of all random numbers of the compression.
        rank_map (`dict[str, dict]`): The factored layers by canonical name (relative to the base model, as on disk),
            each `{"rank": int, "bias": bool, "layout": str}`. Written by the compressor; do not set it by hand.
        layout_version (`int`): Version of the stored layout.
        library_version (`str`): Version of optimum-mixrank that wrote the checkpoint.

    Raises:
        TypeError: for an argument that does not exist.
        ValueError: for an invalid value; the message names field, value and remedy.
    """

    quant_method: str = QUANT_METHOD
    compression_ratio: float = _BY_COST
    compression_scope: Scope = "model"
    target_parameters: int | None = None
    like: str | None = None
    recipe: Recipe = "best"
    metric: Metric | str = _BY_RECIPE
    allocation: Allocation | str = _BY_RECIPE
    layout: Layout = _BY_RECIPE
    compensation: list[str] = _BY_RECIPE
    structures: list[str] = _BY_RECIPE
    held_out_ratio: float = 0.1
    mirror: bool = True
    epochs: int = 10
    learning_rate: float = 5e-4
    train_batch_size: int = 64
    view_scale: float = 2.0
    output_names: str | list[str] | None = None
    interpolate_pos_encoding: bool = False
    fisher_samples: int = 1
    probed_images: int = _BY_RECIPE
    closed_form_images: int | None = _BY_RECIPE
    target_modules: str | list[str] | None = None
    include: list[str] = field(default_factory=list)
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    ratio_pattern: dict[str, float] = field(default_factory=dict)
    rank_multiple: int = _BY_COST
    min_rank: int = 1
    min_rank_ratio: float = _BY_RECIPE
    max_rank_ratio: float | None = None
    cost: Cost = "parameters"
    latency_table: str | None = None
    target_latency: float | None = None
    dataset: str | None = None
    num_samples: int = _BY_RECIPE
    seed: int = 42
    rank_map: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout_version: int = LAYOUT_VERSION
    library_version: str = __version__

    def __post_init__(self) -> None:
        validation.check_choice("recipe", self.recipe, tuple(RECIPES))
        if self.structures is None and not self._can_mix():
            self.structures = ["rank"]
        for field_name, value in RECIPES[self.recipe].items():
            if getattr(self, field_name) is None:
                setattr(self, field_name, copy.copy(value))
        if isinstance(self.like, os.PathLike):
            self.like = os.fspath(self.like)
        self._fill_in_by_cost()
        self.validate()

    def __repr__(self) -> str:
        """Show what was asked for: the fields that differ from those of the recipe, and how many layers are factored."""
        usual = type(self)(recipe=self.recipe)
        names = [each.name for each in dataclasses.fields(self) if each.name not in ("quant_method", "rank_map")]
        always = ("recipe",) if self.compression_ratio is None else ("compression_ratio", "recipe")
        shown = {name: getattr(self, name) for name in names}
        parts = [
            f"{name}={value!r}"
            for name, value in shown.items()
            if name in always or (value is not None and value != getattr(usual, name))
        ]
        if self.rank_map:
            parts.append(f"rank_map=<{len(self.rank_map)} layers>")
        return f"{type(self).__name__}({', '.join(parts)})"

    def _fill_in_by_cost(self) -> None:
        # A size becomes a ratio when the model is known.
        if self.compression_ratio is None and self.target_parameters is None and self.like is None:
            given = self.target_latency
            # 1 - 0.7 is 0.30000000000000004.
            self.compression_ratio = round(1 - given, 12) if validation.is_share(given) else 0.5
        if self.rank_multiple is None and self.cost != "latency":
            self.rank_multiple = 1

    def _can_mix(self) -> bool:
        """Return whether the structures of the recipe fit the fields that were given."""
        same_metric = self.metric in (None, RECIPES[self.recipe]["metric"])
        steps = self.compensation if isinstance(self.compensation, list) else []
        return same_metric and not self.rank_map and "residual" not in steps

    def validate(self) -> None:
        """Check every field on its own and against the others; called on construction.

        Raises:
            ValueError: for an invalid value; the message names field, value and remedy.
        """
        validation.check_method(self)
        validation.check_size(self)
        validation.check_cost(self)
        validation.check_ranks(self)
        validation.check_training(self)
        validation.check_data(self)
        if not self.rank_map:
            # A checkpoint opens without importing the classes that it was made with, even if they no longer exist.
            validation.check_steps(self)
        validation.check_checkpoint(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, as `config.json` holds them; `from_dict` is the inverse.

        A field at its default stays out if it asks for nothing (None, False or empty) or belongs to a step that was not
        used, such as `epochs` without training.
        """
        usual = {each.name: each.default for each in dataclasses.fields(self)} | RECIPES.get(self.recipe, {})
        usual |= {"rank_pattern": {}, "ratio_pattern": {}}
        unused = validation.fields_without_effect(self)
        return {
            name: value
            for name, value in super().to_dict().items()
            if value != usual[name] or not (name in unused or value is None or value is False or value == {})
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `to_dict` does; `repr` of the base class calls this, which Transformers 4.57 lacks."""
        return self.to_dict()

    @property
    def model_call(self) -> ModelCall:
        """How models are called, and which of their outputs are compared."""
        from ..runtime.outputs import ModelCall

        return ModelCall.named(self.output_names, self.interpolate_pos_encoding)

    @property
    def factored_layers(self) -> dict[str, FactoredLayer]:
        """The factored layers by canonical name, parsed from the rank map."""
        return parse_rank_map(self.rank_map)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a stored configuration, which another version of this library may have written.

        Unknown keys are dropped with one warning that names them, and unknown methods (`metric`, `allocation` and so on)
        are kept with a warning. An unknown layout version is refused, because the weights would be misread.

        Raises:
            ValueError: for an unknown `layout_version` or an invalid value.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(config_dict) - known))
        stored = {key: value for key, value in config_dict.items() if key in known}
        # Loading does not depend on how a checkpoint was made; the names are kept for the record.
        choices = {"recipe": RECIPES, "metric": METRICS, "allocation": ALLOCATORS, "compensation": COMPENSATORS}
        foreign = {
            key: stored.pop(key)
            for key, names in choices.items()
            if validation.is_name(stored.get(key)) and not validation.is_known(stored[key], tuple(names))
        }
        config = cls(**stored)
        written_by = shorten(str(config.library_version))
        for key, value in foreign.items():
            logger.warning(
                f"The checkpoint was made with {key}={quote(value)}, which optimum-mixrank {__version__} does not know "
                f"(it was written by {written_by}). It can be used, but this version cannot make it again."
            )
        if unknown:
            logger.warning(
                f"Dropped keys of the stored MixRankConfig that optimum-mixrank {__version__} does not know: "
                f"{shorten(', '.join(unknown))}. The checkpoint was written by optimum-mixrank {written_by}; "
                "upgrade with `pip install --upgrade optimum-mixrank` if you need them."
            )
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in known}
        if overrides:
            config = dataclasses.replace(config, **overrides)
        for key, value in foreign.items():
            if key not in overrides:
                setattr(config, key, value)
        return (config, kwargs) if return_unused_kwargs else config


def _suggesting_names(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap an `__init__` so that it answers an unknown argument with the name that was probably meant."""

    @functools.wraps(init)
    def wrapped(self: MixRankConfig, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in dataclasses.fields(self)]
        for name in kwargs:
            if name not in known:
                close = [each for each in known if each.endswith(f"_{name}")] or difflib.get_close_matches(
                    name, known, n=1
                )
                hint = f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(known)}."
                raise TypeError(f"MixRankConfig has no argument `{name}`; {hint}")
        init(self, *args, **kwargs)

    return wrapped


setattr(MixRankConfig, "__init__", _suggesting_names(MixRankConfig.__init__))  # noqa: B010 - mypy allows no assignment
