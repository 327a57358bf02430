"""Checkpoints, reports and statistics of earlier versions are read as they were meant; see `golden/make*.py`."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification

from optimum_mixrank import FactoredLinear, MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.result import Calibration
from optimum_mixrank.reporting import CompressionReport


GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("vit", "deit", "swin")
LAYOUTS = ("factors", "pivoted")
RANK_ALONE = [f"{family}/{layout}" for family in FAMILIES for layout in LAYOUTS]
MIXED = [f"mixed/{family}/{layout}" for family in ("vit", "swin") for layout in LAYOUTS]
CHECKPOINTS = RANK_ALONE + MIXED
STATISTICS = json.loads((GOLDEN / "statistics.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors") | load_file(GOLDEN / "mixed/expected.safetensors")


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request):
    return request.param


def load(name):
    return AutoModelForImageClassification.from_pretrained(GOLDEN / name).eval()


def stored_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights(tensors):
    """Without what Swin recomputes, which Transformers 4.57 stores all the same."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("relative_position_index")}


def contents(tensors):
    """The tensors without their names, which differ between releases of Transformers in memory."""
    return sorted(
        (list(each.shape), str(each.dtype), each.contiguous().numpy().tobytes()) for each in weights(tensors).values()
    )


def assert_same_logits(model, name, expected):
    with torch.no_grad():
        logits = model(pixel_values=expected["pixel_values"]).logits
    scale = expected[name].abs().max().item()
    torch.testing.assert_close(logits, expected[name], rtol=0, atol=1e-5 * scale)


def test_no_file_is_missing(expected):
    originals = [f"{family}/original" for family in FAMILIES]
    assert sorted(expected) == sorted(["pixel_values", *originals, *CHECKPOINTS])
    assert sorted(STATISTICS) == sorted(
        path.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/statistics-*.safetensors")
    )
    entries = [entry for name in RANK_ALONE for entry in stored_config(GOLDEN / name)["rank_map"].values()]
    assert {(entry["layout"], entry["bias"]) for entry in entries} == {(a, b) for a in LAYOUTS for b in (True, False)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_itself_has_not_changed(family, expected):
    assert_same_logits(load(f"{family}/original"), f"{family}/original", expected)


def test_a_checkpoint_has_its_tensors_and_logits(checkpoint, expected):
    model = load(checkpoint)
    stored = load_file(GOLDEN / checkpoint / "model.safetensors")
    assert contents(model.state_dict()) == contents(stored)
    factored = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    assert {module.layout for module in factored} == {checkpoint.split("/")[-1]}
    assert_same_logits(model, checkpoint, expected)


def test_a_checkpoint_is_saved_as_it_was(checkpoint, tmp_path):
    load(checkpoint).save_pretrained(tmp_path)
    before, after = stored_config(GOLDEN / checkpoint), stored_config(tmp_path)
    assert after["rank_map"] == before["rank_map"]
    assert MixRankConfig.from_dict(after) == MixRankConfig.from_dict(before)
    tensors, saved = (weights(load_file(folder / "model.safetensors")) for folder in (GOLDEN / checkpoint, tmp_path))
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype and torch.equal(saved[name], tensor), name


def test_a_configuration_is_read_in_full(checkpoint):
    stored = stored_config(GOLDEN / checkpoint)
    assert AutoConfig.from_pretrained(GOLDEN / checkpoint).quantization_config == stored
    config = MixRankConfig.from_dict(stored)
    assert stored.items() <= vars(config).items()
    assert {name: layer.to_dict() for name, layer in config.factored_layers.items()} == stored["rank_map"]


@pytest.mark.parametrize("checkpoint", RANK_ALONE)
def test_a_report_is_read_in_full(checkpoint):
    stored = json.loads((GOLDEN / checkpoint / "mixrank_report.json").read_text())
    report = CompressionReport.load(GOLDEN / checkpoint)
    content = report.to_dict()
    assert stored.keys() <= content.keys()
    assert {name: value for name, value in content.items() if name in stored and name != "layers"} == {
        name: value for name, value in stored.items() if name != "layers"
    }
    for found, layer in zip(content["layers"], stored["layers"], strict=True):
        assert layer.items() <= found.items()
    rank_map = stored_config(GOLDEN / checkpoint)["rank_map"]
    ranks = {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
    assert ranks == {name: entry["rank"] for name, entry in rank_map.items()}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_hold_what_was_saved(name):
    calibration, facts = Calibration.load(GOLDEN / name), STATISTICS[name]
    fields = ("num_images", "num_tokens", "fisher_samples", "model_fingerprint", "data_fingerprint")
    assert {field: getattr(calibration, field) for field in fields} == {field: facts[field] for field in fields}
    assert len(calibration.layers) == facts["layers"]
    digest = hashlib.sha256()
    for layer, statistics in sorted(calibration.layers.items()):
        for field, value in sorted(vars(statistics).items()):
            if isinstance(value, torch.Tensor):
                digest.update(f"{layer} {field} {list(value.shape)} {value.dtype}".encode())
                digest.update(value.contiguous().numpy().tobytes())
    assert digest.hexdigest() == facts["digest"]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_can_be_used(name):
    family, metric = name.removesuffix(".safetensors").split("/statistics-")
    calibration = Calibration.load(GOLDEN / name)
    compressor = MixRankCompressor.from_pretrained(GOLDEN / family / "original")
    if not calibration.layers.keys() <= {layer for layer, _ in compressor.model.named_modules()}:
        pytest.skip("statistics name the modules of the line of Transformers that they were taken with")
    config = MixRankConfig(
        compression_ratio=0.4, compression_scope="targets", metric=metric, structures=["rank"], compensation=[]
    )
    model = compressor.compress(config, calibration=calibration)
    assert any(isinstance(module, FactoredLinear) for module in model.modules())
    report = {layer.name: layer for layer in compressor.report.layers}
    compressed = STATISTICS[name]["compressed"]
    assert {layer: report[layer].rank for layer in report} == {layer: rank for layer, (rank, _) in compressed.items()}
    for layer, (rank, energy) in compressed.items():
        if rank is not None:
            assert report[layer].kept_energy == pytest.approx(energy, rel=1e-6), layer
