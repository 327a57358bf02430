"""Put together the report of a compression."""

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
from ..compensation import CompensationResult
from ..configuration import MixRankConfig
from ..distributed import ALONE, Processes
from ..evaluation.flops import flops_per_image
from ..evaluation.size import count_parameters, safetensors_bytes, stored_dtype
from ..layout import FactoredLayer, stored_values
from ..messages import get_logger
from ..profile import RankProfile
from ..targets import Target
from .report import CompressionReport, LayerReport


if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = get_logger(__name__)

_PACKAGES = ("optimum-mixrank", "torch", "transformers", "optimum", "datasets", "safetensors")


@dataclass(frozen=True)
class Measurement:
    """Size and cost of a model.

    Attributes:
        parameters: Stored values.
        flops: FLOPs per image, or None where the model cannot be run on an image of its size.
        bytes: Bytes of the safetensors files it was loaded from; None where they are not in a local folder.
        dtype: Of most values in these files.
    """

    parameters: int
    flops: int | None
    bytes: int | None = None
    dtype: str | None = None


def measure(model: PreTrainedModel) -> Measurement:
    """Measure a model as it is now."""
    try:
        flops = flops_per_image(model)
    except Exception as error:
        # A count that some architecture does not support must not stop a compression.
        logger.warning(f"The FLOPs of {type(model).__name__} could not be counted: {error}")
        flops = None
    folder = Path(model.name_or_path)
    if model.name_or_path and any(folder.glob("*.safetensors")):
        return Measurement(count_parameters(model), flops, safetensors_bytes(folder), stored_dtype(folder))
    return Measurement(count_parameters(model), flops)


def build_report(
    config: MixRankConfig,
    linears: Sequence[Target],
    ranks: Mapping[str, int | None],
    rank_map: Mapping[str, FactoredLayer],
    losses: Mapping[str, np.ndarray],
    original: Measurement,
    model: PreTrainedModel,
    calibration: Calibration | None,
    seconds: Mapping[str, float],
    compensation: Sequence[CompensationResult] = (),
    predicted: bool = False,
    profile: RankProfile | None = None,
    processes: Processes = ALONE,
    memory: Mapping[str, Any] | None = None,
) -> CompressionReport:
    """Describe what was done to every linear layer of the encoder, targeted or not.

    Args:
        config: As it is stored with the model.
        linears: All linear layers of the encoder, as they were.
        ranks: By canonical name of every targeted layer.
        rank_map: The factored layers.
        losses: Loss at rank 0, 1, …, by canonical name, as the allocation saw it.
        original: The model as it was.
        model: The compressed model.
        calibration: None where no data was used.
        seconds: Wall time by phase.
        compensation: What came of every step.
        predicted: Whether the losses are in a common unit, so that their sum says something.
        profile: What other budgets would have cost.
        processes: Those that shared the work.
        memory: What was announced and what was measured; see `CompressionReport`.
    """
    layers = []
    for linear in linears:
        name, (m, n) = linear.canonical_name, linear.shape
        factored = rank_map.get(name)
        after = m * n if factored is None else factored.num_values(m, n)
        kept = None
        if factored is not None:
            total = float(losses[name][0])
            kept = 1 - float(losses[name][factored.rank]) / total if total > 0 else 1.0
        layers.append(
            LayerReport(
                name=name,
                shape=(m, n),
                rank=factored.rank if factored else None,
                kept_energy=kept,
                targeted=name in ranks,
                parameters_before=m * n,
                parameters_after=after,
                predicted_loss=float(losses[name][factored.rank]) if predicted and factored is not None else None,
            )
        )
    predicted_loss = sum(float(losses[name][entry.rank]) for name, entry in rank_map.items())
    compressed = measure(model)
    settings = {key: value for key, value in config.to_dict().items() if key != "rank_map"}
    return CompressionReport(
        layers=layers,
        settings=settings,
        environment={
            **environment(next(model.parameters()).device),
            "processes": processes.count,
            "mixed_precision": processes.mixed_precision,
        },
        model_parameters_before=original.parameters,
        model_parameters_after=compressed.parameters,
        bytes_on_disk_before=original.bytes,
        dtype_on_disk_before=original.dtype,
        flops_before=original.flops,
        flops_after=compressed.flops,
        calibration=_describe(calibration),
        predicted_loss=predicted_loss if predicted else None,
        model_name=_name(model),
        profile=[] if profile is None else _budgets(profile, linears, original.parameters, config.layout),
        loss_unit=None if profile is None else profile.unit,
        compensation=[dataclasses.asdict(result) for result in compensation],
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        memory=memory or {},
    )


def environment(used: torch.device | None = None) -> dict[str, Any]:
    """Versions and machine: what a reader needs to reproduce or to judge a figure.

    Args:
        used: The device that the work was done on; default: the CPU.
    """
    versions = {}
    for package in _PACKAGES:
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
    # Where a folder lies on this machine is nobody's business.
    name = str(model.name_or_path)
    return (Path(name).name if Path(name).exists() else name) or type(model).__name__


def _budgets(profile: RankProfile, linears: Sequence[Target], parameters: int, layout: str) -> list[dict[str, Any]]:
    shapes = {linear.canonical_name: linear.shape for linear in linears}
    budgets = []
    for point in profile.points:
        factored = [(*shapes[name], rank) for name, rank in point.ranks.items() if rank is not None]
        saved = sum(m * n - stored_values(m, n, rank, layout) for m, n, rank in factored)
        budgets.append({"compression_ratio": point.ratio, "model_parameters": parameters - saved, "loss": point.loss})
    return budgets


def _describe(calibration: Calibration | None) -> dict[str, Any]:
    if calibration is None:
        return {"num_images": 0, "num_tokens": 0, "num_broken": 0}
    return {
        "num_images": calibration.num_images,
        "num_tokens": calibration.num_tokens,
        "num_broken": len(calibration.broken),
    }
