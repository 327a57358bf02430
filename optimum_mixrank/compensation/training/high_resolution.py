"""Images to learn from at a higher resolution than the model sees, for views that show their details."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers.utils import logging

from ...calibration.images.batches import ImageBatches
from ...runtime.distributed import Processes
from ...runtime.phases import phase


@dataclass(frozen=True)
class HighResolutionImages:
    """Calibration images that are decoded when a step asks for them, and not held before or after.

    Attributes:
        batches: The batches of all calibration images, enlarged.
        held_out: Which images of the batches of this process are held out, bool, by number of the batch.
        processes: Those that share the images out.
    """

    batches: ImageBatches
    held_out: Mapping[int, Tensor]
    processes: Processes

    def decode(self) -> dict[int, Tensor]:
        """Those to learn from, by the number of their batch, each `[batch, channels, height, width]`, float16.

        Every process calls this and gets its share.

        Raises:
            ValueError: if they are not as many as when the model saw them.
        """
        with phase("Decoded photographs") as decoding:
            with self.processes.raise_on_all_ranks():
                learn = self._learned_from()
            self.batches.merge_across_processes()
            decoding.add_detail(*(" x ".join(map(str, batch.shape[2:])) for batch in list(learn.values())[:1]))
        return learn

    def _learned_from(self) -> dict[int, Tensor]:
        learn, seen = {}, set()
        for batch in logging.tqdm(self.batches, desc="Decoding photographs", unit="batch"):
            held_out = self.held_out.get(batch.index)
            if held_out is None or len(held_out) != batch.num_images:
                raise _changed(batch.index)
            seen.add(batch.index)
            if not held_out.all():
                learn[batch.index] = batch.pixel_values[~held_out]
        missing = self.held_out.keys() - seen
        if missing:
            raise _changed(min(missing))
        return learn


def _changed(index: int) -> ValueError:
    return ValueError(
        f"Batch {index} of the calibration images holds other images than when it was decoded first, so that it is not "
        "known which are held out. Leave the files as they are while a compression runs, or set view_scale=1."
    )
