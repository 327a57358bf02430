import copy
from dataclasses import dataclass

import pytest
import torch
from models import pixels, tiny_deit, tiny_swin, tiny_vit
from torch import Tensor
from transformers import AutoBackbone, DeiTForImageClassificationWithTeacher, SwinConfig, ViTForMaskedImageModeling

from optimum_mixrank import evaluate_model
from optimum_mixrank.evaluation.evaluate import EvaluationResult


@dataclass
class Batch:
    pixel_values: Tensor
    labels: Tensor | None = None


def changed(model):
    """A copy that computes something else."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, pixel_values):
    with torch.no_grad():
        return model.eval()(pixel_values=pixel_values).logits.double()


@pytest.fixture
def batches():
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0])
    images = pixels(11)
    # Unequal batches: means are over images, not over batches.
    return [Batch(images[:8], labels[:8]), Batch(images[8:], labels[8:])]


@pytest.mark.parametrize("tiny", [tiny_vit, tiny_deit, tiny_swin], ids=["vit", "deit", "swin"])
def test_classifier_against_the_definitions(tiny, batches):
    reference = tiny()
    model = changed(reference)
    result = evaluate_model(model, batches, reference)
    images, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pixel_values", "labels"))
    original, compressed = logits(reference, images), logits(model, images)
    p, q = original.softmax(1), compressed.softmax(1)
    assert result == EvaluationResult(
        num_images=11,
        top1=(compressed.argmax(1) == labels).sum().item() / 11,
        top5=1.0,
        reference_top1=(original.argmax(1) == labels).sum().item() / 11,
        reference_top5=1.0,
        agreement=pytest.approx((compressed.argmax(1) == original.argmax(1)).double().mean().item()),
        kl=pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4),
        gained=((compressed.argmax(1) == labels) & (original.argmax(1) != labels)).sum().item() / 11,
        lost=((compressed.argmax(1) != labels) & (original.argmax(1) == labels)).sum().item() / 11,
        kind="classes",
    )


def test_model_with_itself(batches):
    result = evaluate_model(tiny_vit(), batches, reference=tiny_vit())
    assert (result.agreement, result.kl, result.top1) == (1.0, 0.0, result.reference_top1)


def test_without_labels_there_is_no_accuracy():
    model = tiny_vit()
    result = evaluate_model(model, [Batch(pixels())], reference=model)
    assert result == EvaluationResult(num_images=4, agreement=1.0, kl=0.0, kind="classes")


def test_without_original_there_is_only_accuracy(batches):
    result = evaluate_model(tiny_vit(), batches)
    assert result.top1 is not None
    assert (result.reference_top1, result.agreement, result.kl, result.feature_error) == (None, None, None, None)


def test_deit_with_teacher_is_judged_by_its_averaged_logits(batches):
    model = tiny_deit(DeiTForImageClassificationWithTeacher)
    result = evaluate_model(model, batches, reference=changed(model))
    assert None not in (result.top1, result.reference_top1, result.agreement, result.kl)
    assert result.feature_error is None


def _feature_error(pairs):
    errors = [((f - g).flatten(1).norm(dim=1) / f.flatten(1).norm(dim=1)).double() ** 2 for f, g in pairs]
    return pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_encoder_by_its_last_hidden_state(batches):
    reference = tiny_vit().vit.eval()
    model = changed(reference)
    images = torch.cat([batch.pixel_values for batch in batches])
    with torch.no_grad():
        pair = reference(images).last_hidden_state, model(images).last_hidden_state
    result = evaluate_model(model, batches, reference)
    correlation = [torch.corrcoef(torch.stack(each).flatten(1))[0, 1].double() for each in zip(*pair, strict=True)]
    assert result == EvaluationResult(
        num_images=11,
        feature_error=_feature_error([pair]),
        kind="features",
        measures={"correlation": pytest.approx(torch.stack(correlation).mean().item(), rel=1e-4)},
    )
    assert result.correlation == result.to_dict()["correlation"] and result.mask_iou is None


def test_backbone_by_its_feature_maps():
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        out_features=["stage1", "stage2"],
    )
    torch.manual_seed(0)
    reference = AutoBackbone.from_config(config).eval()
    model = changed(reference)
    with torch.no_grad():
        pairs = list(zip(reference(pixels()).feature_maps, model(pixels()).feature_maps, strict=True))
    assert len(pairs) == 2
    assert evaluate_model(model, [Batch(pixels())], reference).feature_error == _feature_error(pairs)


def test_head_without_classes_by_its_output():
    model = tiny_vit(ViTForMaskedImageModeling)
    result = evaluate_model(changed(model), [Batch(pixels())], model)
    assert result.feature_error > 0
    assert result.kl is None


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_logits_without_softmax_are_features(problem, batches):
    model = tiny_vit(problem_type=problem)
    result = evaluate_model(changed(model), batches, model)
    assert result.feature_error > 0
    assert (result.kl, result.top1) == (None, None)


def test_models_are_left_as_they_were(batches):
    model, reference = tiny_vit().train(), tiny_vit().eval()
    model.vit.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    evaluate_model(model, batches, reference)
    assert [module.training for module in model.modules()] == modes
    assert not any(module.training for module in reference.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mode_is_restored_after_an_error():
    model = tiny_vit().train()
    with pytest.raises(ValueError, match="outside"):
        evaluate_model(model, [Batch(pixels(1), torch.tensor([9]))])
    assert all(module.training for module in model.modules())


def test_dropout_does_not_matter(batches):
    model = tiny_vit(hidden_dropout_prob=0.5).train()
    assert evaluate_model(model, batches, reference=tiny_vit()).kl == 0


def test_every_image_runs_once_through_each_model(batches):
    model, reference = tiny_vit(), tiny_vit()
    seen = {"model": [], "reference": []}
    for name, each in (("model", model), ("reference", reference)):
        each.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(len(kwargs["pixel_values"])), with_kwargs=True
        )
    evaluate_model(model, batches, reference)
    assert seen == {"model": [8, 3], "reference": [8, 3]}


def test_model_in_half_precision_against_original_in_full(batches):
    result = evaluate_model(tiny_vit().bfloat16(), batches, reference=tiny_vit())
    assert 0 < result.kl < 0.1


def test_progress_can_be_switched_off(batches, capsys):
    evaluate_model(tiny_vit(), batches, progress=False)
    assert "Evaluating" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "batches", "reference", "message"),
    [
        (tiny_vit, [], None, "no images to evaluate"),
        (tiny_vit, [Batch(pixels())], None, "nothing to measure: give labels"),
        (lambda: tiny_vit().vit, [Batch(pixels(), torch.zeros(4, dtype=torch.long))], None, "nothing to measure"),
        (tiny_vit, [Batch(pixels(1), torch.tensor([0])), Batch(pixels(1))], tiny_vit, "Some batches have labels"),
        (tiny_vit, [Batch(pixels())], lambda: tiny_vit().vit, "different heads"),
        (tiny_vit, [Batch(pixels())], lambda: tiny_vit(num_labels=4), r"Logits of shape \(4, 5\)"),
        (tiny_vit, [Batch(pixels() * torch.nan)], tiny_vit, "The model gives NaN or Inf"),
        (lambda: torch.nn.Identity(), [Batch(pixels())], None, None),
    ],
    ids=["no-image", "no-measure", "no-head", "some-labels", "heads", "classes", "nan", "other-module"],
)
def test_what_cannot_be_measured(model, batches, reference, message):
    error = TypeError if message is None else ValueError
    with pytest.raises(error, match=message or "pixel_values"):
        evaluate_model(model(), batches, reference() if reference else None)


def test_output_without_anything_to_compare():
    class Strange(torch.nn.Linear):
        def forward(self, pixel_values):
            return {"loss": pixel_values}

    with pytest.raises(ValueError, match="The dict holds neither logits nor features"):
        evaluate_model(Strange(1, 1), [Batch(pixels())], Strange(1, 1))


def test_an_output_of_zeros_has_no_relative_error():
    class Constant(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, pixel_values):
            return {"depth": self.value.expand(len(pixel_values), 3)}

    with pytest.raises(ValueError, match="is zero for an image.*name other outputs by `output_names`"):
        evaluate_model(Constant(1.0), [Batch(pixels(2))], reference=Constant(0.0))


def test_intervals_hold_what_was_measured():
    result = EvaluationResult(400, top1=0.88, reference_top1=0.9, agreement=0.95, gained=0.01, lost=0.03)
    intervals = result.intervals()
    assert intervals.keys() == {"top1", "reference_top1", "agreement", "change"}
    assert all(low < getattr(result, name, -0.02) < high for name, (low, high) in intervals.items())
    assert EvaluationResult(400, feature_error=0.1).intervals() == {}
