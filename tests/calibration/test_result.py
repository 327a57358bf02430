"""Statistics on disk: reused for another budget, refused for another model or other images."""

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import given
from models import pixels, tiny_vit
from mutations import is_same, mutations, read
from safetensors.torch import save_file

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.fingerprint import ImageFingerprint, fingerprint_model
from optimum_mixrank.calibration.result import Calibration


SETTINGS = {"recipe": "best", "compression_scope": "targets", "compensation": []}


@pytest.fixture
def compressor():
    return MixRankCompressor(tiny_vit())


@pytest.fixture
def saved(compressor, tmp_path):
    return compressor.calibrate([pixels(8)], ["kfac", "mean_input"]).save(tmp_path / "statistics.safetensors")


@pytest.mark.parametrize("metric", ["kfac", "mean_input"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_reloaded_statistics_give_the_same_model(compressor, saved, metric, ratio):
    config = MixRankConfig(compression_ratio=ratio, **SETTINGS, metric=metric)
    direct = compressor.compress(config, calibration=compressor.calibrate([pixels(8)], ["kfac", "mean_input"]))
    reused = compressor.compress(config, calibration=Calibration.load(saved))
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, reused.state_dict()[name])
    assert compressor.report.calibration["num_images"] == 8


def test_shared_statistics_are_stored_once(compressor, saved):
    calibration = compressor.calibrate([pixels(8)], ["kfac", "mean_input"])
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for statistics in calibration.layers.values()
        for tensor in vars(statistics).values()
        if isinstance(tensor, torch.Tensor)
    }
    assert saved.stat().st_size < sum(tensors.values()) + 40_000


def test_another_model_is_refused(saved):
    model = tiny_vit()
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="belong to a model with the fingerprint .* weights differ. Calibrate this"):
        MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), calibration=Calibration.load(saved))


def test_other_images_are_refused(compressor, saved):
    config = MixRankConfig(compression_scope="targets", compensation=["sequential"])
    with pytest.raises(ValueError, match="taken from images with the fingerprint"):
        compressor.compress(config, [pixels(8, seed=1)], calibration=Calibration.load(saved))
    # The same images in other batches are the same images.
    compressor.compress(config, list(pixels(8).split(3)), calibration=Calibration.load(saved))


def test_images_are_compared_where_nothing_else_needs_them(compressor, saved):
    config, calibration = MixRankConfig(**SETTINGS), Calibration.load(saved)
    direct = compressor.compress(config, calibration=calibration)
    compared = compressor.compress(config, list(pixels(8).split(3)), calibration=calibration)
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, compared.state_dict()[name])
    with pytest.raises(ValueError, match="taken from images with the fingerprint"):
        compressor.compress(config, [pixels(8, seed=1)], calibration=calibration)


def test_statistics_can_be_checked_without_a_run(compressor, saved, monkeypatch):
    calibration = Calibration.load(saved)
    monkeypatch.setattr(compressor.model, "forward", None)
    compressor.check_calibration(calibration, [pixels(8)])
    with pytest.raises(ValueError, match="taken from images with the fingerprint"):
        compressor.check_calibration(calibration, [pixels(4)])


def test_no_statistics_are_not_written(compressor, tmp_path):
    with pytest.raises(ValueError, match="There are no statistics to write .* metric='svd' needs none"):
        compressor.calibrate([pixels(8)], "svd").save(tmp_path / "statistics.safetensors")
    assert not list(tmp_path.iterdir())


def test_fingerprints_see_every_change():
    model = tiny_vit()
    before = fingerprint_model(model)
    assert fingerprint_model(copy.deepcopy(model)) == before
    assert fingerprint_model(model.half()) != before
    one, two = ImageFingerprint(), ImageFingerprint()
    one.update(pixels(4))
    for batch in pixels(4).split(1):
        two.update(batch)
    assert one.hexdigest() == two.hexdigest()
    two.update(pixels(1))
    assert one.hexdigest() != two.hexdigest()


