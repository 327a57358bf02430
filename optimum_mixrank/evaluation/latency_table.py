"""Measure the table of latencies of a model, and keep it in a file."""

from __future__ import annotations

import copy
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..allocation.latency import LatencyTable, LayerTimes, RankTimes
from ..calibration.sites import Mlp, find_sites
from ..calibration.targets import encoder_linears
from ..checkpoint.modeling import replace_module
from ..checkpoint.rank_map import LAYOUT_NAMES
from ..runtime.files import replaced_file
from ..runtime.formatting import quote
from ..runtime.forward import black_image, evaluation_mode
from ..runtime.inputs import ModelInputs
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelCall
from ..runtime.phases import phase
from ..runtime.version import __version__
from .flops import tokens_per_image
from .latency import MIN_REPEATS, time_in_turns
from .layer_samples import Passing, SampleGroup, find_activations, sample, sample_groups
from .runtimes import check_runtime, runnable


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger(__name__)

SIZE_SHARES = (0.125, 0.25, 0.4, 0.55, 0.75)
"""Widths of an MLP that are measured beside the full one, as shares of it."""

RANK_SHARES = (0.03, 0.1, 0.2, 0.3, 0.42, 0.56, 0.75, 1.0)
"""Ranks that are measured, as shares of the break-even rank."""

NARROW_RANK_SHARES = (0.06, 0.25, 0.55, 1.0)
"""The same for layers with fewer hidden units, between which the full ones show the shape of the curve."""

MULTIPLE = 8
"""The multiple of ranks that is compared with the next higher rank."""

MOST_OUTSIDE = 0.95
"""Largest share of the time that layers may not account for: otherwise noise decides what they take."""

MAX_FILE_BYTES = 2**26

_Key = tuple[int, str | None, int | None]
"""Size, layout and rank of a sample."""


