"""A tiny model and a few images, for one module of tests each."""

import pytest
from shipped import write_few_images, write_tiny_model


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_few_images(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))
