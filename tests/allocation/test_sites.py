"""Layers whose structures are decided together, under one budget."""

import numpy as np
import pytest
import torch
from allocation.problems import TOWER

from optimum_mixrank.allocation.budget import RankBudget
from optimum_mixrank.allocation.specs import LayerSpec, MlpSpec, SharedInputSpec
from optimum_mixrank.checkpoint.rank_map import stored_values
from optimum_mixrank.decomposition.mlp import WidthLosses


SHARED = SharedInputSpec("query+key+value", ("query", "key", "value"))
MLP = MlpSpec("fc1 > fc2", ("fc1",), "fc2")


def falling(size, speed=0.1, total=1.0):
    """Return losses at rank 0, …, size that fall from a total to 0."""
    energies = np.exp(-np.arange(size) * speed)
    return np.append(energies[::-1].cumsum()[::-1], 0) / energies.sum() * total


def losses(joint=2.0, **speeds):
    found = {
        layer.name: falling(min(layer.out_features, layer.in_features), speeds.get(layer.name, 0.1)) for layer in TOWER
    }
    return {**found, SHARED.name: falling(32, total=joint)}


def mlp_losses(widths, width_loss):
    return {
        MLP.name: [
            WidthLosses(
                width,
                width_loss * (1 - width / 64),
                torch.from_numpy(falling(min(width, 32))),
                torch.from_numpy(falling(min(width, 32))),
            )
            for width in widths
        ]
    }


def make_budget(ratio=0.5, sites=(SHARED, MLP), **changes):
    return RankBudget(TOWER, 10_000, ratio, "targets", layout="pivoted", sites=sites, **changes)


def allocate(budget, joint=2.0, width_loss=0.1, allocation="global"):
    return budget.allocate(losses(joint), allocation, mlp_losses(budget.widths(64), width_loss))


@pytest.mark.parametrize("allocation", ["global", "greedy", "uniform"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_the_budget_is_kept_and_what_is_kept_is_counted(allocation, ratio, layout):
    budget = RankBudget(TOWER, 10_000, ratio, "targets", layout=layout, sites=(SHARED, MLP))
    budget.check()
    found = allocate(budget, allocation=allocation)
    assert list(found.choices) == [layer.name for layer in TOWER]
    # Each stored value costs one.
    assert budget.num_values(found.choices) == found.cost <= budget.budget
    assert budget.kept(found) <= 1 - ratio


def test_layers_share_a_factor_where_that_loses_less():
    cheap = allocate(make_budget(), joint=0.5).choices
    assert cheap["query"].shared and cheap["query"] == cheap["key"] == cheap["value"]
    assert not cheap["output"].shared
    dear = allocate(make_budget(), joint=50.0).choices
    assert not any(choice.shared for choice in dear.values())


def test_separate_factors_are_those_of_layers_decided_alone():
    together = allocate(make_budget(sites=(SHARED,)), joint=1e6)
    alone = make_budget(sites=()).allocate(losses(), "global")
    assert together.cost <= make_budget().budget
    # Only combinations on the convex hull are considered, a step of which is left at most.
    assert together.loss == pytest.approx(alone.loss, rel=0.05)


def test_units_are_removed_where_that_loses_less():
    narrow = allocate(make_budget(), width_loss=0.01).choices
    assert narrow["fc1"].width == narrow["fc2"].width < 64
    whole = allocate(make_budget(), width_loss=1e3).choices
    assert whole["fc1"].width is whole["fc2"].width is None


def test_losses_of_the_choices_add_up():
    found = allocate(make_budget())
    assert sum(choice.loss for choice in found.choices.values()) == pytest.approx(found.loss)


def test_widths():
    budget = make_budget()
    assert budget.widths(1536)[-3:] == [1408, 1472, 1536]
    # The smallest is the share that ranks must keep too.
    assert budget.widths(1536)[:2] == [154, 192]
    assert make_budget(rank_multiple=32).widths(100) == [32, 64, 96, 100]
    assert make_budget(min_rank_ratio=1.0).widths(64) == [64]


@pytest.mark.parametrize("multiple", [4, 8])
def test_ranks_and_widths_are_multiples(multiple):
    for choice in allocate(make_budget(rank_multiple=multiple), width_loss=0.01).choices.values():
        assert choice.rank is None or choice.rank % multiple == 0
        assert choice.width is None or choice.width % multiple == 0


def test_only_some_structures():
    widths = allocate(make_budget(ratio=0.3, sites=(MLP,), factored=False), width_loss=0.01).choices
    assert all(choice.rank is None for choice in widths.values())
    assert widths["fc1"].width < 64 and widths["output"].is_dense
    with pytest.raises(ValueError, match="cannot be reached"):
        make_budget(ratio=0.9, sites=(MLP,), factored=False).check()
    shared = allocate(make_budget(ratio=0.2, sites=(SHARED,), factored=False)).choices
    assert shared["query"].shared and shared["fc1"].is_dense


def test_gate_and_value_lose_the_same_units():
    layers = [LayerSpec("gate", 64, 32), LayerSpec("up", 64, 32), LayerSpec("down", 32, 64)]
    site = MlpSpec("gate+up > down", ("gate", "up"), "down")
    budget = RankBudget(layers, 10_000, 0.5, "targets", layout="pivoted", sites=(site,))
    found = budget.allocate(
        {},
        "global",
        {
            site.name: [
                WidthLosses(
                    width,
                    1 - width / 64,
                    torch.from_numpy(falling(min(2 * width, 32))),
                    torch.from_numpy(falling(min(width, 32))),
                )
                for width in budget.widths(64)
            ]
        },
    )
    gate, up, down = (found.choices[name] for name in ("gate", "up", "down"))
    assert gate == up and gate.width == down.width
    width = down.width or 64
    first = 64 * width if gate.rank is None else stored_values(2 * width, 32, gate.rank, "pivoted")
    second = 32 * width if down.rank is None else stored_values(32, width, down.rank, "pivoted")
    assert found.cost == first + second == budget.num_values(found.choices)


def test_prices():
    layers = [LayerSpec(each.name, each.out_features, each.in_features, price=10) for each in TOWER]
    dear = RankBudget(layers, 10_000, 0.5, "targets", layout="pivoted", sites=(SHARED, MLP))
    found = allocate(dear)
    assert found.cost == 10 * dear.num_values(found.choices)
    assert found.choices == allocate(make_budget()).choices
