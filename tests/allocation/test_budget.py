"""Budgets, floors and patterns, for every allocator."""

import re
from unittest.mock import patch

import numpy as np
import pytest
from allocation.problems import TOWER

from optimum_mixrank.allocation import ALLOCATORS
from optimum_mixrank.allocation.budget import RankBudget
from optimum_mixrank.allocation.specs import LayerSpec, MlpSpec


ALLOCATIONS = sorted(ALLOCATORS)
TARGETED = 4 * 1024 + 2 * 2048


def make_budget(layers=TOWER, ratio=0.5, scope="targets", model_cost=10_000, **changes):
    return RankBudget(layers, model_cost, ratio, scope, **changes)


def losses_of(layers, seed=0):
    """Return losses that fall from 1 to 0, at a different speed in every layer."""
    generator = np.random.default_rng(seed)
    losses = {}
    for layer in layers:
        energies = np.exp(-np.arange(min(layer.out_features, layer.in_features)) * generator.uniform(0.02, 0.5))
        losses[layer.name] = np.append(energies[::-1].cumsum()[::-1], 0) / energies.sum()
    return losses


def cost(layer, rank):
    if rank is None:
        return layer.out_features * layer.in_features
    return rank * (layer.out_features + layer.in_features)


def total(layers, ranks):
    return sum(cost(layer, ranks[layer.name]) for layer in layers)


def replace(layers, name, **fields):
    return [LayerSpec(**{**vars(layer), **(fields if layer.name == name else {})}) for layer in layers]


@pytest.mark.parametrize(
    ("scope", "ratio", "expected"),
    [
        ("targets", 0.5, 4096),
        ("targets", 0.6, 3276),
        ("targets", 0.25, 6144),
        ("model", 0.5, 3192),
        ("model", 0.6, 2192),
        ("model", 0.1, 7192),
    ],
)
def test_budget(scope, ratio, expected):
    assert make_budget(ratio=ratio, scope=scope).budget == expected


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
def test_round_numbers_are_not_missed_by_rounding(ratio):
    layers = [LayerSpec("a", 1000, 1000)]
    assert make_budget(layers, ratio).budget == round(1e6 * (1 - ratio))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("scope", ["model", "targets"])
@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6])
def test_budget_is_kept_and_missed_by_less_than_one_step(allocation, scope, ratio):
    budget = make_budget(ratio=ratio, scope=scope)
    budget.check()
    ranks = budget.allocate(losses_of(TOWER), allocation).ranks
    assert list(ranks) == [layer.name for layer in TOWER]
    left = budget.budget - total(TOWER, ranks)
    assert left >= 0
    # No factored layer could have had one rank more; or become dense.
    for layer in TOWER:
        rank = ranks[layer.name]
        if rank is not None:
            more = min(cost(layer, rank + 1), cost(layer, None))
            assert left < more - cost(layer, rank)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_ranks_keep_floors_multiples_and_break_even(allocation):
    budget = make_budget(ratio=0.3, rank_multiple=4, min_rank=5, min_rank_ratio=0.3)
    ranks = budget.allocate(losses_of(TOWER), allocation).ranks
    for layer in TOWER:
        rank = ranks[layer.name]
        if rank is not None:
            assert rank % 4 == 0
            assert rank >= 5
            assert rank >= 0.3 * cost(layer, None) / (layer.out_features + layer.in_features)
            assert cost(layer, rank) < cost(layer, None)


