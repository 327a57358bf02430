import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit

from optimum_mixrank import MixRankConfig
from optimum_mixrank.checkpoint.loading import insert_factored_layers
from optimum_mixrank.checkpoint.rank_map import FactoredLayer, decode_rows, encode_rows, parse_rank_map, stored_values


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
    assert stored_values(32, 48, 8, layout) == values


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


@pytest.mark.parametrize("layers", [10_001, 20_000])
def test_more_layers_than_any_model_has(layers):
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"rank_map has {layers:,} layers, more than any model"):
        MixRankConfig.from_dict({"rank_map": {str(index): {"rank": 1, "bias": True} for index in range(layers)}})
    # Seconds, were they parsed.
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("digits", [33, 10**6, 10**7])
def test_pivots_longer_than_the_layer(digits):
    name = "encoder.layer.0.attention.attention.query"
    with pytest.raises(
        ValueError, match=f"'{name}'.* (more than the layer of shape|is not a hexadecimal mask)"
    ) as caught:
        insert_factored_layers(
            tiny_vit(), parse_rank_map({name: {"rank": 4, "bias": True, "layout": "pivoted", "pivots": "f" * digits}})
        )
    assert len(str(caught.value)) < 500


def test_nothing_is_replaced_if_an_entry_does_not_fit():
    model = tiny_vit()
    before = list(model.modules())
    names = [f"encoder.layer.{block}.attention.attention.query" for block in (0, 1)]
    with pytest.raises(ValueError, match=f"'{names[1]}' has rank 999"):
        insert_factored_layers(model, {names[0]: FactoredLayer(2, True), names[1]: FactoredLayer(999, True)})
    assert list(model.modules()) == before


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.just("\x1b[31m" * 10_000),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


@given(
    st.one_of(
        values,
        st.dictionaries(
            st.one_of(st.text(), st.integers()),
            st.dictionaries(st.sampled_from(["rank", "bias", "layout", "pivots", "more"]), values),
            max_size=3,
        ),
    )
)
def test_any_content(content):
    try:
        parse_rank_map(content)
    except ValueError as error:
        assert len(str(error)) < 1000 and "\x1b" not in str(error)


def test_a_number_that_python_does_not_print():
    with pytest.raises(ValueError, match="rank=<int too large to print> is not a positive integer"):
        parse_rank_map({"query": {"rank": -(10**5000), "bias": True}})
