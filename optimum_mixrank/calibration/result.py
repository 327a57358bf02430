"""The statistics of a calibration, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..decomposition.statistics import LayerStatistics, Statistic
from ..runtime.files import replaced_file
from ..runtime.formatting import quote
from ..runtime.version import __version__


_FORMAT = "optimum-mixrank statistics 2"


@dataclass(frozen=True)
class Calibration:
    """Statistics of all layers, and what they were collected from.

    Attributes:
        layers: Statistics by module name.
        num_images: Number of images seen.
        broken: Names of the files that could not be decoded and were left out.
        seconds: Wall time of the collection.
        model_fingerprint: Fingerprint of the model; see `fingerprint_model`.
        data_fingerprint: Fingerprint of the images; see `ImageFingerprint`.
        fisher_samples: Probes per image that the Fisher information was estimated with; None if unknown.
    """

    layers: Mapping[str, LayerStatistics]
    num_images: int
    broken: tuple[str, ...] = ()
    seconds: float = 0.0
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    fisher_samples: int | None = None

    def save(self, path: str | Path) -> Path:
        """Write the statistics to a safetensors file, completely or not at all, and return its path.

        They can be reused without the images. The folder must exist.

        Raises:
            ValueError: if there are none, as for a metric that needs none.
        """
        if not self.layers:
            raise ValueError(f"There are no statistics to write to {str(path)!r}: metric='svd' needs none.")
        path = Path(path).expanduser()
        tensors: dict[str, Tensor] = {}
        stored_as: dict[int, str] = {}
        layers: dict[str, Any] = {}
        for name, statistics in self.layers.items():
            keys = {}
            for statistic in Statistic:
                tensor = getattr(statistics, statistic.value)
                if tensor is not None:
                    # Layers that share an input share its tensors, which are stored once.
                    key = stored_as.setdefault(id(tensor), f"{name}:{statistic.value}")
                    tensors[key] = tensor.detach().cpu().contiguous()
                    keys[statistic.value] = key
            counts = {"num_tokens": statistics.num_tokens, "num_images": statistics.num_images}
            layers[name] = {**counts, "tensors": keys}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content = json.dumps({**fields, "layers": layers, "library_version": __version__})
        with replaced_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, "calibration": content})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read statistics that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else, or is damaged.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {str(path)!r} with statistics; write one with `calibration.save`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(
                        f"{str(path)!r} has the format {quote(metadata.get('format'))}, not {_FORMAT!r}; collect the "
                        "statistics again with this version."
                    )
                # Copies are aligned in memory like the tensors that were saved; arithmetic may depend on it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            content = json.loads(metadata["calibration"])
            layers = {name: _read_layer(entry, tensors) for name, entry in content["layers"].items()}
            if not all(isinstance(content[f"{what}_fingerprint"], str) for what in ("model", "data")):
                raise TypeError("fingerprints are missing")
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls) if field.name in content}
            return cls(**{**fields, "layers": layers, "broken": tuple(content["broken"])})
        except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({quote(error)}); collect the statistics again.") from error

    def check(self, model_fingerprint: str, data_fingerprint: str | None = None) -> None:
        """Check that the statistics belong to a model and, if a fingerprint of them is given, to images.

        Raises:
            ValueError: if they do not.
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
        """Number of tokens seen by the layer that has seen the most."""
        return max((statistics.num_tokens for statistics in self.layers.values()), default=0)


def _read_layer(entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> LayerStatistics:
    known = {statistic.value for statistic in Statistic}
    values = {name: tensors[key] for name, key in entry["tensors"].items() if name in known}
    for name, tensor in values.items():
        if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
            raise TypeError(f"{name} is not finite float64")
    counts = {name: entry[name] for name in ("num_tokens", "num_images")}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise TypeError(f"{name}={quote(count)}")
    return LayerStatistics(**counts, **values)
