"""Statistics of layers against explicitly captured activations, and what a run leaves behind."""

from contextlib import nullcontext

import pytest
import torch
from calibration.layers import MODELS, batches, covariance, hook_count, required_for
from models import pixels, tiny_swin, tiny_vit
from transformers.utils import logging

from optimum_mixrank.calibration.collect import collect_statistics
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.decomposition import Statistic


def capture(model, images):
    """Inputs and outputs (less the bias) of every encoder linear, in float64, by module name."""
    captured = {}
    for target in encoder_linears(model):

        def hook(module, args, output, name=target.name):
            bias = 0 if module.bias is None else module.bias.double()
            captured[name] = (args[0].double(), output.double() - bias)

        target.module.register_forward_hook(hook)
    with torch.no_grad():
        model(pixel_values=images)
    return captured


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_statistics_are_those_of_the_captured_activations(make):
    model = make()
    collected, seen = collect_statistics(model, batches(5, 1, 2), required_for(model))
    captured = capture(make(), pixels(8))
    assert seen == 8
    assert collected.keys() == captured.keys()
    for name, (inputs, outputs) in captured.items():
        statistics = collected[name]
        vectors = inputs.reshape(-1, inputs.shape[-1])
        assert statistics.num_tokens == len(vectors)
        expected = {
            "input_mean": vectors.mean(0),
            "input_variance": vectors.var(0, correction=0),
            "input_covariance": covariance(inputs),
            "output_covariance": covariance(outputs),
            "representative_input": inputs.reshape(-1, *inputs.shape[-2:]).mean(0),
        }
        for field, tensor in expected.items():
            ours = getattr(statistics, field)
            assert ours.dtype == torch.float64
            scale = tensor.abs().max().item()
            torch.testing.assert_close(ours, tensor, rtol=0, atol=1e-5 * scale)


def test_what_was_not_asked_for_is_none():
    model = tiny_vit()
    collected, _ = collect_statistics(model, batches(2), required_for(model, {Statistic.INPUT_MEAN}))
    for statistics in collected.values():
        assert statistics.input_mean is not None
        assert statistics.input_covariance is statistics.output_covariance is statistics.representative_input is None


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_no_hook_of_ours_remains_and_the_users_survive(fails):
    model = tiny_vit()
    calls = []
    layer = encoder_linears(model)[0].module
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    before = hook_count(model)

    def images():
        yield from batches(2)
        assert hook_count(model) > before
        if fails:
            raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone") if fails else nullcontext():
        collect_statistics(model, images(), required_for(model))
    assert hook_count(model) == before
    calls.clear()
    model(pixel_values=pixels(1))
    assert calls == ["model", "layer"]


def test_no_hook_remains_where_the_forward_pass_fails():
    model = tiny_vit()
    with pytest.raises(ValueError, match="channel"):
        collect_statistics(model, [Batch(torch.zeros(2, 1, 32, 32))], required_for(model))
    assert hook_count(model) == 0


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "exception"])
def test_modes_are_restored_module_by_module(fails):
    model = tiny_vit(hidden_dropout_prob=0.5).train()
    frozen = encoder_linears(model)[2].module.eval()
    model.base_model.embeddings.eval()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def images():
        yield from batches(2)
        assert not any(module.training for module in model.modules())
        if fails:
            raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone") if fails else nullcontext():
        collect_statistics(model, images(), required_for(model))
    assert [module.training for module in model.modules()] == before
    assert not frozen.training
    assert torch.is_grad_enabled()


def test_dropout_is_off():
    model = tiny_vit(hidden_dropout_prob=0.5).train()
    ours, _ = collect_statistics(model, batches(4), required_for(model, {Statistic.INPUT_MEAN}))
    theirs, _ = collect_statistics(tiny_vit(), batches(4), required_for(model, {Statistic.INPUT_MEAN}))
    assert all(torch.equal(ours[name].input_mean, theirs[name].input_mean) for name in ours)


