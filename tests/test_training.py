"""Compressed models can be trained: gradient checkpointing, mixed precision, `Trainer`, and saving the result."""

import copy
import json

import pytest
import torch
from models import compressed, pixels, tiny_deit, tiny_swin, tiny_vit
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from optimum_mixrank import FactoredLinear
from optimum_mixrank.checkpoint.rank_map import LAYOUT_NAMES


FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}


@pytest.fixture(params=[(family, layout) for family in FAMILIES for layout in LAYOUT_NAMES], ids="-".join)
def model(request):
    family, layout = request.param
    return compressed(FAMILIES[family](), layout)


def logits(model, images):
    with torch.no_grad():
        return model.eval()(pixel_values=images).logits


def gradients(model, autocast=False):
    """Return the gradients of a loss by name of the parameter, with a fixed seed for dropout."""
    torch.manual_seed(0)
    labels = torch.arange(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model.train()(pixel_values=pixels()).logits, labels)
    loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reloaded", [False, True])
def test_steps_of_distributed_data_parallel(one_process, reloaded, tmp_path):
    model = compressed(tiny_vit(), "pivoted")
    if reloaded:
        model.save_pretrained(tmp_path / "model")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    parallel = torch.nn.parallel.DistributedDataParallel(model.train().requires_grad_(True))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(parallel(pixel_values=pixels()).logits, torch.arange(4)).backward()
        optimizer.step()
    assert all(each.grad is not None for each in model.parameters() if each.numel())


def factor_names(model):
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, FactoredLinear)]
    assert layers
    return {f"{name}.{inner}" for name, layer in layers for inner, each in layer.named_parameters() if each.numel()}


def checkpointing_enabled(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    return model


def test_gradient_checkpointing_gives_the_same_gradients(model):
    expected = gradients(copy.deepcopy(model))
    runs = []
    layer = next(each for each in model.modules() if isinstance(each, FactoredLinear))
    layer.register_forward_hook(lambda *_: runs.append(1))
    found = gradients(checkpointing_enabled(model))
    assert len(runs) > 1  # in the forward pass, and again in the backward pass
    assert found.keys() == expected.keys() >= factor_names(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_bfloat16_autocast(model):
    expected, found = gradients(copy.deepcopy(model)), gradients(model, autocast=True)
    assert found.keys() == expected.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    # They are compared as one vector, since some are zero up to rounding, such as those of the keys' biases.
    in_bfloat16, in_float32 = (
        torch.cat([each[name].flatten() for name in sorted(factor_names(model))]) for each in (found, expected)
    )
    assert (in_bfloat16 - in_float32).norm() < 0.2 * in_float32.norm()


class LabelledPixels(torch.utils.data.Dataset):
    """Sixteen random images of two classes, one darker than the other."""

    def __init__(self):
        self.labels = torch.arange(16) % 2
        self.pixel_values = pixels(16) + self.labels[:, None, None, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 2}], ids=["float32", "bf16"])
def test_epochs_with_trainer_then_save_reload_save(model, tmp_path, options):
    data = LabelledPixels()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss_before = F.cross_entropy(logits(model, data.pixel_values), data.labels)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **options,
    )
    trainer = Trainer(model=checkpointing_enabled(model), args=arguments, train_dataset=data)
    trainer.train()
    # Accelerate leaves its autocast wrapper around the forward method.
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert F.cross_entropy(logits(model, data.pixel_values), data.labels) < loss_before
    for name in factor_names(model):
        assert not torch.equal(model.state_dict()[name], before[name]), name

    model.save_pretrained(tmp_path / "once")
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "once")
    assert torch.equal(logits(reloaded, data.pixel_values), logits(model, data.pixel_values))
    reloaded.save_pretrained(tmp_path / "twice")
    once, twice = (tmp_path / name for name in ("once", "twice"))
    assert (twice / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (once, twice)]
    assert configs[0]["rank_map"] and configs[0] == configs[1]
