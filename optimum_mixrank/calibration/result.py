"""What a calibration run found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..decomposition.statistics import LayerStatistics


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers, with what they were taken from.

    Attributes:
        layers: Statistics by module name.
        num_images: Images that were seen.
        broken: Names of the files that could not be decoded and were left out.
        seconds: Wall time of the run.
        model_fingerprint: Of the model that ran; see `fingerprint_model`.
        data_fingerprint: Of the images; see `ImageFingerprint`.
        fisher_samples: Probes per image that the Fisher information was taken with; None where that is not known.
    """

    layers: Mapping[str, LayerStatistics]
    num_images: int
    broken: tuple[str, ...] = ()
    seconds: float = 0.0
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    fisher_samples: int | None = None

    def save(self, path: str | Path) -> Path:
        """Write the statistics to a safetensors file, to be used again for another budget without the images.

        Raises:
            ValueError: if there are none, as for a metric that needs none.
        """
        from .storage import save_calibration

        return save_calibration(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read statistics that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else, or is damaged.
        """
        from .storage import load_calibration

        return load_calibration(path)

    def check(self, model_fingerprint: str, data_fingerprint: str | None = None) -> None:
        """Check that these are the statistics of a model, and of images where they are given too.

        Raises:
            ValueError: if they are not.
        """
        if self.model_fingerprint not in (None, model_fingerprint):
            raise ValueError(
                f"The statistics belong to a model with the fingerprint {self.model_fingerprint}, this one has "
                f"{model_fingerprint}: weights differ. Calibrate this model."
            )
        if data_fingerprint is not None and self.data_fingerprint not in (None, data_fingerprint):
            raise ValueError(
                f"The statistics were taken from images with the fingerprint {self.data_fingerprint}, the calibration "
                f"dataset has {data_fingerprint}. Give the same images in the same order, or calibrate with these."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that the layer with the most of them has seen."""
        return max((statistics.num_tokens for statistics in self.layers.values()), default=0)
