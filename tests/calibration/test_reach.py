"""What of a model is targeted, and of what kind all else is."""

import pytest
import torch
from families.catalogue import FAMILIES
from models import tiny_vit

from optimum_mixrank import find_targets
from optimum_mixrank.calibration import reach
from optimum_mixrank.calibration.reach import measure_reach
from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.outputs import ModelCall


def measured(model, batch=None, **patterns):
    call = ModelCall().bound(model, None if batch is None else ModelInputs(batch))
    targets = find_targets(model, call=call, **patterns)
    found = measure_reach(model, targets, call)
    assert found.targeted == sum(target.module.weight.numel() for target in targets)
    assert found.targeted + sum(found.left_out.values()) == sum(each.numel() for each in model.parameters())
    return found


def size(model, *parts):
    return sum(each.numel() for name, each in model.named_parameters() if name.startswith(parts))


def of(name):
    family = FAMILIES[name]
    model = family.make()
    return model, measured(model, family.batches(1, 2)[0])


def test_of_a_classifier():
    model = tiny_vit()
    found = measured(model, exclude_modules=["query"])
    assert found.images == sum(each.numel() for each in model.parameters())
    assert found.left_out[reach.HEADS] == model.classifier.weight.numel()
    queries = [module for name, module in model.named_modules() if name.endswith(("query", "q_proj"))]
    assert found.left_out[reach.EXCLUDED] == sum(module.weight.numel() for module in queries)
    assert found.left_out[reach.EMBEDDINGS] == size(model, "vit.embeddings.")
    assert set(found.left_out) == {reach.HEADS, reach.EXCLUDED, reach.EMBEDDINGS, reach.VECTORS}


def test_of_a_model_for_images_and_text():
    model, found = of("LLaVA")
    vision = size(model, "model.vision_tower", "model.multi_modal_projector")
    assert found.images == vision and found.left_out[reach.TEXT] == size(model, "") - vision
    assert found.left_out[reach.MERGERS] == sum(
        each.numel() for each in model.model.multi_modal_projector.parameters() if each.ndim > 1
    )


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("SigLIP", reach.POOLING, "vision_model.head."),
        ("Qwen2-VL", reach.MERGERS, None),
        ("RT-DETR", reach.CONVOLUTIONS, None),
        ("TrOCR", reach.DECODERS, "decoder."),
    ],
)
def test_kinds_that_are_left_out(name, kind, part):
    model, found = of(name)
    assert found.left_out[kind] > 0
    if part is not None:
        assert found.left_out[kind] == size(model, part)


def test_a_model_that_does_not_run(monkeypatch):
    model = tiny_vit()
    call = ModelCall(example=ModelInputs(torch.zeros(1, 3, 8, 8)))
    found = measure_reach(model, [], call)
    assert found.images is None and sum(found.left_out.values()) == sum(each.numel() for each in model.parameters())
