"""What of an output is a distribution and what is a feature, by what the model returns."""

from types import SimpleNamespace

import pytest
import torch
from families.catalogue import FAMILIES
from transformers import CLIPVisionConfig, SiglipVisionConfig, ViTConfig

from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.kinds import OutputKind
from optimum_mixrank.runtime.model_output import ModelOutput, binary
from optimum_mixrank.runtime.outputs import ModelCall, select_output
from optimum_mixrank.runtime.registry import KINDS


IMAGES = 2


def rows(*shape):
    return torch.randn(IMAGES, *shape)


CASES = {
    "boxes with one softmax": (
        {"logits": rows(5, 4), "pred_boxes": rows(5, 4), "last_hidden_state": rows(5, 8)},
        {"num_labels": 3},
        ("detection", [(5, 4)], [(5, 4)]),
    ),
    "boxes with a sigmoid per class": (
        {"logits": rows(5, 3), "pred_boxes": rows(5, 4)},
        {"num_labels": 3},
        ("detection", [(5, 3, 2)], [(5, 4)]),
    ),
    "boxes and masks": (
        {"logits": rows(5, 4), "pred_boxes": rows(5, 4), "pred_masks": rows(5, 6, 6)},
        {"num_labels": 3},
        ("detection", [(5, 4), (5, 6, 6, 2)], [(5, 4)]),
    ),
    "boxes with classes named by texts": (
        {"logits": rows(5, 4), "pred_boxes": rows(5, 4), "text_embeds": rows(4, 8)},
        {"num_labels": 3},
        ("detection", [(5, 4, 2)], [(5, 4)]),
    ),
    "a class per pixel": ({"logits": rows(3, 6, 6)}, {"num_labels": 3}, ("segmentation", [(6, 6, 3)], [])),
    "one class per pixel": ({"logits": rows(1, 6, 6)}, {"num_labels": 1}, ("masks", [(1, 6, 6, 2)], [])),
    "maps that are no classes": ({"logits": rows(3, 6, 6)}, {"num_labels": 5}, ("features", [], [(3, 6, 6)])),
    "masks": ({"pred_masks": rows(1, 3, 6, 6), "iou_scores": rows(1, 3)}, {}, ("masks", [(1, 3, 6, 6, 2)], [])),
    "queries": (
        {"class_queries_logits": rows(5, 4), "masks_queries_logits": rows(5, 6, 6), "pixel_states": rows(8)},
        {},
        ("segments", [(5, 4), (5, 6, 6, 2)], []),
    ),
    "tokens": ({"logits": rows(7, 99)}, {"vocab_size": 99}, ("tokens", [(7, 99)], [])),
    "tokens of a decoder": (
        {"logits": rows(7, 99), "last_hidden_state": None},
        {"decoder": SimpleNamespace(vocab_size=99)},
        ("tokens", [(7, 99)], []),
    ),
    "several texts": (
        {"logits": (rows(7, 9), rows(7, 11))},
        {"num_bpe_labels": 9, "num_character_labels": 11},
        ("tokens", [(7, 9), (7, 11)], []),
    ),
    "pixels to fill in": ({"logits": rows(16, 192)}, {"num_labels": 2}, ("features", [], [(16, 192)])),
    "depth": ({"predicted_depth": rows(8, 8), "domain_logits": rows(2)}, {}, ("depth", [], [(8, 8)])),
    "heatmaps": ({"heatmaps": rows(3, 8, 8)}, {}, ("heatmaps", [], [(3, 8, 8)])),
    "an embedding": ({"image_embeds": rows(8), "last_hidden_state": rows(5, 8)}, {}, ("embeddings", [], [(8,)])),
}


@pytest.mark.parametrize(("output", "config", "expected"), CASES.values(), ids=CASES)
def test_by_names_and_shapes(output, config, expected):
    found = select_output(output, SimpleNamespace(**config), (), IMAGES)
    shapes = [[tuple(each.shape[1:]) for each in tensors] for tensors in (found.distributions, found.features)]
    assert (found.kind, *shapes) == expected


@pytest.mark.parametrize(
    ("config", "kind"), [(CLIPVisionConfig, "embeddings"), (SiglipVisionConfig, "embeddings"), (ViTConfig, "features")]
)
def test_the_pooled_output_of_a_tower_alone_is_an_embedding(config, kind):
    output = {"last_hidden_state": rows(5, 8), "pooler_output": rows(8)}
    found = select_output(output, config(), (), IMAGES)
    assert found.kind == kind and found.features[0].ndim == (2 if kind == "embeddings" else 3)


def test_outputs_that_are_named_have_their_kind():
    output = {"logits": rows(5), "predicted_depth": rows(8, 8), "boxes": rows(5, 4)}
    for names, kind in (
        (("predicted_depth",), "depth"),
        (("logits",), "classes"),
        # Nothing of what was asked for is left out.
        (("predicted_depth", "boxes"), "features"),
    ):
        found = select_output(output, SimpleNamespace(), names, IMAGES)
        assert found.kind == kind and len(found.tensors) == len(names)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("CLIP", "embeddings"),
        ("SigLIP", "embeddings"),
        ("LLaVA", "features"),
        ("MGP-STR", "tokens"),
        ("ViTPose", "heatmaps"),
    ],
)
def test_of_models(name, kind):
    family = FAMILIES[name]
    model, inputs = family.make(), family.batches(1, IMAGES)[0]
    with torch.no_grad():
        found = ModelCall().bound(model, ModelInputs(inputs))(model, inputs)
    assert found.kind == kind and all(len(each) == IMAGES for each in found.tensors)


def test_a_sigmoid_as_a_softmax_of_two():
    logits = torch.tensor([-torch.inf, -2.0, 0.0, 3.0])
    probabilities = binary(logits).softmax(dim=-1)
    assert torch.allclose(probabilities[:, 0], logits.sigmoid())
    assert torch.allclose(probabilities[:, 1], (-logits).sigmoid())


def test_a_kind_of_others_is_asked_first(monkeypatch):
    monkeypatch.setattr(KINDS, "_classes", dict(KINDS._classes))

    class Gaze(OutputKind):
        name = "gaze"

        def select(self, output, config):
            return ModelOutput(features=(output["gaze"],), kind=self.name) if "gaze" in output else None

    KINDS.register(Gaze)
    found = select_output({"gaze": rows(2), "predicted_depth": rows(8, 8)}, SimpleNamespace(), (), IMAGES)
    assert found.kind == "gaze"
