"""Images to learn from at a higher resolution than the model sees, for views that show their details."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import logging

from ..calibration.images import ImageBatches
from ..distributed import Processes
from ..phases import phase
from .held_out import split_batches


@dataclass(frozen=True)
class Photographs:
    """Calibration images that are decoded when a step asks for them, and not held before or after.

    Attributes:
        batches: The batches of all calibration images, enlarged.
        held_out_ratio: Share of the images that is held out, as of the images that the model sees.
        seed: Of that draw.
        processes: Those that share the images out.
    """

    batches: ImageBatches
    held_out_ratio: float
    seed: int
    processes: Processes

    def decode(self) -> dict[int, Tensor]:
        """Those to learn from, by the number of their batch, each `[batch, channels, height, width]`, float16.

        Every process calls this and gets its share. The held-out ones are those that `split_batches` holds out of the
        images that the model sees.
        """
        with phase("Decoded photographs") as decoding:
            with self.processes.agreed():
                found = {
                    batch.index: batch.pixel_values
                    for batch in logging.tqdm(self.batches, desc="Decoding photographs", unit="batch")
                }
            self.batches.settle()
            learn, _ = split_batches(found, self.held_out_ratio, self.seed, self.processes)
            decoding.tell(" x ".join(map(str, next(iter(found.values())).shape[2:])) if found else "")
        return learn
