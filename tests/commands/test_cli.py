"""`optimum-cli mixrank`, called as users call it."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoint.mixed import mixed_model
from commands.calling import cli, process
from PIL import Image
from safetensors.torch import load_file, save_file
from shipped import DATA, MODEL, ROOT
from transformers import AutoImageProcessor, AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.commands.command import checked_device
from optimum_mixrank.commands.fields import FIELDS, configuration
from optimum_mixrank.reporting.table import evaluation_lines


GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def compressed(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    stdout, stderr = process(
        *("compress", "--model", MODEL, "--dataset", few, "--split", "calibration", "--num-samples", 128),
        *("--ratio", 0.5, "--recipe", "fast", "--output", out, "--json"),
        *("--evaluate-on", few, "--evaluate-split", "test", "--batch-size", 128),
    )
    return out, json.loads(stdout), stderr


def test_compress_writes_a_checkpoint_and_a_report(compressed):
    out, values, stderr = compressed
    assert AutoModelForImageClassification.from_pretrained(out).config.quantization_config.rank_map
    assert values["settings"]["recipe"] == "fast" and values["settings"]["num_samples"] == 128
    assert values["removed_of_model"] >= 0.5 and 0.8 < values["evaluation"]["top1"] < 1
    assert f"{values['evaluation']['kl']:.4f} nats" in (out / "report.html").read_text()
    assert (out / "ranks.png").stat().st_size > 1000 and (out / "preprocessor_config.json").exists()
    # Warnings, a line per phase, and no progress bars outside a terminal.
    warning, *lines = stderr.splitlines()
    assert warning == "The dataset holds 96 images, fewer than the 128 to draw; all of them are used."
    phases = [line.partition(":")[0] for line in lines]
    assert phases == [
        "Calibrated",
        "Decomposed",
        "Allocated",
        "Factorized",
        "Compared with the original",
        "Evaluated",
        "Saved",
    ]


@pytest.mark.parametrize(
    ("option", "wanted", "unwanted"),
    [
        pytest.param("--quiet", [], ["\n"], id="quiet"),
        pytest.param("--verbose", ["Factorized: ", "Profiled: ", "Configuration saved in"], [], id="verbose"),
    ],
)
def test_levels_of_messages(few, tiny, tmp_path, option, wanted, unwanted):
    stdout, stderr = process(
        *("compress", "--model", tiny, "--dataset", few, "--split", "test", "--num-samples", 5000),
        *("--metric", "svd", "--compensation", "none", "--output", tmp_path / "out", "--json", option),
    )
    assert json.loads(stdout)["settings"]["metric"] == "svd"
    assert all(text in stderr for text in wanted) and not any(text in stderr for text in unwanted)


def test_checkpoints_are_stored_in_the_dtype_of_the_original(few, tiny, tmp_path):
    original, dataset = tmp_path / "original", ("--evaluate-on", few, "--evaluate-split", "test")
    AutoModelForImageClassification.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(original)
    AutoImageProcessor.from_pretrained(tiny).save_pretrained(original)
    common = (
        "--model",
        original,
        *dataset,
        "--metric",
        "svd",
        "--compensation",
        "none",
        "--batch-size",
        128,
        "--json",
    )
    found = {}
    for name, option in {"auto": (), "float32": ("--save-dtype", "float32")}.items():
        values = json.loads(cli("compress", *common, "--output", tmp_path / name, *option)[0])
        weights = load_file(tmp_path / name / "model.safetensors")
        found[name] = {tensor.dtype for tensor in weights.values()}, values["evaluation"]["kl"]
    assert (found["auto"][0], found["float32"][0]) == ({torch.bfloat16}, {torch.float32})
    # The rounded values were evaluated.
    assert found["auto"][1] != found["float32"][1]
    assert found["auto"][1] == pytest.approx(found["float32"][1], rel=0.2)
    errors = cli("compress", *common, "--output", tmp_path / "out", "--save-dtype", "int8", code=1)[1]
    assert errors.splitlines()[-1].startswith(
        "Error: --save-dtype int8 is not a floating-point dtype; choose 'float32'"
    )


def test_compress_says_where_its_files_are(tiny, tmp_path):
    out = tmp_path / "out"
    stdout, _ = cli("compress", "--model", tiny, "--metric", "svd", "--compensation", "none", "--output", out)
    assert stdout.splitlines()[-1] == f"The same as a web page: {out / 'report.html'}"
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_plan_leaves_out_ratios_that_cannot_be_reached(tiny, caplog):
    options = ("plan", "--model", tiny, "--metric", "svd", "--json")
    points = json.loads(cli(*options)[0])["points"]
    assert [each["ratio"] for each in points] == [0.3, 0.4, 0.5, 0.6]
    assert "Ratios that this model cannot reach are left out: 0.7." in caplog.text
    assert "--ratio 0.7 (of the model) cannot be reached" in cli(*options, "--ratios", 0.7, code=1)[1]


def test_plan_shows_the_structure_of_every_block(tiny, few):
    images = ("--dataset", few, "--split", "calibration", "--num-samples", 32)
    settings = ("--scope", "targets", "--ratios", 0.5, "--quiet")
    values = json.loads(cli("plan", "--model", tiny, *images, *settings, "--json")[0])
    text, _ = cli("plan", "--model", tiny, *images, *settings)
    [point] = values["points"]
    assert any(choice["width"] for choice in point["choices"].values())
    blocks = [line.split("  ") for line in text[text.index("Ranks at ratio 50.0%") :].splitlines()[2:]]
    assert len(blocks) == len({name.split(".")[2] for name in point["choices"]})
    for choice in point["choices"].values():
        wanted = "dense" if choice["rank"] is None else f"{choice['rank']}{'*' if choice['shared'] else ''}"
        wanted += f", {choice['width']} units" if choice["width"] else ""
        assert any(wanted in (cell.strip() for cell in cells) for cells in blocks)
    assert point["ranks"] == {name: choice["rank"] for name, choice in point["choices"].items()}


def test_plan_estimates_agreement_from_one_measured_budget(tiny, few):
    images = ("--dataset", few, "--split", "calibration", "--num-samples", 32)
    settings = ("--recipe", "fast", "--scope", "targets", "--ratios", 0.6, "--quiet")
    values = json.loads(cli("plan", "--model", tiny, *images, *settings, "--measure", 0.4, "--json")[0])
    assert [point["ratio"] for point in values["points"]] == [0.4, 0.6]
    first, second = values["points"]
    assert first["estimated_kl"] == pytest.approx(values["measured"]["kl"]) and values["measured"]["num_images"] == 32
    assert first["estimated_agreement"] == pytest.approx(values["measured"]["agreement"])
    assert second["estimated_kl"] > first["estimated_kl"]


def test_plan_measures_only_with_images(tiny):
    _, errors = cli("plan", "--model", tiny, "--metric", "svd", "--measure", 0.4, code=1)
    assert "--measure needs --dataset" in errors


def test_inspect_without_a_report_describes_every_layer(tmp_path):
    mixed_model()[0].save_pretrained(tmp_path / "mixed")
    text, _ = cli("inspect", tmp_path / "mixed")
    assert "There is no report of the compression." in text
    assert "attention.query: rank 8, factors, shared by query, key, value" in text
    assert "0.intermediate.dense: dense, [40, 32] of [64, 32]" in text
    assert "0.output.dense: rank 8, factors, [32, 40] of [32, 64]" in text


def test_inspect(compressed):
    out, values, _ = compressed
    text, _ = cli("inspect", out)
    assert "Parameters of the model" in text and "stored values" in text
    shown = json.loads(cli("inspect", out, "--json")[0])
    assert shown["config"]["rank_map"] and shown["bytes_on_disk"] == (out / "model.safetensors").stat().st_size
    assert shown["report"]["layers"] == values["layers"]


def test_evaluate_agrees_with_the_report(compressed, few):
    out, values, _ = compressed
    stdout, _ = cli(
        *("evaluate", "--model", out, "--reference", MODEL, "--dataset", few, "--split", "test", "--json"),
        *("--batch-size", 128),
    )
    assert json.loads(stdout)["top1"] == pytest.approx(values["evaluation"]["top1"])
    assert json.loads(stdout)["kl"] == pytest.approx(values["evaluation"]["kl"], rel=1e-4)


def test_evaluate_prints_what_compress_prints(compressed, few):
    out, values, _ = compressed
    where = ("--dataset", few, "--split", "test", "--batch-size", 128)
    lines = cli("evaluate", "--model", out, "--reference", MODEL, *where)[0].splitlines()
    assert lines == evaluation_lines(values["evaluation"])
    number = r"[+-]\d+\.\d\d"
    change = rf"\({number} points: {number} to {number}\)"
    assert re.match(rf"  top-1 accuracy +\d+\.\d\d% -> \d+\.\d\d%  {change}$", lines[1])


def test_evaluate_compares_two_compressed_checkpoints(compressed, few):
    out, where = compressed[0], ("--dataset", few, "--split", "test", "--batch-size", 128)
    values = json.loads(cli("evaluate", "--model", out, "--reference", out, *where, "--json")[0])
    assert values["agreement"] == 1 and values["kl"] == pytest.approx(0, abs=1e-6)


def test_evaluate_recognises_swapped_checkpoints(compressed, few):
    _, stderr = cli("evaluate", "--model", MODEL, "--reference", compressed[0], "--dataset", few, code=1)
    assert f"--reference {str(compressed[0])!r} is compressed and --model" in stderr and "swap the two" in stderr


@pytest.mark.parametrize("option", ["--model", "--reference"])
def test_evaluate_names_a_checkpoint_that_does_not_exist(compressed, few, tmp_path, option):
    given = {"--model": compressed[0], "--reference": MODEL, option: tmp_path / "gone", "--dataset": few}
    error = cli("evaluate", *(each for pair in given.items() for each in pair), code=1)[1]
    assert f"Error: The model {str(tmp_path / 'gone')!r} does not exist" in error


def test_evaluate_names_an_output_that_is_missing(compressed):
    common = ("evaluate", "--model", compressed[0], "--reference", MODEL, "--dataset", DATA, "--split", "test")
    stderr = cli(*common, "--num-samples", 4, "--interpolate-pos-encoding", "--output-names", "heatmaps", code=1)[1]
    assert "--output-names heatmaps: an ImageClassifierOutput holds no such tensors" in stderr


def test_merge(compressed, tmp_path):
    out, values, _ = compressed
    cli("merge", "--model", out, "--output", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert sum(parameter.numel() for parameter in model.parameters()) == values["model_parameters_before"]


def test_merge_with_the_widths_as_they_are(tmp_path):
    mixed_model()[0].save_pretrained(tmp_path / "mixed")
    stdout, _ = cli("merge", "--json", "--model", tmp_path / "mixed", "--output", tmp_path / "out", "--keep-widths")
    assert json.loads(stdout)["needs_plugin"] is False
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == 40
    assert "quantization_config" not in config


def test_merge_into_a_checkpoint_that_brings_its_code(tmp_path):
    mixed_model()[0].save_pretrained(tmp_path / "mixed")
    arguments = ("merge", "--model", tmp_path / "mixed", "--output", tmp_path / "out", "--self-contained")
    values = json.loads(cli(*arguments, "--json")[0])
    assert not values["needs_plugin"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("mixed", "out"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], each) for name, each in before.items())
    assert (tmp_path / "out" / "modeling_mixrank.py").exists()
    stdout, _ = cli(*arguments, "--overwrite")
    assert "needs trust_remote_code=True, or the plugin" in stdout
    # From there to a dense one, which brings no code.
    cli("merge", "--model", tmp_path / "out", "--output", tmp_path / "dense", "--trust-remote-code")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with pytest.raises(AssertionError, match="not allowed with argument"):
        cli(*arguments, "--keep-widths", "--overwrite")


def test_compress_into_checkpoints_that_need_no_plugin(tiny, few, tmp_path):
    images = ("--dataset", few, "--split", "calibration", "--num-samples", 32, "--ratio", 0.3, "--scope", "targets")
    common = ("compress", "--model", tiny, *images, "--compensation", "none", "--probed-images", 0)
    stdout, _ = cli(*common, "--structures", "rank", "--self-contained", "--output", tmp_path / "code")
    assert "`from_pretrained(…, trust_remote_code=True)` needs no plugin" in stdout
    assert (tmp_path / "code" / "modeling_mixrank.py").exists()
    assert "trust_remote_code=True" in (tmp_path / "code" / "README.md").read_text()
    widths = ("--structures", "width", "--allocation", "uniform")
    stdout, _ = cli(*common, *widths, "--self-contained", "--output", tmp_path / "plain")
    assert "the checkpoint is an ordinary one" in stdout
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["intermediate_size"] < 64 and not {"quantization_config", "auto_map"} & config.keys()
    assert not (tmp_path / "plain" / "modeling_mixrank.py").exists()
    assert "nothing but Transformers" in (tmp_path / "plain" / "README.md").read_text()


def test_merge_refuses_a_checkpoint_with_holes(tmp_path):
    shutil.copytree(GOLDEN / "vit" / "pivoted", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    _, stderr = cli("merge", "--quiet", "--model", tmp_path / "damaged", "--output", tmp_path / "dense", code=1)
    assert "lacks vit.layernorm.weight, which ViTForImageClassification has" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "dense").exists()


def test_merge_with_a_class_of_the_users_own(tmp_path):
    shutil.copytree(GOLDEN / "vit" / "factors", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace("ViTForImageClassification", "Mine"))
    arguments = ("merge", "--quiet", "--model", tmp_path / "model", "--output", tmp_path / "dense")
    assert "'Mine' is not a model class of Transformers" in cli(*arguments, code=1)[1]
    cli(*arguments, "--auto-class", "transformers.ViTForImageClassification")
    expected = load_file(GOLDEN / "expected.safetensors")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        logits = model(expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["vit/factors"], atol=1e-4, rtol=1e-4)


def test_benchmark_against_the_dense_merge(compressed):
    out, values, _ = compressed
    common = ("benchmark", "--model", out, "--device", "cpu", "--threads", 1, "--repeats", 6)
    result = json.loads(cli(*common, "--batch-size", 1, 4, "--json")[0])
    assert result["models"]["compressed"]["parameters"] == values["model_parameters_after"]
    assert result["models"]["dense"]["parameters"] == values["model_parameters_before"]
    assert result["models"]["dense"]["weight_bytes"] == 4 * values["model_parameters_before"]
    assert result["image_shape"] == [3, 28, 28] and result["environment"]["threads"] == 1
    assert [run["batch_size"] for run in result["runs"]] == [1, 4]
    for run in result["runs"]:
        assert 0 < run["time_ratio"]["low"] <= run["time_ratio"]["median"] <= run["time_ratio"]["high"]
        for row in run["models"].values():
            assert row["images_per_second"] == pytest.approx(run["batch_size"] / row["seconds"])
            assert row["activation_bytes"] > 0


def test_benchmark_against_a_named_model_at_another_size(compressed):
    text, _ = cli(
        *("benchmark", "--model", compressed[0], "--reference", MODEL, "--device", "cpu", "--dtype", "bfloat16"),
        *("--image-size", 40, "--batch-size", 2, "--repeats", 6),
    )
    assert "images 3x40x40" in text and "bfloat16" in text and "batch 2: compressed takes" in text


@pytest.mark.slow
def test_benchmark_of_compiled_models(compressed):
    result = json.loads(
        cli(
            *("benchmark", "--model", compressed[0], "--compile", "--batch-size", 2, 3, "--repeats", 6, "--json"),
            *("--device", "cpu"),
        )[0]
    )
    assert result["compiled"] and [run["batch_size"] for run in result["runs"]] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", MODEL), "is a dense checkpoint; name what to compare with by --reference"),
        (("--batch-size", 4, 0), "--batch-size 0 is not positive"),
        (("--repeats", 5), "--repeats 5 is too few for an interval; use 6 or more"),
        (("--dtype", "int8"), "--dtype int8 is not a floating-point dtype"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_benchmark_refuses_before_work_starts(compressed, arguments, message):
    _, stderr = cli("benchmark", "--model", compressed[0], *arguments, code=1)
    assert "Error: " in stderr and message in stderr and "Traceback" not in stderr


def test_plan_keeps_and_reuses_statistics(tiny, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    common = ("plan", "--model", tiny, "--ratios", 0.4, 0.6, "--statistics", statistics, "--json")
    first, _ = cli(*common, "--dataset", DATA, "--split", "calibration", "--num-samples", 64)
    again, _ = cli(*common, "--plot", tmp_path / "profile.png")
    assert json.loads(first) == json.loads(again)
    assert [point["ratio"] for point in json.loads(first)["points"]] == [0.4, 0.6]
    assert (tmp_path / "profile.png").exists()


def test_compress_reuses_the_statistics_of_plan(tiny, tmp_path):
    statistics = tmp_path / "statistics.safetensors"
    model = ("--model", tiny, "--metric", "second_moment", "--statistics", statistics, "--quiet")
    images = ("--dataset", DATA, "--split", "calibration", "--num-samples", 64)
    cli("plan", *model, *images, "--ratios", 0.5)
    written = statistics.read_bytes()
    direct = ("compress", *model[:4], "--quiet", "--compensation", "none", "--ratio", 0.5)
    cli(*direct, *images, "--output", tmp_path / "direct")
    reused = ("compress", *model, "--compensation", "none", "--ratio", 0.5)
    cli(*reused, "--output", tmp_path / "reused")
    assert statistics.read_bytes() == written
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("direct", "reused"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    # If images are named nevertheless, they are compared with those of the file.
    for command in (("plan", *model), (*reused, "--output", tmp_path / "other")):
        _, stderr = cli(*command, *images[:4], "--num-samples", 32, code=1)
        assert "Error: The statistics were taken from images with the fingerprint" in stderr
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def statistics(tiny, tmp_path_factory):
    images = [torch.rand(4, 3, 28, 28)]
    calibration = MixRankCompressor.from_pretrained(tiny).calibrate(images, ["second_moment", "kfac"])
    return calibration.save(tmp_path_factory.mktemp("statistics") / "statistics.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "svd"), "--statistics has no effect with --metric svd"),
        (("--statistics", "no-such-folder/file"), "is in a folder that does not exist"),
        (("--fisher-samples", 2, "--metric", "kfac"), "was made with --fisher-samples 1, not 2"),
        (("--statistics", "new-file", "--max-memory", "1GiB"), "--max-memory may need several passes over the images"),
        (
            ("--compensation", "sequential"),
            "--dataset is missing: name a folder of images, or add --compensation none",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unusable_statistics_are_refused(tiny, statistics, tmp_path, arguments, message):
    options = {"--statistics": statistics, "--metric": "second_moment", "--compensation": "none"}
    options.update(zip(arguments[::2], arguments[1::2], strict=True))
    given = [each for pair in options.items() for each in pair]
    _, stderr = cli("compress", "--model", tiny, *given, "--output", tmp_path / "out", code=1)
    assert message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_plan_without_images_for_a_metric_that_needs_none(tiny):
    stdout, _ = cli("plan", "--model", tiny, "--metric", "svd", "--ratios", 0.4, 0.6, "--json")
    assert [point["ratio"] for point in json.loads(stdout)["points"]] == [0.4, 0.6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "does/not-exist-here"), "Error: "),
        (("--metric", "kfacc"), "Error: --metric kfacc is unknown"),
        (("--config", "nothing.yaml"), "Error: --config 'nothing.yaml' is not a file"),
        (("--split", "validation"), "Error: "),
        (("--output", MODEL), "is not empty; choose another"),
        (("--evaluate-split", "test"), "Error: --evaluate-split has no effect without --evaluate-on"),
        (("--device", "gpu"), "Error: --device gpu is unknown; choose cpu, cuda"),
        (("--exclude-modules", "qery"), "--exclude-modules has 'qery', which matches no linear layer."),
        (("--exclude-modules", "qery"), "Did you mean 'query'?"),
        (("--dataset", MODEL), "holds a model and no images; name a folder of images."),
        (("--push-to-hub", "./out"), "Error: './out' cannot be the name of a repository on the Hub; give one such as"),
        (("--model", DATA), "holds no config.json; name the folder of a model"),
        (("--dataset", "exmaples"), "Error: There is no folder 'exmaples', nor could it be read from the Hub"),
        (("--dataset", "exmaples"), "did you mean 'examples'?"),
        (("--max-image-pixels", 700), "it has more than --max-image-pixels 700 pixels (28 × 28)"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_errors_are_one_sentence_without_traceback(tmp_path, monkeypatch, arguments, message):
    # Where there is no network, asking the Hub takes half a minute.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    defaults = {"--model": MODEL, "--dataset": DATA, "--split": "calibration", "--output": tmp_path / "out"}
    defaults.update({arguments[0]: arguments[1]})
    _, stderr = cli("compress", *(each for pair in defaults.items() for each in pair), code=1)
    assert message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    _, stderr = process("compress", "--model", MODEL, "--output", tmp_path / "out", "--epochs", 0, "--debug", code=1)
    assert "Traceback" in stderr


def test_an_error_ends_the_program(tmp_path):
    stdout, stderr = process("compress", "--model", MODEL, "--output", tmp_path / "out", "--epochs", 0, code=1)
    assert stderr.startswith("Error: --epochs 0 is not an integer") and stderr.count("\n") == 1 and not stdout


def test_missing_images_are_named(tmp_path):
    _, stderr = cli("compress", "--model", MODEL, "--output", tmp_path / "out", code=1)
    assert "Error: --dataset is missing" in stderr


def test_options_of_a_dataset_that_is_not_named():
    for name, value in {"split": "test", "image_column": "image", "streaming": True}.items():
        args = dict.fromkeys((*FIELDS, "config", "split", "image_column", "streaming")) | {name: value}
        option = f"--{name.replace('_', '-')}"
        with pytest.raises(
            ValueError, match=f"{option} has no effect without --dataset; name a dataset, or leave it out"
        ):
            configuration(SimpleNamespace(**args))
        assert configuration(SimpleNamespace(**args | {"dataset": "images"})).dataset == "images"


def test_a_file_of_fields(tiny, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("metric: svd\ncompensation: []\ncompression_ratio: 0.3\nratio_pattern: {query: 0}\n")
    stdout, _ = cli(
        "compress", "--model", tiny, "--config", file, "--ratio", 0.4, "--output", tmp_path / "out", "--json"
    )
    settings = json.loads(stdout)["settings"]
    assert settings["metric"] == "svd" and settings["compression_ratio"] == 0.4
    assert settings["ratio_pattern"] == {"query": 0}


def test_every_field_has_an_option_and_a_help_text():
    internal = {"quant_method", "rank_map", "layout_version", "library_version"}
    assert {field.name for field in dataclasses.fields(MixRankConfig)} - internal == set(FIELDS)
    text, _ = cli("compress", "--help")
    assert all(f"--{field.option}" in text for field in FIELDS.values())
    assert "examples:" in text


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from optimum_mixrank.commands.mixrank import MixRankCommand; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'yaml') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_gpu_that_is_not_there_is_named(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (("benchmark", "--model", tiny, "--reference", tiny), ("plan", "--model", tiny, "--metric", "svd")):
        assert "Error: --device cuda is not available: PyTorch" in cli(*command, "--device", "cuda", code=1)[1]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("xpu", "--device xpu is not available: PyTorch"),
        ("vulkan", "--device vulkan is not available: PyTorch"),
        ("meta", "--device meta holds no values to compute with; choose cpu"),
        ("cuda:9", "--device cuda:9 does not exist: this machine has cuda:0 to cuda:1"),
        ("cuda:x", "--device cuda:x is unknown; choose cpu"),
    ],
)
def test_devices_are_checked_before_the_work(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        checked_device(device)
    assert checked_device("cpu") == "cpu" and checked_device("cuda:1") == "cuda:1"


def test_class_names_are_checked_before_the_work(tiny, tmp_path, caplog):
    for split in ("train", "validation"):
        for name in ("zebra", "Bag"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("L", (28, 28), 90).save(tmp_path / "images" / split / name / "1.png")
    images, output = tmp_path / "images", tmp_path / "out"
    options = ("--dataset", images, "--evaluate-on", images, "--output", output)
    _, stderr = cli("compress", "--model", tiny, *options, code=1)
    assert "the model does not know ['zebra']" in stderr
    assert "Calibrated" not in caplog.text and not output.exists()


def test_an_upload_that_fails_says_that_the_checkpoint_is_complete(tiny, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError("no network.")

    monkeypatch.setattr(MixRankCompressor, "push_to_hub", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    options = ("--metric", "svd", "--compensation", "none", "--output", tmp_path / "out")
    _, stderr = cli("compress", "--model", tiny, *options, "--push-to-hub", "me/vit", code=1)
    assert "--push-to-hub me/vit needs an access token, and none is known yet" in caplog.messages[0]
    assert f"The checkpoint in {str(tmp_path / 'out')!r} is complete, but was not uploaded to 'me/vit'" in stderr
    assert f"`hf upload me/vit {tmp_path / 'out'}`" in stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_interruption_after_saving_says_what_was_saved(tiny, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MixRankCompressor, "push_to_hub", interrupt)
    options = ("--metric", "svd", "--compensation", "none", "--quiet", "--output", tmp_path / "out")
    _, stderr = cli("compress", "--model", tiny, *options, "--push-to-hub", "me/vit", code=130)
    assert f"Interrupted. The checkpoint in {str(tmp_path / 'out')!r} is complete. It was not uploaded" in stderr
    assert "overwritten" not in stderr
