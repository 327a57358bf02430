"""Match the labels of a dataset with those of a model."""

from __future__ import annotations

from collections.abc import Mapping

import datasets

from ..calibration.images.folders import missing_labels
from ..runtime.logging import get_logger


logger = get_logger(__name__)


def find_label_column(data: datasets.Dataset | datasets.IterableDataset) -> str | None:
    """Return the column with class labels, if there is one: the only `ClassLabel` column, else `label` or `labels`."""
    classes = [name for name, feature in data.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    return next((name for name in ("label", "labels") if name in data.features), None)


def explain_missing_labels(data: datasets.Dataset) -> str:
    """Return why a dataset without a column of labels has none."""
    columns = data.column_names
    if len(columns) == 1 and isinstance(data.features[columns[0]], datasets.Image):
        images = data.with_format(None).cast_column(columns[0], datasets.Image(decode=False))[columns[0]]
        # Beside bytes there is only the name of a file.
        paths = [image["path"] for image in images if image is not None and image["bytes"] is None]
        reason = missing_labels(path for path in paths if path) if paths else None
        if reason is not None:
            return f"{reason}; put the images of each class into a folder of their own"
    return (
        f"there is no column `label` or `labels`; name one of {', '.join(columns)} with label_column, if it has them"
    )


def map_labels(
    data: datasets.Dataset, label_column: str, id2label: Mapping[int, str]
) -> list[int] | dict[str, int] | None:
    """Map the labels of a dataset to those of a model.

    Labels are matched by index if model and dataset have the same number of classes and no name has another index in
    the model than in the dataset; otherwise by name, if the model knows every class name of the dataset for exactly one
    class. Case matters only where names differ in nothing else. ImageNet is matched by index: two of its classes are
    called "crane", which models keep and datasets have to tell apart.

    Args:
        data: The dataset.
        label_column: Its column with labels.
        id2label: From the model's configuration, whose `label2id` lacks classes if two have the same name.

    Returns:
        Model label by dataset label, which is an index or, in a column of strings, a name; None if the column has no class
        names, so that its numbers are used as they are.

    Raises:
        ValueError: if the classes do not match.
    """
    feature = data.features[label_column]
    by_index = isinstance(feature, datasets.ClassLabel)
    if by_index:
        names = feature.names
    elif getattr(feature, "dtype", None) in ("string", "large_string"):
        names = [name for name in data.unique(label_column) if name is not None]
    else:
        return None
    exact: dict[str, list[int]] = {}
    any_case: dict[str, list[int]] = {}
    for index, name in id2label.items():
        exact.setdefault(name, []).append(int(index))
        any_case.setdefault(name.lower(), []).append(int(index))
    candidates = [exact.get(name) or any_case.get(name.lower(), []) for name in names]
    unknown = [name for name, indices in zip(names, candidates, strict=True) if not indices]
    if (
        by_index
        and len(candidates) == len(id2label)
        and all(index in indices for index, indices in enumerate(candidates) if indices)
    ):
        if unknown:
            logger.warning(
                f"The model has other names for {len(unknown)} of the dataset's {len(candidates)} classes "
                f"({', '.join(unknown[:3])}); labels are matched by index."
            )
        return list(range(len(candidates)))
    if all(len(indices) == 1 for indices in candidates):
        indices = [index for [index] in candidates]
        return indices if by_index else dict(zip(names, indices, strict=True))
    if unknown:
        problem = f"the model does not know {unknown[:5]}"
    else:
        twice = [name for name, indices in zip(names, candidates, strict=True) if len(indices) > 1]
        problem = f"the model has several classes for each of {twice[:5]}"
    raise ValueError(
        f"The dataset has {len(candidates)} classes, the model {len(id2label)}; {problem}. "
        "Rename or reorder the classes (folders of images) to match the model's `config.id2label`."
    )
