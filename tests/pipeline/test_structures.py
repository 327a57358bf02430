"""Shared factors and narrow MLPs, from images to a checkpoint."""

import dataclasses
import math
from unittest.mock import patch

import pytest
import torch
from models import pixels, tiny_deit, tiny_swin, tiny_vit
from transformers import Dinov2Config, Dinov2ForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.shared import SharedLinear
from optimum_mixrank.compensation.layerwise.sequential import SequentialCompensator
from optimum_mixrank.pipeline.probing import MOST, _bounded


def gated():
    """A tiny model whose MLPs have gates."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Dinov2ForImageClassification(Dinov2Config(**sizes, use_swiglu_ffn=True, num_labels=5)).eval()


IMAGES = [pixels(16), pixels(16, 1)]
SETTINGS = {"compression_scope": "targets", "compression_ratio": 0.5, "probed_images": 8}


def compress(model, **changes):
    compressor = MixRankCompressor(model)
    return compressor, compressor.compress(MixRankConfig(**{**SETTINGS, **changes}), IMAGES)


ALL = ["rank", "shared", "width"]


@pytest.mark.parametrize(
    ("make", "structures"),
    [
        (tiny_vit, ALL),
        (tiny_vit, ["shared", "width"]),
        (tiny_vit, ["shared"]),
        (tiny_deit, ["rank", "width"]),
        (tiny_swin, ALL),
        (gated, ALL),
        (gated, ["shared", "width"]),
    ],
)
def test_structures_from_images_to_a_checkpoint(make, structures, tmp_path):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ratio = 0.15 if structures in (["width"], ["shared"]) else 0.4
    compressor, compressed = compress(model, structures=structures, compression_ratio=ratio, compensation=[])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    layers = compressor.report.layers
    kept = sum(layer.parameters_after for layer in layers)
    # The last step of an MLP's width is larger than that of a rank.
    assert 0.9 * (1 - ratio) <= kept / sum(layer.parameters_before for layer in layers) <= 1 - ratio
    removed = sum(layer.parameters_before for layer in layers) - kept
    values = sum(parameter.numel() for parameter in compressed.parameters())
    biases = sum(layer.shape[0] - layer.shape_after[0] for layer in layers)
    assert values == sum(parameter.numel() for parameter in model.parameters()) - removed - biases
    if "rank" not in structures:
        assert all(layer.rank is None or layer.members or layer.shape != layer.shape_after for layer in layers)

    inputs = pixels(4, seed=9)
    with torch.no_grad():
        expected = compressed(pixel_values=inputs).logits
        compressor.save_pretrained(compressed, tmp_path / "compressed")
        loaded = type(model).from_pretrained(tmp_path / "compressed").eval()
        assert torch.equal(loaded(pixel_values=inputs).logits, expected)
        dense = to_dense(loaded)
        assert torch.allclose(dense(pixel_values=inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert {name: value.shape for name, value in dense.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }


@pytest.mark.parametrize("make", [tiny_vit, gated])
def test_the_sequential_step_keeps_structures_and_lowers_the_error_on_its_own_images(make):
    model = make()
    _, plain = compress(model, compensation=[])
    compressor, repaired = compress(model, compensation=["sequential"], probed_images=0)
    entries = [each.config.quantization_config.factored_layers for each in (plain, repaired)]
    shapes = [{name: (entry.rank, entry.shape, entry.members) for name, entry in each.items()} for each in entries]
    assert shapes[0] == shapes[1]
    [step] = compressor.report.compensation
    assert set(step["details"]["layer_errors"]) == set(entries[1])
    assert all(0 <= error < 1.5 for error in step["details"]["layer_errors"].values())


def test_query_key_and_value_share_a_factor_where_that_is_predicted_to_lose_less():
    # With one and the same weight, one factor serves all three.
    model = tiny_vit()
    for layer in range(2):
        names = [f"vit.encoder.layer.{layer}.attention.attention.{part}" for part in ("query", "key", "value")]
        modules = dict(model.named_modules())
        if names[0] not in modules:
            names = [f"vit.layers.{layer}.attention.{part}_proj" for part in "qkv"]
        first = modules[names[0]]
        for name in names[1:]:
            modules[name].weight.data.copy_(first.weight)
    _, compressed = compress(model, compensation=[], probed_images=0)
    shared = [module for module in compressed.modules() if isinstance(module, SharedLinear)]
    assert len(shared) == 6
    assert len({id(module.factored) for module in shared}) == 2


def test_statistics_serve_for_other_ratios_structures_and_patterns():
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate(IMAGES, "kfac")
    for changes in (
        {"compression_ratio": 0.3},
        {"structures": ["rank"]},
        {"structures": ["shared", "width"]},
        # The joint layer of query and value alone, and an MLP whose second layer is on its own.
        {"rank_pattern": {"key": 5}, "ratio_pattern": {"1.output.dense": 0.5}},
        {"exclude_modules": ["query"]},
    ):
        config = MixRankConfig(**{**SETTINGS, "compensation": [], **changes})
        compressor.compress(config, calibration=calibration)
        report = compressor.report
        assert sum(layer.parameters_after for layer in report.layers if layer.targeted) <= math.ceil(
            (1 - config.compression_ratio) * sum(layer.parameters_before for layer in report.layers if layer.targeted)
        )


def test_statistics_of_single_layers_serve_for_single_layers():
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate(IMAGES, "kfac", structures=["rank"])
    config = MixRankConfig(**{**SETTINGS, "compensation": []})
    with patch("optimum_mixrank.pipeline.decompose.logger.warning") as warning:
        found = compressor.compress(config, calibration=calibration)
    assert "do not say how 4 of 4 groups of layers" in warning.call_args.args[0]
    alone = compressor.compress(dataclasses.replace(config, structures=["rank"]), calibration=calibration)
    expected = alone.config.quantization_config.rank_map
    assert found.config.quantization_config.rank_map == expected


def test_structures_need_losses_in_one_unit():
    config = MixRankConfig(**{**SETTINGS, "metric": "second_moment", "structures": ["rank", "width"]})
    with pytest.raises(
        ValueError, match=r"structures=\['rank', 'width'\] cannot be compared by metric='second_moment'"
    ):
        MixRankCompressor(tiny_vit()).compress(config, IMAGES)
    # Another metric than the recipe's has only ranks by default.
    assert MixRankConfig(metric="second_moment").structures == ["rank"]
    assert MixRankConfig().structures == ["rank", "shared", "width"]


@pytest.mark.parametrize("structures", [[], "rank", ["rank", "depth"], None])
def test_structures_that_do_not_exist(structures):
    if structures is None:
        assert MixRankConfig(structures=None).structures
    else:
        with pytest.raises(ValueError, match="structures="):
            MixRankConfig(structures=structures)


def test_measured_losses_scale_predicted_ones():
    compressor, _ = compress(tiny_vit(), compensation=["sequential"])
    assert compressor.report.seconds["probe"] > 0
    plain, _ = compress(tiny_vit(), compensation=["sequential"], probed_images=0)
    assert "probe" not in plain.report.seconds
    assert plain.report.predicted_loss != compressor.report.predicted_loss


def test_factors_of_curves_are_bounded_around_their_median():
    found = _bounded(
        {"a": 2.0, "b": 3.0, "c": 4.0, "d": 1e6, "e": 1e-9, "f": float("nan")}, ["a", "b", "d", "e", "f", "g"]
    )
    assert found == {"a": 2.0, "b": 3.0, "d": 3.0 * MOST, "e": 3.0 / MOST, "f": 3.0 * MOST, "g": 3.0}
    assert _bounded({}, ["a"]) == {"a": 1.0}


def test_gate_and_value_share_no_factor_unless_that_is_asked_for():
    compressor, compressed = compress(gated(), structures=["rank", "width"], compensation=[])
    assert not any(isinstance(module, SharedLinear) for module in compressed.modules())
    assert all(layer.shape == layer.shape_after for layer in compressor.report.layers)


def test_statistics_of_more_layers_give_those_of_fewer_to_the_sequential_step():
    compressor = MixRankCompressor(tiny_vit())
    calibration = compressor.calibrate(IMAGES, "kfac")
    config = MixRankConfig(**{**SETTINGS, "rank_pattern": {"query": 8}, "structures": ["shared", "rank"]})
    with patch.object(
        SequentialCompensator, "_fisher", autospec=True, side_effect=SequentialCompensator._fisher
    ) as fisher:
        compressor.compress(config, IMAGES, calibration=calibration)
    places = [call.args[1] for call in fisher.call_args_list]
    assert all(place.statistics is not None and place.statistics.has_gradients for place in places)


def test_whole_models_are_run_where_blocks_cannot_be_replayed():
    compressor, _ = compress(tiny_vit(), compensation=["distillation"], epochs=1)
    with patch("optimum_mixrank.pipeline.probing.SegmentReplay", side_effect=RuntimeError("several stacks")):
        other, _ = compress(tiny_vit(), compensation=["distillation"], epochs=1)
    assert [layer.rank for layer in other.report.layers] == [layer.rank for layer in compressor.report.layers]
