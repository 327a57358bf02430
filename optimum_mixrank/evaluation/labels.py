"""Match the labels of a dataset with those of a model."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
from transformers.utils import logging


logger = logging.get_logger(__name__)


def find_label_column(data: datasets.Dataset) -> str | None:
    """The column with class labels, or None: the one `ClassLabel` column, else `label` or `labels`."""
    classes = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in ("label", "labels") if name in data.features), None)


def map_labels(data: datasets.Dataset, label_column: str, label2id: Mapping[str, int]) -> list[int] | None:
    """Model label by dataset label.

    By name, where the model knows all class names of the dataset (in any case of letters); by index, with a warning,
    where it knows none and the numbers of classes agree.

    Args:
        data: The dataset.
        label_column: Its column with labels.
        label2id: Of the model's configuration.

    Returns:
        `[classes of the dataset]`; None where the column has no class names, so that its numbers are taken as they are.

    Raises:
        ValueError: if the classes do not match.
    """
    feature = data.features[label_column]
    if not isinstance(feature, datasets.ClassLabel):
        return None
    exact = {str(name): int(index) for name, index in label2id.items()}
    any_case = {name.lower(): index for name, index in exact.items()}
    ids = [exact.get(name, any_case.get(name.lower())) for name in feature.names]
    known = [index for index in ids if index is not None]
    if len(known) == len(ids):
        return known
    if not known and len(ids) == len(exact):
        logger.warning("The dataset names its classes otherwise than the model; labels are matched by index.")
        return list(range(len(ids)))
    unknown = [name for name, index in zip(feature.names, ids, strict=True) if index is None]
    raise ValueError(
        f"The dataset has {len(ids)} classes, the model {len(exact)}; the model does not know {unknown[:5]}. "
        "Rename or reorder the classes to match the model's `config.label2id`."
    )
