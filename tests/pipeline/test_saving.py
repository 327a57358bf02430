"""Where results are saved: what a user has is never lost, and a place that cannot be written is refused before work."""

import json
import os
from pathlib import Path

import pytest
import torch
from calibration.pictures import processor, write
from models import pixels, tiny_vit
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.pipeline.saving import record_evaluation
from optimum_mixrank.reporting import CompressionReport


PIXELS = pixels(4)
CONFIG = MixRankConfig(recipe="fast", compression_ratio=0.3)


class Images(list):
    """Batches that tell whether they were read."""

    def __init__(self):
        super().__init__([PIXELS])
        self.read = False

    def __iter__(self):
        self.read = True
        return super().__iter__()


def compress(output, images=None, model=None, **options):
    return MixRankCompressor(model or tiny_vit()).compress(CONFIG, images or Images(), output, **options)


def opens(folder, model):
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(PIXELS).logits
        return torch.equal(logits, model.eval()(PIXELS).logits)


def test_overwriting_keeps_what_is_not_ours(tmp_path):
    compress(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cat.jpg").write_text("mine")
    assert opens(tmp_path, compress(tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "images" / "cat.jpg").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_shards_of_the_old_checkpoint_are_removed(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(CONFIG, [PIXELS])
    compressor.save_pretrained(model, tmp_path / "out", max_shard_size="20KB")
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    compressor.save_pretrained(model, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "thesis.tex").exists() and opens(tmp_path / "out", model)


@pytest.mark.parametrize("output", ["models/original", "models", "pictures", "pictures/0", "."])
def test_output_over_what_is_read_is_refused_before_work(tmp_path, monkeypatch, output):
    tiny_vit().save_pretrained(tmp_path / "models" / "original")
    (tmp_path / "pictures" / "0").mkdir(parents=True)
    write(tmp_path / "pictures" / "0", 2)
    before = sorted(path for path in tmp_path.rglob("*"))
    compressor = MixRankCompressor.from_pretrained(tmp_path / "models" / "original", image_processor=processor())
    monkeypatch.setattr("optimum_mixrank.pipeline.compressor.compress", lambda run: pytest.fail("work has started"))
    with pytest.raises(
        ValueError, match=r"(is the same folder as|holds|is inside) the (model|images) .*choose another"
    ):
        compressor.compress(CONFIG, tmp_path / "pictures", tmp_path / output, overwrite=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["empty", "full", "missing"])
def test_a_link_is_followed(tmp_path, target):
    if target != "missing":
        (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    model = compress(tmp_path / "link")
    if target == "full":
        model = compress(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and opens(tmp_path / "target", model)
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


@pytest.mark.parametrize("output", [".", "~/out", "a" * 250])
def test_places_that_look_odd_work(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    compress(output)
    model = compress(output, overwrite=True)
    assert opens(Path(output).expanduser().absolute(), model)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("output", ["/", "file", "file/out", "/proc/nothing/out", "a" * 256])
def test_places_that_cannot_be_written_are_refused_before_work(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    images = Images()
    with pytest.raises((OSError, ValueError), match=r"save_directory=.*(choose another|name a folder)"):
        compress(output, images, overwrite=True)
    assert not images.read and os.listdir(tmp_path) == ["file"]


def test_a_folder_whose_parent_cannot_be_written_is_written_into(tmp_path, monkeypatch):
    """As root may write everywhere, the attempt beside the folder is made to fail."""
    (tmp_path / "out").mkdir()
    mkdir = os.mkdir

    def refused(path, *args, **kwargs):
        if Path(path).parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refused)
    compress(tmp_path / "out")
    assert opens(tmp_path / "out", compress(tmp_path / "out", overwrite=True))
    images = Images()
    with pytest.raises(OSError, match="cannot be written .Permission denied.; choose another"):
        compress(tmp_path / "other", images)
    assert not images.read


class Meanwhile(list):
    """Batches; while they are read, another process writes a file."""

    def __init__(self, path):
        super().__init__([PIXELS])
        self.path = path

    def __iter__(self):
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("mine")
        return super().__iter__()


def test_a_file_written_meanwhile_stays_and_so_does_the_work(tmp_path):
    with pytest.raises(FileExistsError, match="in the meantime.*is in '.*out.new'"):
        compress(tmp_path / "out", Meanwhile(tmp_path / "out" / "notes.txt"))
    assert os.listdir(tmp_path / "out") == ["notes.txt"]
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out.new") is not None


@pytest.mark.parametrize(("mask", "modes"), [(0o077, {0o700, 0o600}), (0o002, {0o775, 0o664})])
def test_the_umask_is_respected(tmp_path, mask, modes):
    before = os.umask(mask)
    try:
        compress(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").iterdir())} == modes


@pytest.mark.parametrize("name", ["statistics.safetensors", "lock", "run.safetensors", "step0-mine.safetensors"])
def test_files_of_the_users_in_the_folder_for_the_progress_stay(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text("mine")
    images = Images()
    with pytest.raises((FileExistsError, ValueError), match=r"holds other files|is damaged"):
        compress(tmp_path / "out", images, resume_directory=run)
    assert (run / name).read_text() == "mine" and not images.read


@pytest.mark.parametrize(
    ("new", "is_added"),
    [
        ({"num_images": 8, "agreement": 1.0, "kl": 0.01}, False),
        ({"num_images": 9000, "agreement": 1.0, "kl": 0.01}, False),
        ({"num_images": 8, "top1": 0.8, "reference_top1": 0.8, "agreement": 1.0}, False),
        ({"num_images": 2000, "top1": 0.8, "reference_top1": 0.8, "agreement": 1.0}, True),
    ],
    ids=["fewer_unlabelled", "unlabelled", "fewer", "as_many"],
)
def test_an_evaluation_that_says_less_replaces_none(tmp_path, caplog, new, is_added):
    compress(tmp_path)
    original = CompressionReport.load(tmp_path).model_name
    much = {"num_images": 2000, "top1": 0.9, "reference_top1": 0.9, "agreement": 0.99, "kl": 0.01}
    assert record_evaluation(tmp_path, {"num_images": 8, "agreement": 1.0}, original)
    assert record_evaluation(tmp_path, much, original)
    assert record_evaluation(tmp_path, new, original) == is_added
    assert CompressionReport.load(tmp_path).evaluation == (new if is_added else much)
    assert ("| top-1 accuracy | 90.00" in (tmp_path / "README.md").read_text()) != is_added
    assert ("keeps the evaluation on 2,000 images" in caplog.text) != is_added


def test_no_path_of_this_machine_is_saved(tmp_path):
    write(tmp_path / "my-secret-pictures", 2)
    compressor = MixRankCompressor(tiny_vit(), processor())
    config = MixRankConfig(recipe="fast", compression_ratio=0.3, dataset=str(tmp_path / "my-secret-pictures"))
    compressor.compress(config, save_directory=tmp_path / "out")
    shown = [path.name for path in (tmp_path / "out").iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert shown == []
    assert "dataset" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config.dataset == str(tmp_path / "my-secret-pictures")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00009.safetensors"])
def test_a_folder_of_the_users_with_a_name_of_ours_stays(tmp_path, name):
    compress(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    assert opens(tmp_path, compress(tmp_path, overwrite=True))
    assert (tmp_path / name / "thesis.tex").exists()
