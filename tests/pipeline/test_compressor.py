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
from transformers import (
    AutoModelForImageClassification,
    ViTForImageClassification,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    pipeline,
)

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


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("change", ["dead channel", "constant inputs", "tiny", "zero", "merged", "small gradients"])
def test_layers_without_full_rank_are_compressed_by_the_default_recipe(change, layout):
    model = tiny_vit()
    first = next(module for module in model.modules() if getattr(module, "out_features", 0) == 64)
    norm = next(module for name, module in model.named_modules() if name.endswith("layernorm_after"))
    with torch.no_grad():
        if change == "dead channel":
            first.weight[:, 3] = 0
        elif change == "constant inputs":
            norm.weight.zero_()
        elif change in ("tiny", "zero"):
            first.weight.mul_(1e-40 if change == "tiny" else 0)
        elif change == "small gradients":
            model.vit.layernorm.weight.mul_(1e-30)
    if change == "merged":
        model = MixRankCompressor(model).compress(config(recipe="fast"), [PIXELS]).dequantize()
    compressed = MixRankCompressor(model).compress(config(layout=layout), [PIXELS])
    with torch.no_grad():
        assert compressed(PIXELS).logits.isfinite().all()


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


WRONG = {
    "ratio for config": (lambda each: each.compress(0.5, [PIXELS]), "config is a float, not a MixRankConfig"),
    "dict for config": (
        lambda each: each.compress({}, [PIXELS]),
        r"config is a dict; give MixRankConfig\(\*\*config\)",
    ),
    "swapped": (lambda each: each.compress([PIXELS], config()), "config is a list, not a MixRankConfig"),
    "swapped folder": (
        lambda each: each.compress(config(), "out", [PIXELS]),
        "save_directory is a list, not the path",
    ),
    "path of statistics": (
        lambda each: each.compress(config(), [PIXELS], calibration="file"),
        "calibration is a str, not a Calibration; .*Calibration.load",
    ),
    "save_interval": (lambda each: each.compress(config(), save_interval="1"), "save_interval='1' is not a positive"),
    "batch_size": (lambda each: each.compress(config(), [PIXELS], batch_size="8"), "batch_size='8' is not a positive"),
    "max_memory": (lambda each: each.compress(config(), [PIXELS], max_memory=[1]), r"max_memory=\[1\] is not a size"),
    "swapped in calibrate": (lambda each: each.calibrate("kfac", [PIXELS]), "metric is a list, not the name of a"),
    "patterns": (lambda each: each.calibrate([PIXELS], target_modules=3), "target_modules=3 is neither None, a reg"),
    "fisher_samples": (lambda each: each.calibrate([PIXELS], fisher_samples=0), "fisher_samples=0 is not an integer"),
    "seed": (lambda each: each.calibrate([PIXELS], seed=2**64), "seed=18446744073709551616 is too large"),
    "no layer": (lambda each: each.compress(config(compression_ratio=1e-12), [PIXELS]), "1e-12 .* stay dense; raise"),
    "evaluate": (lambda each: each.evaluate("out", [PIXELS]), "model is a str, not a model"),
    "save_pretrained": (lambda each: each.save_pretrained("out", each.model), "save_directory is a ViTFor"),
    "push_to_hub": (lambda each: each.push_to_hub("user/name", each.model), "model is a str, not a model"),
    "profile": (lambda each: each.profile(config(), None), "calibration is a MixRankConfig, not a Calibration"),
    "memory_plan": (lambda each: each.memory_plan({}), "config is a dict; give MixRankConfig"),
    "quantize": (lambda each: each.quantize("out", config()), "file_prefix is a MixRankConfig; give it as quantiz"),
}


@pytest.mark.parametrize("case", WRONG)
def test_swapped_and_mistyped_arguments_are_named(case):
    call, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(MixRankCompressor(tiny_vit()))


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ratio",
            r"`compress` has no argument `ratio`; it belongs to the configuration: MixRankConfig\(compression_ratio=…\)",
        ),
        ("metric", r"it belongs to the configuration: MixRankConfig\(metric=…\)"),
        ("output", "did you mean `save_directory`?"),
        ("dataset", "did you mean `calibration_dataset`?"),
        ("size", "did you mean `batch_size`?"),
        ("overwritten", "did you mean `overwrite`?"),
        ("xyzzy", "`compress` has no argument `xyzzy`."),
    ],
)
def test_arguments_of_other_names_are_recognised(name, message):
    with pytest.raises(TypeError, match=message):
        MixRankCompressor(tiny_vit()).compress(**{name: "value"})


