"""Tables of latencies: interpolation, what they are scaled to, and tables that are not to be trusted."""

import json
import math

import numpy as np
import pytest
from allocation.tables import block_table, dense_seconds, factored_seconds, layer_times

from optimum_mixrank.allocation.latency import KIND, LatencyTable, LayerTimes, RankTimes, isotonic


def isotonic_by_definition(values):
    """Return the isotonic regression by its min-max formula."""
    n = len(values)
    return [
        max(min(np.mean(values[low : high + 1]) for high in range(index, n)) for low in range(index + 1))
        for index in range(n)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_isotonic_regression(seed):
    rng = np.random.default_rng(seed)
    values = np.cumsum(rng.normal(0.3, 1.0, rng.integers(1, 12)))
    found = isotonic(values)
    np.testing.assert_allclose(found, isotonic_by_definition(values), rtol=1e-12)
    assert (np.diff(found) >= 0).all()


def test_measured_points_are_met_and_others_lie_between():
    times = RankTimes((8, 16, 32), (1.0, 3.0, 4.0))
    np.testing.assert_allclose(times.at(np.array([0, 8, 12, 16, 24, 32, 64])), [1, 1, 2, 3, 3.5, 4, 8])


@pytest.mark.parametrize("seed", range(5))
def test_noise_never_makes_a_higher_rank_cheaper(seed):
    rng = np.random.default_rng(seed)
    exact = layer_times(48, 24, 5, 1, "out", step=8)
    noisy = {
        layout: tuple(RankTimes(each.ranks, tuple(t * rng.uniform(0.6, 1.4) for t in each.seconds)) for each in found)
        for layout, found in exact.factored.items()
    }
    layer = LayerTimes(**{**vars(exact), "factored": noisy})
    for size in (3, 8, 20, 33, 48):
        for layout in noisy:
            seconds = layer.factored_seconds(size, layout)
            assert len(seconds) == min(size, 24) + 1 and (np.diff(seconds) >= 0).all() and seconds[0] > 0


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_widths_are_interpolated(side, layout):
    m, n = (64, 24) if side == "out" else (24, 64)
    layer = layer_times(m, n, 7, 1, side, step=8)
    for size in (16, 20, 41, 64):
        shape = (size, n) if side == "out" else (m, size)
        assert layer.dense_seconds(size) == pytest.approx(dense_seconds(*shape, 7), rel=1e-9)
        found = layer.factored_seconds(size, layout)
        for rank in (4, 8, 11):
            assert found[rank] == pytest.approx(factored_seconds(*shape, rank, 7, layout), rel=0.1)


def test_layers_and_the_rest_add_up_to_the_model():
    table = block_table()
    layers = sum(layer.count * layer.full_seconds for layer in table.layers if layer.members == 1)
    assert table.scale * layers + table.rest_seconds == pytest.approx(table.model_seconds)


def test_layers_are_found_by_shape_tokens_and_role():
    table = block_table()
    assert table.find((64, 32), 17, side="out") is table.find((64, 32), 17) is table.layers[1]
    assert table.find((96, 32), 17, members=3) is table.layers[3]
    for arguments in (((64, 32), 16), ((96, 32), 17), ((96, 32), 17, 2), ((32, 32), 17, 1, "in")):
        assert not table.has(*arguments)
        with pytest.raises(ValueError, match="table of latencies has no layer of shape"):
            table.find(*arguments)
    with pytest.raises(ValueError, match="no times for layout='other', only for 'factors', 'pivoted'"):
        table.layers[0].factored_seconds(32, "other")


def test_another_model_is_recognised():
    table = block_table()
    counts = {((32, 32), 17): 8, ((64, 32), 17): 2, ((32, 64), 17): 2}
    table.check_counts(counts)
    for others in ({**counts, ((32, 32), 17): 12}, {((32, 32), 17): 8}, {**counts, ((8, 8), 17): 1}):
        with pytest.raises(ValueError, match=r"was measured on another model: on 8 x \[32, 32\] at 17 tokens"):
            table.check_counts(others)


def test_round_trip_through_json():
    table = block_table(step=8, rank_multiple=8)
    text = json.dumps(table.to_dict(), allow_nan=False)
    assert LatencyTable.from_dict(json.loads(text)) == table


def with_value(path, value):
    """Return a table as JSON values with one of them replaced, or removed for `...`."""
    content = json.loads(json.dumps(block_table(step=16).to_dict()))
    *parents, last = path
    place = content
    for each in parents:
        place = place[each]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


FIRST = ("layers", 1)
CURVE = (*FIRST, "factored", "pivoted", 0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "other", f"it is not a table of latencies, whose `kind` is {KIND!r}"),
        (("version",), 2, "its version 2 is unknown, this release reads version 1"),
        (("version",), ..., "its version None is unknown"),
        (("model_seconds",), -1.0, "model_seconds=-1.0 is not a positive number of seconds"),
        (("model_seconds",), math.nan, "model_seconds=nan is not a positive number"),
        (("model_seconds",), math.inf, "model_seconds=inf is not a positive number"),
        (("model_seconds",), True, "model_seconds=True is not a positive number"),
        (("model_seconds",), 10**400, "model_seconds=1000"),
        (("rest_seconds",), "1", "rest_seconds='1' is not a positive number"),
        (("rest_seconds",), 3000.0, "rest_seconds=3000.0 is not less than model_seconds"),
        (("rank_multiple",), 0, "rank_multiple=0 is not an integer from 1 to 256"),
        (("rank_multiple",), 8.0, "rank_multiple=8.0 is not an integer"),
        (("conditions",), [], "conditions is a list, not an object"),
        (("conditions", "device"), {"a": 1}, "conditions['device']={'a': 1} is neither a text nor a number"),
        (("layers",), [], "layers=[] is not a list of 1 to 1,000 entries"),
        (("layers",), {}, "layers={} is not a list"),
        (("layers", 0), 7, "layers[0] is an int, not an object"),
        ((*FIRST, "out_features"), -64, "layers[1].out_features=-64 is not an integer from 1"),
        ((*FIRST, "count"), ..., "layers[1].count=None is not an integer"),
        ((*FIRST, "side"), "up", "layers[1].side='up' is not one of '', 'out', 'in'"),
        ((*FIRST, "sizes"), [16, 32, 48], "layers[1].sizes=[16, 32, 48] does not end with the full size 64"),
        ((*FIRST, "sizes"), [32, 16, 48, 64], "layers[1].sizes=[32, 16, 48, 64] is not ascending"),
        ((*FIRST, "dense"), [1.0], "layers[1].dense has 1 entries, not 4"),
        ((*FIRST, "dense", 2), 0, "layers[1].dense[2]=0 is not a positive number"),
        ((*FIRST, "factored"), [], "layers[1].factored is a list, not an object"),
        (
            (*FIRST, "factored", "dense"),
            [],
            "layers[1].factored['dense'] is not a layout; choose one of 'factors', 'pivoted'",
        ),
        ((*FIRST, "factored", "pivoted"), [{}], "layers[1].factored['pivoted'] has 1 entries for 4 sizes"),
        (CURVE, 3, "layers[1].factored['pivoted'][0] is an int"),
        ((*CURVE, "ranks"), [1, 99], "has 99, more than the largest rank 16 of the layer"),
        ((*CURVE, "ranks"), [1, "2"], "ranks='2' is not an integer"),
        ((*CURVE, "seconds"), [1.0], "seconds has 1 entries, not 2"),
        ((*CURVE, "seconds", 1), -2.0, "seconds[1]=-2.0 is not a positive number"),
    ],
    ids=str,
)
def test_a_table_that_cannot_be_trusted(path, value, message):
    with pytest.raises(ValueError) as error:
        LatencyTable.from_dict(with_value(path, value))
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, 3, [], "table", {}], ids=str)
def test_a_file_that_is_not_a_table(content):
    with pytest.raises(ValueError, match="it is"):
        LatencyTable.from_dict(content)


def test_layers_are_not_repeated():
    content = with_value(("version",), 1)
    content["layers"].append(content["layers"][0])
    with pytest.raises(ValueError, match="two of its `layers` are the same"):
        LatencyTable.from_dict(content)
    content["layers"] = content["layers"][3:4]
    with pytest.raises(ValueError, match="hold no single layer"):
        LatencyTable.from_dict(content)
