"""Models whose layers are more than `W x + b` are refused before the first image is read."""

import logging

import pytest
import torch
from models import pixels, tiny_swin, tiny_vit
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig, find_targets
from optimum_mixrank.calibration.plain_layers import check_model


SETTINGS = {"compression_ratio": 0.3, "compression_scope": "targets", "recipe": "fast"}


class Images(list):
    """A list that knows whether it has been read."""

    read = False

    def __iter__(self):
        self.read = True
        return super().__iter__()


def first(model):
    return find_targets(model)[0].module


def blocks(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Marked(nn.Parameter):
    """A weight of a class of its own, like those of quantizers."""


def adapted(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=[find_targets(model)[0].name.rpartition(".")[2]]))


def double(model):
    first(model).__class__ = Doubled


def mark(model):
    layer = first(model)
    layer.weight = Marked(layer.weight.data)


def tie(model):
    layers = [target.module for target in find_targets(model)]
    layers[1].weight = layers[0].weight


def reuse(model):
    blocks(model)[1] = blocks(model)[0]


def share_a_layer(model):
    parent = next(each for each in model.modules() if first(model) in each.children())
    name = next(name for name, child in parent.named_children() if child is first(model))
    other = [each for each in model.modules() if type(each) is type(parent)][1]
    setattr(other, name, first(model))


def quantize_elsewhere(model):
    model.config.quantization_config = {"quant_method": "gptq"}


CASES = {
    "adapter": (adapted, "adapter that is not merged.*merge_and_unload"),
    "weight norm": (lambda model: parametrizations.weight_norm(first(model)), "computed at each call"),
    "orthogonal": (lambda model: parametrizations.orthogonal(first(model)), "computed at each call"),
    "spectral norm of old": (lambda model: spectral_norm(first(model)), "computed at each call.*remove_spectral_norm"),
    "mask": (lambda model: prune.l1_unstructured(first(model), "weight", 0.3), "computed at each call.*prune.remove"),
    "mask on the head": (
        lambda model: prune.random_unstructured(model.classifier, "weight", 0.3),
        "'classifier' is computed",
    ),
    "own forward": (double, "Doubled with a `forward` of its own"),
    "own class of weights": (mark, "Marked of torch.float32, not a plain tensor"),
    "tied weights": (tie, "share one weight"),
    "reused block": (reuse, "used in two places"),
    "reused layer": (share_a_layer, "used in two places"),
    "quantized": (quantize_elsewhere, "quant_method='gptq'"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_the_first_image(case):
    change, message = CASES[case]
    model, images = tiny_vit(), Images([pixels()])
    change(model)
    with pytest.raises(ValueError, match=message):
        MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), images)
    assert not images.read


def test_a_convolution_whose_weight_its_class_computes(tmp_path):
    """Wav2Vec 2.0 makes its positions by a convolution with weight norm, which is saved and read as it is."""
    model, batches = tiny_wav2vec2(), [{"input_values": torch.randn(4, 400)}]
    made = MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), batches, save_directory=tmp_path)
    reloaded = Wav2Vec2ForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(made(**batches[0]).logits, reloaded(**batches[0]).logits)


def test_a_convolution_whose_weight_is_computed_otherwise():
    model = tiny_wav2vec2()
    prune.l1_unstructured(model.wav2vec2.feature_extractor.conv_layers[0].conv, "weight", 0.3)
    with pytest.raises(ValueError, match="'wav2vec2.feature_extractor.conv_layers.0.conv' is computed at each call"):
        find_targets(model)


def test_what_is_computed_on_top_of_that_weight():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = tiny_wav2vec2()
    parametrize.register_parametrization(model.wav2vec2.encoder.pos_conv_embed.conv, "weight", Halved())
    with pytest.raises(ValueError, match="'wav2vec2.encoder.pos_conv_embed.conv' is computed at each call"):
        find_targets(model)


def test_random_numbers_are_left_as_they_were():
    model = tiny_wav2vec2()
    before = torch.get_rng_state()
    check_model(model)
    assert torch.equal(torch.get_rng_state(), before)


def tiny_wav2vec2():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes, **convolutions, **positions)).eval()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantized tensor")
def test_dynamically_quantized():
    model = torch.ao.quantization.quantize_dynamic(tiny_vit(), {nn.Linear})
    with pytest.raises(ValueError, match="is quantized .*Compress the original instead"):
        find_targets(model)


def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_vit(), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TypeError, match="not merged.*merge_and_unload"):
        MixRankCompressor(wrapped)
    assert find_targets(wrapped.merge_and_unload())


def test_a_mask_made_permanent():
    model = tiny_vit()
    layer = first(model)
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.remove(layer, "weight")
    assert find_targets(model)


def test_a_layer_that_is_left_out_may_be_special():
    model = tiny_swin()
    name = find_targets(model)[0].name
    double(model)
    assert name not in [target.name for target in find_targets(model, exclude_modules=[name])]


@pytest.mark.parametrize("part", ["", "classifier"])
def test_a_forward_that_was_replaced(part):
    model = tiny_vit()
    module = model.get_submodule(part)
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    images = Images([pixels(4)])
    with pytest.raises(ValueError, match="was replaced by a function.*wrap or compile the result instead"):
        MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), images)
    assert not images.read


def test_a_compiled_model():
    with pytest.raises(TypeError, match="model is compiled; give the model as it was before"):
        MixRankCompressor(torch.compile(tiny_vit()))


def test_a_layer_whose_weight_another_stack_shares_is_left_out_with_one_line(caplog):
    model = tiny_vit()
    every = {target.name for target in find_targets(model)}
    shared = first(model)
    # As detectors share the weights of their heads between the encoder and the decoder.
    model.base_model.heads = nn.ModuleList([nn.Linear(shared.in_features, shared.out_features)])
    model.base_model.heads[0].weight = shared.weight
    with caplog.at_level(logging.INFO, logger="optimum_mixrank"):
        found = find_targets(model)
    assert shared not in [target.module for target in found] and len(found) == len(every) - 1
    assert [each for each in caplog.messages if "their weights are used elsewhere too" in each]
