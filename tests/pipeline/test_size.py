"""A size of the whole model in place of a ratio."""

import re

import pytest
import torch
from models import pixels, tiny_deit, tiny_swin, tiny_vit
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification, ViTModel

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint.size import parameters_like
from optimum_mixrank.reporting import format_table
from optimum_mixrank.reporting.card import model_card
from optimum_mixrank.reporting.html import render_html


def size_of(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def wide_vit():
    """Large enough that one more rank of one layer is less than a percent of the model."""
    return tiny_vit(hidden_size=48, intermediate_size=192, num_hidden_layers=3)


@pytest.mark.parametrize(
    "settings",
    [{"recipe": "fast"}, {"compensation": [], "probed_images": 0}, {"metric": "svd", "compensation": []}],
    ids=["fast", "mixed structures", "svd"],
)
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_reloaded_model_has_at_most_the_parameters_asked_for_and_hardly_fewer(settings, share, tmp_path):
    model = wide_vit()
    target = round(share * size_of(model))
    config = MixRankConfig(target_parameters=target, **settings)
    assert config.compression_ratio is None
    MixRankCompressor(model).compress(config, [pixels(16)], tmp_path)
    found = size_of(ViTForImageClassification.from_pretrained(tmp_path))
    assert 0.995 * target <= found <= target


def test_the_size_of_another_model_is_met_and_shown(tmp_path):
    smaller = tiny_vit(hidden_size=32, intermediate_size=128, num_hidden_layers=3)
    smaller.save_pretrained(tmp_path / "smaller")
    (tmp_path / "smaller" / "model.safetensors").unlink()
    compressor = MixRankCompressor(wide_vit())
    config = MixRankConfig(like=tmp_path / "smaller", recipe="fast")
    compressor.compress(config, [pixels(16)], tmp_path / "out")
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert 0.99 * size_of(smaller) <= size_of(reloaded) <= size_of(smaller)
    stored = reloaded.config.quantization_config
    assert (stored.like, stored.target_parameters) == ("smaller", size_of(smaller)), "no path is published"
    assert stored.compression_ratio == pytest.approx(1 - size_of(smaller) / size_of(compressor.model))
    asked = f'at most {size_of(smaller):,} parameters, the size of "smaller"'
    assert re.search(rf"asked for +{asked}", format_table(compressor.report))
    assert asked in str(model_card(reloaded, compressor.report))
    assert asked.replace('"', "&#34;") in render_html(compressor.report)
    assert config.target_parameters is None and config.compression_ratio is None, "the configuration is the user's"


def test_parameters_are_counted_by_a_configuration_alone(tmp_path):
    for position, model in enumerate([tiny_vit(), tiny_deit(), tiny_swin(), tiny_vit(ViTModel)]):
        model.save_pretrained(tmp_path / str(position))
        (tmp_path / str(position) / "model.safetensors").unlink()
        assert parameters_like(str(tmp_path / str(position))) == size_of(model)
    compressed = MixRankCompressor(tiny_vit()).compress(MixRankConfig(recipe="fast"), [pixels(8)], tmp_path / "small")
    assert parameters_like(str(tmp_path / "small")) == size_of(compressed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "of their own", "auto_map": {"AutoConfig": "code.Config"}}', "cannot be counted"),
        ('{"model_type": "vit", "architectures": ["TheirViT"]}', "TheirViT.* as target_parameters"),
        (None, r"like='.*folder': the parameters of this model cannot be counted.*does not exist|config.json"),
    ],
    ids=["code", "class", "nothing"],
)
def test_a_model_that_cannot_be_counted_is_named(content, message, tmp_path):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        MixRankCompressor(tiny_vit()).compress(MixRankConfig(like=str(folder)), [pixels(4)])


def no_images():
    raise AssertionError("images were read")
    yield


