"""Loss that more stored values would save, for layers of the model of this repository."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers.utils import logging

from optimum_mixrank import MixRankCompressor, MixRankConfig
from optimum_mixrank.calibration.result import Calibration
from optimum_mixrank.calibration.targets import find_targets
from optimum_mixrank.checkpoint.rank_map import stored_values
from optimum_mixrank.decomposition import METRICS
from optimum_mixrank.pipeline.decompose import Decompositions, decompose_layers
from optimum_mixrank.reporting.colours import BREAK_EVEN, GRID, INK, SERIES


TITLE = "Ranks under one budget"
DESCRIPTION = (
    "For four layers, the nats per image that a thousand more stored values would save, over the values that the layer "
    "has: falling curves on a logarithmic scale. A horizontal line is the price of a value. The rank of every layer, a "
    "dot, lies where its curve meets the price."
)

SHIPPED = Path(__file__).parents[2] / "examples" / "fashion_mnist"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LAYERS = {
    "encoder.layer.0.attention.attention.query": "query, block 0",
    "encoder.layer.0.output.dense": "MLP output, block 0",
    "encoder.layer.5.intermediate.dense": "MLP input, block 5",
    "encoder.layer.5.attention.attention.value": "value, block 5",
}


@functools.cache
def calibrated() -> tuple[MixRankCompressor, MixRankConfig, Calibration]:
    """Return a compressor for the shipped model, the configuration, and statistics from 512 images."""
    logging.disable_progress_bar()
    compressor = MixRankCompressor.from_pretrained(SHIPPED / "model")
    images = compressor.get_calibration_dataset(SHIPPED / "data", split="calibration")
    config = MixRankConfig(compression_ratio=0.6, structures=["rank"])
    return compressor, config, compressor.calibrate(images, config.metric)


def draw() -> Figure:
    """Draw the curves of four layers with their ranks at `compression_ratio=0.6`."""
    compressor, config, calibration = calibrated()
    metric, targets = METRICS.create(config.metric), find_targets(compressor.model)
    losses = Decompositions(decompose_layers(metric, targets, calibration, config.layout)).losses(metric)
    (point,) = compressor.profile(calibration, config, [config.compression_ratio]).points
    costs, gains = {}, {}
    for target in targets:
        (m, n), name = target.shape, target.canonical_name
        costs[name] = np.array([stored_values(m, n, rank, config.layout) for rank in range(min(m, n) + 1)])
        gains[name] = np.concatenate([[np.nan], -1000 * np.diff(losses[name]) / np.diff(costs[name])])

    price = np.median([gain[rank] for name, gain in gains.items() if (rank := point.ranks[name]) is not None])

    figure = Figure(figsize=(5.8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(price, color=BREAK_EVEN, linewidth=1.3)
    axes.annotate(
        "the price",
        (1, price),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=BREAK_EVEN,
    )
    for colour, (name, label) in zip(SERIES, LAYERS.items(), strict=False):
        gain, rank = gains[name], point.ranks[name]
        axes.plot(costs[name][1:], gain[1:], color=colour)
        axes.plot(costs[name][rank], gain[rank], "o", color=colour, label=f"{label}: rank {rank}")
    axes.set(yscale="log", ylim=(price / 100, None), xlim=(0, 32_000))
    axes.set(xlabel="stored values of the layer", ylabel="nats per image that 1,000 more would save")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: "10" + str(round(np.log10(value))).translate(SUPERSCRIPTS))
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK)
    return figure