def measure_latency_table(
    model: PreTrainedModel,
    batch_size: int = 1,
    *,
    runtime: str = "eager",
    pixel_values_shape: Sequence[int] | None = None,
    layouts: Sequence[str] = LAYOUT_NAMES,
    repeats: int = 9,
    min_seconds: float = 0.005,
) -> LatencyTable:
    """Measure how long the layers of a model take, dense and factored, at several ranks and widths.

    The device, the dtype and the number of threads are those of the model and of PyTorch at the time of the call. All
    samples of one shape take turns with the whole model, and what counts is the median of their times relative to its
    time in the same turn, so that a machine that slows down slows down all of them. Weights are random. As many copies of a
    layer as the model has, but at most 12, run one after another, so that weights come from memory as they do in the model.

    Args:
        model: The dense model; left as it was.
        batch_size: Images per forward pass.
        runtime: `"eager"`, `"compile"` (`torch.compile`) or `"onnxruntime"` (on the CPU).
        pixel_values_shape: `(channels, height, width)` of an image; default: as the configuration of the model says.
        layouts: Layouts of factored layers to measure.
        repeats: Turns, at least 6.
        min_seconds: Shortest time of a turn of a sample, which runs as often as it takes.

    Raises:
        ValueError: for a model that is compressed, too few turns, or a runtime or a layout that is unknown.
        ImportError: if ONNX Runtime is to be measured and not installed.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats={repeats} is too few; use {MIN_REPEATS} or more.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive.")
    if not layouts or not set(layouts) <= set(LAYOUT_NAMES):
        raise ValueError(f"layouts={layouts!r} is not a list of {', '.join(map(repr, LAYOUT_NAMES))}.")
    check_runtime(runtime, model.device)
    image = black_image(model, pixel_values_shape)
    call = ModelCall(example=ModelInputs(image))
    linears = encoder_linears(model, call)
    tokens = tokens_per_image(model, [target.name for target in linears], call=call)
    sites = find_sites(model, linears, ["shared", "width"], call)
    mlps = [site for site in sites if isinstance(site, Mlp)]
    activations = find_activations(model, mlps, image)
    groups = sample_groups(linears, sites, tokens, {name: module for name, (_, module) in activations.items()})
    shape = tuple(image.shape[1:])
    timer = _Timer(model, batch_size, shape, runtime, repeats, min_seconds, tuple(layouts))
    with phase("Measured latencies") as measuring, evaluation_mode(model):
        timer.expect(groups)
        with _only_passing(
            model, [target.name for target in linears], [name for name, _ in activations.values()]
        ) as rest:
            model_seconds, rest_share = timer.whole(rest)
        layers = [timer.layer(group) for group in groups]
        measuring.add_detail(f"{len(groups)} shapes")
    return LatencyTable(
        model_seconds=model_seconds,
        rest_seconds=_outside(rest_share) * model_seconds,
        layers=tuple(_scaled(layer, model_seconds) for layer in layers),
        rank_multiple=timer.rank_multiple(),
        conditions=_conditions(model, batch_size, shape, runtime),
    )


def save_latency_table(table: LatencyTable, path: str | Path) -> Path:
    """Write a table as JSON, completely or not at all; return its path."""
    file = Path(path).expanduser()
    text = json.dumps(table.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replaced_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def load_latency_table(path: str | Path) -> LatencyTable:
    """Read a table, which may be untrusted.

    Raises:
        ValueError: if there is no such file, or it holds no table; the message names the value that is wrong.
    """
    file, measure = Path(path).expanduser(), "measure one with `optimum-cli mixrank benchmark --model … --table FILE`"
    if not file.is_file():
        raise ValueError(f"latency_table={str(path)!r} is not a file; {measure}.")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"latency_table={str(path)!r} has more than {MAX_FILE_BYTES:,} bytes; {measure}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"latency_table={str(path)!r} holds no JSON ({quote(str(error))}); {measure}.") from None
    try:
        return LatencyTable.from_dict(content)
    except ValueError as error:
        raise ValueError(
            f"latency_table={str(path)!r} cannot be used: {error}. If it is damaged, {measure}."
        ) from None


@dataclass
class _Timer:
    """Times samples in turns with the whole model.

    Attributes:
        model: In evaluation mode.
        batch_size: Images per forward pass.
        image_shape: `(channels, height, width)`.
        runtime: One of `RUNTIMES`.
        repeats: Number of turns.
        min_seconds: Shortest time of a turn of a sample.
        layouts: Layouts to measure.
    """

    model: PreTrainedModel
    batch_size: int
    image_shape: tuple[int, ...]
    runtime: str
    repeats: int
    min_seconds: float
    layouts: tuple[str, ...]

    def __post_init__(self) -> None:
        self._steps: list[float] = []
        image = torch.randn(self.batch_size, *self.image_shape, generator=torch.Generator().manual_seed(0))
        self._image = image.to(self.model.device, self.model.dtype)
        self._whole = runnable(_FirstOutput(self.model), self._image, self.runtime)

    def expect(self, groups: Sequence[SampleGroup]) -> None:
        """Start the progress bar for the whole and for these groups."""
        count = 2 + sum(1 + len(self._keys(group)) for group in groups)
        self._bar = logging.tqdm(total=count * self.repeats, desc="Measuring latencies", unit="time")

    def whole(self, rest: nn.Module) -> tuple[float, float]:
        """Return the seconds of the model, and the share that it takes without its layers."""
        functions = {"whole": self._whole, "rest": runnable(_FirstOutput(rest), self._image, self.runtime)}
        times = self._time(functions)
        return statistics.median(times["whole"]), _median_ratio(times["rest"], times["whole"])

    def layer(self, group: SampleGroup) -> LayerTimes:
        """Return the times of a group's layers as shares of the model's time."""
        vectors = (self.batch_size, group.tokens)
        functions: dict[Any, Callable[[], Any]] = {"whole": self._whole}
        copies = {}
        for size, layout, rank in self._keys(group):
            module = sample(group, size, layout, rank, keep=self.runtime != "eager")
            copies[size, layout, rank] = len(module.copies)
            inputs = torch.randn(*vectors, group.shape(size)[1], generator=torch.Generator().manual_seed(0))
            example = inputs.to(self._image)
            functions[size, layout, rank] = runnable(module, example, self.runtime)
        times = self._time(functions)
        shares = {key: _median_ratio(times[key], times["whole"]) / count for key, count in copies.items()}
        self._note_steps(group, shares)
        return _layer_times(group, shares, self.layouts, self._sizes(group))

    def rank_multiple(self) -> int:
        """Return the multiple of ranks that costs nothing: 8 if a rank above it costs about as much as the next one."""
        self._bar.close()
        return MULTIPLE if self._steps and statistics.median(self._steps) > 0.5 else 1

    def _note_steps(self, group: SampleGroup, shares: Mapping[_Key, float]) -> None:
        """Note which part of the step from one multiple to the next is taken by the rank just above the first."""
        for layout in self.layouts:
            low = _probed_rank(group, layout)
            before, above, after = (shares.get((group.full_size, layout, low + more)) for more in (0, 1, MULTIPLE))
            if before is not None and above is not None and after is not None and after > before:
                self._steps.append((above - before) / (after - before))

    def _sizes(self, group: SampleGroup) -> tuple[int, ...]:
        return group.sizes(SIZE_SHARES)

    def _keys(self, group: SampleGroup) -> list[_Key]:
        """Return size, layout and rank of all samples of a group."""
        keys: list[_Key] = []
        for size in self._sizes(group):
            is_full = size == group.full_size
            keys.append((size, None, None))
            for layout in self.layouts:
                ranks = group.ranks(size, layout, RANK_SHARES if is_full else NARROW_RANK_SHARES)
                low = _probed_rank(group, layout)
                if is_full and low:
                    ranks = tuple(sorted({*ranks, low, low + 1, low + MULTIPLE}))
                keys += [(size, layout, rank) for rank in ranks]
        return keys

    def _time(self, functions: Mapping[Any, Callable[[], Any]]) -> dict[Any, tuple[float, ...]]:
        return time_in_turns(
            functions,
            self.model.device,
            repeats=self.repeats,
            warmup=2,
            min_seconds=self.min_seconds,
            on_turn=self._bar.update,
        )


def _probed_rank(group: SampleGroup, layout: str) -> int:
    """Return a multiple of 8 about half-way to break-even, or 0 if there are too few ranks."""
    (middle,) = group.ranks(group.full_size, layout, (0.5,))
    (largest,) = group.ranks(group.full_size, layout, (1.0,))
    return middle if middle % MULTIPLE == 0 and MULTIPLE <= middle <= largest - MULTIPLE else 0


class _FirstOutput(nn.Module):
    """A model as a function of one tensor that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(pixel_values=pixel_values, return_dict=False)[0]


