"""Images at a higher resolution than the model sees, from which views with more detail are cropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import logging

from ...calibration.images.batches import ImageBatches
from ...runtime.distributed import Processes
from ...runtime.formatting import format_size
from ...runtime.phases import phase


@dataclass(frozen=True)
class HighResolutionImages:
    """Calibration images that are decoded when a step asks for them, and not kept in memory otherwise.

    Attributes:
        batches: The batches of all calibration images, enlarged.
        held_out: Bool masks of the held-out images in the batches of this process, by number of the batch.
        processes: The processes that share the images.
    """

    batches: ImageBatches
    held_out: Mapping[int, Tensor]
    processes: Processes

    def decode(self) -> dict[int, Tensor]:
        """Return this process's images to learn from, by number of their batch; every process calls this.

        Each batch is `[batch, channels, height, width]`, float16.

        Raises:
            ValueError: if a batch does not hold as many images as when it was first decoded.
        """
        with phase("Decoded high-resolution images") as decoding:
            with self.processes.raise_on_all_ranks():
                learn = self._images_to_learn_from()
            self.batches.merge_across_processes()
            decoding.add_detail(*(format_size(batch.shape[2:]) for batch in list(learn.values())[:1]))
        return learn

    def _images_to_learn_from(self) -> dict[int, Tensor]:
        learn, missing = {}, set(self.held_out)
        for batch in logging.tqdm(self.batches, desc="Decoding high-resolution images", unit="batch"):
            held_out = self.held_out.get(batch.index)
            if held_out is None or len(held_out) != batch.num_images:
                raise _changed(batch.index)
            missing.discard(batch.index)
            if not held_out.all():
                learn[batch.index] = batch.inputs.main[~held_out]
        if missing:
            raise _changed(min(missing))
        return learn


def _changed(index: int) -> ValueError:
    return ValueError(
        f"Batch {index} of the calibration images holds other images than when it was first decoded, so it is unknown "
        "which of them are held out. Do not change the files while a compression runs, or set view_scale=1."
    )
