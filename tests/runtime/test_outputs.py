"""Which tensors of an output are compared, for all kinds of heads."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_swin, tiny_vit
from torch import nn
from transformers import ViTModel
from transformers.modeling_outputs import DepthEstimatorOutput, ImageClassifierOutput
from transformers.utils import ModelOutput as TransformersOutput

from optimum_mixrank.runtime.inputs import ModelInputs
from optimum_mixrank.runtime.outputs import ModelCall, select_features, select_output


IMAGES = 4
PLAIN = SimpleNamespace()


def rows(*shape):
    return torch.randn(IMAGES, *shape)


@dataclass
class Several(TransformersOutput):
    loss: torch.Tensor | None = None
    maps: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    vision_hidden_states: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: tuple[torch.Tensor, ...] | None = None


@dataclass
class Plain:
    """An output that is no mapping."""

    scores: torch.Tensor
    labels: torch.Tensor


def test_logits_of_one_softmax():
    logits = rows(5)
    for names in ((), ("logits",)):
        assert select_output(ImageClassifierOutput(logits=logits), PLAIN, names).logits is logits


def test_logits_with_a_dimension_of_one_entry_for_what_was_pooled():
    logits = rows(1, 5)
    found = select_output({"logits": logits}, SimpleNamespace(num_labels=5), (), IMAGES)
    assert found.kind == "classes" and torch.equal(found.logits, logits[:, 0])
    assert select_output({"logits": logits}, SimpleNamespace(num_labels=7), (), IMAGES).kind == "features"


def test_a_head_without_a_known_name():
    depth = rows(8, 8)
    output = DepthEstimatorOutput(loss=torch.tensor(1.0), predicted_depth=depth, hidden_states=(rows(3, 2),))
    found = select_output(output, PLAIN, (), IMAGES)
    assert found.logits is None and len(found.features) == 1 and found.features[0] is depth


def test_all_tensors_of_the_result_and_no_others():
    more = {name: (rows(2, 2),) for name in ("vision_hidden_states", "cross_attentions", "past_key_values")}
    maps, scores = rows(1, 8, 8), rows(3)
    found = select_output(Several(torch.tensor(1.0), maps, scores, **more), PLAIN, (), IMAGES)
    assert [id(each) for each in found.features] == [id(maps), id(scores)]


def test_numbers_that_are_no_features_are_passed_over():
    output = {"indices": torch.arange(IMAGES), "scale": torch.tensor(2.0), "text": torch.randn(2, 3), "map": rows(3)}
    (found,) = select_output(output, PLAIN, (), IMAGES).features
    assert found is output["map"]
    (found,) = select_output(Plain(rows(2), torch.arange(IMAGES)), PLAIN, (), IMAGES).features
    assert found.shape == (IMAGES, 2)


def test_one_number_per_image():
    (found,) = select_output({"age": rows()}, PLAIN, (), IMAGES).features
    assert found.shape == (IMAGES, 1)


def test_named_outputs():
    output = {"logits": rows(5), "boxes": rows(2, 4), "levels": (rows(3), rows(4)), "inner": {"pooled": rows(6)}}
    for names, shapes in (
        (("boxes",), [(2, 4)]),
        (("levels", "boxes"), [(3,), (4,), (2, 4)]),
        (("inner.pooled",), [(6,)]),
    ):
        found = select_output(output, PLAIN, names, IMAGES)
        assert found.logits is None and [tuple(each.shape[1:]) for each in found.features] == shapes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("depth",), "output_names='depth': a dict holds no such tensors.*`logits`, `text`"),
        (("text",), r"output_names='text' has the shape \[2, 3\] for 4 images"),
        (("logits.inner",), "output_names='logits.inner'"),
    ],
)
def test_names_that_cannot_be_compared(names, message):
    with pytest.raises(ValueError, match=message):
        select_output({"logits": rows(5), "text": torch.randn(2, 3)}, PLAIN, names, IMAGES)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="neither logits nor features of images, but `loss`, `text`"):
        select_output({"loss": torch.tensor(1.0), "text": torch.randn(2, 3)}, PLAIN, (), IMAGES)


TENSORS = st.lists(st.integers(1, 3), max_size=2).map(lambda shape: torch.zeros(IMAGES, *shape))
NESTED = st.recursive(TENSORS, lambda inner: st.tuples(inner, inner) | st.fixed_dictionaries({"part": inner}))


@given(NESTED)
def test_every_tensor_is_found_however_it_is_nested(value):
    def count(each):
        if isinstance(each, torch.Tensor):
            return 1
        return sum(map(count, each.values() if isinstance(each, dict) else each))

    found = select_output({"result": value}, PLAIN, (), IMAGES).features
    assert len(found) == count(value) and all(each.ndim > 1 and len(each) == IMAGES for each in found)


@pytest.mark.parametrize("make", [lambda: tiny_vit(ViTModel), tiny_swin], ids=["vit", "swin"])
def test_images_of_another_size(make):
    model, images = make(), torch.randn(2, 3, 64, 64)
    call = ModelCall(interpolate_pos_encoding=True)
    call.check(model)
    with torch.no_grad():
        found = call(model, images)
    assert len(found.features[0] if found.logits is None else found.logits) == 2


def test_a_model_that_cannot_interpolate():
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True, but Linear has no such argument"):
        ModelCall(interpolate_pos_encoding=True).check(torch.nn.Linear(1, 1))


def _shapes(output, images):
    found = select_features(output, images)
    return found.kind, [tuple(each.shape) for each in found.features]


@pytest.mark.parametrize("named", [True, False], ids=["fields", "tuple"])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [((4, 4, 4), (3, 4)), ((4, 2, 6), (12,)), ((4,), (1, 4))],
    ids=["equal", "different", "one image"],
)
def test_features_of_images_and_of_several_layers_have_the_same_rows(sizes, rows, named):
    """As the models of Qwen3-VL return them: tokens image by image, and three layers over the tokens of all images."""
    tokens = tuple(torch.randn(size, 8) for size in sizes)
    layers = [torch.randn(sum(sizes), 8) for _ in range(3)]
    output = {"pooler_output": tokens, "deepstack_features": layers} if named else (tokens, layers)
    assert _shapes(output, len(sizes)) == ("features", [(*rows, 8)] * 4)
    (first, second, *_) = select_features(output, len(sizes)).features
    assert torch.equal(first.reshape(-1, 8), torch.cat(tokens)) and torch.equal(second.reshape(-1, 8), layers[0])


def test_what_belongs_to_no_image_is_passed_over():
    """Ovis2 under Transformers 4.57 returns the embeddings of its marks beside the tokens of every image."""
    assert _shapes((torch.randn(4, 3, 8), torch.randn(5, 8)), 4) == ("features", [(4, 3, 8)])


def test_one_vector_per_image_is_an_embedding():
    for count in (1, 4):
        assert _shapes({"pooler_output": torch.randn(count, 8)}, count) == ("embeddings", [(count, 8)])
        assert _shapes(torch.randn(count, 3, 8), count) == ("features", [(count, 3, 8)])


def test_tokens_of_the_tower_where_nothing_else_is_returned():
    """As Llama 4 returns them under Transformers 5."""
    assert _shapes({"last_hidden_state": torch.randn(4, 3, 8), "pooler_output": None}, 4) == ("features", [(4, 3, 8)])
    with pytest.raises(ValueError, match="`get_image_features` returns no features, but `hidden_states`"):
        select_features({"hidden_states": (torch.randn(4, 3, 8),)}, 4)


@pytest.mark.parametrize(
    ("rows", "kind"), [(IMAGES, "segments"), (2 * IMAGES, "segments"), (IMAGES + 1, "features")], ids=str
)
def test_queries_of_every_frame_of_a_video(rows, kind):
    """As VidEoMT returns them, which reads the frames of all videos one after the other."""
    queries = {"class_queries_logits": torch.randn(rows, 5, 3), "masks_queries_logits": torch.randn(rows, 5, 6, 6)}
    assert select_output({**queries, "last_hidden_state": torch.randn(rows, 7, 8)}, PLAIN, (), IMAGES).kind == kind


def test_what_a_model_of_sounds_and_text_hears_is_what_its_method_returns():
    class Hearing(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Linear(8, 3)

        def get_audio_features(self, input_features):
            return {"pooler_output": self.tower(input_features)}

        def forward(self, input_ids, input_features=None):
            raise AssertionError("no text is given")

    model, inputs = Hearing(), ModelInputs({"input_features": torch.randn(IMAGES, 5, 8)})
    call = ModelCall().bound(model, inputs)
    assert call.part == "get_audio_features" and call(model, inputs).features[0].shape == (IMAGES, 5, 3)
    with pytest.raises(ValueError, match="`get_audio_features` returns no features"):
        call.select(model, {"states": None}, IMAGES)


def test_the_error_of_the_method_for_features_is_the_one_that_is_told():
    class Broken(nn.Module):
        def forward(self, input_ids=None, pixel_values=None):
            raise ValueError("You have to specify input_ids")

        def get_image_features(self, pixel_values):
            raise AttributeError("'tuple' object has no attribute 'pooler_output'")

    with pytest.raises(ValueError, match="AttributeError: 'tuple' object"):
        ModelCall().bound(Broken(), ModelInputs(torch.zeros(1, 3, 8, 8)))


def test_the_method_for_features_of_a_model_inside_a_retriever_with_what_it_passes_on():
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Linear(8, 3)

        def get_image_features(self, pixel_values, merge_sizes):
            return self.tower(pixel_values.mean(dim=(1, 2))) * merge_sizes[:, None]

        def forward(self, input_ids, pixel_values=None):
            raise AssertionError("no text is given")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Seeing()

        def get_image_features(self, pixel_values, **kwargs):
            return self.model.get_image_features(pixel_values, **kwargs)

    class Retriever(nn.Module):
        def __init__(self):
            super().__init__()
            self.vlm = nn.Module()
            self.vlm.add_module("inside", Outer())

        def forward(self, input_ids, pixel_values=None):
            return self.vlm.inside.model(input_ids, pixel_values)

    tensors = {"pixel_values": torch.randn(IMAGES, 3, 8, 8), "merge_sizes": torch.ones(IMAGES)}
    model, inputs = Retriever(), ModelInputs({**tensors, "unknown": torch.ones(IMAGES)})
    call = ModelCall().bound(model, inputs)
    assert call.part == "vlm.inside.get_image_features"
    assert call(model, inputs).kind == "embeddings" and call(model, inputs).features[0].shape == (IMAGES, 3)
