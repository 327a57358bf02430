"""Models that hold a layer in two places without declaring it are saved, and read again."""

import pytest
import torch
from models import pixels, tiny_vit
from transformers import ViTForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig, to_dense
from optimum_mixrank.checkpoint.files import stored_tensors


@pytest.fixture
def sharing():
    """A ViT whose blocks share their first normalization, as CoaT shares convolutions."""
    model = tiny_vit()
    first, second = (module for name, module in model.named_modules() if name.rpartition(".")[2] == "layernorm_before")
    owner = next(each for each in model.modules() if second in each.children())
    owner.layernorm_before = first
    return model


def test_such_a_model_is_compressed_saved_and_reloaded(sharing, tmp_path):
    with pytest.raises(RuntimeError, match="shared tensors"):
        sharing.save_pretrained(tmp_path / "of Transformers alone", state_dict=sharing.state_dict())
    compressor = MixRankCompressor(sharing)
    config = MixRankConfig(compression_ratio=0.3, recipe="fast")
    made = compressor.compress(config, [pixels(8)], tmp_path / "small")
    names = [name for name in stored_tensors(tmp_path / "small") if "layernorm_before.weight" in name]
    assert len(names) == 2
    with torch.no_grad():
        expected = made(pixels(4)).logits
        reloaded = ViTForImageClassification.from_pretrained(tmp_path / "small").eval()
        assert torch.equal(reloaded(pixels(4)).logits, expected)
        to_dense(made).save_pretrained(tmp_path / "dense")
        dense = ViTForImageClassification.from_pretrained(tmp_path / "dense").eval()
        assert torch.allclose(dense(pixels(4)).logits, expected, atol=1e-4)
