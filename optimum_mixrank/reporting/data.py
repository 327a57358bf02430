"""The report of a compression as plain data, saved beside the checkpoint as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import replaced_file
from ..runtime.logging import get_logger


if TYPE_CHECKING:
    from typing_extensions import Self


logger = get_logger(__name__)

REPORT_NAME = "mixrank_report.json"


@dataclass(frozen=True)
class LayerReport:
    """What was done to a linear layer of the encoder.

    Attributes:
        name: Canonical name.
        shape: `(out_features, in_features)`.
        rank: None if the layer stayed dense.
        kept_energy: Share of the layer's energy that one-shot factors of this rank keep, in [0, 1], as the metric
            measures it, before compensation; None for a dense layer.
        targeted: Whether it was to be compressed; a targeted layer stays dense where that is smaller or asked for.
        parameters_before: Stored values of the weight, `out_features * in_features`.
        parameters_after: Stored values of the weight or its factors.
        predicted_loss: What one-shot factors of this rank are predicted to cost, before compensation, in nats per
            image, to second order; None for a dense layer or a metric whose losses have no common unit.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    kept_energy: float | None
    targeted: bool
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def kept(self) -> float:
        """Share of the stored values that is left."""
        return self.parameters_after / self.parameters_before


@dataclass(frozen=True)
class ReportData:
    """What a compression was asked to do, what it did, and what came of it.

    Attributes:
        layers: All linear layers of the encoder in forward order, targeted or not.
        settings: The configuration, JSON values.
        environment: Versions, machine and threads, JSON values.
        model_parameters_before: Parameters of the whole model.
        model_parameters_after: The same after the compression.
        bytes_on_disk_before: Of the original's weight files; None if not known.
        bytes_on_disk_after: Of the compressed checkpoint's weight files; None before it is saved.
        dtype_on_disk_before: The dtype of most of the original's stored values, such as `"float16"`; None if not known.
        dtype_on_disk_after: Of the compressed checkpoint.
        flops_before: FLOPs per image (a multiply-add counts two); None if not counted.
        flops_after: The same after the compression.
        calibration: `num_images`, `num_tokens`, `num_broken`.
        seconds: Wall time by phase.
        evaluation: Fields of `EvaluationResult`; None before an evaluation.
        compensation: Fields of `CompensationTaskResult` for every step.
        predicted_loss: Of the ranks, before compensation: in nats per image, to second order; None for a metric whose
            losses have no common unit.
        model_name: Hub id or folder of the original, without the path to it.
        profile: What other budgets were predicted to cost, before compensation, by ascending ratio:
            `compression_ratio`, `model_parameters` and `loss` of each.
        loss_unit: Unit of the profile's losses.
        memory: Where a limit was set, what was estimated beside the original, of the main process: `estimated_bytes` by
            place (`host`, `device`), `disk_bytes` that activations take there, `passes` over the images for statistics,
            and `not_counted`, the steps that the estimate leaves out. Else empty.

    Raises:
        TypeError: if settings and the like hold something else than JSON values.
        ValueError: if they hold NaN or Inf.
    """

    layers: Sequence[LayerReport]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    model_parameters_before: int
    model_parameters_after: int
    bytes_on_disk_before: int | None = None
    bytes_on_disk_after: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    compensation: Sequence[Mapping[str, Any]] = ()
    predicted_loss: float | None = None
    model_name: str | None = None
    profile: Sequence[Mapping[str, Any]] = ()
    loss_unit: str | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    dtype_on_disk_before: str | None = None
    dtype_on_disk_after: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in _JSON_FIELDS:
            object.__setattr__(self, name, _json_value(getattr(self, name), name))

    @property
    def kept_of_encoder(self) -> float:
        """Share of the stored values of all the encoder's linear weights, excluded and dense ones included, left."""
        return _share(self.layers)

    @property
    def removed_of_encoder(self) -> float:
        """Share removed of all the encoder's linear weights, excluded and dense ones included."""
        return 1 - self.kept_of_encoder

    @property
    def removed_of_model(self) -> float:
        """Share removed of all parameters of the model; what `compression_scope="model"` counts."""
        return 1 - self.model_parameters_after / self.model_parameters_before

    @property
    def removed_of_targets(self) -> float:
        """Share removed of the targeted layers' weights; what `compression_scope="targets"` counts."""
        return 1 - _share([layer for layer in self.layers if layer.targeted])

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with the ratios; `from_dict` is its exact inverse."""
        content = dataclasses.asdict(self)
        content["layers"] = [{**layer, "shape": list(layer["shape"])} for layer in content["layers"]]
        ratios = {name: getattr(self, name) for name in _RATIOS}
        return {**ratios, **content}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build a report from its JSON form.

        Fields of a newer version of this library are left out, with a warning.

        Raises:
            ValueError: names what is missing.
        """
        known = {name: value for name, value in content.items() if name not in _RATIOS}
        fields = _known_fields(cls, known, "The report")
        layers = [
            LayerReport(**_known_fields(LayerReport, layer, "A layer of the report")) for layer in fields["layers"]
        ]
        return cls(**{**fields, "layers": layers})

    def save(self, path: str | Path) -> Path:
        """Write the report, complete or not at all.

        Args:
            path: A file, or an existing folder in which it is called `mixrank_report.json`.

        Returns:
            The file.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text(file_in(path, REPORT_NAME), text)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report.

        Args:
            path: The file, or the folder of the checkpoint.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file holds no report.
        """
        file = file_in(path, REPORT_NAME)
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{str(file)!r} holds a {type(content).__name__}, not the report of a compression.")
        return cls.from_dict(content)


_JSON_FIELDS = (
    "settings",
    "environment",
    "calibration",
    "seconds",
    "evaluation",
    "compensation",
    "profile",
    "memory",
)

_RATIOS = ("removed_of_model", "removed_of_targets", "removed_of_encoder", "kept_of_encoder")


def _share(layers: Sequence[LayerReport]) -> float:
    before = sum(layer.parameters_before for layer in layers)
    # Of nothing, nothing was removed.
    return sum(layer.parameters_after for layer in layers) / before if before else 1.0


def file_in(path: str | Path, name: str) -> Path:
    """The path itself, or the file of this name in it where it is an existing folder."""
    path = Path(path)
    return path / name if path.is_dir() else path


def write_text(file: Path, text: str) -> Path:
    """Write a file, complete or not at all, and return it."""
    with replaced_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _json_value(value: Any, name: str) -> Any:
    """The value as it comes back from a JSON file, so that a report equals its reloaded self."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except TypeError as error:
        raise TypeError(f"{name} of a report is to hold JSON values only: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{name} of a report may hold neither NaN nor Inf: {error}.") from None


def _known_fields(cls: type, content: Mapping[str, Any], what: str) -> dict[str, Any]:
    fields = {each.name: each for each in dataclasses.fields(cls)}
    missing = [
        name
        for name, each in fields.items()
        if name not in content and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; the file is no report of a compression, or is damaged.")
    unknown = sorted(set(content) - set(fields))
    if unknown:
        logger.warning(
            f"{what} has unknown fields, which are left out: {', '.join(unknown)}. Is optimum-mixrank up to date?"
        )
    return {name: value for name, value in content.items() if name in fields}
