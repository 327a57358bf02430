"""The report of a compression as plain data, saved as JSON beside the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.replacing import REPORT_NAME as REPORT_NAME
from ..runtime.files import replaced_file
from ..runtime.formatting import type_of
from ..runtime.logging import get_logger


if TYPE_CHECKING:
    from typing_extensions import Self


logger = get_logger(__name__)


@dataclass(frozen=True)
class LayerReport:
    """What was done to a linear layer of the encoder.

    Attributes:
        name: Canonical name.
        shape: `(out_features, in_features)`.
        rank: The rank of its factors; None if the layer stayed dense.
        kept_energy: Share of the layer's energy that one-shot factors of this rank keep, in [0, 1], as the metric
            measures it, before compensation; None for a dense layer.
        targeted: Whether the layer was targeted; a targeted layer stays dense if that is smaller or requested.
        parameters_before: Number of values in the weight, `out_features * in_features`.
        parameters_after: Number of values stored for the weight or its factors.
        predicted_loss: Predicted loss of one-shot factors of this rank, before compensation, in nats per image, to
            second order; None for a dense layer or a metric whose losses have no common unit.
        shape_after: Its shape where hidden units of its MLP were removed; else `shape`.
        members: Canonical names of the layers that share its first factor, itself among them; empty if none do.
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    kept_energy: float | None
    targeted: bool
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None
    shape_after: tuple[int, int] | None = None
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "shape_after", tuple(self.shape_after or self.shape))
        object.__setattr__(self, "members", tuple(self.members))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without an unchanged shape and without members where there are none."""
        content = {**dataclasses.asdict(self), "shape": list(self.shape)}
        del content["shape_after"], content["members"]
        if self.shape_after != self.shape and self.shape_after is not None:
            content["shape_after"] = list(self.shape_after)
        return {**content, "members": list(self.members)} if self.members else content

    @property
    def kept(self) -> float:
        """Share of the stored values that is left."""
        return self.parameters_after / self.parameters_before

    @property
    def rank_text(self) -> str:
        """The rank as tables show it: a number, `65 shared` with other layers, `dense` or `excluded`."""
        if self.rank is None:
            return "dense" if self.targeted else "excluded"
        return f"{self.rank} shared" if self.members else str(self.rank)

    def shape_text(self, times: str = "x") -> str:
        """Return the shape as tables show it, `1536 x 384`; `896 of 1536 x 384` where hidden units were removed."""
        after = self.shape_after or self.shape
        sizes = [
            str(before) if before == now else f"{now} of {before}"
            for before, now in zip(self.shape, after, strict=True)
        ]
        return f" {times} ".join(sizes)

    @property
    def kept_units(self) -> float:
        """Share of the hidden units that are left of those that its MLP had; 1 for other layers."""
        before, after = self.shape, self.shape_after or self.shape
        return min(now / size for size, now in zip(before, after, strict=True))


@dataclass(frozen=True)
class ReportData:
    """The plain data of a report: what a compression was asked to do, what it did, and what the result is like.

    Attributes:
        layers: All linear layers of the encoder in forward order, targeted or not.
        settings: The configuration, as JSON values.
        environment: Versions, machine and threads, as JSON values.
        model_parameters_before: Parameters of the original model.
        model_parameters_after: Parameters of the compressed model.
        bytes_on_disk_before: Size of the original's weight files; None if unknown.
        bytes_on_disk_after: Size of the compressed checkpoint's weight files; None before it is saved.
        dtype_on_disk_before: The dtype of most of the original's stored values, such as `"float16"`; None if unknown.
        dtype_on_disk_after: The same for the compressed checkpoint.
        flops_before: FLOPs per image of the original (a multiply-add counts as two); None if not counted.
        flops_after: FLOPs per image of the compressed model.
        calibration: `num_images`, `num_tokens` and `num_broken`.
        seconds: Wall time by phase.
        evaluation: The fields of `EvaluationResult`; None before an evaluation.
        compensation: The fields of `CompensationResult` for every step.
        predicted_loss: Predicted loss of the ranks before compensation, in nats per image, to second order; None for a
            metric whose losses have no common unit.
        model_name: Hub id of the original, or the name of its folder without the path.
        profile: Predicted losses of other budgets before compensation, by ascending ratio; each has
            `compression_ratio`, `model_parameters` and `loss`.
        loss_unit: The unit of the profile's losses.
        memory: If a limit was set, the main process's estimate of what is needed in addition to the original:
            `estimated_bytes` by place (`host`, `device`), `disk_bytes` of activations on the disk, `passes` over the
            images for statistics, and `not_counted`, the steps that the estimate leaves out. Empty without a limit.
        fidelity: Comparison with the original on images that were at hand: `num_images`, whether they are `held_out`,
            the `kind` of the output and its measures, such as `agreement` and `kl`. Empty without images.
        latency: If the budget was one of time, by the table of latencies: `predicted_share` of the dense model's time,
            `predicted_seconds` and `dense_seconds` per batch, and the `conditions` of the measurement. Empty otherwise.
        reach: Parameters of the original: `targeted`, those of what runs when `images` go in (None if unknown) and the
            `targeted_by_images` of these, and those that are `left_out`, by kind.

    Raises:
        TypeError: if settings and the like hold anything but JSON values.
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
    latency: Mapping[str, Any] = field(default_factory=dict)
    dtype_on_disk_before: str | None = None
    dtype_on_disk_after: str | None = None
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    reach: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in {each.name for each in dataclasses.fields(self)} - {"layers"}:
            object.__setattr__(self, name, _json_value(getattr(self, name), name))

    @property
    def kept_of_encoder(self) -> float:
        """Share left of the values of all the encoder's linear weights, including excluded and dense ones."""
        return _share(self.layers)

    @property
    def removed_of_encoder(self) -> float:
        """Share removed of the values of all the encoder's linear weights, including excluded and dense ones."""
        return 1 - self.kept_of_encoder

    @property
    def removed_of_model(self) -> float:
        """Share removed of all parameters of the model, which `compression_scope="model"` counts."""
        return 1 - self.model_parameters_after / self.model_parameters_before

    @property
    def removed_of_targets(self) -> float:
        """Share removed of the targeted layers' weights, which `compression_scope="targets"` counts."""
        return 1 - _share([layer for layer in self.layers if layer.targeted])

    @property
    def targeted_of_model(self) -> float:
        """Share of the model's parameters that are weights of targeted layers."""
        return sum(layer.parameters_before for layer in self.layers if layer.targeted) / self.model_parameters_before

    @property
    def targeted_of_images(self) -> float | None:
        """The same of the part that images reach, such as a vision tower; None if unknown, or if others are targeted."""
        images, targeted = self.reach.get("images"), self.reach.get("targeted_by_images")
        return targeted / images if images and targeted else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report with its ratios as JSON values; `from_dict` is the exact inverse."""
        content = dataclasses.asdict(self)
        content["layers"] = [layer.to_dict() for layer in self.layers]
        ratios = {name: getattr(self, name) for name in _RATIOS}
        return {**ratios, **content}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Build a report from JSON values; unknown fields, as of a newer version, are dropped with a warning.

        Raises:
            ValueError: if a field is missing.
        """
        known = {name: value for name, value in content.items() if name not in _RATIOS}
        fields = _known_fields(cls, known, "The report")
        layers = [
            LayerReport(**_known_fields(LayerReport, layer, "A layer of the report")) for layer in fields["layers"]
        ]
        return cls(**{**fields, "layers": layers})

    def save(self, path: str | Path) -> Path:
        """Write the report, completely or not at all.

        Args:
            path: A file, or an existing folder, in which the file is called `mixrank_report.json`.

        Returns:
            The path of the file.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        return write_text(file_in(path, REPORT_NAME), text)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a report.

        Args:
            path: The file, or the folder of the checkpoint.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file does not hold a report.
        """
        file = file_in(path, REPORT_NAME)
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{str(file)!r} holds {type_of(content)}, not a compression report.")
        return cls.from_dict(content)


