"""The model and images that ship with the repository, and less of both for tests that need a command to do something."""

from pathlib import Path

from datasets import load_dataset
from models import tiny_vit
from transformers import AutoConfig, AutoImageProcessor


ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "examples" / "fashion_mnist"
MODEL, DATA = str(SHIPPED / "model"), str(SHIPPED / "data")


def write_few_images(folder):
    """Write 96 calibration and 400 test images; return the folder."""
    (folder / "data").mkdir(parents=True)
    for split, count in {"calibration": 96, "test": 400}.items():
        images = load_dataset(DATA, split=split).select(range(count))
        images.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_tiny_model(folder):
    """Write a tiny model for the same images and classes; return the folder."""
    labels = AutoConfig.from_pretrained(MODEL).id2label
    tiny_vit(image_size=28, patch_size=7, num_labels=len(labels), id2label=labels).save_pretrained(folder)
    AutoImageProcessor.from_pretrained(MODEL).save_pretrained(folder)
    return folder
