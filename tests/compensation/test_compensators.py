"""What compensators promise: a lower held-out error or nothing, the same ranks, the same model every time."""

import copy

import pytest
import torch
from compensation.cases import FAMILIES, compress, config, images
from transformers import AutoModelForImageClassification

from optimum_mixrank import FactoredLinear, MixRankCompressor
from optimum_mixrank.compensation import COMPENSATORS, CompensationTask, Compensator
from optimum_mixrank.compensation.held_out import (
    accept_if_improved,
    model_outputs,
    output_error,
    split_batches,
)
from optimum_mixrank.compensation.layerwise import compensator as layerwise
from optimum_mixrank.compensation.layerwise.output_loss import output_loss, output_loss_of_factors
from optimum_mixrank.compensation.training.loop import TrainingSettings, train


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
def test_the_same_seed_gives_the_same_model(step):
    first, _ = compress(FAMILIES["vit"](), settings(step))
    second, _ = compress(FAMILIES["vit"](), settings(step))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("step", STEPS)
def test_swin_and_models_without_a_head(step):
    original = FAMILIES["swin"]().swin
    compressed, report = compress(original, settings(step, metric="second_moment"))
    [result] = report.compensation
    assert result["kept"]
    assert torch.isfinite(model_outputs(compressed, [images(2)])[0].features[0]).all()


# Nothing fits, or some of the batches.
@pytest.mark.parametrize("max_bytes", [0, 1_000_000])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_outputs_that_do_not_fit_into_memory_are_computed_again(monkeypatch, family, max_bytes):
    kept, _ = compress(FAMILIES[family](), settings("sequential"))
    shares = []
    of = layerwise._OriginalOutputs.of

    def spy(outputs, index, names):
        shares.append(len(outputs._kept) / len(outputs._replay.calls))
        return of(outputs, index, names)

    monkeypatch.setattr(layerwise._OriginalOutputs, "of", spy)
    monkeypatch.setattr(COMPENSATORS["sequential"], "max_bytes", max_bytes)
    again, _ = compress(FAMILIES[family](), settings("sequential"))
    assert any(0 < share < 1 for share in shares) if max_bytes else not any(shares)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
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


def test_in_place_learns_from_the_original():
    copied, report = compress(FAMILIES["vit"](), config(compensation=["sequential"]))
    compressor = MixRankCompressor(FAMILIES["vit"]())
    inplace = compressor.compress(config(compensation=["sequential"]), list(images(64).split(16)), inplace=True)
    assert compressor.report.compensation == report.compensation
    assert all(
        torch.equal(a, b) for a, b in zip(copied.state_dict().values(), inplace.state_dict().values(), strict=True)
    )


class Spoiler(Compensator):
    name = "spoiler"

    def compensate(self, task):
        for module in task.model.modules():
            if isinstance(module, FactoredLinear):
                module.factor_a.weight.data.mul_(3)
        return {"spoiled": True}


def test_what_does_not_help_is_put_back():
    original = FAMILIES["vit"]()
    compressed, _ = compress(original, config(compensation=[]))
    before = copy.deepcopy(compressed.state_dict())
    held_out = [images(8, seed=3)]
    references = model_outputs(original, held_out)
    task = CompensationTask(original, compressed, [], {}, {}, [images(8)], held_out, references, config())
    result = accept_if_improved(Spoiler(), task)
    assert not result.kept and result.error_after > result.error_before and result.details == {"spoiled": True}
    assert all(torch.equal(before[name], tensor) for name, tensor in compressed.state_dict().items())


