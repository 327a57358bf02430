"""A tiny model of mixed structure, and a runtime that needs no other package than PyTorch."""

import pytest
import torch
from models import mixed, tiny_vit

from optimum_mixrank.deployment.target import ExportedModel, Runtime
from optimum_mixrank.runtime.registry import RUNTIMES


@pytest.fixture
def one_model():
    """A model whose query, key and value share a pivoted factor, and whose MLPs have lost units."""
    return mixed(tiny_vit(), "pivoted").eval()


class Stored(ExportedModel):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def run(self, pixel_values):
        return {"logits": pixel_values.flatten(1)[:, :5] * self.weight}


@pytest.fixture
def plain_runtime():
    """A runtime called "plain" whose file holds one number, and a second file beside it."""

    @RUNTIMES.register
    class Plain(Runtime):
        name, file_name, packages, install = "plain", "model.plain", ("torch",), "pip install torch"

        def write(self, model, pixel_values, file):
            assert not model.training and len(pixel_values) == 2
            file.write_text("1.0")
            file.with_name("model.plain.data").write_text("weights")

        def quantize(self, file, target, batches):
            count = 0 if batches is None else sum(map(len, batches))
            target.write_text(f"{float(file.read_text()) + count}")
            return f"{count} images"

        def open(self, file):
            return Stored(torch.tensor(float(file.read_text())))

    yield Plain
    del RUNTIMES._classes["plain"]
