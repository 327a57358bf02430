"""The statistics of a calibration, in memory and on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..decomposition.statistics import LayerStatistics, Statistic
from ..runtime.digest import digest_content
from ..runtime.files import replaced_file
from ..runtime.formatting import quote
from ..runtime.version import __version__


_FORMAT = "optimum-mixrank statistics 3"

_FORMAT_WITHOUT_DIGEST = "optimum-mixrank statistics 2"

_ROUNDING = 1e-6
"""Share of the largest value up to which a covariance may be asymmetric, and its diagonal negative."""

_POSITIVE = frozenset(Statistic) - {Statistic.INPUT_MEAN, Statistic.REPRESENTATIVE_INPUT}

_UNREADABLE = (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError, RuntimeError)


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

    def save(self, path: str | Path, run: str = "") -> Path:
        """Write the statistics to a safetensors file, completely or not at all, and return its path.

        They can be reused without the images. The folder must exist. A digest is stored with them, so that damage does
        not go unnoticed; it does not protect from somebody who changes the file on purpose.

        Args:
            path: The file.
            run: Mark of the unfinished run that keeps them; see `Journal`.

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
        metadata = {"format": _FORMAT, "calibration": content, "run": run}
        metadata["digest"] = digest_content(tensors, content, run)
        with replaced_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
        return path

    @classmethod
    def load(cls, path: str | Path, run: str | None = None) -> Calibration:
        """Read statistics that `save` wrote.

        Args:
            path: The file.
            run: Mark of the unfinished run that they must belong to; None accepts all.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else, is damaged or belongs to another run.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no file {str(path)!r} with statistics; write one with `calibration.save`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                known = metadata.get("format") in (_FORMAT, _FORMAT_WITHOUT_DIGEST)
                # Copies are aligned in memory like the tensors that were saved; arithmetic may depend on it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if known}  # noqa: SIM118
            fields = _read_fields(metadata, tensors) if known else {}
        except _UNREADABLE as error:
            raise ValueError(f"{str(path)!r} is damaged ({quote(error)}); collect the statistics again.") from error
        if not known:
            raise ValueError(
                f"{str(path)!r} has the format {quote(metadata.get('format'))}, not {_FORMAT!r}; collect the statistics "
                "again with this version."
            )
        if run is not None and metadata.get("run") != run:
            raise ValueError(f"{str(path)!r} belongs to another run; collect the statistics again.")
        return cls(**fields)

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


def _read_fields(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the fields of a `Calibration` from a file; raises one of `_UNREADABLE` if they are not what was saved."""
    text = metadata["calibration"]
    if metadata["format"] == _FORMAT and metadata["digest"] != digest_content(tensors, text, metadata["run"]):
        raise ValueError("its content is not what was saved")
    content = json.loads(text)
    fields = {field.name: content[field.name] for field in dataclasses.fields(Calibration) if field.name in content}
    if not all(isinstance(fields[f"{what}_fingerprint"], str) for what in ("model", "data")):
        raise TypeError("fingerprints are missing")
    _check_count("num_images", fields["num_images"])
    if (samples := fields.get("fisher_samples")) is not None:
        _check_count("fisher_samples", samples)
    if not 0 <= (seconds := fields.get("seconds", 0.0)) < math.inf:
        raise ValueError(f"seconds={seconds!r}")
    broken = fields.get("broken", ())
    if not isinstance(broken, list) or not all(isinstance(name, str) for name in broken):
        raise TypeError(f"broken={broken!r}")
    if not content["layers"]:
        raise ValueError("there are no layers")
    layers = {name: _read_layer(entry, tensors) for name, entry in content["layers"].items()}
    return {**fields, "layers": layers, "broken": tuple(broken)}


def _check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise TypeError(f"{name}={count!r}")


def _read_layer(entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> LayerStatistics:
    known = {statistic.value for statistic in Statistic}
    values = {name: tensors[key] for name, key in entry["tensors"].items() if name in known}
    for name, tensor in values.items():
        if tensor.dtype != torch.float64 or not torch.isfinite(tensor).all():
            raise TypeError(f"{name} is not finite float64")
        if Statistic(name) in _POSITIVE:
            _check_positive(name, tensor)
    counts = {name: entry[name] for name in ("num_tokens", "num_images")}
    for name, count in counts.items():
        _check_count(name, count)
    return LayerStatistics(**counts, **values)


def _check_positive(name: str, tensor: Tensor) -> None:
    """Check that a variance is not negative, and that a covariance is symmetric with such a diagonal."""
    tolerance = _ROUNDING * tensor.abs().max() if tensor.numel() else 0.0
    variances = tensor.diagonal() if tensor.ndim == 2 else tensor
    if (variances < -tolerance).any():
        raise ValueError(f"{name} holds negative variances")
    if tensor.ndim == 2 and (tensor.shape[0] != tensor.shape[1] or ((tensor - tensor.T).abs() > tolerance).any()):
        raise ValueError(f"{name} is not symmetric")