def test_damaged_and_foreign_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Calibration.load(tmp_path / "nothing")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="has the format None"):
        Calibration.load(foreign)
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        Calibration.load(saved)


@pytest.mark.parametrize("damage", ["nan", "dtype", "count", "fingerprint"])
def test_wrong_content_is_refused(compressor, tmp_path, damage):
    calibration = compressor.calibrate([pixels(4)], "kfac")
    name = next(iter(calibration.layers))
    statistics = calibration.layers[name]
    if damage == "nan":
        statistics = dataclasses.replace(statistics, gradient_moment=statistics.gradient_moment * float("nan"))
    elif damage == "dtype":
        statistics = dataclasses.replace(statistics, gradient_moment=statistics.gradient_moment.float())
    elif damage == "count":
        statistics = dataclasses.replace(statistics, num_tokens="4")
    layers = {**calibration.layers, name: statistics}
    changes = {"model_fingerprint": None} if damage == "fingerprint" else {}
    path = dataclasses.replace(calibration, layers=layers, **changes).save(tmp_path / "statistics.safetensors")
    with pytest.raises(ValueError, match="is damaged .* collect the statistics again"):
        Calibration.load(path)


def test_wrong_shapes_are_refused(compressor):
    calibration = compressor.calibrate([pixels(4)], "kfac")
    name = next(iter(calibration.layers))
    wrong = dataclasses.replace(calibration.layers[name], gradient_moment=torch.eye(3).double())
    calibration = dataclasses.replace(calibration, layers={**calibration.layers, name: wrong})
    with pytest.raises(ValueError, match=r"gradient_moment of layer .* has the shape \[3, 3\]; \[32, 32\] is needed"):
        compressor.compress(MixRankConfig(**SETTINGS), calibration=calibration)


def test_nothing_is_left_behind_when_writing_fails(compressor, saved, tmp_path, monkeypatch):
    calibration = compressor.calibrate([pixels(4)], "kfac")
    before = saved.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("optimum_mixrank.calibration.result.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        calibration.save(saved)
    assert saved.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [saved.name]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    compressor = MixRankCompressor(tiny_vit())
    return compressor.calibrate([pixels(4)], "kfac").save(tmp_path_factory.mktemp("saved") / "statistics.safetensors")


@given(mutate=mutations())
def test_no_damage_goes_unnoticed(written, mutate):
    damaged = written.with_name("damaged.safetensors")
    damaged.write_bytes(written.read_bytes())
    mutate(damaged)
    if not is_same(written, damaged):
        with pytest.raises(ValueError, match="(is damaged|has the format).* collect the statistics again"):
            Calibration.load(damaged)


@pytest.mark.parametrize("change", ["negative", "asymmetric", "seconds", "broken", "no layers", "deep"])
def test_statistics_without_digest_have_to_make_sense(written, tmp_path, change):
    tensors, metadata = read(written)
    content = json.loads(metadata["calibration"])
    name = next(name for name in tensors if name.endswith("covariance"))
    if change == "negative":
        tensors[name] = -tensors[name]
    elif change == "asymmetric":
        tensors[name][0, 1] += 1
    content |= {"seconds": {"seconds": "long"}, "broken": {"broken": 3}, "no layers": {"layers": {}}}.get(change, {})
    text = "[" * 100_000 if change == "deep" else json.dumps(content)
    path = tmp_path / "statistics.safetensors"
    save_file(tensors, path, metadata={"format": "optimum-mixrank statistics 2", "calibration": text})
    with pytest.raises(ValueError, match="is damaged .* collect the statistics again"):
        Calibration.load(path)


def test_statistics_of_another_run_are_not_its_own(written):
    copy = Calibration.load(written).save(written.with_name("run.safetensors"), run="this")
    assert Calibration.load(copy).num_images == Calibration.load(copy, run="this").num_images == 4
    with pytest.raises(ValueError, match="belongs to another run; collect the statistics again"):
        Calibration.load(copy, run="other")
