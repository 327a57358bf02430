"""Models placed by `device_map` and by Accelerate's hooks."""

import accelerate
import pytest
import torch
from compensation.cases import config, images
from models import tiny_vit
from transformers import AutoImageProcessor, AutoModelForImageClassification

from optimum_mixrank import MixRankCompressor
from optimum_mixrank.checkpoint.original import check_placement, load_image_processor
from optimum_mixrank.runtime.distributed import Processes


EVERY_STEP = config(compensation=["sequential", "blocks", "distillation"], epochs=1, train_batch_size=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_vit().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    return MixRankCompressor(tiny_vit()).compress(EVERY_STEP, batches())


def batches():
    return list(images(64).split(16))


def blocks(model):
    """Module names of the first and the second block."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return [f"{lists[0]}.{index}" for index in range(2)]


def check(compressor, expected, folder, **arguments):
    with torch.no_grad():
        before = compressor.model(images(3)).logits
    model = compressor.compress(EVERY_STEP, batches(), save_directory=folder, **arguments)
    for tensor, other in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(tensor, other)
    with torch.no_grad():
        outputs = expected.eval()(images(3)).logits
        assert torch.equal(model.eval()(images(3)).logits, outputs)
        assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(images(3)).logits, outputs)
        if compressor.model is not model:
            assert torch.equal(compressor.model(images(3)).logits, before)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_map_of_one_device(device_map, checkpoint, expected, tmp_path, monkeypatch):
    # "auto" takes a GPU where there is one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(MixRankCompressor.from_pretrained(checkpoint, device_map=device_map), expected, tmp_path)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_hooks_that_move_inputs_to_the_weights(inplace, expected, tmp_path):
    """As for a model on several GPUs, but here all parts have the same device."""
    model = tiny_vit()
    first, second = blocks(model)
    children = [name for name, module in model.named_modules() if name.count(".") == 1 and not first.startswith(name)]
    places = dict.fromkeys([*children, first, second, "classifier"], "cpu")
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert hasattr(model.get_submodule(first), "_hf_hook") and model.hf_device_map == places
    check(MixRankCompressor.from_pretrained(model), expected, tmp_path, inplace=inplace)


def offloaded_by_hooks(checkpoint, folder):
    return accelerate.cpu_offload(tiny_vit(), execution_device=torch.device("cpu"))


def on_disk(checkpoint, folder):
    model = tiny_vit()
    places = {
        name: "disk" if any(True for _ in module.children()) else "cpu" for name, module in model.vit.named_children()
    }
    places = {f"vit.{name}": place for name, place in places.items()} | {"classifier": "cpu"}
    return AutoModelForImageClassification.from_pretrained(checkpoint, device_map=places, offload_folder=folder)


@pytest.mark.parametrize("place", [offloaded_by_hooks, on_disk])
def test_offloaded_weights_are_refused(place, checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"\d+ weights of this ViTForImageClassification are offloaded .* larger `max_memory`"
    ):
        MixRankCompressor(place(checkpoint, tmp_path))


def test_device_beside_device_map_is_refused(checkpoint):
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' both say where to put the model"):
        MixRankCompressor.from_pretrained(checkpoint, device="cpu", device_map="auto")
    model = tiny_vit()
    model.hf_device_map = {"vit": 0, "classifier": 1}
    with pytest.raises(ValueError, match=r"device='cpu' and device_map=\{'vit': 0, 'classifier': 1\}"):
        MixRankCompressor.from_pretrained(model, device="cpu")


class Spread:
    """Stands in for a model on two GPUs."""

    def named_parameters(self):
        return [(str(index), Weight(index)) for index in range(2)]

    def parameters(self):
        return [weight for _, weight in self.named_parameters()]


class Weight:
    is_meta = False

    def __init__(self, index):
        self.device = torch.device("cuda", index)


def test_a_model_on_several_devices_needs_a_single_process():
    check_placement(Spread(), Processes())
    with pytest.raises(ValueError, match="spread over cuda:0, cuda:1 in each of 2 processes"):
        check_placement(Spread(), Processes(0, 2))


@pytest.mark.parametrize("dtype", ["float16", torch.float16], ids=str)
def test_the_old_name_of_dtype_is_refused(dtype, checkpoint):
    with pytest.raises(TypeError, match="torch_dtype=.* is an old name; pass `dtype` instead"):
        MixRankCompressor.from_pretrained(checkpoint, torch_dtype=dtype)


@pytest.mark.parametrize("sizes", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_variant_is_read_and_written(sizes, tmp_path):
    tiny_vit().save_pretrained(tmp_path / "original", variant="fp16", **sizes)
    compressor = MixRankCompressor.from_pretrained(tmp_path / "original", variant="fp16")
    model = compressor.compress(config(compensation=[]), batches())
    compressor.save_pretrained(model, tmp_path / "out", variant="fp16", **sizes)
    assert compressor.report.bytes_on_disk_before > compressor.report.bytes_on_disk_after
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out", variant="fp16")
    assert torch.equal(reloaded(images(3)).logits, model.eval()(images(3)).logits)


def test_an_image_processor_whose_library_is_missing_is_none(checkpoint, monkeypatch, caplog):
    def fail(*_, **__):
        raise ImportError("TimmWrapperImageProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", fail)
    assert load_image_processor(checkpoint, {}, needed=False) is None and not caplog.records
    assert load_image_processor(checkpoint, {}) is None
    assert "has no usable image processor (TimmWrapperImageProcessor requires" in caplog.text
