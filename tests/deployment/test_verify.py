import copy
import math

import pytest
import torch
from models import mixed, pixels, segformer, tiny_deit, tiny_vit
from torch import nn
from transformers import DeiTForImageClassificationWithTeacher, DeiTModel, ViTModel

from optimum_mixrank import verify_model
from optimum_mixrank.calibration.images.batches import Batch
from optimum_mixrank.deployment.target import ExportedModel, named_precision
from optimum_mixrank.deployment.verify import Limits, precision_of, random_pixels


class Shifted(ExportedModel):
    """A model whose logits differ from those of another."""

    def __init__(self, model, shift, name="logits"):
        super().__init__()
        self.model, self.shift, self.name = [model], shift, name

    def run(self, pixel_values):
        return {self.name: self.model[0](pixel_values=pixel_values).logits + self.shift}


@pytest.fixture(scope="module")
def model():
    return mixed(tiny_vit(), "pivoted").eval()


@pytest.fixture(scope="module")
def batches(model):
    images = [pixels(4, seed=0), pixels(3, seed=1)]
    with torch.no_grad():
        return [Batch(each, model(pixel_values=each).logits.argmax(dim=1)) for each in images]


def test_a_model_equals_itself(model, batches):
    result = verify_model(model, Shifted(model, 0.0), batches)
    assert result.is_ok and result.to_dict() == {
        **{"ok": True, "precision": "float32", "num_images": 7, "num_non_finite": 0, "problems": []},
        **{"max_difference": 0.0, "relative_difference": 0.0, "agreement": 1.0, "kl": 0.0},
        **{"top1": 1.0, "source_top1": 1.0},
    }


def test_measures_against_their_definitions(model, batches):
    shift = torch.tensor([0.5, -0.25, 0.0, 2.0, 0.0])
    result = verify_model(model, Shifted(model, shift), batches)
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=batch.pixel_values).logits for batch in batches]).double()
    p, q = logits.log_softmax(1), (logits + shift).log_softmax(1)
    assert result.max_difference == pytest.approx(2.0, rel=1e-6)
    assert result.relative_difference == pytest.approx(2.0 / logits.abs().max().item(), rel=1e-6)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    assert result.agreement == result.top1 == (p.argmax(1) == q.argmax(1)).double().mean().item()
    [problem] = result.problems
    assert problem == "the outputs differ by 2, the limit is 0.0001"


def test_each_precision_has_its_limits(model, batches):
    slightly = Shifted(model, torch.tensor([0.01, 0.0, 0.0, 0.0, 0.0]))
    assert not verify_model(model, slightly, batches).is_ok
    assert verify_model(model, slightly, batches, "half").is_ok
    clearly = Shifted(model, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]))
    [problem] = verify_model(model, clearly, batches, "half").problems
    assert problem.startswith("KL is ") and problem.endswith("the limit is 0.001")
    assert verify_model(model, clearly, batches, limits=Limits(difference=1.0 + 1e-6)).is_ok
    with pytest.raises(ValueError, match="precision='int4' is unknown; choose one of 'float32', 'half', 'int8'"):
        verify_model(model, clearly, batches, "int4")


def test_one_other_class_among_few_images_is_tolerated(model, batches):
    with torch.no_grad():
        logits = model(pixel_values=batches[0].pixel_values).logits
    # Exchanges the two largest logits of some images.
    top = logits.topk(2).indices
    exchanged = logits.clone().scatter_(1, top, logits.gather(1, top.flip(1)))
    for count, ok in ((1, True), (2, False)):
        changed = torch.where(torch.arange(4)[:, None] < count, exchanged, logits)
        fake = Shifted(model, changed - logits)
        assert verify_model(model, fake, batches[:1], limits=Limits(agreement=0.99)).is_ok is ok


def test_nan_is_broken(model, batches):
    result = verify_model(model, Shifted(model, torch.tensor([math.nan, math.inf, 0.0, 0.0, 0.0])), batches, "int8")
    assert result.num_non_finite == 14 and "14 outputs are NaN or Inf" in result.problems
    assert math.isfinite(result.max_difference)


def test_a_single_output_needs_no_name(model, batches):
    assert verify_model(model, Shifted(model, 0.0, "output_0"), batches).is_ok


def test_outputs_without_names_are_those_of_the_source_in_their_order():
    class Unnamed(ExportedModel):
        def __init__(self, model):
            super().__init__()
            self.model = [model]

        def run(self, pixel_values):
            values = self.model[0](pixel_values=pixel_values).values()
            return {f"output_{index}": value for index, value in enumerate(values)}

    for cls in (DeiTForImageClassificationWithTeacher, DeiTModel):
        model = tiny_deit(cls)
        result = verify_model(model, Unnamed(model), [Batch(pixels(3))])
        assert result.is_ok and result.max_difference == 0 and (result.kl is None) == (cls is DeiTModel)


def test_models_that_do_not_belong_together(model, batches):
    other = tiny_vit(num_labels=3).eval()
    with pytest.raises(ValueError, match=r"shape \[\[4, 5\]\] and the exported model \[\[4, 3\]\]"):
        verify_model(model, other, batches)
    with pytest.raises(ValueError, match="There are no images to compare"):
        verify_model(model, model, [])


def test_features_are_compared_where_there_are_no_classes():
    encoder = tiny_vit(ViTModel, add_pooling_layer=False).eval()
    batches = [Batch(random_pixels(encoder, 3))]
    half = verify_model(encoder, copy.deepcopy(encoder).to(torch.bfloat16), batches)
    assert half.is_ok and half.precision == "half" and half.agreement is None and 0 < half.relative_difference < 0.05
    with torch.no_grad():
        damaged = copy.deepcopy(encoder)
        damaged.layernorm.weight.mul_(1.001)
    assert not verify_model(encoder, damaged, batches).is_ok


def test_precision_is_that_of_the_weights(model):
    assert precision_of(model) == "float32" and precision_of(copy.deepcopy(model).half()) == "half"
    assert precision_of(nn.Identity()) == "float32"
    assert [named_precision(each) for each in (["FLOAT", "INT8"], ["f32", "f16"], ["f32", "i64"], [])] == [
        *("int8", "half", "float32", "float32")
    ]


def test_images_for_which_the_file_was_not_made(model, batches):
    class Other(Shifted):
        def run(self, pixel_values):
            raise RuntimeError("Got invalid dimensions for input")

    with pytest.raises(ValueError, match=r"does not run on images of 3 x 32 x 32, .* another size. \(Got invalid dim"):
        verify_model(model, Other(model, 0.0), batches)


def test_a_model_in_half_precision_that_does_not_run_says_why_itself(model, batches, monkeypatch):
    half = copy.deepcopy(model).half()

    def fail(*_, **__):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(half, "forward", fail)
    with pytest.raises(RuntimeError, match="^not implemented for 'Half'$"):
        verify_model(model, half, batches)


def test_a_model_that_names_no_size_takes_that_of_the_images():
    model = segformer()
    images = torch.randn(3, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    assert verify_model(model, Shifted(model, 0.0), [Batch(images)]).is_ok
    assert random_pixels(model, 2, (3, 32, 64)).shape == (2, 3, 32, 64)
