"""A size of the whole model, on the command line."""

import json

from commands.calling import cli
from transformers import AutoModelForImageClassification


def parameters(folder) -> int:
    return AutoModelForImageClassification.from_pretrained(folder).num_parameters()


def test_compress_to_the_size_of_another_model(tiny, few, tmp_path):
    target = round(0.7 * parameters(tiny))
    arguments = ("compress", "--model", tiny, "--dataset", few, "--split", "calibration", "--recipe", "fast")
    cli(*arguments, "--target-parameters", f"{target / 1000}k", "--output", tmp_path / "first")
    assert 0.97 * target < parameters(tmp_path / "first") <= target
    stdout, _ = cli(*arguments, "--like", tmp_path / "first", "--output", tmp_path / "second")
    assert parameters(tmp_path / "second") == parameters(tmp_path / "first")
    assert f'at most {parameters(tmp_path / "first"):,} parameters, the size of "first"' in stdout


def test_plan_for_a_size(tiny, few):
    target = round(0.7 * parameters(tiny))
    arguments = ("plan", "--model", tiny, "--dataset", few, "--split", "calibration", "--recipe", "fast")
    stdout, _ = cli(*arguments, "--target-parameters", target)
    assert f"leaves {target:,} parameters." in stdout and stdout.count("Ranks at ratio") == 1
    content = json.loads(cli(*arguments, "--target-parameters", target, "--json")[0])
    assert content["target_parameters"] == target and len(content["points"]) == 1
    _, stderr = cli(*arguments, "--target-parameters", 100, code=1)
    assert "--target-parameters 100 cannot be reached" in stderr and "can be reached is --target-parameters" in stderr
    _, stderr = cli(*arguments, "--target-parameters", target, "--ratios", 0.5, code=1)
    assert "Give only one of them" in stderr


def test_a_ratio_and_a_size_exclude_each_other_before_anything_is_opened(tmp_path):
    arguments = ("compress", "--model", tmp_path / "none", "--output", tmp_path / "out", "--ratio", 0.5)
    _, stderr = cli(*arguments, "--target-parameters", "22M", code=1)
    assert "Error: --ratio 0.5 and --target-parameters 22000000 both say how small the model is to become." in stderr


def test_more_than_the_blocks(tiny, few, tmp_path):
    arguments = ("--model", tiny, "--dataset", few, "--split", "calibration", "--recipe", "fast", "--scope", "targets")
    include = ("--include", "patch_embedding", "heads")
    statistics = ("--metric", "second_moment", "--statistics", tmp_path / "statistics.safetensors")
    stdout, _ = cli("plan", *arguments, *include, *statistics, "--ratios", 0.5)
    assert "classifier" in stdout and "projection.linear" in stdout
    out = tmp_path / "out"
    cli("compress", *arguments, *include, *statistics, "--ratio", 0.5, "--output", out)
    assert "projection.linear" in cli("inspect", out)[0]
    cli("merge", "--model", out, "--output", tmp_path / "dense")
    assert parameters(tmp_path / "dense") == parameters(tiny) > parameters(out)
    _, stderr = cli("compress", *arguments, "--include", "head", "--output", tmp_path / "other", code=1)
    assert "include has 'head', which is unknown; choose among" in stderr


def test_a_size_in_a_file(tmp_path):
    file = tmp_path / "fields.yaml"
    file.write_text("target_parameters: 22,5M\n")
    arguments = ("compress", "--model", tmp_path / "none", "--output", tmp_path / "out", "--config", file)
    assert "is not a number of parameters" in cli(*arguments, code=1)[1]


def test_the_model_that_like_names_is_reached_with_the_token(tiny, monkeypatch):
    seen = []

    def read_config(name, hub_kwargs):
        seen.append((str(name), hub_kwargs))
        raise OSError("There is no such model.")

    monkeypatch.setattr("optimum_mixrank.checkpoint.size.read_config", read_config)
    hub = ("--token", "hf_secret", "--cache-dir", "cache", "--like", "private/small@v2")
    _, stderr = cli("plan", "--model", tiny, "--metric", "svd", *hub, code=1)
    assert "private/small@v2" in stderr and "hf_secret" not in stderr
    ((name, given),) = seen
    assert name == "private/small" and given["revision"] == "v2"
    assert given["token"] == "hf_secret" and given["cache_dir"] == "cache" and given["trust_remote_code"] is False