@contextmanager
def _only_passing(model: nn.Module, linears: Sequence[str], activations: Sequence[str]) -> Iterator[nn.Module]:
    """Yield a copy of a model in which layers and activations cost next to nothing."""
    rest = copy.deepcopy(model)
    for name in linears:
        replace_module(rest, name, Passing(rest.get_submodule(name)))
    for name in activations:
        replace_module(rest, name, nn.Identity())
    with evaluation_mode(rest):
        yield rest


def _median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(own / other for own, other in zip(times, reference, strict=True))


def _outside(share: float) -> float:
    """Return the share of the time that layers do not account for, within reason."""
    if share <= MOST_OUTSIDE:
        return share
    logger.warning(
        f"Without its linear layers the model takes {share:.2f} of its time, so that these can hardly be made faster; a "
        "larger batch or model can. The table counts on them for a twentieth of the time."
    )
    return MOST_OUTSIDE


def _layer_times(
    group: SampleGroup, times: Mapping[_Key, float], layouts: Sequence[str], sizes: Sequence[int]
) -> LayerTimes:
    curves: dict[str, tuple[RankTimes, ...]] = {}
    for layout in layouts:
        found = []
        for size in sizes:
            ranks = sorted(key[2] for key in times if key[:2] == (size, layout) and key[2] is not None)
            found.append(RankTimes(tuple(ranks), tuple(times[size, layout, rank] for rank in ranks)))
        curves[layout] = tuple(found)
    m, n = group.target.shape
    dense = tuple(times[size, None, None] for size in sizes)
    return LayerTimes(m, n, group.tokens, group.members, group.count, group.side, tuple(sizes), dense, curves)


def _scaled(layer: LayerTimes, seconds: float) -> LayerTimes:
    """Return the times in seconds, given as shares of this time."""
    curves = {
        layout: tuple(RankTimes(each.ranks, tuple(share * seconds for share in each.seconds)) for each in found)
        for layout, found in layer.factored.items()
    }
    values = {**vars(layer), "dense": tuple(share * seconds for share in layer.dense), "factored": curves}
    return LayerTimes(**values)


def _conditions(model: PreTrainedModel, batch_size: int, image_shape: Sequence[int], runtime: str) -> dict[str, Any]:
    on_gpu = model.device.type == "cuda"
    packages = ["torch", "transformers", *(["onnxruntime"] if runtime == "onnxruntime" else [])]
    return {
        "device": model.device.type,
        "device_name": torch.cuda.get_device_name(model.device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "runtime": runtime,
        "image_shape": list(image_shape),
        "model": type(model).__name__,
        "optimum-mixrank": __version__,
        **{name: version(name) for name in packages},
    }
