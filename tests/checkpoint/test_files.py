import json

import pytest
import torch
from models import tiny_swin, tiny_vit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTForMaskedImageModeling

from optimum_mixrank import LowRankLinear
from optimum_mixrank.checkpoint.files import (
    check_saved_files,
    count_parameters,
    safetensors_bytes,
    safetensors_files,
    stored_dtype,
    stored_tensors,
)
from optimum_mixrank.checkpoint.modeling import replace_module


def factored_vit():
    model = tiny_vit()
    name = next(name for name, m in model.vit.named_modules() if isinstance(m, nn.Linear) and m.out_features == 64)
    replace_module(
        model.vit, name, LowRankLinear.from_factors(torch.randn(5, 32), torch.randn(64, 5), torch.randn(64))
    )
    return model


def test_a_tied_parameter_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_parameters(model) == 16 + 4 + 4


def test_parameters_of_a_factored_model():
    assert count_parameters(factored_vit()) == count_parameters(tiny_vit()) - 64 * 32 + 5 * (64 + 32)


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one-file", "shards"])
@pytest.mark.parametrize("make", [tiny_vit, tiny_swin, factored_vit], ids=["vit", "swin", "factored"])
def test_headers_tell_what_the_files_hold(make, size, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "20KB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    stored = stored_tensors(tmp_path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert sum(tensor.num_values for tensor in stored.values()) >= count_parameters(model)
    assert safetensors_files(tmp_path) == files
    assert safetensors_bytes(tmp_path) == sum(len(file.read_bytes()) for file in files)
    check_saved_files(model, tmp_path)


def test_dtype_is_that_of_the_file(tmp_path):
    tiny_vit().half().save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in stored_tensors(tmp_path).values()} == {"F16"}
    shape, dtype = stored_tensors(tmp_path)["classifier.weight"]
    assert (shape, dtype) == ((5, 32), "F16")
    assert stored_dtype(tmp_path) == "float16"


def test_the_dtype_of_most_values_counts(tmp_path):
    save_file({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == "float32"
    save_file({"a": torch.zeros(9, dtype=torch.int8), "b": torch.zeros(5)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) is None


def test_check_passes_for_another_precision(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    check_saved_files(model.half(), tmp_path)


def test_check_finds_another_model(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hold [\d,]+ values, the ViTForImageClassification [\d,]+; the checkpoint"):
        check_saved_files(factored_vit(), tmp_path)


def test_check_finds_a_missing_tensor(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("classifier.bias")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not belong to this model"):
        check_saved_files(model, tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_check_counts_tied_tensors_once(device, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    model[1].weight = model[0].weight
    save_file({"w": torch.zeros(4, 4), "b": torch.zeros(4), "c": torch.zeros(4)}, tmp_path / "model.safetensors")
    check_saved_files(model, tmp_path)


def test_check_of_another_head(tmp_path):
    model = tiny_vit(ViTForMaskedImageModeling)
    model.save_pretrained(tmp_path)
    check_saved_files(model, tmp_path)


def test_folder_without_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        safetensors_bytes(tmp_path)


def _index(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no `weight_map`"),
        ([], "has no `weight_map`"),
        ({"weight_map": {"a": "../a.safetensors"}}, r"lists '\.\./a\.safetensors', which is not a file beside it"),
    ],
    ids=["empty", "list", "outside"],
)
def test_malformed_index(content, message, tmp_path):
    _index(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        stored_tensors(tmp_path)


def test_missing_shard(tmp_path):
    _index(tmp_path, {"weight_map": {"a": "a.safetensors"}})
    with pytest.raises(FileNotFoundError, match=r"has no a\.safetensors"):
        stored_tensors(tmp_path)


def test_tensor_in_two_shards(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    _index(tmp_path, {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    with pytest.raises(ValueError, match=r"Tensor 'x' is in b\.safetensors and in another shard"):
        stored_tensors(tmp_path)
