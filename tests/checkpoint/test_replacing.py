"""A new checkpoint in the place of an old one: all else stays, and old or new opens at every moment."""

import itertools
import json
import os
import shutil

import pytest
import torch
from models import pixels, tiny_vit
from transformers import AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.checkpoint import replacing
from optimum_mixrank.checkpoint.replacing import replace_checkpoint
from optimum_mixrank.runtime import folders


PIXELS = pixels(4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints, each in one file and in shards, with the logits of each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    logits = {}
    for name, ratio in (("old", 0.2), ("new", 0.5)):
        compressor = MixRankCompressor(tiny_vit())
        model = compressor.compress(MixRankConfig(recipe="fast", compression_ratio=ratio), [PIXELS])
        compressor.save_pretrained(model, folder / f"{name}-whole")
        compressor.save_pretrained(model, folder / f"{name}-shards", max_shard_size="20KB")
        with torch.no_grad():
            logits[name] = model(PIXELS).logits
    return folder, logits


def opened(folder):
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(folder).eval()(PIXELS).logits


class Killed(BaseException):
    """SIGKILL, as far as Python can tell it."""


@pytest.mark.parametrize("before", ["old-whole", "old-shards"])
@pytest.mark.parametrize("after", ["new-whole", "new-shards"])
def test_old_or_new_opens_whenever_a_process_is_killed(checkpoints, tmp_path, monkeypatch, before, after):
    folder, logits = checkpoints
    steps = 0
    for kill_at in itertools.count():
        destination = tmp_path / f"{kill_at}"
        shutil.copytree(folder / before, destination)
        (destination / "thesis.tex").write_text("mine")
        shutil.copytree(folder / after, destination / ".saving-0123abcd")
        steps = 0

        def counted(function, kill_at=kill_at):
            def wrapped(*args, **kwargs):
                nonlocal steps
                if steps == kill_at:
                    raise Killed
                steps += 1
                return function(*args, **kwargs)

            return wrapped

        finished = True
        with monkeypatch.context() as patched:
            for name in ("replace", "link", "unlink", "rename"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                replace_checkpoint(destination / ".saving-0123abcd", destination, overwrite=True)
            except Killed:
                finished = False
        found = opened(destination)
        assert torch.equal(found, logits["old"]) or torch.equal(found, logits["new"]), kill_at
        assert (destination / "thesis.tex").read_text() == "mine"
        if finished:
            break
    assert kill_at > 5 and torch.equal(found, logits["new"])
    kept = {each for each in os.listdir(destination) if not folders.is_leftover(each)}
    assert kept == {*os.listdir(folder / after), "thesis.tex"}


def test_a_run_after_one_that_was_killed_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    folder, logits = checkpoints
    destination = tmp_path / "out"
    shutil.copytree(folder / "old-whole", destination)
    (destination / "thesis.tex").write_text("mine")
    shutil.copytree(folder / "new-whole", destination / ".saving-0123abcd")

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(replacing, "_link", killed)
        with pytest.raises(Killed):
            replace_checkpoint(destination / ".saving-0123abcd", destination, overwrite=True)
    # Its weights are still in the temporary folder, which therefore is no leftover.
    assert replacing.weights_in_use(destination) == ".saving-0123abcd"
    assert torch.equal(opened(destination), logits["new"])
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(MixRankConfig(recipe="fast", compression_ratio=0.3), [PIXELS])
    compressor.save_pretrained(model, destination, overwrite=True)
    assert set(os.listdir(destination)) == {*os.listdir(folder / "new-whole"), "thesis.tex"}
    assert "transformers_weights" not in json.loads((destination / "config.json").read_text())


def test_nothing_new_is_lost_where_a_file_cannot_be_moved(checkpoints, tmp_path, monkeypatch):
    folder, logits = checkpoints
    destination, source = tmp_path / "out", tmp_path / "new"
    shutil.copytree(folder / "old-whole", destination)
    (destination / "thesis.tex").write_text("mine")
    shutil.copytree(folder / "new-whole", source)

    def in_use(*args):
        raise PermissionError("the file is in use")

    monkeypatch.setattr(replacing, "_use_weights", in_use)
    with pytest.raises(
        PermissionError, match=r"could not be put into .*the file is in use.*What is not there yet is in '(.*)'"
    ):
        replace_checkpoint(source, destination, overwrite=True)
    assert torch.equal(opened(destination), logits["old"])
    assert torch.equal(opened(tmp_path / "out.new"), logits["new"])


def test_only_a_checkpoint_of_ours_has_report_and_card(tmp_path, checkpoints):
    folder, _ = checkpoints
    assert replacing.checkpoint_files(folder / "old-whole") == set(os.listdir(folder / "old-whole"))
    tiny_vit().save_pretrained(tmp_path)
    for name in ("README.md", "report.html", "model-notes.safetensors"):
        (tmp_path / name).write_text("mine")
    assert replacing.checkpoint_files(tmp_path) == {"config.json", "model.safetensors"}


def test_shards_without_their_index_are_removed(checkpoints, tmp_path):
    folder, _ = checkpoints
    shutil.copytree(folder / "new-whole", tmp_path / "out")
    for each in (folder / "old-shards").glob("model-*.safetensors"):
        shutil.copy(each, tmp_path / "out")
    shutil.copytree(folder / "new-whole", tmp_path / "new")
    replace_checkpoint(tmp_path / "new", tmp_path / "out", overwrite=True)
    assert set(os.listdir(tmp_path / "out")) == set(os.listdir(folder / "new-whole"))
