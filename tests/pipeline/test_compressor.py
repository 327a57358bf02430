"""The public way, on the model that ships with the repository and on tiny ones."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibration.pictures import processor, write
from datasets import load_dataset
from models import tiny_swin, tiny_vit
from optimum.quantization_base import OptimumQuantizer
from transformers import AutoModelForImageClassification, ViTForImageClassification, pipeline

from optimum_mixrank import LowRankLinear, MixRankCompressor, MixRankConfig
from optimum_mixrank.reporting import CompressionReport


ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "examples" / "fashion_mnist"
PIXELS = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def config(**changes):
    return MixRankConfig(**{"compression_ratio": 0.4, "compression_scope": "targets", **changes})


@pytest.fixture(scope="module")
def shipped():
    return MixRankCompressor.from_pretrained(str(SHIPPED / "model"))


@pytest.fixture(scope="module")
def calibration(shipped):
    images = shipped.get_calibration_dataset(SHIPPED / "data", split="calibration", num_samples=256)
    return shipped.calibrate(images, ["svd", "diagonal", "mean_input", "second_moment"])


def test_is_optimums_compression_interface():
    assert issubclass(MixRankCompressor, OptimumQuantizer)


def test_second_moment_beats_svd_and_the_default_loses_little(shipped, calibration):
    results = {}
    for metric in ("svd", "second_moment"):
        model = shipped.compress(
            MixRankConfig(recipe="fast", compression_ratio=0.6, metric=metric), calibration=calibration
        )
        results[metric] = shipped.evaluate(model, SHIPPED / "data", split="test", num_samples=1000)
    assert results["second_moment"].kl < results["svd"].kl
    assert results["second_moment"].reference_top1 - results["second_moment"].top1 < 0.03
    assert results["second_moment"].kl < 0.06


def test_labels_of_the_shipped_data_are_those_of_the_model(shipped):
    data = load_dataset(str(SHIPPED / "data"))
    assert len(data["calibration"]) == 1000 and len(data["test"]) == 2000
    assert data["test"].features["label"].names == [shipped.model.config.id2label[i] for i in range(10)]


@pytest.mark.parametrize("scope", ["model", "targets"])
@pytest.mark.parametrize("allocation", ["uniform", "greedy", "global"])
def test_the_ratio_is_reached_and_not_overshot(shipped, calibration, scope, allocation):
    settings = MixRankConfig(recipe="fast", compression_ratio=0.5, compression_scope=scope, allocation=allocation)
    shipped.compress(settings, calibration=calibration)
    report = shipped.report
    removed = report.removed_of_model if scope == "model" else report.removed_of_targets
    step = 480 / (report.model_parameters_before if scope == "model" else 36 * 18432)
    assert 0.5 <= removed < 0.5 + step


def test_compress_saves_a_checkpoint_for_plain_transformers(shipped, calibration, tmp_path):
    model = shipped.compress(
        MixRankConfig(recipe="fast", compression_ratio=0.5), calibration=calibration, save_directory=tmp_path
    )
    image = load_dataset(str(SHIPPED / "data"), split="test")[0]["image"]
    classifier = pipeline("image-classification", model=str(tmp_path))
    pixels = shipped.image_processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.softmax(-1)[0]
    assert classifier(image)[0]["label"] == model.config.id2label[int(expected.argmax())]
    assert classifier(image)[0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)
    report = CompressionReport.load(tmp_path)
    assert report.model_parameters_after == sum(p.numel() for p in model.parameters())
    assert report.bytes_on_disk_after == (tmp_path / "model.safetensors").stat().st_size
    assert report.to_dict() == shipped.report.to_dict()
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_copy_is_compressed_unless_inplace():
    original = tiny_vit()
    before = copy.deepcopy(original.state_dict())
    compressor = MixRankCompressor(original)
    compressed = compressor.compress(config(), [PIXELS])
    assert compressed is not original and isinstance(compressed, ViTForImageClassification)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())
    assert compressor.compress(config(), [PIXELS], inplace=True) is original
    with pytest.raises(ValueError, match="compressed already"):
        compressor.compress(config(), [PIXELS])


def test_no_hook_and_no_mode_stays_behind():
    original = tiny_vit().train()
    compressed = MixRankCompressor(original).compress(config(), [PIXELS])
    for model in (original, compressed):
        assert model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_same_seed_same_checkpoint(tmp_path):
    for name in ("first", "second"):
        MixRankCompressor(tiny_vit()).compress(config(), [PIXELS], tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_workers_change_nothing_but_the_time(tmp_path):
    paths = sorted(write(tmp_path, 13, broken=[5]).iterdir())
    found = []
    for num_workers in (0, 2):
        compressor = MixRankCompressor(tiny_vit(), processor())
        loading = {"batch_size": 3, "num_workers": num_workers}
        model = compressor.compress(config(), paths, max_broken_share=0.1, **loading)
        calibration = compressor.calibrate(paths, "kfac", max_broken_share=0.1, **loading)
        found.append((model.state_dict(), calibration, compressor.evaluate(model, paths[:5], **loading)))
    (state, calibration, result), (other_state, other_calibration, other_result) = found
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())
    assert calibration.data_fingerprint == other_calibration.data_fingerprint
    for name, statistics in calibration.layers.items():
        for what, value in vars(statistics).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(other_calibration.layers[name], what))
    assert result == other_result


def test_quantize_is_optimums_name_for_it(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    compressor.quantize(tmp_path, quantization_config=config(), calibration_dataset=[PIXELS])
    assert AutoModelForImageClassification.from_pretrained(tmp_path).config.quantization_config.rank_map
    with pytest.raises(ValueError, match="file_prefix='x' is not supported"):
        compressor.quantize(tmp_path, "x")


def test_patterns_decide_single_layers():
    settings = config(
        rank_pattern={"query": 4},
        ratio_pattern={"output.dense": 0},
        exclude_modules=["key"],
        rank_multiple=2,
        compression_ratio=0.2,
    )
    model = MixRankCompressor(tiny_vit()).compress(settings, [PIXELS])
    entries = model.config.quantization_config.factored_layers
    assert {entry.rank for name, entry in entries.items() if name.endswith("query")} == {4}
    assert not any(name.endswith(("key", "output.dense")) for name in entries)
    assert all(entry.rank % 2 == 0 for entry in entries.values())


def test_bare_models_are_compressed_and_compared_by_features():
    compressor = MixRankCompressor(tiny_swin().swin)
    model = compressor.compress(config(), [PIXELS])
    result = compressor.evaluate(model, [PIXELS])
    assert result.kl is None and 0 < result.feature_error < 1


def test_dtypes(tmp_path):
    tiny_vit().half().save_pretrained(tmp_path)
    assert MixRankCompressor.from_pretrained(tmp_path).model.dtype == torch.float32
    compressor = MixRankCompressor.from_pretrained(tmp_path, dtype="auto")
    assert compressor.compress(config(), [PIXELS]).dtype == torch.float16
    with pytest.raises(ValueError, match="dtype='int8' is not a floating-point dtype"):
        MixRankCompressor.from_pretrained(tmp_path, dtype="int8")


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({"compression_ratio": 0.99}, [PIXELS], "The largest ratio that can be reached is"),
        ({"target_modules": ["qery"]}, [PIXELS], "target_modules has 'qery', which matches no linear layer"),
        ({"rank_pattern": {"query": 1000}}, [PIXELS], "whose largest rank is 32"),
        ({}, None, "needs calibration images"),
        ({}, [], "no image"),
        ({}, [{"pixels": PIXELS}], "A batch has no `pixel_values`"),
        ({}, [PIXELS[:, :1]], "the model needs"),
        ({}, [(PIXELS * 255).byte()], "give floating point values"),
        ({}, [PIXELS / 0], "contain NaN or Inf"),
        ({}, ["no-such-file.png"], "need the model's image processor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_gets_a_clear_error_and_changes_nothing(settings, data, message):
    model = tiny_vit()
    with pytest.raises(ValueError, match=message):
        MixRankCompressor(model).compress(config(**settings), data, inplace=True)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_damaged_weights_are_named():
    model = tiny_vit()
    with torch.no_grad():
        model.vit.get_submodule("encoder.layer.1" if hasattr(model.vit, "encoder") else "layers.1").apply(
            lambda module: module.weight.fill_(float("nan")) if isinstance(module, torch.nn.Linear) else None
        )
    with pytest.raises(ValueError, match=r"The weight of layer 'vit\..*1\..*' holds NaN or Inf"):
        MixRankCompressor(model).compress(config(), [PIXELS])


def test_what_is_saved_already_is_not_lost(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    compressor = MixRankCompressor(tiny_vit())
    with pytest.raises(FileExistsError, match="is not empty"):
        compressor.compress(config(), [PIXELS], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    target = tmp_path / "out"
    model = compressor.compress(config(), [PIXELS], target)
    before = (target / "model.safetensors").read_bytes()
    model.save_pretrained = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        compressor.save_pretrained(model, target, overwrite=True)
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "out"]


def test_not_a_model_and_compressed_checkpoints_are_refused(tmp_path):
    with pytest.raises(TypeError, match="use `MixRankCompressor.from_pretrained"):
        MixRankCompressor("facebook/deit-base-patch16-224")
    MixRankCompressor(tiny_vit()).compress(config(), [PIXELS], tmp_path)
    with pytest.raises(ValueError, match="compressed or quantized already"):
        MixRankCompressor.from_pretrained(tmp_path)


def test_push_to_hub_uploads_the_checkpoint(monkeypatch):
    calls = {}

    class Hub:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id, branch, exist_ok):
            calls["branch"] = repo_id, branch, exist_ok

        def upload_folder(self, repo_id, folder_path, revision, commit_message):
            calls["repo"], calls["files"] = repo_id, {path.name for path in Path(folder_path).iterdir()}
            return "url"

    monkeypatch.setattr("optimum_mixrank.pipeline.saving.HfApi", Hub)
    compressor = MixRankCompressor(tiny_vit())
    model = compressor.compress(config(), [PIXELS])
    assert compressor.push_to_hub(model, "me/small-vit", token="secret", revision="v2") == "url"
    assert calls["branch"] == ("me/small-vit", "v2", True)
    assert calls["repo"] == "me/small-vit" and calls["token"] == "secret"
    assert {"config.json", "model.safetensors", "mixrank_report.json", "report.html"} <= calls["files"]


def test_quickstart_runs_as_the_readme_has_it(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=None)
    assert result.returncode == 0, result.stderr
    assert "KL" in result.stdout
    assert (tmp_path / "out" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "top-1 accuracy" in (tmp_path / "out" / "report.html").read_text()


def test_recipes_rank_as_promised_on_the_shipped_model(shipped):
    """KL(best) < KL(paper) and KL(best) < KL(second moment) < KL(SVD), at a fixed seed."""
    dataset = load_dataset(str(SHIPPED / "data"), split="calibration").select(range(256))
    images = [
        shipped.image_processor(images=[row["image"].convert("RGB") for row in part], return_tensors="pt")[
            "pixel_values"
        ]
        for part in (dataset.select(range(i, i + 64)) for i in range(0, 256, 64))
    ]
    one_shot = {"allocation": "uniform", "layout": "factors", "compensation": []}
    settings = {
        "best": {"recipe": "best"},
        "paper": {"recipe": "paper"},
        "second moment": {"metric": "second_moment", **one_shot},
        "svd": {"metric": "svd", **one_shot},
    }
    kl = {}
    for name, fields in settings.items():
        model = shipped.compress(MixRankConfig(compression_ratio=0.6, compression_scope="targets", **fields), images)
        kl[name] = shipped.evaluate(model, load_dataset(str(SHIPPED / "data"), split="test"), batch_size=64).kl
    assert kl["best"] < kl["paper"]
    assert kl["best"] < kl["second moment"] < kl["svd"]
