"""A new checkpoint in the place of an old one: what belongs to neither stays, and old or new opens at any moment."""

import json
import os
from pathlib import Path

import pytest
from models import compressed, pixels, tiny_vit
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from optimum_mixrank.checkpoint.saving import ORIGINAL, save_checkpoint, writable_directory


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(scope="module")
def old():
    return compressed(tiny_vit(), "factors")


@pytest.fixture(scope="module")
def new():
    return compressed(tiny_vit(), "factors", compression_ratio=0.4)


def opens_as(folder, model):
    images = pixels(1)
    found, expected = (
        each.eval()(images).logits for each in (ViTForImageClassification.from_pretrained(folder), model)
    )
    return found.allclose(expected, rtol=1e-3, atol=1e-4)


def test_what_is_not_ours_stays(old, new, tmp_path):
    out = tmp_path / "out"
    save_checkpoint(old, out, None, max_shard_size="50KB")
    (out / "thesis.tex").write_text("mine")
    (out / "images").mkdir()
    (out / "images" / "a.png").write_bytes(b"mine")
    save_checkpoint(new, out, None, overwrite=True)
    assert {each.name for each in out.iterdir()} == {"config.json", "model.safetensors", "thesis.tex", "images"}
    assert (out / "images" / "a.png").read_bytes() == b"mine" and opens_as(out, new)
    assert os.listdir(tmp_path) == ["out"]


def test_through_a_link(old, new, tmp_path):
    link, real = tmp_path / "out", tmp_path / "real"
    link.symlink_to(real)
    for model in (old, new):
        save_checkpoint(model, link, None, overwrite=model is new)
        assert link.is_symlink() and opens_as(real, model)
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


def test_old_or_new_opens_at_any_moment(old, new, tmp_path, monkeypatch):
    replace, number, cut = Path.replace, 0, True
    while cut:
        number, cut, out = number + 1, False, tmp_path / f"{number}"
        save_checkpoint(old, out, None)
        (out / "notes.txt").write_text("so that files are moved one by one")
        left = [number]

        def watched(self, target, left=left):
            left[0] -= 1
            if not left[0]:
                raise Killed
            return replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", watched)
            try:
                save_checkpoint(new, out, None, overwrite=True)
            except Killed:
                cut = True
        assert opens_as(out, new) or opens_as(out, old)
        save_checkpoint(new, out, None, overwrite=True)
        assert {each.name for each in out.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
        assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    assert number > 3


def test_what_was_written_in_the_meantime_stays(new, tmp_path):
    out = tmp_path / "out"

    def write(_folder):
        out.mkdir()
        (out / "mine").write_text("mine")

    with pytest.raises(FileExistsError, match=r"written in the meantime.*out\.new"):
        save_checkpoint(new, out, None, announce=write, checked=True)
    assert [each.name for each in out.iterdir()] == ["mine"]
    (rest,) = list(tmp_path.rglob("out.new")) or list(out.rglob("*.new"))
    assert load_file(rest / "model.safetensors")


def test_the_umask_holds(new, tmp_path):
    before = os.umask(0o077)
    try:
        save_checkpoint(new, tmp_path / "out", None)
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "out").iterdir()} == {0o600}


def test_places_that_are_refused_before_work(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / "vit"):
        with pytest.raises(ValueError, match="the model"):
            writable_directory(place, True, sources={ORIGINAL: [tmp_path / "vit"]})
    with pytest.raises(OSError, match="cannot be written"):
        writable_directory(tmp_path / ("a" * 300), False)
