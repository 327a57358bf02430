import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_vit
from transformers import BitsAndBytesConfig

from optimum_mixrank import MixRankConfig
from optimum_mixrank.checkpoint.loading import insert_factored_layers
from optimum_mixrank.checkpoint.rank_map import (
    MAX_CHUNKS,
    MAX_MEMBERS,
    FactoredLayer,
    decode_rows,
    encode_rows,
    layout_version,
    parse_rank_map,
    quantization_method,
    stored_values,
)


QUERY, KEY = "attention.query", "attention.key"
SHARED = {"rank": 3, "bias": True, "members": [QUERY, KEY]}
NARROW = {"bias": True, "layout": "dense", "shape": [5, 8], "dense_shape": [6, 8]}


@pytest.mark.parametrize(
    "layer",
    [
        FactoredLayer(1, False),
        FactoredLayer(8, True),
        FactoredLayer(300, True, "pivoted"),
        FactoredLayer(2, True, "pivoted", "11"),
        FactoredLayer(None, True, "dense", shape=(5, 8), dense_shape=(6, 8)),
        FactoredLayer(3, True, shape=(8, 5), dense_shape=(8, 6)),
        FactoredLayer(None, False, "dense", shape=(6, 8), dense_shape=(12, 8), chunks=2),
    ],
    ids=["no bias", "bias", "pivoted", "pivots", "narrow", "narrow and factored", "gates and values"],
)
def test_round_trip_through_json(layer):
    stored = json.loads(json.dumps({"encoder.layer.0.output.dense": layer.to_dict()}))
    assert parse_rank_map(stored) == {"encoder.layer.0.output.dense": layer}


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "mixrank"}, "mixrank"),
        (MixRankConfig(compression_ratio=0.5), "mixrank"),
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
        ({}, None),
        (None, None),
        ("text", None),
    ],
    ids=["as read", "parsed", "of Transformers", "no method", "none", "anything else"],
)
def test_quantization_method(settings, method):
    assert quantization_method(settings) == method


def test_empty_map():
    assert parse_rank_map({}) == {}


def test_layout_may_be_left_out():
    assert parse_rank_map({"query": {"rank": 3, "bias": True}}) == {"query": FactoredLayer(3, True)}


@pytest.mark.parametrize(("layout", "values"), [("factors", 8 * 80), ("pivoted", 8 * 80 - 64)])
def test_number_of_values(layout, values):
    assert stored_values(32, 48, 8, layout) == values


@pytest.mark.parametrize("changes", [{}, {"layout": "pivoted"}], ids=["factors", "pivoted"])
def test_layers_that_share_a_factor_round_trip(changes):
    first = FactoredLayer(3, True, members=(QUERY, KEY), **changes)
    if changes:
        first = FactoredLayer(3, True, pivots="7", members=(QUERY, KEY), **changes)
    second = FactoredLayer(3, True, members=(QUERY, KEY), **changes)
    stored = json.loads(json.dumps({QUERY: first.to_dict(), KEY: second.to_dict()}))
    assert parse_rank_map(stored) == {QUERY: first, KEY: second}


def test_the_oldest_version_that_can_describe_the_layers():
    plain, narrow = FactoredLayer(3, True, "pivoted", "7"), parse_rank_map({"fc1": NARROW})["fc1"]
    assert layout_version([]) == layout_version([plain]) == 1
    assert layout_version([plain, narrow]) == 2
    assert layout_version(parse_rank_map({QUERY: SHARED, KEY: SHARED}).values()) == 2