def labelled(count=6):
    return [{"pixel_values": PIXELS[:count], "labels": torch.arange(count) % 5}]


def test_a_report_belongs_to_its_model(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    models = {
        ratio: compressor.compress(config(compression_ratio=ratio, recipe="fast"), [PIXELS]) for ratio in (0.3, 0.5)
    }
    last = compressor.report
    result = compressor.evaluate(models[0.3], labelled())
    assert compressor.report is last and last.evaluation is None
    for ratio, model in models.items():
        compressor.save_pretrained(model, tmp_path / str(ratio))
        saved = CompressionReport.load(tmp_path / str(ratio))
        assert saved.settings["compression_ratio"] == ratio
        assert (saved.evaluation is not None) == (ratio == 0.3)
    assert CompressionReport.load(tmp_path / "0.3").evaluation["kl"] == result.kl
    assert compressor.report.bytes_on_disk_after == CompressionReport.load(tmp_path / "0.5").bytes_on_disk_after
    # Also of a model that was loaded again, or copied, after the first one is gone.
    del models, model
    for again in (load(tmp_path / "0.5"), copy.deepcopy(load(tmp_path / "0.5")).bfloat16().float()):
        result = compressor.evaluate(again, labelled())
        assert compressor.report.evaluation["kl"] == result.kl
    compressor.evaluate(load(tmp_path / "0.3"), labelled(3))
    assert compressor.report.evaluation["kl"] == result.kl
    compressor.save_pretrained(load(tmp_path / "0.3"), tmp_path / "again")
    assert CompressionReport.load(tmp_path / "again").evaluation["num_images"] == 3


def load(folder):
    return ViTForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("has_report", [False, True])
def test_no_report_of_another_model_is_saved(has_report, tmp_path, caplog):
    settings = config(recipe="fast", allocation="uniform")
    foreign = MixRankCompressor(tiny_vit(layer_norm_eps=0.1)).compress(settings, [PIXELS])
    compressor = MixRankCompressor(tiny_vit())
    if has_report:
        compressor.compress(settings, [PIXELS])
    compressor.evaluate(foreign, labelled())
    compressor.save_pretrained(foreign, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*report*")) and not (tmp_path / "out" / "README.md").exists()
    assert "did not make the ViTForImageClassification" in caplog.text
    assert not has_report or compressor.report.evaluation is None


def test_saving_a_model_leaves_the_unfinished_run_of_another(tmp_path):
    compressor = MixRankCompressor(tiny_vit())
    settings = config(recipe="fast")
    models = [
        compressor.compress(settings, [PIXELS], resume_directory=tmp_path / f"run{number}") for number in range(2)
    ]
    compressor.save_pretrained(models[0], tmp_path / "out0")
    assert not (tmp_path / "run0").exists() and (tmp_path / "run1").exists()
    again = compressor.compress(settings, [PIXELS], resume_directory=tmp_path / "run1")
    for number, model in enumerate((again, models[1]), 1):
        compressor.save_pretrained(model, tmp_path / f"out{number}")
        assert not (tmp_path / "run1").exists()


def test_not_a_model_and_compressed_checkpoints_are_refused(tmp_path):
    with pytest.raises(TypeError, match="use `MixRankCompressor.from_pretrained"):
        MixRankCompressor("facebook/deit-base-patch16-224")
    MixRankCompressor(tiny_vit()).compress(config(), [PIXELS], tmp_path)
    with pytest.raises(ValueError, match="compressed or quantized already"):
        MixRankCompressor.from_pretrained(tmp_path)


@pytest.fixture
def hub(monkeypatch):
    """What a stand-in for the Hub was asked for; it puts the user's name before names without one, as the Hub does."""
    calls = {}

    class Hub:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def create_branch(self, repo_id, branch, exist_ok):
            calls["branch"] = repo_id, branch, exist_ok

        def upload_folder(self, repo_id, folder_path, **commit):
            calls["commit"] = commit
            calls["repo"], calls["files"] = repo_id, {path.name for path in Path(folder_path).iterdir()}
            calls["card"] = (Path(folder_path) / "README.md").read_text()
            return "url"

    monkeypatch.setattr("optimum_mixrank.pipeline.saving.HfApi", Hub)
    return calls


@pytest.fixture(scope="module")
def made():
    compressor = MixRankCompressor(tiny_vit())
    return compressor, compressor.compress(config(), [PIXELS])


def test_push_to_hub_uploads_the_checkpoint(hub, made):
    calls, (compressor, model) = hub, made
    assert compressor.push_to_hub(model, "me/small-vit", token="secret", revision="v2") == "url"
    assert calls["branch"] == ("me/small-vit", "v2", True)
    assert calls["repo"] == "me/small-vit" and calls["token"] == "secret"
    assert {"config.json", "model.safetensors", "mixrank_report.json", "report.html"} <= calls["files"]


def test_the_card_names_the_repository_even_if_a_folder_has_that_name(hub, made, tmp_path, monkeypatch):
    compressor, model = made
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small-vit").mkdir()
    compressor.push_to_hub(model, "small-vit")
    assert hub["repo"] == "me/small-vit"
    assert 'from_pretrained("me/small-vit")' in hub["card"]
    assert not list((tmp_path / "small-vit").iterdir())


def test_saving_can_upload_too(hub, made, tmp_path):
    compressor, model = made
    compressor.save_pretrained(model, tmp_path / "vit", push_to_hub=True, token="secret", private=True)
    assert (hub["repo"], hub["token"]) == ("me/vit", "secret")
    assert (tmp_path / "vit" / "model.safetensors").is_file() and "model.safetensors" in hub["files"]
    compressor.save_pretrained(model, tmp_path / "other", push_to_hub=True, repo_id="team/vit")
    assert hub["repo"] == "team/vit" and "ranks.png" not in hub["files"]
    options = {"create_pr": True, "commit_message": "Smaller", "tags": ["small"], "picture": True, "overwrite": True}
    compressor.save_pretrained(model, tmp_path / "other", push_to_hub=True, **options)
    assert hub["commit"] == {"create_pr": True, "commit_message": "Smaller"}
    assert "ranks.png" in hub["files"] and "- small" in hub["card"]


def test_a_folder_is_not_the_name_of_a_repository(made, tmp_path):
    compressor, model = made
    with pytest.raises(ValueError, match="'./out' cannot be the name of a repository on the Hub; give one such as"):
        compressor.push_to_hub(model, "./out")
    with pytest.raises(ValueError, match="cannot be the name of a repository"):
        compressor.save_pretrained(model, tmp_path / "two words", push_to_hub=True)
    assert not (tmp_path / "two words").exists()


def test_an_upload_without_a_token_names_the_remedy(made, monkeypatch):
    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, *_, **__):
            raise RuntimeError("401 Client Error")

    compressor, model = made
    monkeypatch.setattr("optimum_mixrank.pipeline.saving.HfApi", Hub)
    monkeypatch.setattr("optimum_mixrank.pipeline.saving.get_token", lambda: None)
    monkeypatch.setattr("optimum_mixrank.pipeline.saving.why_unreachable", lambda: "")
    with pytest.raises(OSError, match="'me/vit' cannot be uploaded without an access token; run `hf auth login`"):
        compressor.push_to_hub(model, "me/vit")
    with pytest.raises(RuntimeError, match="401"):
        compressor.push_to_hub(model, "me/vit", token="wrong")
    monkeypatch.setattr("optimum_mixrank.pipeline.saving.why_unreachable", lambda: "no network: no route")
    with pytest.raises(OSError, match=r"since the Hub cannot be reached \(no network: no route\)"):
        compressor.push_to_hub(model, "me/vit")


def test_quickstart_runs_as_the_readme_has_it(tmp_path):
    script, out = str(ROOT / "examples" / "quickstart.py"), str(tmp_path / "out")
    command = [sys.executable, script, "--output", out, "--num-samples", "64"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "KL" in result.stdout
    assert (tmp_path / "out" / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "top-1 accuracy" in (tmp_path / "out" / "report.html").read_text()


@pytest.fixture(scope="module")
def best(shipped):
    return kl(shipped, recipe="best")


def kl(shipped, **fields):
    """The KL that a compression of the shipped model has, at a fixed seed."""
    images = shipped.get_calibration_dataset(SHIPPED / "data", split="calibration", num_samples=192)
    settings = MixRankConfig(compression_ratio=0.6, compression_scope="targets", **fields)
    model = shipped.compress(settings, images, batch_size=64)
    return shipped.evaluate(model, SHIPPED / "data", split="test", num_samples=800, batch_size=64).kl


def test_the_default_beats_both_baselines_on_the_shipped_model(shipped, best):
    one_shot = {"allocation": "uniform", "layout": "factors", "compensation": []}
    second_moment, svd = (kl(shipped, metric=metric, **one_shot) for metric in ("second_moment", "svd"))
    assert best < second_moment < svd


@pytest.mark.slow
def test_the_default_beats_the_recipe_of_the_paper_on_the_shipped_model(shipped, best):
    assert best < kl(shipped, recipe="paper")


def weights(model):
    return list(model.state_dict().values())


@pytest.mark.parametrize(
    "surroundings",
    [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")],
    ids=["inference", "no grad", "meta"],
)
def test_surroundings_do_not_change_the_result(surroundings):
    model, steps = tiny_vit(), ["sequential", "distillation"]
    expected = MixRankCompressor(model).compress(config(compensation=steps, epochs=1), [PIXELS])
    compressor = MixRankCompressor(model)
    with surroundings():
        result = compressor.compress(config(compensation=steps, epochs=1), [PIXELS])
        assert compressor.evaluate(result, [PIXELS]).kl < 1
    assert all(torch.equal(*pair) for pair in zip(weights(expected), weights(result), strict=True))
    assert not any(each.is_inference() for each in result.parameters())


def test_images_and_weights_of_inference_mode():
    with torch.inference_mode():
        images, model = PIXELS.clone(), copy.deepcopy(tiny_vit())
    assert MixRankCompressor(tiny_vit()).compress(config(), [images])
    with pytest.raises(ValueError, match=r"were made inside `torch.inference_mode\(\)`, the first is"):
        MixRankCompressor(model).compress(config(), [PIXELS])


POSE = VitPoseConfig(
    backbone_config=VitPoseBackboneConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=[32, 32],
        patch_size=[8, 8],
        out_indices=[2],
    ),
    num_labels=3,
)


@pytest.mark.parametrize("names", [None, "heatmaps"])
def test_a_head_of_its_own_kind(names, tmp_path):
    compressor = MixRankCompressor(VitPoseForPoseEstimation(POSE).eval())
    settings = config(output_names=names, layout="factors")
    model = compressor.compress(settings, [PIXELS], save_directory=tmp_path / "out")
    assert 0 < compressor.evaluate(model, [PIXELS], output_names=names).feature_error < 1
    opened = VitPoseForPoseEstimation.from_pretrained(tmp_path / "out")
    assert opened.config.quantization_config.output_names == names


def test_an_output_that_the_model_lacks():
    compressor = MixRankCompressor(tiny_vit())
    with pytest.raises(ValueError, match="output_names='heatmaps': an ImageClassifierOutput holds no .*`logits`"):
        compressor.compress(config(output_names="heatmaps", recipe="fast"), [PIXELS])
    with pytest.raises(ValueError, match="output_names='heatmaps'"):
        compressor.evaluate(tiny_vit(), [PIXELS], output_names=["heatmaps"])


@pytest.mark.parametrize("steps", [["sequential", "distillation"], ["blocks"]], ids="-".join)
def test_images_of_another_size(steps):
    compressor, images = MixRankCompressor(tiny_vit()), [torch.randn(8, 3, 48, 48)]
    asked = {"interpolate_pos_encoding": True}
    model = compressor.compress(config(**asked, compensation=steps, epochs=1), images)
    assert compressor.evaluate(model, images, **asked).kl < 1
    assert compressor.calibrate(images, "kfac", **asked).layers
    with pytest.raises(ValueError, match="doesn't match model"):
        compressor.compress(config(), images)


def test_positions_that_cannot_be_interpolated():
    compressor = MixRankCompressor(VitPoseForPoseEstimation(POSE).eval())
    for run in (
        lambda: compressor.compress(config(interpolate_pos_encoding=True), [PIXELS]),
        lambda: compressor.evaluate(compressor.model, [PIXELS], interpolate_pos_encoding=True),
        lambda: compressor.calibrate([PIXELS], interpolate_pos_encoding=True),
    ):
        with pytest.raises(ValueError, match="VitPoseForPoseEstimation has no such argument"):
            run()


def test_tensors_of_more_values_than_float32_counts(tmp_path):
    model = tiny_vit()
    model.register_buffer("large", torch.zeros(19_200_032))
    compressor = MixRankCompressor(model)
    compressor.compress(config(metric="svd", compensation=[]), save_directory=tmp_path / "out")
    assert (tmp_path / "out" / "mixrank_report.json").exists()


def test_precision_of_the_caller_does_not_matter():
    expected = MixRankCompressor(tiny_vit()).compress(config(), [PIXELS]).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        found = MixRankCompressor(tiny_vit()).compress(config(), [PIXELS]).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