@pytest.mark.parametrize(
    ("floors", "smallest"),
    [
        ({"min_rank_ratio": 0}, 1),
        ({"min_rank_ratio": 0.1}, 3),  # a tenth of the break-even rank 30
        ({"min_rank_ratio": 0.11}, 4),
        ({"min_rank": 7}, 7),
        ({"min_rank": 2, "min_rank_ratio": 0.5}, 15),
        ({"min_rank": 7, "rank_multiple": 4}, 8),
        ({"rank_multiple": 8}, 8),
        ({"min_rank_ratio": 0.7}, 21),
    ],
    ids=str,
)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_smallest_rank(allocation, floors, smallest):
    layers = [LayerSpec("a", 60, 60)]
    ratio = 1 - smallest * 120 / 3600
    assert make_budget(layers, ratio, **floors).allocate(losses_of(layers), allocation).ranks == {"a": smallest}
    with pytest.raises(ValueError, match="cannot be reached"):
        make_budget(layers, ratio + 0.001, **floors).allocate(losses_of(layers), allocation)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_rank_pattern(allocation):
    layers = replace(replace(TOWER, "key", rank=3), "fc1", rank=9)
    ranks = make_budget(layers, rank_multiple=4).allocate(losses_of(layers), allocation).ranks
    # A rank that the user gives need not be a multiple and may be below the floors.
    assert ranks["key"] == 3
    assert ranks["fc1"] == 9
    others = [ranks[name] for name in ("query", "value", "output", "fc2") if ranks[name] is not None]
    assert others and all(rank % 4 == 0 for rank in others)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_rank_that_saves_nothing_leaves_the_layer_dense(allocation):
    layers = replace(TOWER, "key", rank=16)
    budget = make_budget(layers)
    with patch("optimum_mixrank.allocation.budget.logger.warning") as warning:
        budget.check()
    [message] = warning.call_args.args
    assert "gives rank 16 to layer 'key'" in message
    assert "Ranks up to 15 save parameters" in message
    ranks = budget.allocate(losses_of(layers), allocation).ranks
    assert ranks["key"] is None
    assert total(layers, ranks) <= budget.budget


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_ratio_zero_leaves_the_layer_dense_within_the_budget(allocation):
    layers = replace(replace(TOWER, "key", ratio=0), "fc2", ratio=0.0)
    budget = make_budget(layers)
    assert budget.budget == 4096
    ranks = budget.allocate(losses_of(layers), allocation).ranks
    assert ranks["key"] is ranks["fc2"] is None
    assert total(layers, ranks) <= 4096


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(
    ("shape", "ratio", "multiple", "rank"),
    [
        ((32, 32), 0.5, 1, 8),
        ((32, 32), 0.51, 1, 7),
        ((64, 32), 0.25, 1, 16),
        ((64, 32), 0.25, 6, 12),
        ((20, 20), 0.9, 1, 1),
        ((100, 100), 0.7, 5, 15),
        ((36, 60), 0.001, 1, 22),
    ],
    ids=str,
)
def test_ratio_pattern_removes_at_least_that_share(allocation, shape, ratio, multiple, rank):
    layers = [LayerSpec("a", *shape, ratio=ratio), LayerSpec("b", 100, 100)]
    ranks = make_budget(layers, 0.05, rank_multiple=multiple).allocate(losses_of(layers), allocation).ranks
    assert ranks["a"] == rank
    assert cost(layers[0], rank) <= (1 - ratio) * cost(layers[0], None) + 1e-6


def test_ratio_pattern_that_leaves_no_rank():
    layers = replace(TOWER, "key", ratio=0.95)
    with pytest.raises(ValueError, match=r"ratio_pattern removes 95\.00% of layer 'key', which leaves no rank of 1\."):
        make_budget(layers).check()
    layers = replace(TOWER, "key", ratio=0.6)
    with pytest.raises(ValueError, match="removes 60.00% of layer 'key', which leaves no rank of 8. Remove less"):
        make_budget(layers, rank_multiple=8).check()


def test_both_patterns():
    with pytest.raises(ValueError, match="Both rank_pattern and ratio_pattern match layer 'key'. Narrow one"):
        make_budget(replace(TOWER, "key", rank=3, ratio=0.5))


@pytest.mark.parametrize("rank", [33, 1000])
def test_rank_that_is_too_large(rank):
    message = (
        rf"rank_pattern gives rank {rank} to layer 'fc1' of shape \[64, 32\], whose largest rank is 32\. Choose 32"
    )
    with pytest.raises(ValueError, match=message):
        make_budget(replace(TOWER, "fc1", rank=rank))


def random_budget(seed):
    """Return random layers and settings; most ratios cannot be reached with them."""
    generator = np.random.default_rng(seed)
    layers = []
    for index in range(generator.integers(1, 6)):
        m, n = (int(size) for size in generator.integers(8, 70, size=2))
        kind = generator.integers(5)
        layers.append(
            LayerSpec(
                f"layer {index}",
                m,
                n,
                rank=int(generator.integers(1, min(m, n) + 1)) if kind == 0 else None,
                ratio=[0, 0.25, 0.5][generator.integers(3)] if kind == 1 else None,
            )
        )
    targeted = sum(cost(layer, None) for layer in layers)
    return layers, {
        "scope": ["model", "targets"][generator.integers(2)],
        "model_cost": targeted + int(generator.integers(0, targeted)),
        "rank_multiple": int(generator.choice([1, 1, 2])),
        "min_rank": int(generator.integers(1, 6)),
        "min_rank_ratio": float(generator.choice([0.0, 0.1, 0.5])),
    }