def test_entries_of_earlier_versions_have_no_new_keys():
    assert FactoredLayer(3, True).to_dict().keys() == {"rank", "bias", "layout"}
    assert FactoredLayer(3, True, "pivoted", "7").to_dict().keys() == {"rank", "bias", "layout", "pivots"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 3}, "a dense layer has neither rank nor members"),
        ({"members": ["query", "key"]}, "a dense layer has neither rank nor members"),
        ({"pivots": "7"}, "pivots='7' is not a hexadecimal mask of the rows of a pivoted layer"),
        ({"shape": None, "dense_shape": None}, "`shape`, `dense_shape` and `chunks` belong together"),
        ({"dense_shape": None}, "belong together"),
        ({"shape": [6, 8]}, "is not what is left of"),
        ({"shape": [7, 8]}, "is not what is left of"),
        ({"shape": [5, 9]}, "is not what is left of"),
        ({"chunks": 2}, "is not what is left of"),
        ({"shape": [5]}, r"shape=\[5\] is not a shape of two positive integers"),
        ({"shape": [5, 0]}, "is not a shape"),
        ({"shape": [5, True]}, "is not a shape"),
        ({"shape": [5.0, 8]}, "is not a shape"),
        ({"shape": "58"}, "is not a shape"),
        ({"shape": {"5": 8}}, "is not a shape"),
        ({"dense_shape": [2**30, 8]}, "dense_shape=.* is not a shape"),
        ({"chunks": 0}, f"chunks=0 is not an integer from 1 to {MAX_CHUNKS}"),
        ({"chunks": MAX_CHUNKS + 1}, "is not an integer"),
        ({"chunks": True}, "is not an integer"),
        ({"chunks": "2"}, "is not an integer"),
    ],
    ids=repr,
)
def test_malformed_entry_of_a_narrow_layer_is_named(changes, message):
    with pytest.raises(ValueError, match=f"rank_map entry 'fc1'.*{message}"):
        parse_rank_map({"fc1": {**NARROW, **changes}})


def test_chunks_without_a_shape():
    with pytest.raises(ValueError, match="`shape`, `dense_shape` and `chunks` belong together"):
        parse_rank_map({"fc1": {"rank": 3, "bias": True, "chunks": 2}})


@pytest.mark.parametrize(
    "members",
    [
        None,
        [],
        [QUERY],
        [QUERY, QUERY],
        [KEY, "attention.value"],
        [QUERY, 3],
        [QUERY, [KEY]],
        QUERY,
        {QUERY: KEY},
        [QUERY, *map(str, range(MAX_MEMBERS))],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_malformed_members_are_named(members):
    if members is None:
        assert parse_rank_map({QUERY: {**SHARED, "members": None}}) == {QUERY: FactoredLayer(3, True)}
        return
    with pytest.raises(ValueError, match=f"rank_map entry '{QUERY}': members=.* is not a list of 2 to {MAX_MEMBERS}"):
        parse_rank_map({QUERY: {**SHARED, "members": members}})


@pytest.mark.parametrize(
    "other",
    [
        None,
        {"rank": 3, "bias": True},
        {**SHARED, "rank": 4},
        {**SHARED, "bias": False},
        {**SHARED, "layout": "pivoted"},
        {**SHARED, "members": [KEY, QUERY]},
        {**SHARED, "members": [KEY, "attention.value"]},
    ],
    ids=["absent", "alone", "rank", "bias", "layout", "order", "another group"],
)
def test_members_that_disagree(other):
    stored = {QUERY: SHARED, **({} if other is None else {KEY: other})}
    with pytest.raises(ValueError, match="shares its first factor with .*, whose entry does not agree"):
        parse_rank_map(stored)


def test_pivots_of_another_than_the_first_member():
    stored = {**SHARED, "layout": "pivoted"}
    with pytest.raises(ValueError, match=f"'{KEY}': the pivots belong to the first member, '{QUERY}'"):
        parse_rank_map({QUERY: {**stored, "pivots": "7"}, KEY: {**stored, "pivots": "7"}})


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


KEYS = ["rank", "bias", "layout", "pivots", "members", "shape", "dense_shape", "chunks", "more"]

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
            st.dictionaries(st.sampled_from(KEYS), values),
            max_size=3,
        ),
    )
)
def test_any_content(content):
    try:
        parse_rank_map(content)
    except ValueError as error:
        assert len(str(error)) < 1000 and "\x1b" not in str(error)


@given(st.sampled_from([QUERY, KEY, "fc1"]), st.sampled_from(KEYS), values)
def test_any_value_in_an_entry(name, key, value):
    stored = {QUERY: SHARED, KEY: SHARED, "fc1": NARROW}
    try:
        parse_rank_map({**stored, name: {**stored[name], key: value}})
    except ValueError as error:
        assert len(str(error)) < 1000 and "\x1b" not in str(error)


def test_a_number_that_python_does_not_print():
    with pytest.raises(ValueError, match="rank=<int too large to print> is not a positive integer"):
        parse_rank_map({"query": {"rank": -(10**5000), "bias": True}})
