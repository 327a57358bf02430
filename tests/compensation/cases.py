"""Tiny models, and images with enough structure to learn from."""

from __future__ import annotations

import torch
from models import tiny_deit, tiny_swin, tiny_vit

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.targets import encoder_linears
from optimum_mixrank.compensation.segments import find_segments


FAMILIES = {"vit": tiny_vit, "deit": tiny_deit, "swin": tiny_swin}


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Random mixtures of eight images, `[count, 3, 32, 32]`."""
    base = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    mixture = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return (mixture @ base.flatten(1)).view(count, 3, 32, 32) / 3


def config(**changes) -> MixRankConfig:
    settings = {"compression_ratio": 0.5, "compression_scope": "targets", "metric": "kfac", "layout": "pivoted"}
    settings["structures"] = ["rank"]
    return MixRankConfig(**{**settings, **changes})


def compress(model, settings: MixRankConfig, count: int = 64):
    """The compressed model and its report."""
    compressor = MixRankCompressor(model)
    compressed = compressor.compress(settings, list(images(count).split(16)))
    return compressed, compressor.report


def segments_of(model) -> list[str]:
    """The segments that hold the targeted layers."""
    return find_segments(model, [target.name for target in encoder_linears(model)])


def layers_inside(model, segment: str) -> list[str]:
    """The targeted layers of a segment, by their names within it, in forward order."""
    prefix = f"{segment}."
    names = [target.name for target in encoder_linears(model)]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
