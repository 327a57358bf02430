"""Compression under a budget of time, by a table that was not measured but follows a formula."""

import pytest
from allocation.tables import block_table, dense_seconds, factored_seconds
from models import pixels, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint.entries import compressed_layers
from optimum_mixrank.checkpoint.modeling import FactoredLinear
from optimum_mixrank.checkpoint.shared import SharedLinear
from optimum_mixrank.evaluation.latency_table import save_latency_table
from optimum_mixrank.reporting import CompressionReport, format_table


TOKENS = 17


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return save_latency_table(block_table(), tmp_path_factory.mktemp("tables") / "latencies.json")


def config_for(table, **changes):
    settings = {"cost": "latency", "latency_table": str(table), "target_latency": 0.7, "compensation": []}
    return MixRankConfig(**{**settings, **changes})


def share_of_time(model):
    """Return the share of the dense model's time that a model takes, by the formula of the table."""
    found, done = block_table().rest_seconds, set()
    for name, layer in model.named_modules():
        if not name.startswith(("vit.layers", "vit.encoder")):
            continue
        if isinstance(layer, SharedLinear):
            joint = layer.factored
            if id(joint) not in done:
                done.add(id(joint))
                found += factored_seconds(joint.out_features, joint.in_features, joint.rank, TOKENS, joint.layout)
        elif isinstance(layer, FactoredLinear) and id(layer) not in done:
            done.add(id(layer))
            found += factored_seconds(layer.out_features, layer.in_features, layer.rank, TOKENS, layer.layout)
        elif type(layer).__name__ == "Linear" and not name.endswith(("factor_a", "factor_b")):
            found += dense_seconds(layer.out_features, layer.in_features, TOKENS)
    return found / block_table().model_seconds


@pytest.mark.parametrize("recipe", ["best", "fast"])
def test_the_whole_model_takes_no_longer_than_the_target(table, recipe, tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    config = config_for(table, recipe=recipe)
    model = compressor.compress(config, [pixels(16)], tmp_path / "out")
    report = compressor.report
    assert compressed_layers(model)
    assert 0.6 < share_of_time(model) <= 0.7 + 1e-4
    assert report.latency["predicted_share"] == pytest.approx(share_of_time(model), abs=2e-4)
    assert report.latency["predicted_seconds"] < report.latency["dense_seconds"] == block_table().model_seconds
    (row,) = [line for line in format_table(report).splitlines() if line.startswith("Latency, predicted")]
    assert "of the dense model; batch 1, cpu, float32, eager)" in row
    assert "predicted time" in report.to_html()
    assert CompressionReport.load(tmp_path / "out") == report
    # Paths of this machine are not published.
    stored = type(model).from_pretrained(tmp_path / "out").config.quantization_config
    assert (stored.latency_table, stored.target_latency, stored.compression_ratio) == ("latencies.json", 0.7, 0.3)


def test_the_table_decides_on_multiples(tmp_path):
    table = save_latency_table(block_table(rank_multiple=8), tmp_path / "table.json")
    compressor = MixRankCompressor(tiny_vit())
    compressor.compress(config_for(table, recipe="fast", metric="svd"))
    ranks = [layer.rank for layer in compressor.report.layers if layer.rank is not None]
    assert ranks and all(rank % 8 == 0 for rank in ranks)
    assert compressor.report.settings["rank_multiple"] == 8
    compressor.compress(config_for(table, recipe="fast", metric="svd", rank_multiple=3))
    ranks = [layer.rank for layer in compressor.report.layers if layer.rank is not None]
    assert ranks and all(rank % 3 == 0 for rank in ranks)


def test_profile(table):
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate([pixels(16)], "kfac")
    profile = compressor.profile(calibration, config_for(table), (0.2, 0.4))
    assert [point.ratio for point in profile.points] == [0.2, 0.4]
    for point in profile.points:
        assert 1 - point.ratio - 0.1 < point.latency <= 1 - point.ratio + 1e-4
    assert "time" in str(profile).splitlines()[0] and f"{profile.points[0].latency:.3f}" in str(profile)


def test_layers_that_patterns_single_out_are_factored_by_themselves(table):
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(config_for(table, rank_pattern={"query": 8}, target_latency=0.8), [pixels(16)])
    assert {layer.rank for layer in compressor.report.layers if "query" in layer.name} == {8}
    assert not any(isinstance(layer, SharedLinear) for layer in model.modules())
    assert compressor.report.latency["predicted_share"] <= 0.8


def test_unreachable_targets_are_refused_before_work_starts(table):
    compressor = MixRankCompressor(tiny_vit())
    with pytest.raises(
        ValueError, match=r"target_latency=0.1 cannot be reached: .* smallest target_latency that can be"
    ):
        # There are no images, which would be found out later.
        compressor.compress(config_for(table, target_latency=0.1, compensation=["sequential"]))


@pytest.mark.parametrize(
    "model", [tiny_vit(num_hidden_layers=3), tiny_vit(patch_size=16), tiny_vit(intermediate_size=96), tiny_swin()]
)
def test_tables_of_other_models_are_refused(table, model):
    with pytest.raises(ValueError, match="table of latencies was measured on another model"):
        MixRankCompressor(model).compress(config_for(table, recipe="fast", metric="svd"))


def test_missing_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="latency_table='.*missing.json' is not a file"):
        MixRankCompressor(tiny_vit()).compress(config_for(tmp_path / "missing.json", metric="svd", recipe="fast"))