_RATIOS = (
    "removed_of_model",
    "removed_of_targets",
    "removed_of_encoder",
    "kept_of_encoder",
    "targeted_of_model",
    "targeted_of_images",
)


def _share(layers: Sequence[LayerReport]) -> float:
    before = sum(layer.parameters_before for layer in layers)
    # Where there is nothing, nothing was removed.
    return sum(layer.parameters_after for layer in layers) / before if before else 1.0


def file_in(path: str | Path, name: str) -> Path:
    """Return the file of this name in `path` if that is an existing folder, else `path` itself."""
    path = Path(path).expanduser()
    return path / name if path.is_dir() else path


def write_text(file: Path, text: str) -> Path:
    """Write a file, completely or not at all, and return its path."""
    with replaced_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def _json_value(value: Any, name: str) -> Any:
    """Return the value as a JSON file would give it back, so that a report equals its reloaded copy."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except TypeError as error:
        raise TypeError(f"{name} of a report must hold JSON values only: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{name} of a report must not hold NaN or Inf: {error}.") from None


def _known_fields(cls: type, content: Mapping[str, Any], what: str) -> dict[str, Any]:
    fields = {each.name: each for each in dataclasses.fields(cls)}
    missing = [
        name
        for name, each in fields.items()
        if name not in content and each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; the file is not a compression report, or it is damaged.")
    unknown = sorted(set(content) - set(fields))
    if unknown:
        logger.warning(
            f"{what} has unknown fields, which are dropped: {', '.join(unknown)}. Is optimum-mixrank up to date?"
        )
    return {name: value for name, value in content.items() if name in fields}
