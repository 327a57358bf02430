"""Models for images and text through all commands: only the vision part changes, and the whole is saved."""

import json

import numpy as np
import pytest
import torch
import transformers
from commands.calling import cli
from families.catalogue import FAMILIES
from PIL import Image

import optimum_mixrank
from optimum_mixrank.reporting import CompressionReport


PROCESSORS = {
    "CLIP": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "SigLIP": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}}),
    "LLaVA": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "SmolVLM": ("SmolVLMImageProcessor", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}),
    "Qwen2-VL": ("Qwen2VLImageProcessor", {"patch_size": 8, "min_pixels": 256, "max_pixels": 1024}),
    "TrOCR": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
}
OFTEN = ("CLIP", "LLaVA", "Qwen2-VL")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def write(name, folder):
    """Write a model with its image processor; return its class."""
    model = FAMILIES[name].make()
    model.save_pretrained(folder)
    processor, settings = PROCESSORS[name]
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return type(model)


def settings(images, output, **options):
    given = {"dataset": images, "num-samples": 12, "batch-size": 4, "recipe": "fast", "scope": "targets", **options}
    return [
        *(each for name, value in given.items() for each in (f"--{name}", value)),
        "--output",
        output,
        "--ratio",
        0.3,
    ]


def states(cls, *folders):
    return [cls.from_pretrained(folder).state_dict() for folder in folders]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in PROCESSORS])
def test_only_the_vision_part_changes(name, images, tmp_path):
    source, out, dense = (tmp_path / each for each in ("model", "out", "dense"))
    cls = write(name, source)
    text, _ = cli("compress", "--model", source, *settings(images, out))
    report = CompressionReport.load(out)
    assert report.reach["left_out"]["decoders" if name == "TrOCR" else "language and text layers"] > 0
    assert 0 < report.targeted_of_model < report.targeted_of_images < 1
    assert f"{report.targeted_of_images:.1%} of the part that images reach" in text

    cli("merge", "--model", out, "--output", dense)
    before, after, merged = states(cls, source, out, dense)
    targets = {each.name for each in optimum_mixrank.find_targets(cls.from_pretrained(source), call=_call(name))}
    outside = [key for key in before if not any(key.startswith(f"{target}.") for target in targets)]
    assert len(outside) > len(before) / 3
    for key in outside:
        assert torch.equal(before[key], after[key]) and torch.equal(before[key], merged[key]), key
    changed = [key for key in before if key not in after or not torch.equal(before[key], after[key])]
    assert changed and merged.keys() == before.keys()

    assert "left out" in cli("inspect", "--model", out)[0].lower()
    evaluated = json.loads(
        cli("evaluate", "--model", out, "--reference", source, "--dataset", images, "--batch-size", 4, "--json")[0]
    )
    kind = "embeddings" if name in ("CLIP", "SigLIP") else "features"
    assert evaluated["kind"] == kind and evaluated["feature_error"] == pytest.approx(
        report.fidelity["feature_error"], rel=1e-3
    )
    assert ("retrieval_agreement" in evaluated) == (kind == "embeddings") == ("cosine_similarity" in evaluated)


def _call(name):
    from optimum_mixrank.runtime.inputs import ModelInputs
    from optimum_mixrank.runtime.outputs import ModelCall

    family = FAMILIES[name]
    return ModelCall().bound(family.make(), ModelInputs(family.batches(1, 2)[0]))


def test_target_modules_reaches_the_rest(images, tmp_path):
    source, out = tmp_path / "model", tmp_path / "out"
    cls = write("CLIP", source)
    only = {"metric": "svd", "compensation": "none", "structures": "rank", "allocation": "uniform"}
    pattern = r".*text_model\.encoder\.layers\.\d\.mlp\.fc1"
    cli("compress", "--model", source, *settings(images, out, **only), "--target-modules", pattern)
    before, after = states(cls, source, out)
    changed = [key for key in before if key not in after or not torch.equal(before[key], after[key])]
    assert {key.rpartition(".")[0] for key in changed} == {f"text_model.encoder.layers.{i}.mlp.fc1" for i in range(2)}
    assert CompressionReport.load(out).targeted_of_images is None


def test_plan_of_a_whole_model(images, tmp_path):
    write("CLIP", tmp_path / "model")
    options = ["--dataset", images, "--num-samples", 8, "--recipe", "fast", "--scope", "targets", "--ratios", 0.3]
    values = json.loads(cli("plan", "--model", tmp_path / "model", *options, "--json")[0])
    assert values
