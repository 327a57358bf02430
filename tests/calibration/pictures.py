"""Small pictures, some of them broken."""

import numpy as np
from models import IMAGE_SIZE
from PIL import Image
from transformers import ViTImageProcessor


def processor():
    """The image processor of the tiny models."""
    return ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def write(folder, count, broken=()):
    """Write random pictures `00.png`, `01.png`, …; of the broken ones only the beginning."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"{index:02}.png"
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
        if index in broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder
