"""`MixRankCompressor`, the public face of the method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
import transformers
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel

from ..calibration.images.sources import load_image_dataset, local_paths
from ..calibration.included import included_as_linear, without_views
from ..calibration.plain_layers import MERGE
from ..calibration.result import Calibration
from ..calibration.sites import find_sites
from ..calibration.targets import bound_call, find_targets, linears_in_blocks
from ..calibration.task import CalibrationTask, required_statistics
from ..checkpoint.configuration import MixRankConfig
from ..checkpoint.original import check_placement, open_original
from ..checkpoint.saving import IMAGES, ORIGINAL, check_apart
from ..checkpoint.validation import STRUCTURES, check_integer
from ..checkpoint.views import remove_dense_views
from ..decomposition import METRICS
from ..evaluation.evaluate import EvaluationResult, evaluate_model
from ..reporting import CompressionReport
from ..reporting.build import original_name
from ..reporting.profile import RankProfile
from ..runtime.access import common_access, hub_reached_by
from ..runtime.distributed import Processes, find_processes, quiet_unless_main
from ..runtime.files import is_local_path
from ..runtime.folders import resolved
from ..runtime.formatting import type_of
from ..runtime.forward import ordinary_modes
from ..runtime.logging import get_logger
from ..runtime.outputs import ModelCall
from ..runtime.phases import phase
from ..runtime.precision import tf32_statistics
from .arguments import (
    check_calibration,
    check_compressed,
    check_config,
    check_keywords,
    check_metrics,
    check_path,
    check_save_interval,
)
from .compress import check_statistics, compress
from .images import ImageReader, example_call
from .memory import MaxMemory, MemoryPlan, MemoryTask, estimate_memory, parse_limits
from .profile import profile_model
from .reports import Made, MadeModels
from .run import CompressionRun, free_sites, shared_fingerprint
from .saving import push_compressed, record_evaluation, save_result, upload_arguments
from .size import with_known_ratio
from .unfinished import check_output, open_run


if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator, PartialState

logger = get_logger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _in_every_process(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap a method that all processes call; only the main one prints."""

    @functools.wraps(method)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        check_keywords(method, kwargs)
        compressor = cast("MixRankCompressor", args[0])
        quiet, precision = quiet_unless_main(compressor.processes), tf32_statistics(compressor.allow_tf32)
        with ordinary_modes(), quiet, precision, hub_reached_by(compressor._hub_access):
            return method(*args, **kwargs)

    return wrapped


class MixRankCompressor(OptimumQuantizer):
    """Compresses the encoder of a Vision Transformer into mixed-rank factors, guided by its activations.

    Args:
        model: A Transformers model with a ViT-like encoder and any head.
        image_processor: Its image processor; needed wherever images rather than `pixel_values` are given.
        accelerator: Connects the processes that share the work; an `accelerate.PartialState` also works. Default:
            those that were launched together, as by `accelerate launch`. All of them call the same methods with the same
            arguments; each works on its share of images and layers, all get the same result, and the main one prints and
            saves. Its `mixed_precision` holds for forward passes and training; statistics are summed in float32 or better.
        allow_tf32: Whether statistics may be multiplied in TF32, where PyTorch and the GPU allow it.

    Every model that it makes has a report of its own, which is saved with that model.

    Example:
        ```python
        compressor = MixRankCompressor.from_pretrained("facebook/deit-base-patch16-224")
        images = compressor.get_calibration_dataset("path/to/images", num_samples=512)
        model = compressor.compress(MixRankConfig(compression_ratio=0.6), images, save_directory="out")
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any = None,
        accelerator: Accelerator | PartialState | None = None,
        *,
        allow_tf32: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, PreTrainedModel):
            if type(model).__module__.startswith("peft."):
                raise TypeError(f"model is {type_of(model)} with an adapter that is not merged. {MERGE}")
            if hasattr(model, "_orig_mod"):
                raise TypeError(
                    "model is compiled; give the model as it was before (`model._orig_mod`), and compile the result."
                )
            if type(model).__module__.startswith("transformers."):
                raise TypeError(
                    f"model is {type_of(model)}, which in Transformers {transformers.__version__} is only a "
                    "part of a model. Give the whole model, of which only the layers that images reach are compressed, or "
                    "open its tower with a class of its own, such as `CLIPVisionModel`."
                )
            raise TypeError(
                f"model is of type {type(model).__name__}, not a Transformers model; use "
                "`MixRankCompressor.from_pretrained(path_or_hub_id)` for a path or Hub id."
            )
        check_placement(model, find_processes(accelerator))
        self.model = model
        self.image_processor = image_processor
        self.accelerator = accelerator
        self.allow_tf32 = allow_tf32
        self._made = MadeModels()
        # Dataset and split of which `check_evaluation` has said what is missing.
        self._checked: tuple[Any, str | None] | None = None
        self._hub_access: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: str | Path | PreTrainedModel,
        *,
        image_processor: Any = None,
        accelerator: Accelerator | PartialState | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        allow_tf32: bool = False,
        auto_class: Any = None,
        **hub_kwargs: Any,
    ) -> MixRankCompressor:
        """Load the model to compress, with its image processor.

        Args:
            model_or_path: A local folder, a Hub id, or a model in memory (taken as it is).
            image_processor: For a model in memory, or to replace the one that belongs to the checkpoint.
            accelerator: See `MixRankCompressor`.
            dtype: Precision of the loaded and saved weights, whatever the file holds; `"auto"` keeps the file's.
            device: Where to put the model. Default: a model in memory stays where it is; a checkpoint goes to the device
                of the process if there are several, or an `accelerator` is given, else to the CPU.
            allow_tf32: See `MixRankCompressor`.
            auto_class: Class to load with; default: the architecture that the checkpoint names.
            **hub_kwargs: As for Transformers' `from_pretrained`: `revision`, `token`, `device_map`, `max_memory`, … What
                `token`, `cache_dir`, `local_files_only` and `proxies` say holds for the model that `MixRankConfig.like`
                names too, and the token for datasets.

        Raises:
            OSError: if there is no such checkpoint; TypeError: if Hub arguments are given for a model in memory.
            ValueError: if weights would have to be offloaded, or both `device` and `device_map` are given.
        """
        processes = find_processes(accelerator)
        # A process alone, without an accelerator, leaves the model on the CPU.
        default_device = None if processes.is_single and accelerator is None else processes.device
        with ordinary_modes(), quiet_unless_main(processes):
            model, found = open_original(model_or_path, dtype, device, default_device, auto_class, hub_kwargs)
        processor = found if image_processor is None else image_processor
        compressor = cls(model, processor, accelerator, allow_tf32=allow_tf32)
        compressor._hub_access = common_access(hub_kwargs)
        return compressor

    @property
    def report(self) -> CompressionReport | None:
        """The report of the last model that was compressed, or None."""
        return None if self._made.last is None else self._made.last.report

    @property
    def processes(self) -> Processes:
        """Return this process among those that share the work."""
        return find_processes(self.accelerator)

    def get_calibration_dataset(
        self,
        dataset: str | Path | datasets.Dataset,
        *,
        num_samples: int | None = 512,
        split: str | None = None,
        image_column: str | None = None,
        seed: int = 42,
        **hub_kwargs: Any,
    ) -> datasets.Dataset:
        """Draw calibration images; labels are never looked at.

        Args:
            dataset: A folder of images, a parquet file or folder, a Hub id or a `datasets.Dataset`.
            num_samples: How many images to draw without replacement, None for all.
            split: Default: `train`, or the only one there is.
            image_column: Default: the one image column there is.
            seed: Seed of the draw.
            **hub_kwargs: As for `datasets.load_dataset`; `streaming=True` draws without downloading all of the dataset.

        Raises:
            ValueError: if there is no such data, split or column.
        """
        with quiet_unless_main(self.processes), hub_reached_by(self._hub_access):
            return load_image_dataset(
                dataset, split=split, image_column=image_column, num_samples=num_samples, seed=seed, **hub_kwargs
            )

    # More than eight arguments: what users of Transformers set per call, as keywords.
    @_in_every_process
    def calibrate(
        self,
        calibration_dataset: Any,
        metric: str | Sequence[str] = "second_moment",
        *,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        include: Sequence[str] = (),
        fisher_samples: int = 1,
        seed: int = 42,
        batch_size: int = 32,
        max_broken_share: float = 0.05,
        max_image_pixels: int | None = None,
        num_workers: int = 0,
        output_names: str | Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
        structures: Sequence[str] = STRUCTURES,
    ) -> Calibration:
        """Collect, in one pass, the statistics that metrics need, to try several ratios or metrics on the same ones.

        Args:
            calibration_dataset: See `compress`.
            metric: One or several metrics.
            target_modules: As in `MixRankConfig`.
            exclude_modules: As in `MixRankConfig`.
            include: As in `MixRankConfig`.
            fisher_samples: As in `MixRankConfig`.
            seed: Seed of the probes of the Fisher information.
            batch_size: See `compress`.
            max_broken_share: See `compress`.
            max_image_pixels: See `compress`.
            num_workers: See `compress`.
            output_names: As in `MixRankConfig`.
            interpolate_pos_encoding: As in `MixRankConfig`.
            structures: What layers may become, as in `MixRankConfig`, if a metric can compare that; `["rank"]` needs fewer
                statistics.

        Raises:
            ValueError: for unusable images, NaN or Inf, or layers that never run.
        """
        metrics = [METRICS.create(name) for name in check_metrics(metric)]
        # Its construction checks the values.
        MixRankConfig(
            metric="kfac",
            compensation=[],
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            include=list(include),
            fisher_samples=fisher_samples,
            seed=seed,
            structures=list(structures),
        )
        processes, call = self.processes, ModelCall.named(output_names, interpolate_pos_encoding)
        reader = self._reader(batch_size, num_workers, max_broken_share, max_image_pixels)
        with included_as_linear(self.model, include):
            with processes.raise_on_all_ranks():
                read = functools.cache(lambda: reader.read(calibration_dataset))
                linears_in_blocks(self.model)
                call = example_call(call, self.model, read)
                targets = find_targets(self.model, target_modules, exclude_modules, call, include)
                if not required_statistics(metrics, targets):
                    return Calibration({}, 0)
                call = bound_call(call, self.model, targets)
                together = any(each.common_unit for each in metrics)
                sites = (
                    find_sites(self.model, without_views(self.model, targets), structures, call) if together else []
                )
                batches = read()
            fingerprint = shared_fingerprint(self.model, processes)
            task = CalibrationTask(
                self.model,
                fingerprint,
                batches,
                None,
                metrics,
                fisher_samples,
                seed,
                processes,
                call=call,
                sites=sites,
            )
            return task.collect(targets)

    @_in_every_process
    def check_calibration(
        self,
        calibration: Calibration,
        calibration_dataset: Any,
        *,
        include: Sequence[str] = (),
        batch_size: int = 32,
        max_broken_share: float = 0.05,
        max_image_pixels: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Check that statistics were taken from this model and these images, which are decoded and not run.

        Args:
            calibration: Statistics from `calibrate`.
            calibration_dataset: See `compress`.
            include: As the statistics were taken with.
            batch_size: See `compress`.
            max_broken_share: See `compress`.
            max_image_pixels: See `compress`.
            num_workers: See `compress`.

        Raises:
            ValueError: if they were not.
        """
        check_calibration(calibration)
        reader = self._reader(batch_size, num_workers, max_broken_share, max_image_pixels)
        with self.processes.raise_on_all_ranks():
            batches = reader.read(calibration_dataset)
        with included_as_linear(self.model, include):
            fingerprint = shared_fingerprint(self.model, self.processes)
        check_statistics(calibration, fingerprint, batches)

    # More than eight arguments: what users of Transformers set per call, as keywords.
    @_in_every_process
    def compress(
        self,
        config: MixRankConfig | None = None,
        calibration_dataset: Any = None,
        save_directory: str | Path | None = None,
        *,
        calibration: Calibration | None = None,
        inplace: bool = False,
        overwrite: bool = False,
        max_memory: MaxMemory = None,
        resume_directory: str | Path | None = None,
        save_interval: float = 60.0,
        batch_size: int = 32,
        max_broken_share: float = 0.05,
        max_image_pixels: int | None = None,
        num_workers: int = 0,
    ) -> PreTrainedModel:
        """Compress the model; return one of the same class, which `self.report` describes.

        Args:
            config: What to do; default `MixRankConfig()`.
            calibration_dataset: Unlabelled images: what `get_calibration_dataset` returns, a folder, a Hub
                id, a list of PIL images or paths, or any iterable or `DataLoader` of `pixel_values`. Of a folder or Hub
                id, `config.num_samples` images are drawn with `config.seed`. Not needed for `metric="svd"`.
            save_directory: Where to save the compressed model, its image processor and the report.
            calibration: Statistics from `calibrate` of this exact model. With compensation, the images that they were
                taken from are needed too; any images that are passed are compared with those.
            inplace: False compresses a copy, so that the original stays for comparison; True compresses the model itself.
                Compensation then learns from a copy of the original, which is dropped at the end.
            overwrite: Whether `save_directory` may hold files already; a checkpoint in it is replaced, all else stays.
            max_memory: Most memory to use in addition to the model, such as `"8GiB"`; or by device, as for Accelerate,
                `{"cpu": "16GiB", 0: "8GiB"}`. The need is estimated and logged first. If it is more, statistics take
                several passes and compensation puts activations into `resume_directory` or a temporary folder.
            resume_directory: Where the run records finished work. After an interruption, the same call continues from
                there and ends with the same result, bit by bit. The folder is removed when the result is saved.
            save_interval: Seconds between saves of work in progress; a calibration pass is saved when it is complete.
            batch_size: Images per forward pass.
            max_broken_share: Tolerated share of images that cannot be decoded.
            max_image_pixels: Most pixels of an encoded image, which protects from files made to fill the memory; a larger
                one counts as broken. Default: `PIL.Image.MAX_IMAGE_PIXELS`, 89 million.
            num_workers: Processes that decode images ahead while the model runs; the result is the same for any number.

        Raises:
            TypeError: for swapped or mistyped arguments.
            ValueError: before the model is changed: for a ratio that cannot be reached, patterns that match nothing,
                missing or unusable images, NaN or Inf, too little `max_memory`, a `resume_directory` of another run, or
                a `save_directory` that is or holds the original or the images.
            FileExistsError: if `save_directory` holds files and `overwrite` is False. If they were written during the
                run, the message names the folder in which the result is.
            OSError: if `save_directory` cannot be written, before any work; if a disk is full; what was saved before
                stays as it is.
        """
        config = check_config(config)
        check_save_interval(save_interval)
        check_path("save_directory", save_directory)
        check_path("resume_directory", resume_directory)
        if calibration is not None:
            check_calibration(calibration)
        if max_memory is not None:
            parse_limits(max_memory, None)
        processes, unfinished = self.processes, None
        images = calibration_dataset if calibration_dataset is not None or calibration is not None else config.dataset
        sources = {ORIGINAL: [self.model.name_or_path], IMAGES: local_paths(images)}
        output = (save_directory, overwrite, resume_directory, processes, sources)
        check_output(*output)
        reader = self._reader(batch_size, num_workers, max_broken_share, max_image_pixels)
        options: dict[str, Any] = {"calibration": calibration, "inplace": inplace, "max_memory": max_memory}
        with included_as_linear(self.model, config.include):
            run = CompressionRun.start(config, reader, calibration_dataset, **options)
            if resume_directory is not None:
                self._made.leave(resolved(resume_directory))
                unfinished = open_run(run, resume_directory, save_interval, self.allow_tf32)
                # A run that has ended while this one waited for the folder may have saved its result.
                check_output(*output)
            try:
                model, report = compress(run)
            except Exception:
                if unfinished is not None:
                    unfinished.leave()
                raise
            remove_dense_views(model)
        self._made.add(model, report, unfinished)
        if save_directory is not None:
            self.save_pretrained(model, save_directory, overwrite=overwrite, checked=True)
        return model

    def memory_plan(
        self,
        config: MixRankConfig | None = None,
        num_images: int | None = None,
        *,
        batch_size: int = 32,
        inplace: bool = False,
        max_memory: MaxMemory = None,
    ) -> MemoryPlan:
        """Estimate the memory that `compress` needs in addition to the model; `ValueError` if `max_memory` is too small.

        Args:
            config: What to do; default `MixRankConfig()`.
            num_images: Calibration images; default `config.num_samples`.
            batch_size: See `compress`.
            inplace: See `compress`.
            max_memory: See `compress`.
        """
        with hub_reached_by(self._hub_access):
            config = with_known_ratio(self.model, check_config(config))
        if num_images is not None:
            check_integer("num_images", num_images, 1)
        patterns, metric = (config.target_modules, config.exclude_modules), METRICS.create(config.metric)
        with included_as_linear(self.model, config.include):
            targets = find_targets(self.model, *patterns, config.model_call, config.include)
            call = bound_call(config.model_call, self.model, targets)
            sites = free_sites(self.model, config, targets, metric, call=call)
            required = required_statistics([metric], targets, sites)
            images = self.processes.largest_share(num_images or config.num_samples, batch_size)
            task = MemoryTask(config, required, images, batch_size, inplace, sites, call)
            return estimate_memory(self.model, targets, task, max_memory)

    @_in_every_process
    def profile(
        self,
        calibration: Calibration,
        config: MixRankConfig | None = None,
        ratios: Sequence[float] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    ) -> RankProfile:
        """Ranks and predicted losses over many budgets, without compressing anything.

        Args:
            calibration: Statistics from `calibrate` with the configuration's metric.
            config: Everything but the ratio; default `MixRankConfig()`.
            ratios: Values of `compression_ratio`; one that cannot be reached is a `ValueError`.
        """
        check_calibration(calibration)
        if not isinstance(ratios, Sequence) or isinstance(ratios, str) or not ratios:
            raise TypeError(f"ratios={ratios!r} is not a list of values of compression_ratio.")
        config = check_config(config)
        with included_as_linear(self.model, config.include):
            return profile_model(self._reader(), calibration, config, ratios)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        quantization_config: MixRankConfig | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Compress and save: Optimum's interface to `compress`, whose other arguments it takes as well.

        Raises:
            ValueError: if `file_prefix` is given, and as `compress`.
        """
        if isinstance(file_prefix, MixRankConfig):
            raise TypeError("file_prefix is a MixRankConfig; give it as quantization_config=….")
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix={file_prefix!r} is not supported: `from_pretrained` finds weights by their standard "
                "names. Leave it out, or use one directory per model."
            )
        return self.compress(quantization_config, calibration_dataset, save_dir, **kwargs)

    # More than eight arguments: what users of Transformers set per call, as keywords.
    @_in_every_process
    def evaluate(
        self,
        model: PreTrainedModel,
        dataset: Any,
        *,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        batch_size: int = 32,
        max_broken_share: float = 0.05,
        max_image_pixels: int | None = None,
        num_workers: int = 0,
        output_names: str | Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> EvaluationResult:
        """Measure what a compressed model has lost against the original; kept in its report, also on the disk.

        A checkpoint in a local folder, saved here or opened from there, gets the figures into its report, page and card.

        Args:
            model: The compressed model, in memory or reloaded.
            dataset: Images as for `compress`; with labels, accuracy is measured too.
            split: Split of a named dataset; default: `validation`, `test` or the only one there is.
            image_column: Default: the one image column there is.
            label_column: Default: `label` or `labels`, where there is one.
            num_samples: Number of images to draw; None for all.
            seed: Seed of that draw.
            batch_size: Images per forward pass.
            max_broken_share: See `compress`.
            max_image_pixels: See `compress`.
            num_workers: See `compress`.
            output_names: As in `MixRankConfig`.
            interpolate_pos_encoding: As in `MixRankConfig`.

        Raises:
            ValueError: for unusable images, names that the output lacks, NaN or Inf, or models that cannot be compared.
        """
        check_compressed(model)
        call = ModelCall.named(output_names, interpolate_pos_encoding)
        draw: dict[str, Any] = {"split": split, "num_samples": num_samples, "seed": seed}
        reader = self._reader(batch_size, num_workers, max_broken_share, max_image_pixels)
        with self.processes.raise_on_all_ranks():
            checked, self._checked = self._checked, None
            known = checked is not None and checked[0] is dataset and checked[1] == split
            batches = reader.read_labelled(dataset, image_column, label_column, **draw, warn=not known)
            call = example_call(call, model, lambda: batches).bound(model)
        with phase("Evaluated") as evaluating:
            result = evaluate_model(model, batches, reference=self.model, processes=self.processes, call=call)
            evaluating.add_detail(*result.facts())
        self._keep(model, result)
        return result

    def check_evaluation(self, dataset: Any, *, split: str | None = None) -> None:
        """Check, decoding one image at most, that `evaluate` could read a dataset: its split, images and class names.

        Args:
            dataset: See `evaluate`.
            split: See `evaluate`.

        Raises:
            FileNotFoundError: if there is no such folder or dataset.
            ValueError: as `evaluate`.
        """
        with hub_reached_by(self._hub_access):
            self._reader().read_labelled(dataset, split=split)
        self._checked = (dataset, split)

    def _keep(self, model: PreTrainedModel, result: EvaluationResult) -> None:
        """Add an evaluation to the model's report and, where it lies in a local folder, to the files there."""
        evaluation, made = result.to_dict(), self._made.find(model)
        if made is not None:
            made.report = dataclasses.replace(made.report, evaluation=evaluation)
        folder = str(getattr(model, "name_or_path", "") if made is None or made.folder is None else made.folder)
        if self.processes.is_main and folder and is_local_path(folder):
            record_evaluation(folder, evaluation, original_name(self.model))

    @_in_every_process
    def save_pretrained(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        picture: bool = False,
        self_contained: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a compressed model with its image processor and, if this compressor made it, its report.

        At any moment the destination opens as the old checkpoint or as the new one.

        Args:
            model: The compressed model; saved in the dtype that it has.
            save_directory: A new or empty folder. `~` is expanded, and a link is followed.
            overwrite: Whether the folder may hold files already. A checkpoint in it is replaced; all else stays, except
                files that have the name of a new one.
            picture: Whether to save a picture of the ranks too, `ranks.png`.
            self_contained: Whether the checkpoint brings the code that opens it, so that it needs no plugin but
                `trust_remote_code=True`. Default: if the model was loaded from one that does. Where an ordinary
                configuration describes the model, the checkpoint needs neither.
            **kwargs: `max_shard_size`, … as for Transformers' `save_pretrained`. With `push_to_hub=True` the result is then
                uploaded to `repo_id`, by default named like the folder; `token`, `private`, … are as for `push_to_hub`.

        Raises:
            FileExistsError: if the folder holds files and `overwrite` is False.
            OSError: if the folder cannot be written, or the disk is full.
            ValueError: if the folder is or holds the original, or the architecture is not one of Transformers and the
                checkpoint is to bring its code.
        """
        check_path("save_directory", save_directory)
        processes, made = self.processes, self._find(model)
        report, run = (None, None) if made is None else (made.report, made.run)
        repo_id, upload = upload_arguments(kwargs, save_directory)
        with processes.raise_on_all_ranks():
            if processes.is_main:
                check_apart(save_directory, {ORIGINAL: [self.model.name_or_path]})
                content = (model, save_directory, self.image_processor, report)
                saving: dict[str, Any] = {"overwrite": overwrite, "picture": picture, "self_contained": self_contained}
                report = save_result(*content, run, **(saving | kwargs))
        report = processes.broadcast(report)
        if made is not None and report is not None:
            made.saved(model, report, resolved(save_directory))
        if repo_id is not None:
            self.push_to_hub(model, repo_id, picture=picture, self_contained=self_contained, **upload, **kwargs)

    @_in_every_process
    def push_to_hub(self, model: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
        """Upload a compressed model with its image processor and its report; the main process gets the commit.

        Args:
            model: The compressed model.
            repo_id: `user/name` on the Hub; made if it does not exist.
            **kwargs: `token`, `private`, `revision`, `commit_message`, `create_pr`, `tags` for the model card, and
                `max_shard_size`, `picture` and `self_contained` as for `save_pretrained`.
        """
        uploaded, made = None, self._find(model)
        report = None if made is None else made.report
        with self.processes.raise_on_all_ranks():
            if self.processes.is_main:
                uploaded = push_compressed(model, repo_id, self.image_processor, report, **kwargs)
        return uploaded

    def _find(self, model: PreTrainedModel) -> Made | None:
        """Return what is known of a model, and warn if this compressor did not make it."""
        check_compressed(model)
        made = self._made.find(model)
        if made is None:
            logger.warning(
                f"This compressor did not make the {type(model).__name__}, or it was changed since: it is saved without "
                "report and model card."
            )
        return made

    def _reader(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        max_broken_share: float = 0.05,
        max_image_pixels: int | None = None,
    ) -> ImageReader:
        reading = (batch_size, num_workers, max_broken_share, max_image_pixels)
        return ImageReader(self.model, self.image_processor, self.processes, *reading)
