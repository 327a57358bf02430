"""A compressed part of another model: plain `save_pretrained` of the whole, plain `from_pretrained`."""

import json

import pytest
import torch
from models import pixels, tiny_swin, tiny_vit
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
    ViTForImageClassification,
    ViTModel,
)

from optimum_mixrank import FactoredLinear, MixRankCompressor, MixRankConfig


SETTINGS = {"compression_ratio": 0.3, "compression_scope": "targets", "recipe": "fast"}
TEXT = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOKENS = torch.arange(5)[None]


def decoder():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "is_decoder": True, "add_cross_attention": True}
    return GPT2LMHeadModel(GPT2Config(**sizes, **TEXT))


def encoder_decoder():
    return VisionEncoderDecoderModel(encoder=tiny_vit(ViTModel), decoder=decoder())


def clip():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return CLIPModel(
        CLIPConfig(text_config={**sizes, **TEXT}, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    )


def upernet():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}
    backbone = SwinConfig(**sizes, depths=[1] * 4, num_heads=[2] * 4, out_features=stages)
    sizes = {"hidden_size": 8, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "pool_scales": [1]}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes, num_labels=3))


def dual_encoder():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return VisionTextDualEncoderModel(
        vision_model=tiny_vit(ViTModel), text_model=BertModel(BertConfig(**sizes, vocab_size=20))
    )


def of_clip(whole):
    """Return the vision tower as a model of its own: in Transformers 4.57 it is none."""
    tower = whole.vision_model
    if not isinstance(tower, CLIPVisionModel):
        tower = CLIPVisionModel(whole.config.vision_config)
        tower.vision_model = whole.vision_model
    return tower


WHOLES = {
    "encoder and decoder": (encoder_decoder, lambda whole: whole.encoder),
    "CLIP": (clip, of_clip),
    "backbone": (upernet, lambda whole: whole.backbone),
    "two encoders": (dual_encoder, lambda whole: whole.vision_model),
    "the whole": (upernet, lambda whole: whole),
}


def compress(part, inplace=True):
    return MixRankCompressor(part).compress(MixRankConfig(**SETTINGS), [pixels(8)], inplace=inplace)


def factored(model):
    return {name for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def check_round_trip(whole, folder):
    """Save, open, save again and open again: always the same layers and weights."""
    for each in (folder / "first", folder / "second"):
        whole.save_pretrained(each)
        opened = type(whole).from_pretrained(each)
        assert factored(opened) == factored(whole) != set()
        state = opened.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
        whole = opened
    return whole


@pytest.mark.parametrize("name", WHOLES)
def test_round_trip(name, tmp_path):
    make, part = WHOLES[name]
    whole = make().eval()
    compress(part(whole))
    check_round_trip(whole, tmp_path)


def test_a_copy_that_was_put_in_place(tmp_path):
    whole = encoder_decoder().eval()
    whole.encoder = compress(whole.encoder, inplace=False)
    opened = check_round_trip(whole, tmp_path).eval()
    with torch.no_grad():
        outputs = [each(pixel_values=pixels(1), decoder_input_ids=TOKENS).logits for each in (whole, opened)]
    assert torch.equal(*outputs)


def test_from_a_compressed_encoder(tmp_path):
    MixRankCompressor(tiny_vit(ViTModel)).compress(
        MixRankConfig(**SETTINGS), [pixels(8)], save_directory=tmp_path / "encoder"
    )
    decoder().save_pretrained(tmp_path / "decoder")
    whole = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder")
    check_round_trip(whole, tmp_path)


def test_several_compressed_parts(tmp_path):
    whole = encoder_decoder()
    compress(whole.encoder)
    whole = check_round_trip(whole, tmp_path / "one")
    before = factored(whole)
    # The head of the decoder, made by hand: the map of the file gets a layer more.
    from optimum_mixrank.checkpoint.modeling import LowRankLinear

    whole.encoder.pooler.dense = LowRankLinear.from_factors(torch.randn(4, 32), torch.randn(32, 4), torch.zeros(32))
    opened = check_round_trip(whole, tmp_path / "two")
    assert factored(opened) == before | {"encoder.pooler.dense"}


def test_a_part_of_the_file_is_opened_alone(tmp_path):
    whole = clip()
    compress(of_clip(whole))
    whole.save_pretrained(tmp_path)
    assert factored(CLIPVisionModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("by_part", [False, True])
def test_dense_again(by_part, tmp_path):
    whole = encoder_decoder()
    compress(whole.encoder)
    if not by_part:
        whole.save_pretrained(tmp_path / "compressed")
        whole = type(whole).from_pretrained(tmp_path / "compressed")
    (whole.encoder if by_part else whole).dequantize()
    whole.save_pretrained(tmp_path / "dense")
    assert "rank_map" not in (tmp_path / "dense" / "config.json").read_text()
    assert not factored(type(whole).from_pretrained(tmp_path / "dense"))


def test_the_compressor_saves_a_whole(tmp_path):
    whole = encoder_decoder()
    compressor = MixRankCompressor(whole.encoder)
    compressor.compress(MixRankConfig(**SETTINGS), [pixels(8)], inplace=True)
    compressor.save_pretrained(whole, tmp_path / "out")
    assert factored(type(whole).from_pretrained(tmp_path / "out")) == factored(whole)


def test_names_in_the_file_are_those_of_the_whole(tmp_path):
    whole = encoder_decoder()
    compress(whole.encoder)
    whole.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert all(name.startswith("encoder.encoder.layer.") for name in content["quantization_config"]["rank_map"])


def test_a_dense_model_stays_as_it_is(tmp_path):
    compress(tiny_vit())
    model = tiny_swin()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert isinstance(model, nn.Module) and not hasattr(model, "hf_quantizer")


def test_a_part_replaced_by_another_with_the_same_layers(tmp_path):
    whole = MixRankCompressor(tiny_vit()).compress(MixRankConfig(**SETTINGS), [pixels(8)])
    other = tiny_vit()
    with torch.no_grad():
        for parameter in other.parameters():
            # Other rows become pivots.
            parameter.copy_(parameter.flip(0))
    whole.vit = MixRankCompressor(other).compress(MixRankConfig(**SETTINGS), [pixels(8)]).vit
    whole.save_pretrained(tmp_path)
    reloaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(pixels(2)).logits, whole.eval()(pixels(2)).logits)


@pytest.mark.parametrize("whole", [False, True])
def test_models_that_initialize_a_layer_from_outside(tmp_path, whole):
    """SigLIP's `_init_weights` draws the weights of its MLPs from the module around them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = SiglipVisionModel(SiglipVisionConfig(**vision)).eval()
    model = MixRankCompressor(model).compress(MixRankConfig(**SETTINGS), [pixels(8)])
    expected = model(pixels(2)).last_hidden_state
    if whole:
        text = {**sizes, **TEXT, "max_position_embeddings": 8}
        around = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        around.vision_model = getattr(model, "vision_model", model)
        model = around
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path).eval()
    found = (reloaded.vision_model if whole else reloaded)(pixels(2)).last_hidden_state
    assert torch.equal(found, expected)