def test_split_holds_out_random_images_and_loses_none():
    images_in_order = torch.arange(100.0).view(100, 1, 1, 1)
    batches = dict(enumerate(images_in_order.split(7)))
    learn, held_out = split_batches(batches, 0.2, seed=0)
    ours, theirs = torch.cat(list(learn.values())).flatten(), torch.cat(held_out).flatten()
    assert len(theirs) == 20 and sorted([*ours.tolist(), *theirs.tolist()]) == list(range(100))
    # Sorted classes must not end up on one side.
    assert theirs.min() < 20 and theirs.max() > 80
    assert all(set(part.flatten().tolist()) <= set(batches[index].flatten().tolist()) for index, part in learn.items())
    assert [len(batch) for batch in held_out] == [7, 7, 6]
    # However they are batched, the same images are held out.
    assert torch.equal(torch.cat(split_batches({0: images_in_order}, 0.2, seed=0)[1]).flatten(), theirs)
    assert [len(part[0]) for part in split_batches({0: images(2)}, 0.9, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="needs at least 2; there are 1"):
        split_batches({0: images(1)}, 0.1, seed=0)


def test_a_failure_leaves_a_model_that_was_to_be_compressed_in_place_as_it_was(monkeypatch):
    model = FAMILIES["vit"]()
    before = copy.deepcopy(model.state_dict())

    def fail(self, task):
        task.model.vit.layernorm.weight.data.mul_(2)
        raise ValueError("no luck")

    monkeypatch.setattr(COMPENSATORS["sequential"], "compensate", fail)
    for data, message in (([images(1)], "at least 2"), ([images(16)], "no luck")):
        with pytest.raises(ValueError, match=message):
            MixRankCompressor(model).compress(config(compensation=["sequential"]), data, inplace=True)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_is_random_is_refused():
    model = FAMILIES["vit"]()
    model.vit.layernorm.register_forward_hook(lambda module, args, output: output + torch.rand(()))
    with pytest.raises(ValueError, match="gives another output each time for the same images"):
        MixRankCompressor(model).compress(config(compensation=["sequential"]), [images(16)])


def test_a_learning_rate_that_explodes_is_named():
    layer = torch.nn.Linear(2, 2)
    settings = TrainingSettings(epochs=2, learning_rate=0.9, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"Distilling: the loss is inf in epoch 1; lower learning_rate=0\.9"):
        train(
            layer,
            [{"params": list(layer.parameters())}],
            4,
            lambda indices: layer(torch.full((2, 2), 1e30)).square().sum() * 1e30,
            lambda: 0.0,
            settings,
            "Distilling",
        )


@pytest.mark.parametrize(
    "degenerate",
    [[torch.zeros(16, 3, 32, 32)], [images(1).expand(16, -1, -1, -1)], [images(2)], list(images(16).split(1))],
    ids=["black", "all the same", "two", "sixteen in batches of one"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_degenerate_images_give_a_finite_model(degenerate, family):
    compressor = MixRankCompressor(FAMILIES[family]())
    model = compressor.compress(config(compensation=["sequential"]), degenerate)
    assert torch.isfinite(model_outputs(model, [images(4)])[0].logits).all()


def test_a_single_image_is_too_few():
    with pytest.raises(ValueError, match="needs at least 2; there are 1. Give more calibration images"):
        MixRankCompressor(FAMILIES["vit"]()).compress(config(), [images(1)])


def test_residual_loss_is_the_output_loss():
    generator = torch.Generator().manual_seed(0)
    X, T, W = (torch.randn(*shape, generator=generator).double() for shape in ((5, 40), (4, 40), (4, 5)))
    direct = (T - W @ X).square().sum() / 40
    torch.testing.assert_close(output_loss(W, X @ X.T / 40, T @ X.T / 40) + T.square().sum() / 40, direct)


def test_residual_loss_of_factors_is_that_of_their_product():
    generator = torch.Generator().manual_seed(0)
    A, B, X, T = (torch.randn(*shape, generator=generator).double() for shape in ((2, 5), (4, 2), (5, 40), (4, 40)))
    moments = X @ X.T / 40, T @ X.T / 40
    torch.testing.assert_close(output_loss_of_factors(A, B, *moments), output_loss(B @ A, *moments))


def test_the_registry_holds_what_the_configuration_names():
    assert sorted(COMPENSATORS) == sorted(STEPS)
    with pytest.raises(ValueError, match="a layer-wise step .* makes every layer anew"):
        config(compensation=["distillation", "sequential"])
    with pytest.raises(ValueError, match="a layer-wise step"):
        config(compensation=["sequential", "residual"])


def test_compensation_needs_images():
    with pytest.raises(ValueError, match="compensation needs calibration images"):
        MixRankCompressor(FAMILIES["vit"]()).compress(config(metric="svd", compensation=["sequential"]))
