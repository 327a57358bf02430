"""What every compensator guarantees: a lower held-out error, the same ranks, and the same model every time."""

import copy

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.compensation import COMPENSATORS, CompensationTask
from optimum_mixrank.compensation.held_out import model_outputs, output_error


STEPS = ["sequential", "residual", "blocks", "distillation"]


def error(model, original):
    test = [images(64, seed=7)]
    return output_error(model_outputs(model, test), model_outputs(original, test))


def settings(step, **changes):
    return config(compensation=[step], epochs=3, learning_rate=1e-3, train_batch_size=16, **changes)


@pytest.mark.parametrize(
    ("step", "family", "layout"),
    [
        *((step, family, "pivoted") for step in STEPS for family in ("vit", "deit")),
        ("blocks", "vit", "factors"),
        ("distillation", "vit", "factors"),
    ],
)
def test_every_step_lowers_the_error_and_keeps_the_budget(step, family, layout, tmp_path):
    original = FAMILIES[family]()
    before = copy.deepcopy(original.state_dict())
    plain, plain_report = compress(original, settings(step, layout=layout, metric="second_moment"), 256)
    bare, bare_report = compress(original, config(compensation=[], layout=layout, metric="second_moment"), 256)
    [result] = plain_report.compensation
    assert result["name"] == step
    assert result["kept"] and result["error_after"] < result["error_before"]
    assert error(plain, original) < error(bare, original)
    assert plain_report.model_parameters_after == bare_report.model_parameters_after
    assert [layer.rank for layer in plain_report.layers] == [layer.rank for layer in bare_report.layers]
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())
    plain.save_pretrained(tmp_path)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(reloaded(images(2)).logits, plain.eval()(images(2)).logits)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("short_residuals")
def test_modes_hooks_and_trainability_are_as_before(step):
    original = FAMILIES["vit"]()
    original.train()
    original.vit.embeddings.requires_grad_(False)
    compressed, _ = compress(original, settings(step))
    for model in (original, compressed):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        expected = {name for name, _ in model.named_parameters() if name.startswith("vit.embeddings")}
        guards = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
        assert frozen == expected | guards
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("short_residuals")
def test_the_same_seed_gives_the_same_model(step):
    first, _ = compress(FAMILIES["vit"](), settings(step))
    second, _ = compress(FAMILIES["vit"](), settings(step))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("short_residuals")
def test_swin_and_models_without_a_head(step):
    original = FAMILIES["swin"]().swin
    compressed, report = compress(original, settings(step, metric="second_moment"))
    [result] = report.compensation
    assert result["kept"]
    assert torch.isfinite(model_outputs(compressed, [images(2)])[0].features[0]).all()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("short_residuals")
def test_half_precision(step, dtype):
    original = FAMILIES["vit"]().to(dtype)
    compressed, report = compress(original, settings(step, metric="second_moment"), 256)
    [result] = report.compensation
    assert result["kept"] and compressed.dtype == dtype
    assert torch.isfinite(model_outputs(compressed, [images(4)])[0].logits).all()
    if step == "sequential":
        assert result["details"]["layers_with_residual_target"] >= 3


def test_a_layer_that_does_not_matter_loses_nothing():
    model = FAMILIES["vit"]()
    with torch.no_grad():
        model.classifier.weight.zero_()
    calibration = MixRankCompressor(model).calibrate([images(16)], "kfac")
    profile = MixRankCompressor(model).profile(calibration, config(compensation=[]), (0.5,))
    assert profile.points[0].loss == 0


def test_images_of_a_single_process_need_no_numbers():
    batches, held_out = list(images(6).split(4)), list(images(5, seed=1).split(2))
    task = CompensationTask(None, None, [], {}, {}, batches, held_out, [], config())
    assert torch.equal(task.all_images().main, images(6)) and torch.equal(task.all_held_out().main, images(5, seed=1))
    assert task.all_high_resolution() is None


def test_the_registry_holds_what_the_configuration_names():
    assert sorted(COMPENSATORS) == sorted(STEPS)
    with pytest.raises(ValueError, match="a layer-wise step .* recomputes every layer"):
        config(compensation=["distillation", "sequential"])
    with pytest.raises(ValueError, match="a layer-wise step"):
        config(compensation=["sequential", "residual"])