@pytest.mark.parametrize("seed", range(60))
def test_the_ratio_that_an_error_names_is_the_largest_that_can_be_reached(seed):
    layers, settings = random_budget(seed)
    with pytest.raises(ValueError, match="cannot be reached") as error:
        make_budget(layers, 0.999, **settings).check()
    message = str(error.value)
    assert f"compression_ratio=0.999 (of the {settings['scope']})" in message
    assert f"min_rank={settings['min_rank']}, min_rank_ratio={settings['min_rank_ratio']}" in message
    found = re.search(r"largest ratio that can be reached is ([\d.]+);", message)
    assert found or "No layer can shrink at all" in message
    largest = float(found[1]) if found else 0.0
    for allocation in ALLOCATIONS:
        with pytest.raises(ValueError, match="cannot be reached"):
            make_budget(layers, largest + 0.001, **settings).allocate(losses_of(layers), allocation)
        if largest > 0:
            reachable = make_budget(layers, largest, **settings)
            reachable.check()
            assert total(layers, reachable.allocate(losses_of(layers), allocation).ranks) <= reachable.budget


@pytest.mark.parametrize(
    ("ratio", "largest"), [(0.5, "No layer can shrink at all"), (0.9, "The largest ratio .* is 0")]
)
def test_few_structures_are_named_as_the_reason(ratio, largest):
    layers = [LayerSpec("a", 32, 32), LayerSpec("first", 64, 32), LayerSpec("second", 32, 64)]
    sites = [] if ratio == 0.5 else [MlpSpec("mlp", ("first",), "second")]
    with pytest.raises(ValueError, match=f"{largest}.*or add 'rank' to structures"):
        make_budget(layers, ratio, factored=False, sites=sites).check()
    with pytest.raises(ValueError, match="or target more layers"):
        make_budget(layers, 0.99, min_rank_ratio=0.5).check()


def test_everything_dense_by_request():
    layers = [LayerSpec("a", 32, 32, ratio=0), LayerSpec("b", 32, 32, ratio=0)]
    with pytest.raises(ValueError, match=r"keep at least 2,048 .* No layer can shrink at all"):
        make_budget(layers, 0.1).check()


def test_a_small_encoder_in_a_large_model():
    with pytest.raises(ValueError) as error:
        make_budget(ratio=0.5, scope="model", model_cost=100_000).check()
    assert "hold 8,192 of the model's 100,000 parameters" in str(error.value)


def test_unknown_allocator():
    with pytest.raises(ValueError, match="allocation='best' is unknown; choose one of"):
        make_budget().allocate(losses_of(TOWER), "best")


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_prices_shift_ranks_to_cheap_layers(allocation):
    dear = replace(replace(TOWER, "fc1", price=10), "fc2", price=10)
    plain, found = (make_budget(layers).allocate(losses_of(TOWER), allocation) for layers in (TOWER, dear))
    plain, priced = plain.ranks, found.ranks
    budget = make_budget(dear)
    spent = sum(cost(layer, priced[layer.name]) * layer.price for layer in dear)
    assert budget.budget == (4 * 1024 + 10 * 2 * 2048) // 2
    assert spent <= budget.budget
    assert budget.kept(found) == pytest.approx(spent / (4 * 1024 + 10 * 2 * 2048))
    if allocation == "global":
        assert total(TOWER[:4], priced) > total(TOWER[:4], plain)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_pivoted_layout_buys_higher_ranks(allocation):
    found = {
        layout: make_budget(layout=layout).allocate(losses_of(TOWER), allocation) for layout in ("factors", "pivoted")
    }
    assert make_budget(layout="pivoted").kept(found["pivoted"]) <= 0.5
    ranks = {layout: each.ranks for layout, each in found.items()}
    for name in ("query", "fc1"):
        if None not in (ranks["factors"][name], ranks["pivoted"][name]) and allocation == "uniform":
            assert ranks["pivoted"][name] > ranks["factors"][name]
    # Break-even is at the smaller side.
    full = replace(TOWER, "fc1", rank=31)
    assert make_budget(full, 0.3, layout="pivoted").allocate(losses_of(full), allocation).ranks["fc1"] == 31


@pytest.mark.parametrize("scope", ["model", "targets"])
def test_a_ratio_that_removes_nothing_is_refused(scope):
    with pytest.raises(ValueError, match="compression_ratio=1e-12 of .* is less than one, so that every layer would"):
        make_budget(ratio=1e-12, scope=scope).check()
    # A rank that is asked for removes something all the same.
    make_budget(replace(TOWER, "fc1", rank=9), 1e-12, scope=scope).check()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_ceiling(allocation):
    ranks = make_budget(ratio=0.6, max_rank_ratio=0.5).allocate(losses_of(TOWER), allocation).ranks
    factored = [layer for layer in TOWER if ranks[layer.name] is not None]
    assert factored
    for layer in factored:
        break_even = layer.out_features * layer.in_features / (layer.out_features + layer.in_features)
        assert ranks[layer.name] <= 0.5 * break_even
