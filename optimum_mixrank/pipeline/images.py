"""Batches of images for a model, to calibrate with and to evaluate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from ..calibration.images.batches import ImageBatches
from ..calibration.images.rows import draw_images
from ..calibration.images.sources import load_image_dataset
from ..evaluation.labels import explain_missing_labels, find_label_column, map_labels
from ..runtime.distributed import Processes
from ..runtime.formatting import type_of
from ..runtime.forward import configured_channels, evaluation_mode
from ..runtime.logging import get_logger
from ..runtime.model_output import CLASSES
from ..runtime.outputs import ModelCall
from ..runtime.parts import WHOLE, input_names, is_features


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)


def example_call(call: ModelCall, model: PreTrainedModel, read: Callable[[], ImageBatches | None]) -> ModelCall:
    """Return a call that is tried on a black image or, of a model that takes more or something else, on the first batch."""
    try:
        if (part := call.bound(model).part) == WHOLE or is_features(part):
            return call
    except ValueError:
        call.check(model)
    batches = read()
    example = None if batches is None else batches.first()
    return call if example is None else dataclasses.replace(call, example=example)


@dataclass(frozen=True)
class ImageReader:
    """Reads images as a model takes them.

    Attributes:
        model: The model.
        image_processor: Its image processor; not needed for batches of `pixel_values`.
        processes: The processes that share the images.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images ahead.
        max_broken_share: Tolerated share of images that cannot be decoded.
        max_image_pixels: Most pixels of an encoded image; default: `PIL.Image.MAX_IMAGE_PIXELS`.
    """

    model: PreTrainedModel
    image_processor: Any
    processes: Processes
    batch_size: int = 32
    num_workers: int = 0
    max_broken_share: float = 0.05
    max_image_pixels: int | None = None

    def draw(self, dataset: Any, num_samples: int, seed: int) -> Any:
        """Draw images from a folder or Hub id; return anything else unchanged."""
        if isinstance(dataset, str | Path):
            return load_image_dataset(dataset, num_samples=num_samples, seed=seed)
        return dataset

    def read(self, dataset: Any, keep: bool = False) -> ImageBatches:
        """Return batches to calibrate with, which are fingerprinted.

        Args:
            dataset: See `ImageBatches`.
            keep: Whether the batches will be kept, in which case they must not fill up pinned memory.
        """
        return self._batches(
            dataset,
            pin_memory=not keep and self.model.device.type == "cuda",
            fingerprint=True,
        )

    def read_labelled(
        self,
        dataset: Any,
        image_column: str | None = None,
        label_column: str | None = None,
        split: str | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        warn: bool = True,
    ) -> ImageBatches:
        """Return batches to evaluate on; labels of the dataset are mapped to those of the model.

        Labels are passed over where the model returns something else than one class per image.

        Args:
            dataset: See `ImageBatches`; the default split of a folder or Hub id is `validation`, then `test`.
            image_column: Default: the only image column.
            label_column: Default: `label` or `labels`, if there is one.
            split: Split of a folder, a Hub id or a `DatasetDict`.
            num_samples: Number of images to draw, from anything but a stream; None for all.
            seed: Seed of the draw.
            warn: Whether to say that labels are missing.

        Raises:
            ValueError: for a split or a number of images that cannot be chosen from such a dataset.
        """
        if isinstance(dataset, str | Path | datasets.DatasetDict):
            dataset = load_image_dataset(
                dataset, split=split, default_splits=("validation", "test"), image_column=image_column
            )
        elif split is not None:
            raise ValueError(
                f"split={split!r} cannot be chosen: {type_of(dataset)} has no splits; leave it out, or give a "
                "folder, a Hub id or a `DatasetDict`."
            )
        label_map = None
        if isinstance(dataset, datasets.Dataset):
            is_asked_for, label_column = label_column is not None, label_column or find_label_column(dataset)
            if label_column is None and warn:
                self._warn_about_labels(dataset)
            elif label_column is not None and label_column in dataset.column_names:
                kind = self._kind(draw_images(dataset, 1, seed), image_column)
                if kind in (None, CLASSES):
                    label_map = map_labels(dataset, label_column, self.model.config.id2label)
                else:
                    label_column, say = None, logger.warning if is_asked_for else logger.info
                    say(f"Labels are not used: {type(self.model).__name__} returns {kind}, not one class.")
        return self._batches(
            draw_images(dataset, num_samples, seed),
            image_column=image_column,
            label_column=label_column,
            label_map=label_map,
            pin_memory=self.model.device.type == "cuda",
        )

    def _kind(self, dataset: Any, image_column: str | None) -> str | None:
        """Return what the model returns, see `runtime.kinds`; None if it does not run."""
        try:
            call = example_call(ModelCall(), self.model, lambda: self._batches(dataset, image_column=image_column))
            call = call.bound(self.model)
            with evaluation_mode(self.model):
                return call(self.model, call.example_for(self.model)).kind
        except (ValueError, RuntimeError):
            # What is wrong with the images or the model is said where they are read and run.
            return None

    def _warn_about_labels(self, dataset: datasets.Dataset) -> None:
        # Other models have no accuracy that labels could tell.
        if "ForImageClassification" in type(self.model).__name__ and "pixel_values" not in dataset.column_names:
            logger.warning(
                f"The images have no labels, so accuracy is not measured: {explain_missing_labels(dataset)}."
            )

    def _batches(self, dataset: Any, **options: Any) -> ImageBatches:
        return ImageBatches(
            dataset,
            image_processor=self.image_processor,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            max_broken_share=self.max_broken_share,
            max_image_pixels=self.max_image_pixels,
            num_channels=configured_channels(self.model),
            processes=self.processes,
            input_names=input_names(self.model),
            **options,
        )