def test_a_size_that_makes_no_sense_is_refused_before_any_image_is_read():
    model = tiny_vit()
    compressor = MixRankCompressor(model)
    for size in (size_of(model), size_of(model) + 1):
        with pytest.raises(
            ValueError,
            match=rf"target_parameters={size} is not smaller than the ViTForImage.* has {size_of(model):,} p",
        ):
            compressor.compress(MixRankConfig(target_parameters=size), no_images())
    with pytest.raises(ValueError, match=r"target_parameters=5000 cannot be reached: .* everything else has") as error:
        compressor.compress(MixRankConfig(target_parameters=5000), no_images())
    smallest = int(re.search(r"smallest size that can be reached is target_parameters=(\d+)", str(error.value))[1])
    config = MixRankConfig(target_parameters=smallest, compensation=[], probed_images=0)
    assert size_of(compressor.compress(config, [pixels(8)])) <= smallest
    with pytest.raises(ValueError, match="cannot be reached"):
        compressor.compress(MixRankConfig(target_parameters=smallest - 1), no_images())


def test_memory_is_planned_for_a_size():
    assert MixRankCompressor(tiny_vit()).memory_plan(MixRankConfig(target_parameters=15_000), 16) is not None


def test_the_other_outputs_do_not_change_with_the_way_of_asking():
    model, images = tiny_vit(), [pixels(8)]
    target = round(0.7 * size_of(model))
    by_size = MixRankCompressor(model).compress(MixRankConfig(target_parameters=target, recipe="fast"), images)
    ratio = 1 - target / size_of(model)
    by_ratio = MixRankCompressor(model).compress(MixRankConfig(compression_ratio=ratio, recipe="fast"), images)
    with torch.no_grad():
        assert torch.equal(by_size(pixels(2)).logits, by_ratio(pixels(2)).logits)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hub: a model to compress, "private/large", and one whose size is asked for, "private/small"."""
    sizes = {"large": wide_vit(), "small": tiny_vit(hidden_size=32, intermediate_size=128, num_hidden_layers=3)}
    for name, model in sizes.items():
        model.save_pretrained(tmp_path / name)
    seen = []

    def opened(read):
        def read_from_the_hub(path, *args, **kwargs):
            if not str(path).startswith("private/"):
                return read(path, *args, **kwargs)
            if kwargs.get("token") != "hf_secret":
                raise OSError(f"{path} is a private repository: 401 Client Error.")
            seen.append((str(path), {each: kwargs.get(each) for each in ("revision", "cache_dir")}))
            here = ("revision", "cache_dir", "token")
            return read(tmp_path / path.split("/")[1], *args, **{k: v for k, v in kwargs.items() if k not in here})

        return read_from_the_hub

    for cls in (AutoConfig, ViTForImageClassification):
        monkeypatch.setattr(cls, "from_pretrained", opened(cls.from_pretrained))
    monkeypatch.setattr("optimum_mixrank.checkpoint.architecture.why_unreachable", lambda: "")
    return seen


def test_the_model_that_like_names_is_reached_as_the_model_to_compress(hub):
    images, config = [pixels(8)], MixRankConfig(like="private/small@v2", recipe="fast")
    access = {"token": "hf_secret", "cache_dir": "cache", "revision": "v1", "image_processor": object()}
    compressor = MixRankCompressor.from_pretrained("private/large", **access)
    uses = {
        "compress": lambda: compressor.compress(config, images),
        "quantize": lambda: compressor.quantize(None, quantization_config=config, calibration_dataset=images),
        "memory": lambda: compressor.memory_plan(config, 8),
        "profile": lambda: compressor.profile(compressor.calibrate(images), config, [0.5]),
    }
    for use in uses.values():
        use()
    # The revision is that of the model to compress; each name has its own.
    assert ("private/large", {"revision": "v1", "cache_dir": "cache"}) in hub
    of_small = [given for name, given in hub if name == "private/small"]
    assert of_small == [{"revision": "v2", "cache_dir": "cache"}] * len(of_small) and len(of_small) >= 3
    with pytest.raises(OSError, match="private/small@v2.*private repository.*target_parameters"):
        MixRankCompressor(wide_vit()).compress(config, images)
