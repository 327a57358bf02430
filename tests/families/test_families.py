"""Every family of the catalogue is compressed, reloaded bit by bit, returned to dense and trained, or refused by name."""

import pytest

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.checkpoint.entries import compressed_layers

from .catalogue import FAMILIES
from .checks import CHECKS, check_family, settings


OFTEN = ["CLIP", "SigLIP2", "LLaVA", "Qwen2-VL", "SmolVLM", "TrOCR", "DETR", "MGP-STR", "PVT", "ViTMAE", "V-JEPA 2"]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]


def cases():
    for name, family in FAMILIES.items():
        if not family.refused:
            yield pytest.param(family, id=name, marks=() if name in OFTEN else pytest.mark.slow)


@pytest.mark.parametrize("family", cases())
def test_a_family(family, request):
    if not family.exists:
        pytest.skip("This release of Transformers does not have it.")
    # What is tried with every change has to be quick; all steps of the default recipe are tried with the others.
    often = request.node.callspec.id in OFTEN
    try:
        results = check_family(family, settings(recipe="fast", compensation=["sequential"]) if often else settings())
    except ImportError as error:
        pytest.skip(str(error).strip().split(".")[0])
    assert {name: results[name] for name in CHECKS} == dict.fromkeys(CHECKS, "yes")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_refused_as_what_it_is(name):
    family = FAMILIES[name]
    reason = {"text": "is a text model", "convolution": "is a convolutional network", "whole": "What of .* is unknown"}
    with pytest.raises(ValueError, match=reason[family.refused]):
        check_family(family, settings(metric="svd", recipe="fast", compensation=[], structures=["rank"]))


def test_weights_alone_are_decomposed_where_a_model_runs_on_the_given_images_alone():
    family = FAMILIES["SigLIP2, tower"]
    config = settings(metric="svd", recipe="fast", compensation=[], structures=["rank"])
    made = MixRankCompressor(family.make()).compress(config, family.batches(1))
    assert compressed_layers(made)


def test_a_part_that_is_no_model_is_refused_as_what_it_is():
    model = FAMILIES["ViT"].make()
    with pytest.raises(TypeError, match="is only a part of a model.*Give the whole model"):
        MixRankCompressor(next(each for name, each in model.named_modules() if name.endswith("embeddings")))