def test_the_model_is_not_changed():
    model = tiny_swin()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect_statistics(model, batches(2), required_for(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_in_the_images_names_the_first_layer(value):
    model = tiny_vit()
    batch = pixels(3)
    batch[1, 0, 5, 5] = value
    # Query, key and value share the first input; which of them runs first differs between releases of Transformers.
    first = "|".join(target.name for target in encoder_linears(model)[:3])
    for images in ([batch], [pixels(3), batch]):
        with pytest.raises(ValueError, match=f"NaN or Inf in the inputs of layer '({first})'.*calibration images"):
            collect_statistics(model, [Batch(b) for b in images], required_for(model))
    assert hook_count(model) == 0


def test_nan_in_the_images_is_reported_after_the_first_batch():
    model = tiny_vit()

    def images():
        yield Batch(torch.full((1, 3, 32, 32), float("nan")))
        pytest.fail("went on after a batch of NaN")

    with pytest.raises(ValueError, match="NaN or Inf"):
        collect_statistics(model, images(), required_for(model))


@pytest.mark.parametrize("index", [0, 3, 4, 7], ids=lambda index: f"layer {index}")
def test_nan_in_a_weight_names_the_first_layer_that_shows_it(index):
    model = tiny_vit()
    targets = encoder_linears(model)
    with torch.no_grad():
        targets[index].module.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or Inf in the outputs of layer '{targets[index].name}'"):
        collect_statistics(model, batches(2), required_for(model, {Statistic.OUTPUT_COVARIANCE}))


def test_float16_overflow_is_an_error_with_advice():
    model = tiny_vit().half()
    required = required_for(model)
    with torch.no_grad():
        encoder_linears(model)[4].module.weight.fill_(3e4)
    with pytest.raises(ValueError, match="a half-precision model may overflow, load it with dtype='float32'"):
        collect_statistics(model, batches(2), required)


def test_images_are_cast_to_the_dtype_of_the_model():
    collected, _ = collect_statistics(tiny_vit().double(), batches(2), required_for(tiny_vit()))
    reference, _ = collect_statistics(tiny_vit(), batches(2), required_for(tiny_vit()))
    for name in reference:
        torch.testing.assert_close(collected[name].input_mean, reference[name].input_mean, rtol=1e-4, atol=1e-4)


def test_images_of_several_sizes_are_refused_by_mean_input_alone():
    def images():
        yield Batch(torch.ones(1, 3, 32, 32))
        yield Batch(torch.ones(1, 3, 64, 32))

    model = tiny_swin()
    collect_statistics(model, images(), required_for(model, {Statistic.INPUT_MEAN}))
    message = r"number of tokens changed from 64 to 128.*metric='second_moment'"
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, images(), required_for(model, {Statistic.REPRESENTATIVE_INPUT}))


def test_no_images():
    model = tiny_vit()
    with pytest.raises(ValueError, match="calibration dataset holds no image"):
        collect_statistics(model, [], required_for(model))
    assert hook_count(model) == 0


@pytest.mark.parametrize("switch", [logging.enable_progress_bar, logging.disable_progress_bar])
def test_progress_bar_can_be_switched_off(switch, capfd):
    model = tiny_vit()
    enabled = logging.is_progress_bar_enabled()
    try:
        switch()
        collect_statistics(model, batches(2, 2), required_for(model), num_images=4)
    finally:
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    assert ("Calibrating" in capfd.readouterr().err) == (switch is logging.enable_progress_bar)


def test_an_output_that_nothing_changes_is_warned_about(caplog):
    model = tiny_vit()
    required = required_for(model)
    collect_statistics(model, batches(2), required)
    assert "ranks are chosen blindly" not in caplog.text
    with torch.no_grad():
        model.classifier.weight.zero_()
    collect_statistics(model, batches(2), required)
    assert "ranks are chosen blindly" in caplog.text
