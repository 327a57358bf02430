"""Shared by the examples: turn a dataset of images into inputs for `Trainer` and models."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import datasets
from PIL import ImageOps

from optimum_mixrank.calibration.images.sources import find_image_column
from optimum_mixrank.evaluation.labels import find_label_column, map_labels


def model_inputs(
    dataset: datasets.Dataset, image_processor: Any, id2label: Mapping[int, str] | None = None, mirror: bool = False
) -> datasets.Dataset:
    """Return a dataset whose rows are `pixel_values` and `labels`, decoded when they are read.

    Args:
        dataset: A dataset with a column of images.
        image_processor: The model's image processor.
        id2label: The model's classes; None leaves labels out.
        mirror: Whether to mirror half of the images.

    Raises:
        ValueError: if labels are requested, but the data has none or the model does not know them.
    """
    image_column = find_image_column(dataset.features)
    label_column = None if id2label is None else find_label_column(dataset)
    labels = None
    if id2label is not None:
        if label_column is None:
            raise ValueError(f"Labels are needed, and the data has none: {', '.join(dataset.column_names)}.")
        labels = map_labels(dataset, label_column, id2label)

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in rows[image_column]]
        if mirror:
            images = [ImageOps.mirror(image) if random.random() < 0.5 else image for image in images]
        batch = dict(image_processor(images, return_tensors="pt"))
        if label_column is not None:
            batch["labels"] = [label if labels is None else labels[label] for label in rows[label_column]]
        return batch

    return dataset.cast_column(image_column, datasets.Image()).with_transform(transform)
