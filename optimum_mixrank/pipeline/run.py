"""One run of a compression: everything that its steps share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..allocation.budget import RankBudget
from ..allocation.specs import LayerSpec, MlpSpec, SharedInputSpec, SiteSpec
from ..calibration.fingerprint import fingerprint_model
from ..calibration.images.batches import ImageBatches
from ..calibration.included import without_views
from ..calibration.plain_layers import check_uses
from ..calibration.result import Calibration
from ..calibration.sites import Mlp, Site, find_sites
from ..calibration.targets import bound_call, candidates, linears_in_blocks, match_values, select_targets
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.names import Target
from ..decomposition import METRICS, Metric
from ..runtime.distributed import Processes
from ..runtime.journal import NO_JOURNAL, Journal
from ..runtime.outputs import PLAIN_CALL, ModelCall
from .costs import model_costs, timed_sites
from .decompose import check_weights, priced_sites
from .images import ImageReader, example_call
from .memory import MaxMemory
from .size import size_of, with_known_ratio


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class CompressionRun:
    """The task, the model, the processes that share the work, and the limits.

    Attributes:
        model: The original model.
        config: The task.
        reader: Reads images for the model.
        metric: Measures the error of a layer.
        linears: All linear layers of the encoder, in forward order.
        targets: The layers to compress.
        sites: Those whose structures are decided together.
        budget: The constraints on their ranks.
        call: How the model is called: the part of it that takes images, and images to try it on.
        batches: The images, if statistics or compensation need them, or statistics are to be checked against them.
        calibration: Statistics passed by the user.
        inplace: Whether to compress the model itself rather than a copy.
        max_memory: Limit of the memory to use in addition to the model.
        journal: Records finished work, so that a run that was cut off can be resumed.
        images_known: Whether the journal is known to belong to the bytes of these images.
        fingerprint: Fingerprint of the model's weights; see `fingerprint_model`.
        seconds: Wall time by step.
    """

    model: PreTrainedModel
    config: MixRankConfig
    reader: ImageReader
    metric: Metric
    linears: Sequence[Target]
    targets: Sequence[Target]
    sites: Sequence[Site]
    budget: RankBudget
    call: ModelCall = PLAIN_CALL
    batches: ImageBatches | None = None
    calibration: Calibration | None = None
    inplace: bool = False
    max_memory: MaxMemory = None
    journal: Journal = NO_JOURNAL
    images_known: bool = False
    fingerprint: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: MixRankConfig, reader: ImageReader, dataset: Any, **options: Any) -> CompressionRun:
        """Set up a run, and check everything that can be checked before any work.

        Args:
            config: The task.
            reader: Reads images for the model.
            dataset: The images, as for `MixRankCompressor.compress`.
            **options: Further attributes of the run.

        Raises:
            ValueError: for patterns that match nothing, weights with NaN or Inf, a budget that cannot be met, missing
                images, or processes that hold different models.
        """
        with reader.processes.raise_on_all_ranks():
            config.validate()
            config = with_known_ratio(reader.model, config)
            metric = METRICS.create(config.metric)
            # Most models are refused, if they are, before any image is read.
            read = functools.cache(lambda: _read_images(config, reader, dataset, metric, options.get("calibration")))
            linears_in_blocks(reader.model)
            call = example_call(config.model_call, reader.model, lambda: _any_images(read(), config, reader, dataset))
            linears = candidates(reader.model, config.target_modules, call, config.include)
            targets = select_targets(linears, config.target_modules, config.exclude_modules)
            check_uses(reader.model, targets)
            check_weights(targets)
            call = bound_call(call, reader.model, targets, needed=metric.uses_data or bool(config.compensation))
            sites = free_sites(reader.model, config, targets, metric, options.get("calibration"), call)
            budget = rank_budget(reader.model, config, targets, sites, call)
            budget.check()
            run = cls(reader.model, config, reader, metric, linears, targets, sites, budget, call, read(), **options)
        run.fingerprint = shared_fingerprint(run.model, run.processes)
        return run

    @property
    def processes(self) -> Processes:
        """Return the processes that share the work."""
        return self.reader.processes


def _read_images(
    config: MixRankConfig, reader: ImageReader, dataset: Any, metric: Metric, calibration: Calibration | None
) -> ImageBatches | None:
    """Return the images of a run, or None if it needs none.

    Raises:
        ValueError: if there are none although they are needed.
    """
    needs_statistics = metric.uses_data and calibration is None
    if dataset is None and calibration is None:
        dataset = config.dataset
    compared = calibration is not None and dataset is not None
    if not (config.compensation or compared or needs_statistics):
        return None
    if dataset is None:
        step = f"metric={config.metric!r}" if needs_statistics else "compensation"
        raise ValueError(
            f"{step} needs calibration images: pass `calibration_dataset`. Without images there are only "
            "metric='svd' and compensation=[], which lose far more accuracy."
        )
    drawn = reader.draw(dataset, config.num_samples, config.seed)
    return reader.read(drawn, keep=bool(config.compensation))


def _any_images(
    batches: ImageBatches | None, config: MixRankConfig, reader: ImageReader, dataset: Any
) -> ImageBatches | None:
    """Return images to try a model on: those of a run, or of what was given to one that needs none."""
    given = config.dataset if dataset is None else dataset
    return batches if batches is not None or given is None else reader.read(reader.draw(given, 1, config.seed))


def free_sites(
    model: PreTrainedModel,
    config: MixRankConfig,
    targets: Sequence[Target],
    metric: Metric,
    calibration: Calibration | None = None,
    call: ModelCall | None = None,
) -> list[Site]:
    """Return the sites among the layers that the user has given neither rank nor ratio, if statistics cover them.

    Raises:
        ValueError: if the configuration asks for structures that its metric cannot compare.
    """
    together = [structure for structure in config.structures if structure != "rank"]
    if together and not metric.common_unit:
        raise ValueError(
            f"structures={config.structures!r} cannot be compared by metric={config.metric!r}, whose losses have a unit of "
            "their own in every layer; use metric='kfac', or structures=['rank']."
        )
    given = {
        **match_values(targets, config.rank_pattern, "rank_pattern"),
        **match_values(targets, config.ratio_pattern, "ratio_pattern"),
    }
    free = [target for target in targets if target.canonical_name not in given]
    sites = find_sites(model, without_views(model, free), together, call or config.model_call)
    sites = timed_sites(model, config, sites, call or config.model_call)
    return sites if calibration is None else priced_sites(sites, calibration)


def site_specs(sites: Sequence[Site]) -> list[SiteSpec]:
    """Return what an allocator has to know about sites."""
    specs: list[SiteSpec] = []
    for site in sites:
        names = tuple(layer.canonical_name for layer in site.layers)
        specs.append(
            MlpSpec(site.name, names[:-1], names[-1]) if isinstance(site, Mlp) else SharedInputSpec(site.name, names)
        )
    return specs


def rank_budget(
    model: PreTrainedModel,
    config: MixRankConfig,
    targets: Sequence[Target],
    sites: Sequence[Site] = (),
    call: ModelCall = PLAIN_CALL,
) -> RankBudget:
    """Return the constraints under which ranks are allocated.

    Raises:
        ValueError: if a pattern matches no layer, a rank or ratio does not fit its layer, or there is no table of
            latencies for this model.
    """
    rank_pattern = match_values(targets, config.rank_pattern, "rank_pattern")
    ratio_pattern = match_values(targets, config.ratio_pattern, "ratio_pattern")
    counted = model_costs(model, config, targets, call)
    layers = [
        LayerSpec(
            name=target.canonical_name,
            out_features=target.shape[0],
            in_features=target.shape[1],
            price=counted.prices.get(target.name, 1),
            rank=rank_pattern.get(target.canonical_name),
            ratio=ratio_pattern.get(target.canonical_name),
        )
        for target in targets
    ]
    return RankBudget(
        layers,
        model_cost=counted.model_cost,
        costs=counted.costs,
        compression_ratio=config.compression_ratio,
        compression_scope=config.compression_scope,
        rank_multiple=config.rank_multiple or counted.rank_multiple,
        min_rank=config.min_rank,
        min_rank_ratio=config.min_rank_ratio,
        max_rank_ratio=config.max_rank_ratio,
        layout=config.layout,
        sites=site_specs(sites),
        factored="rank" in config.structures,
        size=size_of(config),
    )


def shared_fingerprint(model: PreTrainedModel, processes: Processes) -> str:
    """Return the fingerprint of the model's weights, which must be the same in all processes.

    Raises:
        ValueError: if the processes hold different models.
    """
    fingerprint = fingerprint_model(model)
    if len(set(processes.gather(fingerprint))) > 1:
        raise ValueError(
            "The processes hold models with different weights. Load the same checkpoint in all, and call "
            "`accelerate.utils.set_seed` before weights (of a new head, for example) are initialized at random."
        )
    return fingerprint
