"""What the budget of a configuration counts, for a given model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..allocation.budget import RankBudget
from ..allocation.choice import Allocation
from ..allocation.costs import Costs, MeasuredTime, StoredValues
from ..allocation.latency import LatencyTable
from ..calibration.sites import Mlp, Site
from ..calibration.targets import encoder_linears
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.files import count_parameters
from ..checkpoint.names import Target
from ..evaluation.flops import flops_per_image, tokens_per_image
from ..evaluation.latency_table import load_latency_table
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)


@dataclass(frozen=True)
class ModelCosts:
    """What the layers of a model cost.

    Attributes:
        costs: Prices layers.
        model_cost: Cost of the whole model.
        prices: Price of a stored value by module name; 1 where a layer is missing.
        rank_multiple: Ranks and widths are multiples of it unless the user says otherwise.
    """

    costs: Costs
    model_cost: int
    prices: Mapping[str, int]
    rank_multiple: int = 1


def model_costs(
    model: PreTrainedModel, config: MixRankConfig, targets: Sequence[Target], call: ModelCall = PLAIN_CALL
) -> ModelCosts:
    """Return what a configuration counts; `call` says how the model is called.

    Raises:
        ValueError: if there is no table of latencies, or it does not belong to this model.
    """
    if config.cost == "parameters":
        return ModelCosts(StoredValues(), count_parameters(model), {})
    prices = tokens_per_image(model, [target.name for target in targets], call=call)
    if config.cost == "flops":
        # A multiply-add counts two FLOPs.
        return ModelCosts(StoredValues("multiply-adds per image"), flops_per_image(model, call=call) // 2, prices)
    costs = MeasuredTime(_table_for(model, config, call))
    return ModelCosts(costs, costs.model_cost, prices, costs.table.rank_multiple)


def timed_sites(
    model: PreTrainedModel, config: MixRankConfig, sites: Sequence[Site], call: ModelCall = PLAIN_CALL
) -> list[Site]:
    """Return the sites for which the table of latencies has times; it is measured for all layers of a model.

    Raises:
        ValueError: as `model_costs`.
    """
    if config.cost != "latency" or not sites:
        return list(sites)
    table = _table_for(model, config, call)
    tokens = tokens_per_image(model, [layer.name for site in sites for layer in site.layers], call=call)
    found = [site for site in sites if _is_timed(site, table, tokens)]
    if len(found) < len(sites):
        logger.info(
            f"The table of latencies has no times for {len(sites) - len(found)} of {len(sites)} groups of layers, from "
            "which patterns single some out; each of their layers is factored by itself."
        )
    return found


def latency_record(budget: RankBudget, allocation: Allocation) -> dict[str, Any]:
    """Return the predicted latency of an allocation for the report; nothing if the budget counts something else."""
    if not isinstance(budget.costs, MeasuredTime):
        return {}
    share = budget.kept_of_model(allocation)
    table = budget.costs.table
    return {
        "predicted_share": share,
        "predicted_seconds": share * table.model_seconds,
        "dense_seconds": table.model_seconds,
        "conditions": dict(table.conditions),
    }


def table_of(costs: Costs) -> dict[str, Any] | None:
    """Return the table of latencies by which layers are priced, as JSON values, or None."""
    return costs.table.to_dict() if isinstance(costs, MeasuredTime) else None


def with_ratio(config: MixRankConfig, ratio: float) -> MixRankConfig:
    """Return the configuration with another ratio to remove, of whatever it counts."""
    return dataclasses.replace(config, compression_ratio=ratio, target_latency=None, target_parameters=None, like=None)


def _table_for(model: PreTrainedModel, config: MixRankConfig, call: ModelCall) -> LatencyTable:
    assert config.latency_table is not None  # as the configuration checks
    table = load_latency_table(config.latency_table)
    linears = encoder_linears(model, call)
    tokens = tokens_per_image(model, [target.name for target in linears], call=call)
    table.check_counts(Counter((target.shape, tokens[target.name]) for target in linears))
    return table


def _is_timed(site: Site, table: LatencyTable, tokens: Mapping[str, int]) -> bool:
    parts = [(site.first, "out"), (site.second, "in")] if isinstance(site, Mlp) else [(site.joint, "")]
    return all(table.has(part.shape, tokens[part.layers[0].name], len(part.layers), side) for part, side in parts)
