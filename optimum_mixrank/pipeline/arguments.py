"""Checks of the arguments of `MixRankCompressor`: what is swapped or mistyped is named before any work."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..calibration.result import Calibration
from ..checkpoint.configuration import MixRankConfig
from ..runtime.formatting import type_of


_ALIASES = {
    "data": "calibration_dataset",
    "dataset": "calibration_dataset",
    "images": "calibration_dataset",
    "output": "save_directory",
    "output_dir": "save_directory",
}
"""What the command line and neighbouring tools call these arguments."""


def check_keywords(method: Callable[..., Any], given: Iterable[str]) -> None:
    """Check that a method has the keyword arguments that it is called with.

    Raises:
        TypeError: if it has not; the message names the argument, or the field of the configuration, that was meant.
    """
    parameters = inspect.signature(method).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    for name in given:
        if name in parameters:
            continue
        found = f"`{method.__name__}` has no argument `{name}`"
        fields = [field.name for field in dataclasses.fields(MixRankConfig)]
        field = next((each for each in fields if each == name or each.endswith(f"_{name}")), None)
        longer = next((each for each in parameters if each.endswith(f"_{name}")), None)
        meant = _ALIASES[name] if _ALIASES.get(name) in parameters else longer
        if meant is not None:
            raise TypeError(f"{found}; did you mean `{meant}`?")
        if "config" in parameters and field is not None:
            raise TypeError(f"{found}; it belongs to the configuration: MixRankConfig({field}=…).")
        close = difflib.get_close_matches(name, [each for each in parameters if each != "self"], n=1)
        raise TypeError(f"{found}{f'; did you mean `{close[0]}`?' if close else '.'}")


def check_config(config: Any) -> MixRankConfig:
    """Return a configuration, the default one for None, after checking its fields.

    Raises:
        TypeError: if it is something else.
        ValueError: if a field is invalid.
    """
    if config is None:
        config = MixRankConfig()
    if isinstance(config, dict):
        raise TypeError("config is a dict; give MixRankConfig(**config).")
    if not isinstance(config, MixRankConfig):
        raise TypeError(f"config is {type_of(config)}, not a MixRankConfig; give MixRankConfig(compression_ratio=…).")
    config.validate()
    return config


def check_calibration(calibration: Any) -> None:
    """Check that statistics are what `MixRankCompressor.calibrate` returns; raises a `TypeError` otherwise."""
    if not isinstance(calibration, Calibration):
        raise TypeError(
            f"calibration is {type_of(calibration)}, not a Calibration; give what `compressor.calibrate(…)` "
            "returns, or `Calibration.load(path)`."
        )


def check_compressed(model: Any) -> None:
    """Check that a model, which may be wrapped, is one; raises a `TypeError` otherwise."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type_of(model)}, not a model; give the one that `compressor.compress(…)` returns.")


def check_path(name: str, path: Any) -> None:
    """Check that a folder is given by its path, or not at all; raises a `TypeError` otherwise."""
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is {type_of(path)}, not the path of a folder.")


def check_save_interval(seconds: Any) -> None:
    """Check the time between two saves; raises a `ValueError` unless it is a positive number."""
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise ValueError(f"save_interval={seconds!r} is not a positive number of seconds.")


def check_metrics(metric: Any) -> list[str]:
    """Return the names of one or several metrics; raises a `TypeError` for anything else."""
    names = [metric] if isinstance(metric, str) else metric
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"metric is {type_of(metric)}, not the name of a metric or a list of names.")
    return list(names)
