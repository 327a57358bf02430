"""Assemble the report of a compression."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..calibration.result import Calibration
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.files import count_parameters, safetensors_bytes, stored_dtype
from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer, stored_values
from ..compensation import CompensationResult
from ..evaluation.flops import flops_per_image
from ..runtime.distributed import Processes
from ..runtime.files import is_local_path
from ..runtime.logging import get_logger
from .data import LayerReport
from .profile import RankProfile
from .report import CompressionReport


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """Size and cost of a model.

    Attributes:
        parameters: Number of stored values.
        flops: FLOPs per image; None if they could not be counted.
        bytes: Size of the safetensors files it was loaded from; None if they are not in a local folder.
        dtype: The dtype of most values in these files.
    """

    parameters: int
    flops: int | None
    bytes: int | None = None
    dtype: str | None = None


def measure(model: PreTrainedModel) -> Measurement:
    """Measure a model in its present state."""
    try:
        flops = flops_per_image(model)
    except Exception as error:
        # A figure for the report must not stop a compression.
        logger.warning(f"The FLOPs of {type(model).__name__} could not be counted: {error}")
        flops = None
    folder = Path(model.name_or_path)
    if model.name_or_path and any(folder.glob("*.safetensors")):
        try:
            return Measurement(count_parameters(model), flops, safetensors_bytes(folder), stored_dtype(folder))
        except (OSError, ValueError) as error:
            logger.warning(f"The size of the original on disk is unknown: {error}")
    return Measurement(count_parameters(model), flops)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a compression; names of layers are canonical.

    Attributes:
        config: The configuration as it is stored with the model.
        linears: All linear layers of the original's encoder.
        ranks: The rank of every targeted layer, None for dense ones.
        rank_map: The factored layers.
        losses: The loss of every targeted layer at rank 0, 1, …, as the allocator saw it.
        original: Size and cost of the original.
        model: The compressed model.
        calibration: The statistics; None if no data was used.
        seconds: Wall time by phase.
        compensation: The result of every step.
        predicted: Whether the losses have a common unit, so that they can be added up.
        profile: Predicted losses of other budgets.
        processes: The processes that shared the work.
        memory: See `ReportData`.
    """

    config: MixRankConfig
    linears: Sequence[Target]
    ranks: Mapping[str, int | None]
    rank_map: Mapping[str, FactoredLayer]
    losses: Mapping[str, np.ndarray]
    original: Measurement
    model: PreTrainedModel
    calibration: Calibration | None
    seconds: Mapping[str, float]
    compensation: Sequence[CompensationResult]
    predicted: bool
    profile: RankProfile
    processes: Processes
    memory: Mapping[str, Any]


def build_report(outcome: Outcome) -> CompressionReport:
    """Return the report of a compression."""
    config, model, original, calibration = outcome.config, outcome.model, outcome.original, outcome.calibration
    compressed = measure(model)
    layers = [_layer_report(outcome, linear) for linear in outcome.linears]
    predicted = [layer.predicted_loss for layer in layers if layer.predicted_loss is not None]
    return CompressionReport(
        layers=layers,
        settings={key: value for key, value in config.to_dict().items() if key != "rank_map"},
        environment={
            **environment(next(model.parameters()).device),
            "processes": outcome.processes.count,
            "mixed_precision": outcome.processes.mixed_precision,
        },
        model_parameters_before=original.parameters,
        model_parameters_after=compressed.parameters,
        bytes_on_disk_before=original.bytes,
        dtype_on_disk_before=original.dtype,
        flops_before=original.flops,
        flops_after=compressed.flops,
        calibration={
            "num_images": 0 if calibration is None else calibration.num_images,
            "num_tokens": 0 if calibration is None else calibration.num_tokens,
            "num_broken": 0 if calibration is None else len(calibration.broken),
        },
        predicted_loss=sum(predicted) if outcome.predicted else None,
        model_name=_name(model),
        profile=_budgets(outcome.profile, outcome.linears, original.parameters, config.layout),
        loss_unit=outcome.profile.unit,
        compensation=[dataclasses.asdict(result) for result in outcome.compensation],
        seconds={step: round(value, 3) for step, value in outcome.seconds.items()},
        memory=outcome.memory,
    )


def _layer_report(outcome: Outcome, linear: Target) -> LayerReport:
    name, (m, n) = linear.canonical_name, linear.shape
    factored = outcome.rank_map.get(name)
    kept = loss = None
    if factored is not None:
        total, loss = float(outcome.losses[name][0]), float(outcome.losses[name][factored.rank])
        kept = 1 - loss / total if total > 0 else 1.0
    return LayerReport(
        name=name,
        shape=(m, n),
        rank=None if factored is None else factored.rank,
        kept_energy=kept,
        targeted=name in outcome.ranks,
        parameters_before=m * n,
        parameters_after=m * n if factored is None else factored.num_values(m, n),
        predicted_loss=loss if outcome.predicted else None,
    )


def environment(used: torch.device | None = None) -> dict[str, Any]:
    """Return the versions and the machine, which a reader needs to reproduce or judge a figure.

    Args:
        used: The device that did the work; default: the CPU.
    """
    versions = {}
    for package in ("optimum-mixrank", "torch", "transformers", "optimum", "datasets", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    on_gpu = used is not None and used.type == "cuda"
    device = torch.cuda.get_device_name(used) if on_gpu else platform.machine()
    return {
        "python": platform.python_version(),
        **versions,
        "system": platform.system(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _name(model: PreTrainedModel) -> str:
    # Reports are published with the model and must not show paths of this machine.
    name = str(model.name_or_path)
    return (Path(name).name if is_local_path(name) else name) or type(model).__name__


def _budgets(profile: RankProfile, linears: Sequence[Target], parameters: int, layout: str) -> list[dict[str, Any]]:
    shapes = {linear.canonical_name: linear.shape for linear in linears}
    budgets = []
    for point in profile.points:
        factored = [(*shapes[name], rank) for name, rank in point.ranks.items() if rank is not None]
        saved = sum(m * n - stored_values(m, n, rank, layout) for m, n, rank in factored)
        budgets.append({"compression_ratio": point.ratio, "model_parameters": parameters - saved, "loss": point.loss})
    return budgets
