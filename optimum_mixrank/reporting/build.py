"""Assemble the report of a compression."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..allocation.choice import LayerChoice
from ..calibration.reach import Reach, measure_reach
from ..calibration.result import Calibration
from ..calibration.sites import Mlp, Site, removed_biases
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.files import count_parameters, safetensors_bytes, stored_dtype
from ..checkpoint.modeling import FactoredLinear
from ..checkpoint.names import Target
from ..checkpoint.rank_map import FactoredLayer
from ..checkpoint.shared import SharedLinear
from ..compensation import CompensationResult
from ..decomposition.mlp import WidthLosses
from ..evaluation.flops import flops_per_image
from ..runtime.distributed import Processes
from ..runtime.files import is_local_path
from ..runtime.logging import get_logger
from ..runtime.outputs import PLAIN_CALL, ModelCall
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
        reach: Which of the parameters are targeted, and what the others are; None if nothing is.
    """

    parameters: int
    flops: int | None
    bytes: int | None = None
    dtype: str | None = None
    reach: Reach | None = None


def measure(
    model: PreTrainedModel, call: ModelCall = PLAIN_CALL, targets: Sequence[Target] | None = None
) -> Measurement:
    """Measure a model in its present state; `call` says how it is called, `targets` which layers are compressed."""
    reach = None if targets is None else measure_reach(model, targets, call)
    try:
        flops = flops_per_image(model, call=call)
    except Exception as error:
        # A figure for the report must not stop a compression.
        logger.warning(f"The FLOPs of {type(model).__name__} could not be counted: {error}")
        flops = None
    folder = Path(model.name_or_path)
    if model.name_or_path and any(folder.glob("*.safetensors")):
        try:
            return Measurement(count_parameters(model), flops, safetensors_bytes(folder), stored_dtype(folder), reach)
        except (OSError, ValueError) as error:
            logger.warning(f"The size of the original on disk is unknown: {error}")
    return Measurement(count_parameters(model), flops, reach=reach)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a compression; names of layers are canonical.

    Attributes:
        config: The configuration as it is stored with the model.
        linears: All linear layers of the original's encoder.
        choices: What was chosen for every targeted layer.
        sites: Layers that were decided together.
        rank_map: The factored layers.
        losses: The losses of layers, single and joint, as the allocator saw them.
        mlp_losses: Those of MLPs by width.
        original: Size and cost of the original.
        model: The compressed model.
        calibration: The statistics; None if no data was used.
        seconds: Wall time by phase.
        compensation: The result of every step.
        predicted: Whether the losses have a common unit, so that they can be added up.
        profile: Predicted losses of other budgets.
        processes: The processes that shared the work.
        memory: See `ReportData`.
        fidelity: See `ReportData`.
        latency: See `ReportData`.
        call: How the models are called.
    """

    config: MixRankConfig
    linears: Sequence[Target]
    choices: Mapping[str, LayerChoice]
    sites: Sequence[Site]
    rank_map: Mapping[str, FactoredLayer]
    losses: Mapping[str, np.ndarray]
    mlp_losses: Mapping[str, Sequence[WidthLosses]]
    original: Measurement
    model: PreTrainedModel
    calibration: Calibration | None
    seconds: Mapping[str, float]
    compensation: Sequence[CompensationResult]
    predicted: bool
    profile: RankProfile
    processes: Processes
    memory: Mapping[str, Any]
    fidelity: Mapping[str, Any]
    latency: Mapping[str, Any]
    call: ModelCall = PLAIN_CALL


def build_report(outcome: Outcome) -> CompressionReport:
    """Return the report of a compression."""
    config, model, original, calibration = outcome.config, outcome.model, outcome.original, outcome.calibration
    compressed = measure(model, outcome.call)
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
        model_name=original_name(model),
        profile=_budgets(outcome),
        loss_unit=outcome.profile.unit,
        compensation=[dataclasses.asdict(result) for result in outcome.compensation],
        seconds={step: round(value, 3) for step, value in outcome.seconds.items()},
        memory=outcome.memory,
        fidelity=outcome.fidelity,
        latency=outcome.latency,
        reach={} if original.reach is None else original.reach.to_dict(),
    )


def _layer_report(outcome: Outcome, linear: Target) -> LayerReport:
    name, (m, n) = linear.canonical_name, linear.shape
    entry, choice = outcome.rank_map.get(name), outcome.choices.get(name)
    kept = loss = None
    if entry is not None and choice is not None:
        loss, total = _losses(outcome, name, entry, choice)
        kept = 1 - loss / total if total > 0 else 1.0
    return LayerReport(
        name=name,
        shape=(m, n),
        rank=None if entry is None else entry.rank,
        kept_energy=kept,
        targeted=choice is not None,
        parameters_before=m * n,
        parameters_after=_num_values(outcome.model.get_submodule(linear.name)),
        predicted_loss=loss if outcome.predicted else None,
        shape_after=(m, n) if entry is None or entry.shape is None else entry.shape,
        members=() if entry is None or entry.members is None else entry.members,
    )


def _num_values(module: nn.Module) -> int:
    if isinstance(module, FactoredLinear | SharedLinear):
        return module.num_values
    return module.weight.numel()


def _losses(outcome: Outcome, name: str, entry: FactoredLayer, choice: LayerChoice) -> tuple[float, float]:
    """Return the loss of a layer and what it would lose at rank 0."""
    site = next((each for each in outcome.sites if name in {layer.canonical_name for layer in each.layers}), None)
    alone = outcome.losses.get(name)
    if alone is not None and entry.rank is not None and not choice.shared:
        # The rank is lower than the one chosen where that could not be stored in the layout.
        return float(alone[entry.rank]), float(alone[0])
    if isinstance(site, Mlp):
        full = outcome.mlp_losses[site.name][-1]
        tails = full.second if name == site.second.canonical_name else full.first / len(site.layers[:-1])
        return choice.loss, float(tails[0])
    assert site is not None and entry.rank is not None  # what shares a factor has a rank
    joint = outcome.losses[site.name]
    return choice.loss, choice.loss / max(float(joint[entry.rank]), 1e-300) * float(joint[0])


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


def original_name(model: PreTrainedModel) -> str:
    """Return what a report calls a model: its Hub id, the name of its folder, or its class."""
    # Reports are published with the model and must not show paths of this machine.
    name = str(model.name_or_path)
    return (Path(name).name if is_local_path(name) else name) or type(model).__name__


def _budgets(outcome: Outcome) -> list[dict[str, Any]]:
    targeted = {linear.canonical_name: math.prod(linear.shape) for linear in outcome.linears}
    return [
        {
            "compression_ratio": point.ratio,
            "model_parameters": outcome.original.parameters
            - sum(targeted[name] for name in point.choices)
            + point.num_values
            - removed_biases(outcome.sites, point.choices),
            "loss": point.loss,
        }
        for point in outcome.profile.points
    ]
