"""A folder with small local stand-ins for the models, images and checkpoints that the documentation names."""

from pathlib import Path

import numpy as np
from docs.blocks import ROOT
from models import IMAGE_SIZE, tiny_vit
from PIL import Image
from transformers import ViTImageProcessor

from optimum_mixrank import MixRankCompressor, MixRankConfig


MODEL = "facebook/deit-base-patch16-224"
SMALL = "facebook/deit-small-patch16-224"
IMAGES = "path/to/images"
LABELLED_IMAGES = "path/to/labelled/images"
CHECKPOINTS = {
    "checkpoints.md": ("deit-base-mixrank", "vit-60", "vit-50", "vit-40"),
    "deployment.md": ("deit-base-mixrank",),
    "training.md": ("deit-base-mixrank",),
}
"""Compressed checkpoints that a page presupposes; the other pages make what they use."""
STARTS = {
    "checkpoints.md": (
        f"from optimum_mixrank import MixRankCompressor, MixRankConfig\n"
        f"compressor = MixRankCompressor.from_pretrained({MODEL!r})\n"
        f"model = compressor.compress(MixRankConfig(recipe='fast'), {IMAGES!r})\n"
        "folder = 'deit-base-mixrank'\n"
    ),
}
"""Code that defines the variables that a page presupposes."""


def lay_out(folder: Path, page: str) -> None:
    """Put the stand-ins into an empty folder: the model, images, and the examples of the repository."""
    tiny_vit(num_hidden_layers=4).save_pretrained(folder / MODEL)
    tiny_vit(num_hidden_layers=2).save_pretrained(folder / SMALL)
    ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder / MODEL)
    generator = np.random.default_rng(0)
    for index in range(24):
        for parent in (IMAGES, f"{LABELLED_IMAGES}/LABEL_{index % 5}"):
            (folder / parent).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / parent / f"{index}.png")
    (folder / "examples").symlink_to(ROOT / "examples")
    if page in CHECKPOINTS:
        compressor = MixRankCompressor.from_pretrained(folder / MODEL)
        first, *others = CHECKPOINTS[page]
        compressor.compress(MixRankConfig(recipe="fast"), str(folder / IMAGES), folder / first)
        for name in others:
            (folder / name).symlink_to(folder / first)
