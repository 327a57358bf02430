import json

import pytest

from optimum_mixrank.checkpoint.rank_map import FactoredLayer, decode_rows, encode_rows, parse_rank_map


@pytest.mark.parametrize(
    "layer",
    [
        FactoredLayer(1, False),
        FactoredLayer(8, True),
        FactoredLayer(300, True, "pivoted"),
        FactoredLayer(2, True, "pivoted", "11"),
    ],
    ids=["no bias", "bias", "pivoted", "pivots"],
)
def test_round_trip_through_json(layer):
    stored = json.loads(json.dumps({"encoder.layer.0.output.dense": layer.to_dict()}))
    assert parse_rank_map(stored) == {"encoder.layer.0.output.dense": layer}


def test_empty_map():
    assert parse_rank_map({}) == {}


def test_layout_may_be_left_out():
    assert parse_rank_map({"query": {"rank": 3, "bias": True}}) == {"query": FactoredLayer(3, True)}


@pytest.mark.parametrize(("layout", "values"), [("factors", 8 * 80), ("pivoted", 8 * 80 - 64)])
def test_number_of_values(layout, values):
    assert FactoredLayer(8, True, layout).num_values(32, 48) == values


@pytest.mark.parametrize("rank_map", [None, [], ["query"], "query", 3], ids=repr)
def test_not_a_mapping(rank_map):
    with pytest.raises(ValueError, match=f"rank_map is a {type(rank_map).__name__}, not a mapping from layer names"):
        parse_rank_map(rank_map)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (8, "must have the keys `rank`, `bias` and `layout`"),
        ([8, True], "must have the keys"),
        (None, "must have the keys"),
        ({}, "must have the keys"),
        ({"rank": 8}, "must have the keys"),
        ({"bias": True}, "must have the keys"),
        ({"rank": 8, "bias": True, "more": 1}, "must have the keys"),
        ({"rank": 0, "bias": True}, "rank=0 is not a positive integer"),
        ({"rank": -4, "bias": True}, "rank=-4 is not a positive integer"),
        ({"rank": True, "bias": True}, "rank=True is not a positive integer"),
        ({"rank": "8", "bias": True}, "rank='8' is not a positive integer"),
        ({"rank": 8.0, "bias": True}, r"rank=8\.0 is not a positive integer"),
        ({"rank": None, "bias": True}, "rank=None is not a positive integer"),
        ({"rank": [8], "bias": True}, r"rank=\[8\] is not a positive integer"),
        ({"rank": 8, "bias": 1}, "bias=1 is neither true nor false"),
        ({"rank": 8, "bias": None}, "bias=None"),
        (
            {"rank": 8, "bias": True, "layout": "diagonal"},
            "layout='diagonal' is unknown; this version knows 'factors'",
        ),
        ({"rank": 8, "bias": True, "layout": ["pivoted"]}, "is unknown"),
        ({"rank": 8, "bias": True, "layout": None}, "layout=None is unknown"),
        ({"rank": 2, "bias": True, "layout": "factors", "pivots": "11"}, "pivots='11' is not a hexadecimal mask"),
        ({"rank": 2, "bias": True, "layout": "pivoted", "pivots": [0, 4]}, "is not a hexadecimal mask"),
        ({"rank": 2, "bias": True, "layout": "pivoted", "pivots": "0x11"}, "is not a hexadecimal mask"),
        ({"rank": 2, "bias": True, "layout": "pivoted", "pivots": ""}, "is not a hexadecimal mask"),
    ],
    ids=repr,
)
def test_malformed_entry_is_named(entry, message):
    with pytest.raises(ValueError, match=f"rank_map entry 'query'.*{message}"):
        parse_rank_map({"fine": {"rank": 1, "bias": False}, "query": entry})


def test_name_that_is_not_a_string():
    with pytest.raises(ValueError, match="rank_map entry 3"):
        parse_rank_map({3: {"rank": 1, "bias": False}})


@pytest.mark.parametrize("rows", [[0], [0, 4], [3, 7, 8, 5000], list(range(100))], ids=str)
def test_rows_round_trip(rows):
    assert decode_rows(encode_rows(rows)) == rows
