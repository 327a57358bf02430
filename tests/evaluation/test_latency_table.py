"""Measuring a table of latencies, and keeping it in a file; how long anything takes is nowhere asserted."""

import copy
import json

import pytest
import torch
from allocation.tables import block_table
from models import compressed, tiny_swin, tiny_vit

from optimum_mixrank.evaluation.latency_table import load_latency_table, measure_latency_table, save_latency_table


QUICK = {"repeats": 6, "min_seconds": 0.0}


def test_the_layers_of_a_vit():
    model = tiny_vit().train()
    before = copy.deepcopy(model.state_dict())
    table = measure_latency_table(model, 2, **QUICK)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    found = {layer.key: layer for layer in table.layers}
    assert {key: layer.count for key, layer in found.items()} == {
        (32, 32, 17, 1, ""): 8,
        (64, 32, 17, 1, "out"): 2,
        (32, 64, 17, 1, "in"): 2,
        (96, 32, 17, 3, ""): 2,
    }
    assert found[64, 32, 17, 1, "out"].sizes == found[32, 64, 17, 1, "in"].sizes == (8, 16, 24, 32, 48, 64)
    assert found[96, 32, 17, 3, ""].sizes == (96,)
    for layer in table.layers:
        assert layer.factored.keys() == {"factors", "pivoted"}
        for curves in layer.factored.values():
            assert len(curves) == len(layer.sizes) == len(layer.dense)
            assert all(each.ranks[-1] <= min(size, 32) for each, size in zip(curves, layer.sizes, strict=True))
    assert 0 < table.rest_seconds < table.model_seconds
    assert table.rank_multiple in (1, 8)
    conditions = table.conditions
    assert (conditions["batch_size"], conditions["runtime"], conditions["dtype"]) == (2, "eager", "float32")


def test_layers_that_see_different_numbers_of_tokens():
    table = measure_latency_table(tiny_swin(), layouts=("pivoted",), **QUICK)
    tokens = {layer.tokens for layer in table.layers}
    assert {64, 16} <= tokens
    assert all(layer.factored.keys() == {"pivoted"} for layer in table.layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 5}, "repeats=5 is too few"),
        ({"batch_size": 0}, "batch_size=0 is not positive"),
        ({"layouts": ("dense",)}, "layouts=.* is not a list of 'factors', 'pivoted'"),
        ({"layouts": ()}, "layouts=.* is not a list"),
        ({"runtime": "tensorrt"}, "runtime='tensorrt' is unknown; choose one of 'eager', 'compile', 'onnxruntime'"),
    ],
    ids=str,
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        measure_latency_table(tiny_vit(), **changes)


def test_a_compressed_model_is_refused():
    with pytest.raises(ValueError, match="is compressed already"):
        measure_latency_table(compressed(tiny_vit(), "pivoted"))


def test_files(tmp_path):
    table = block_table(step=8)
    path = save_latency_table(table, tmp_path / "table.json")
    assert load_latency_table(path) == load_latency_table(str(path)) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no JSON"),
        ("{", "holds no JSON"),
        ("[" * 100_000, "holds no JSON"),
        ("1" * 5_000, "holds no JSON"),
        ("[]", "cannot be used: it is a list, not an object"),
        ('{"kind": "other"}', "cannot be used: it is not a table of latencies"),
        (json.dumps({**block_table(step=32).to_dict(), "model_seconds": float("nan")}), "model_seconds=nan is not"),
    ],
    ids=range(7),
)
def test_files_that_cannot_be_trusted(tmp_path, text, message):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_latency_table(path)
    assert "optimum-cli mixrank benchmark" in str(error.value) and len(str(error.value)) < 1000


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="is not a file; measure one with `optimum-cli mixrank benchmark"):
            load_latency_table(path)
