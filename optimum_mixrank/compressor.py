"""`MixRankCompressor`: reads like the method. Calibrate, decompose, allocate ranks, factorize, report, save."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import datasets
import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration.fingerprint import fingerprint_model
from .calibration.images import Batch, ImageBatches, explained_death_of_workers
from .calibration.result import Calibration
from .calibration.run import CalibrationRun, required_statistics
from .calibration.sources import load_image_dataset
from .checkpoint import push_checkpoint, save_checkpoint, writable_directory
from .compensation.run import compensate, prepare_images
from .configuration import MixRankConfig
from .decomposition import METRICS, Decomposition, Metric
from .decomposition_by_groups import decompose_by_groups
from .distributed import Processes, find_processes, only_main_speaks
from .evaluation.flops import flops_per_image, tokens_per_image
from .evaluation.labels import find_label_column, map_labels
from .evaluation.memory import PeakMemory
from .evaluation.size import safetensors_bytes
from .freed import keep_large_blocks_apart
from .journal import NO_JOURNAL, Journal
from .memory_limits import MaxMemory, announce_memory, foresee_memory, layer_groups, memory_record
from .memory_plan import MemoryPlan
from .modeling import replace_module
from .original import check_placement, load_image_processor, load_original
from .phases import phase, size
from .planning import LayerSpec, RankPlan
from .precision import tf32_statistics
from .profile import RankProfile, profile_budgets
from .quantizer import MixRankHfQuantizer, attach
from .reporting.build import build_report, measure
from .stages import (
    allocation_losses,
    check_weights,
    decompose_layers,
    factorize_layers,
    rank_map_of,
    warn_of_other_layouts,
)
from .targets import Target, encoder_linears, find_targets, match_values, select_targets
from .unfinished import UnfinishedRun, check_images, has_saved, identity_of


if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

    from .evaluation.evaluate import EvaluationResult
    from .reporting.report import CompressionReport


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _in_every_process(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A method of the compressor that all processes call; only the main one speaks."""

    @functools.wraps(method)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        compressor = cast("MixRankCompressor", args[0])
        with (
            only_main_speaks(compressor.processes),
            tf32_statistics(compressor.allow_tf32),
            explained_death_of_workers(),
        ):
            return method(*args, **kwargs)

    return wrapped


class MixRankCompressor(OptimumQuantizer):
    """Compresses the encoder of a Vision Transformer into mixed-rank factors, guided by its activations.

    Args:
        model: A Transformers model with a ViT-like encoder and any head.
        image_processor: Its image processor; needed wherever images rather than `pixel_values` are given.
        accelerator: Stands for the processes that share the work; an `accelerate.PartialState` serves too. Default:
            those that were launched together, as by `accelerate launch`. All of them then call `calibrate`,
            `check_calibration`, `compress`, `profile`, `evaluate`, `save_pretrained` and `push_to_hub`, with the same
            arguments; each works on its share
            of images and layers, all get the same result, and the main one prints and saves. Its `mixed_precision` is
            that of forward passes for statistics and of training; statistics are summed in float32 or better all the
            same.
        allow_tf32: Whether statistics may be multiplied in TF32 where PyTorch is set to it, on GPUs that can: faster,
            and less exact.

    Attributes:
        model: The original model; `compress` leaves it alone unless asked for `inplace=True`.
        image_processor: As given.
        accelerator: As given.
        allow_tf32: As given.
        report: `CompressionReport` of the last compression, or None.

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
            raise TypeError(
                f"model is a {type(model).__name__}, not a Transformers model; use "
                "`MixRankCompressor.from_pretrained(path_or_hub_id)` for a path or Hub id."
            )
        check_placement(model, find_processes(accelerator))
        self.model = model
        self.image_processor = image_processor
        self.accelerator = accelerator
        self.allow_tf32 = allow_tf32
        self.report: CompressionReport | None = None
        self._unfinished: UnfinishedRun | None = None

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
            dtype: Precision of the loaded weights and of the compressed checkpoint, float32 whatever the file holds;
                `"auto"` keeps the file's.
            device: Where to put the model, such as `"cuda"`. Default: a model in memory stays where it is; a checkpoint
                goes to the device of the `accelerator`, or of each of several processes, else to the CPU. A model for
                which one device is too small is loaded with `device_map="auto"` in place of it.
            allow_tf32: See `MixRankCompressor`.
            auto_class: Class to load with, such as `AutoModelForSemanticSegmentation`; default: the architecture
                that the checkpoint names.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, `trust_remote_code`,
                `device_map`, `max_memory`, … as for Transformers' `from_pretrained`.

        Raises:
            OSError: if there is no such checkpoint.
            TypeError: if Hub arguments are given for a model in memory.
            ValueError: if weights would have to be offloaded, or `device` is given for a model that has a `device_map`.
        """
        if isinstance(model_or_path, PreTrainedModel):
            if hub_kwargs or auto_class is not None:
                surplus = ", ".join([*hub_kwargs, *(["auto_class"] if auto_class is not None else [])])
                raise TypeError(f"A model in memory takes no {surplus}; they belong to a path or Hub id.")
            model = model_or_path
            places = getattr(model, "hf_device_map", None) or {}
            device_map = places if len(set(places.values())) > 1 else None
        else:
            device_map = hub_kwargs.get("device_map")
        if device is not None and device_map is not None:
            raise ValueError(
                f"device={str(device)!r} and device_map={device_map!r} both say where the model lies; leave one out."
            )
        if not isinstance(model_or_path, PreTrainedModel):
            processes = find_processes(accelerator)
            with only_main_speaks(processes):
                model = load_original(model_or_path, dtype, auto_class, hub_kwargs)
                if image_processor is None:
                    image_processor = load_image_processor(model_or_path, hub_kwargs)
            if device_map is None and device is None and not (processes.is_alone and accelerator is None):
                device = processes.device
        model = model if device is None else model.to(device)
        return cls(model, image_processor, accelerator, allow_tf32=allow_tf32)

    @property
    def processes(self) -> Processes:
        """This process among those that share the work."""
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
            **hub_kwargs: `revision`, `token`, `cache_dir`, `name` as for `datasets.load_dataset`; `streaming=True` draws
                without downloading all of the dataset.

        Raises:
            ValueError: if there is no such data, split or column.
        """
        with only_main_speaks(self.processes):
            return load_image_dataset(
                dataset, split=split, image_column=image_column, num_samples=num_samples, seed=seed, **hub_kwargs
            )

    @_in_every_process
    def calibrate(
        self,
        calibration_dataset: Any,
        metric: str | Sequence[str] = "second_moment",
        *,
        batch_size: int = 32,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        max_broken_share: float = 0.05,
        fisher_samples: int = 1,
        seed: int = 42,
        num_workers: int = 0,
    ) -> Calibration:
        """Collect the statistics that one or several metrics need, in one forward pass over the images.

        `compress` does this itself; call it to try several ratios or metrics on the same statistics.

        Args:
            calibration_dataset: See `compress`.
            metric: One or several metrics.
            batch_size: Images per forward pass.
            target_modules: As in `MixRankConfig`.
            exclude_modules: As in `MixRankConfig`.
            max_broken_share: Tolerated share of images that cannot be decoded.
            fisher_samples: As in `MixRankConfig`.
            seed: Of the probes of the Fisher information.
            num_workers: See `compress`.

        Raises:
            ValueError: for unusable images, NaN or Inf, or layers that never run.
        """
        metrics = [METRICS.create(name) for name in ([metric] if isinstance(metric, str) else metric)]
        with self.processes.agreed():
            targets = find_targets(self.model, target_modules, exclude_modules)
            if not required_statistics(metrics, targets):
                return Calibration({}, 0)
            batches = self._batches(calibration_dataset, batch_size, max_broken_share, num_workers)
        fingerprint = self._fingerprint(self.processes)
        run = CalibrationRun(self.model, fingerprint, batches, None, metrics, fisher_samples, seed, self.processes)
        return run.collect(targets)

    @_in_every_process
    def check_calibration(
        self,
        calibration: Calibration,
        calibration_dataset: Any,
        *,
        batch_size: int = 32,
        max_broken_share: float = 0.05,
        num_workers: int = 0,
    ) -> None:
        """Check that statistics were taken from this model and these images; the images are decoded, and not run.

        Args:
            calibration: Statistics from `calibrate`, reloaded say.
            calibration_dataset: See `compress`.
            batch_size: Images to decode at a time.
            max_broken_share: Tolerated share of images that cannot be decoded.
            num_workers: See `compress`.

        Raises:
            ValueError: if they were not.
        """
        with self.processes.agreed():
            batches = self._batches(calibration_dataset, batch_size, max_broken_share, num_workers)
        self._check_statistics(calibration, self._fingerprint(self.processes), batches, to_read=True)

    @_in_every_process
    def compress(
        self,
        config: MixRankConfig | None = None,
        calibration_dataset: Any = None,
        save_directory: str | Path | None = None,
        *,
        batch_size: int = 32,
        calibration: Calibration | None = None,
        inplace: bool = False,
        overwrite: bool = False,
        max_broken_share: float = 0.05,
        num_workers: int = 0,
        max_memory: MaxMemory = None,
        resume_directory: str | Path | None = None,
        save_interval: float = 60.0,
    ) -> PreTrainedModel:
        """Compress the model.

        Args:
            config: What to do; default `MixRankConfig()`.
            calibration_dataset: Images without need of labels: what `get_calibration_dataset` returns, a folder, a
                Hub id, a list of PIL images or paths, or any iterable or `DataLoader` of `pixel_values`. Of a folder
                or Hub id, `config.num_samples` images are drawn with `config.seed`. Not needed for `metric="svd"`.
            save_directory: Where to save the compressed model, its image processor and the report.
            batch_size: Images per forward pass.
            calibration: Statistics from `calibrate` of this very model. With compensation, the images that they were
                taken from are needed too; without it, images that are given all the same are compared with those.
            inplace: False compresses a copy, so that the original stays for comparison; True compresses
                `self.model` itself. Without compensation that needs no memory for a second model; compensation learns
                from a copy of the original, which is dropped at the end.
            overwrite: Whether `save_directory` may hold files already.
            max_broken_share: Tolerated share of images that cannot be decoded.
            num_workers: Processes that read and decode datasets and lists of images ahead while the model runs; 0
                decodes in between. The result is the same for any number.
            max_memory: Most memory to use beside the model that is there, such as `"8GiB"`; or by device, as for
                Accelerate, `{"cpu": "16GiB", 0: "8GiB"}`. What will be needed is foreseen before the work starts, and
                announced in the log. Where it is more, statistics are collected in several passes over the images, each
                for some of the layers, and layer-wise compensation puts activations on the disk, into `resume_directory`
                or among the system's temporary files, and computes anew what it would keep.
            resume_directory: Where the run notes what it has finished. The same call goes on from there after it was
                cut off, and ends with the same result, bit by bit. The folder is removed when the compressed model is
                saved, here or by `save_pretrained`. None notes nothing.
            save_interval: Seconds between two savings of work that goes on; at most so much is lost.

        Returns:
            The compressed model, a Transformers model of the same class; `self.report` describes it.

        Raises:
            ValueError: for a ratio that cannot be reached, patterns that match nothing, missing or unusable
                calibration data, NaN or Inf in weights or activations, or memory that `max_memory` does not
                allow; before the model is changed. If `resume_directory` holds a run of another model, dataset or
                configuration.
            FileExistsError: if `save_directory` holds files and `overwrite` is False.
            OSError: if a disk is full; what was saved before stays as it is.
        """
        config = config or MixRankConfig()
        processes = self.processes
        self._unfinished = None
        given = calibration
        with processes.agreed():
            config.validate()
            if save_interval <= 0:
                raise ValueError(f"save_interval={save_interval!r} is not a positive number of seconds.")
            if save_directory is not None and processes.is_main:
                writable_directory(save_directory, overwrite or has_saved(resume_directory, save_directory))
            metric = METRICS.create(config.metric)
            linears = encoder_linears(self.model)
            targets = select_targets(linears, config.target_modules, config.exclude_modules)
            check_weights(targets)
            plan = self._plan(config, targets)
            plan.check()
            batches = self._image_source(
                config, metric, calibration_dataset, calibration, batch_size, max_broken_share, num_workers
            )
        journal, fingerprint = NO_JOURNAL, self._fingerprint(processes)
        if resume_directory is not None:
            statistics = None if calibration is None else calibration.data_fingerprint
            limits = {"batch_size": batch_size, "max_broken_share": max_broken_share, "statistics": statistics}
            self._unfinished = self._open_run(resume_directory, fingerprint, config, batches, limits, save_interval)
            journal = self._unfinished.journal
            with processes.agreed():
                # A run that has ended while this one waited for the folder may have saved its result.
                if save_directory is not None and processes.is_main:
                    writable_directory(save_directory, overwrite or has_saved(resume_directory, save_directory))
        original = measure(self.model)
        if self.model.device.type == "cpu":
            keep_large_blocks_apart()
        # After a first pass, for what libraries take when they first compute is not what a compression needs.
        peak = PeakMemory(self.model.device)
        # What a run needs is said before it starts, unless only its images tell their number.
        own = None if batches is None else batches.num_own_images
        images = self._decoded(config, batches, journal) if own is None else []
        memory = announce_memory(
            self.model,
            config,
            targets,
            {} if calibration is not None else required_statistics([metric], targets),
            sum(batch.num_images for batch in images) if own is None else own,
            processes,
            batch_size=batch_size,
            inplace=inplace,
            max_memory=max_memory,
            directory=journal.directory,
        )
        if own is not None:
            images = self._decoded(config, batches, journal)
        prepared = prepare_images(self.model, images, config, processes, batches) if config.compensation else None
        run, decoded = None, images if config.compensation else None
        if calibration is not None:
            self._check_statistics(calibration, fingerprint, batches, decoded is None)
        elif metric.uses_data:
            assert batches is not None  # `_image_source` has seen to that
            arguments = [metric], config.fisher_samples, config.seed, processes
            run = CalibrationRun(self.model, fingerprint, batches, decoded, *arguments)
        groups, keep_gradients = layer_groups(targets, memory), bool(config.compensation)
        decompositions, calibration, decomposing = self._decompose(
            metric, groups, config.layout, calibration, run, keep_gradients, journal
        )
        decompositions = {target.canonical_name: decompositions[target.canonical_name] for target in targets}
        with phase("Allocated") as allocating:
            losses = allocation_losses(metric, decompositions)
            ranks = processes.broadcast(plan.allocate(losses, config.allocation))
            allocating.tell(_rank_range(ranks))
        with phase("Profiled", logging.DEBUG) as profiling:
            profile = profile_budgets(_around(plan), losses, config.allocation, metric.common_unit)
        model = self.model if inplace else copy.deepcopy(self.model)
        original_model = copy.deepcopy(self.model) if inplace and config.compensation else self.model
        results = []
        try:
            with phase("Factorized") as factorizing:
                rank_map = factorize_layers(
                    model, targets, decompositions, ranks, calibration, config.layout, processes
                )
                factorizing.tell(f"{len(rank_map)} of {len(targets)} layers")
            del decompositions
            with phase("Compensated", logging.DEBUG) as compensating:
                if prepared is not None:
                    results = compensate(
                        original_model,
                        model,
                        targets,
                        rank_map,
                        calibration,
                        prepared,
                        config,
                        processes,
                        journal,
                        memory,
                    )
            # Compensation chooses new pivots.
            rank_map = rank_map_of(model, targets)
            warn_of_other_layouts(rank_map, config.layout)
            config = dataclasses.replace(config, rank_map={name: entry.to_dict() for name, entry in rank_map.items()})
            if given is not None and given.fisher_samples is not None:
                config.fisher_samples = given.fisher_samples
        except BaseException:
            if inplace:
                _restore(model, targets, original_model)
            raise
        attach(model, MixRankHfQuantizer(config, pre_quantized=True))

        report = build_report(
            config=config,
            linears=linears,
            ranks=ranks,
            rank_map=rank_map,
            losses=losses,
            original=original,
            model=model,
            calibration=calibration,
            seconds={
                "calibrate": calibration.seconds if calibration else 0.0,
                "decompose": decomposing,
                "allocate": allocating.seconds,
                "profile": profiling.seconds,
                "factorize": factorizing.seconds,
                "compensate": compensating.seconds,
            },
            compensation=results,
            predicted=metric.common_unit,
            profile=profile,
            processes=processes,
            memory=memory_record(memory, peak),
        )
        # Timings are those of the main process.
        self.report = processes.broadcast(report)
        if save_directory is not None:
            self.save_pretrained(model, save_directory, overwrite=overwrite)
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
        """How much memory `compress` will need beside the model, by phase; `print` it.

        Args:
            config: What to do; default `MixRankConfig()`.
            num_images: Calibration images; default `config.num_samples`.
            batch_size: As for `compress`.
            inplace: As for `compress`.
            max_memory: As for `compress`.

        Raises:
            ValueError: if `max_memory` does not allow it; the message says what is needed.
        """
        config = config or MixRankConfig()
        targets = find_targets(self.model, config.target_modules, config.exclude_modules)
        count = num_images or config.num_samples
        # Whole batches are shared out.
        count = min(count, math.ceil(math.ceil(count / batch_size) / self.processes.count) * batch_size)
        return foresee_memory(
            self.model,
            config,
            targets,
            required_statistics([METRICS.create(config.metric)], targets),
            count,
            batch_size=batch_size,
            inplace=inplace,
            max_memory=max_memory,
        )

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
            ratios: Values of `compression_ratio`; those that cannot be reached are an error.

        Raises:
            ValueError: as `compress`.
        """
        config = config or MixRankConfig()
        metric = METRICS.create(config.metric)
        calibration.check(fingerprint_model(self.model))
        targets = find_targets(self.model, config.target_modules, config.exclude_modules)
        check_weights(targets)
        plans = [self._plan(dataclasses.replace(config, compression_ratio=ratio), targets) for ratio in sorted(ratios)]
        for plan in plans:
            plan.check()
        decompositions = decompose_layers(
            metric, targets, calibration if metric.uses_data else None, config.layout, self.processes
        )
        losses = allocation_losses(metric, decompositions)
        return profile_budgets(plans, losses, config.allocation, metric.common_unit)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        quantization_config: MixRankConfig | None = None,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Compress and save: Optimum's interface, the same as `compress`.

        Args:
            save_dir: Where to save.
            file_prefix: Not supported: Transformers finds weights by their standard names.
            quantization_config: See `compress`.
            calibration_dataset: See `compress`.
            **kwargs: See `compress`.

        Raises:
            ValueError: if `file_prefix` is given, and as `compress`.
        """
        if file_prefix is not None:
            raise ValueError(
                f"file_prefix={file_prefix!r} is not supported: `from_pretrained` finds weights by their standard "
                "names. Leave it out, or use one directory per model."
            )
        return self.compress(quantization_config, calibration_dataset, save_dir, **kwargs)

    @_in_every_process
    def evaluate(
        self,
        model: PreTrainedModel,
        dataset: Any,
        *,
        batch_size: int = 32,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        num_samples: int | None = None,
        seed: int = 42,
        num_workers: int = 0,
    ) -> EvaluationResult:
        """Measure what a compressed model has lost against the original, `self.model`.

        Args:
            model: The compressed model, in memory or reloaded.
            dataset: Images as for `compress`; with labels, accuracy is measured too.
            batch_size: Images per forward pass.
            split: Split of a named dataset; default: `validation`, `test` or the only one there is.
            image_column: Default: the one image column there is.
            label_column: Default: `label` or `labels`, where there is one.
            num_samples: Draw so many images; None for all.
            seed: Seed of that draw.
            num_workers: See `compress`.

        Returns:
            Accuracy of both models, agreement, and KL from the original in nats; also kept in `self.report`.
        """
        from .evaluation.evaluate import evaluate_model

        processes = self.processes
        with processes.agreed():
            batches = self._labelled_batches(
                dataset, batch_size, split, image_column, label_column, num_samples, seed, num_workers
            )
        with phase("Evaluated") as evaluating:
            result = evaluate_model(model, batches, reference=self.model, processes=processes)
            evaluating.tell(*result.facts())
        if self.report is not None:
            self.report = dataclasses.replace(self.report, evaluation=dataclasses.asdict(result))
        return result

    @_in_every_process
    def save_pretrained(
        self,
        model: PreTrainedModel,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        picture: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save a compressed model with its image processor and the report.

        The checkpoint is written beside its destination and moved there when it is complete and on the disk: what stands
        there is the old content or the whole new one, whenever the process ends.

        Args:
            model: The compressed model; saved in the dtype that it has.
            save_directory: A new or empty folder.
            overwrite: Whether the folder may hold files already; they are replaced.
            picture: Whether to save a picture of the ranks too, `ranks.png`.
            **kwargs: `max_shard_size`, … as for Transformers' `save_pretrained`.

        Raises:
            FileExistsError: if the folder holds files and `overwrite` is False.
            OSError: if the disk is full; what was in the folder stays as it is.
        """
        processes, report, run = self.processes, self.report, self._unfinished
        with processes.agreed():
            if processes.is_main:
                with phase("Saved") as saving:
                    ours = run is not None and has_saved(run.journal.directory, save_directory)
                    report = save_checkpoint(
                        model,
                        save_directory,
                        self.image_processor,
                        report,
                        overwrite=overwrite or ours,
                        picture=picture,
                        announce=None if run is None else run.announce,
                        **kwargs,
                    )
                    saving.tell(str(save_directory), size(safetensors_bytes(save_directory)))
                if run is not None:
                    run.close()
        self.report, self._unfinished = processes.broadcast(report), None

    @_in_every_process
    def push_to_hub(self, model: PreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
        """Upload a compressed model with its image processor and the report.

        Args:
            model: The compressed model.
            repo_id: `user/name` on the Hub; made if it does not exist.
            **kwargs: `token`, `private`, `revision`, `commit_message`, and `max_shard_size`.

        Returns:
            What `huggingface_hub.upload_folder` returns; None in all processes but the main one.
        """
        processes, uploaded = self.processes, None
        with processes.agreed():
            if processes.is_main:
                uploaded = push_checkpoint(model, repo_id, self.image_processor, self.report, **kwargs)
        return uploaded

    def _plan(self, config: MixRankConfig, targets: Sequence[Target]) -> RankPlan:
        rank_pattern = match_values(targets, config.rank_pattern, "rank_pattern")
        ratio_pattern = match_values(targets, config.ratio_pattern, "ratio_pattern")
        tokens, model_cost = {}, sum(parameter.numel() for parameter in self.model.parameters())
        if config.cost == "flops":
            tokens = tokens_per_image(self.model, [target.name for target in targets])
            # A multiply-add counts two FLOPs.
            model_cost = flops_per_image(self.model) // 2
        specs = [
            LayerSpec(
                name=target.canonical_name,
                out_features=target.shape[0],
                in_features=target.shape[1],
                price=tokens.get(target.name, 1),
                rank=rank_pattern.get(target.canonical_name),
                ratio=ratio_pattern.get(target.canonical_name),
            )
            for target in targets
        ]
        return RankPlan(
            specs,
            model_cost=model_cost,
            unit="multiply-adds per image" if config.cost == "flops" else "parameters",
            compression_ratio=config.compression_ratio,
            compression_scope=config.compression_scope,
            rank_multiple=config.rank_multiple,
            min_rank=config.min_rank,
            min_rank_ratio=config.min_rank_ratio,
            max_rank_ratio=config.max_rank_ratio,
            layout=config.layout,
        )

    def _image_source(
        self,
        config: MixRankConfig,
        metric: Metric,
        dataset: Any,
        calibration: Calibration | None,
        batch_size: int,
        max_broken_share: float,
        num_workers: int,
    ) -> ImageBatches | None:
        """The images, if statistics or compensation need them, or statistics are to be compared with them."""
        if dataset is None and calibration is None:
            dataset = config.dataset
        compared = calibration is not None and dataset is not None
        if not config.compensation and not compared and (calibration is not None or not metric.uses_data):
            return None
        if dataset is None:
            step = f"metric={config.metric!r}" if metric.uses_data and calibration is None else "compensation"
            raise ValueError(
                f"{step} needs calibration images: pass `calibration_dataset`. Without images there are only "
                "metric='svd' and compensation=[], which lose far more accuracy."
            )
        if isinstance(dataset, str | Path):
            dataset = self.get_calibration_dataset(dataset, num_samples=config.num_samples, seed=config.seed)
        return self._batches(dataset, batch_size, max_broken_share, num_workers, bool(config.compensation))

    def _open_run(
        self,
        directory: str | Path,
        fingerprint: str,
        config: MixRankConfig,
        batches: ImageBatches | None,
        limits: Mapping[str, Any],
        save_interval: float,
    ) -> UnfinishedRun:
        """The run whose progress is kept in a folder, new or cut off before.

        Raises:
            ValueError: if the folder belongs to another run.
        """
        processes, images = self.processes, None
        with processes.agreed():
            if batches is not None and processes.is_main:
                images = batches.source_fingerprint()
        identity = identity_of(
            self.model,
            fingerprint,
            self.image_processor,
            config,
            **limits,
            num_images=None if batches is None else batches.num_images,
            images=processes.broadcast(images),
            processes=processes.count,
            mixed_precision=processes.mixed_precision,
            allow_tf32=self.allow_tf32,
        )
        return UnfinishedRun(directory, identity, save_interval, processes)

    def _decoded(self, config: MixRankConfig, batches: ImageBatches | None, journal: Journal) -> list[Batch]:
        """Images for compensation, which goes over them many times: decoded once, and kept as the model sees them."""
        if not config.compensation or batches is None:
            return []
        processes = self.processes
        with phase("Decoded") as decoding:
            with processes.agreed():
                images = list(logging.tqdm(batches, desc="Decoding", unit="batch"))
            batches.settle()
            decoding.tell(f"{sum(processes.gather(sum(batch.num_images for batch in images))):,} images")
        check_images(journal, batches.fingerprint, processes)
        return images

    def _check_statistics(
        self, calibration: Calibration, fingerprint: str, batches: ImageBatches | None, to_read: bool
    ) -> None:
        """Check that statistics are of the model with this fingerprint, and of these images if there are any.

        Args:
            calibration: The statistics.
            fingerprint: Of the model.
            batches: The images.
            to_read: Whether they have yet to be read.

        Raises:
            ValueError: if they are not.
        """
        processes = self.processes
        calibration.check(fingerprint)
        if batches is None:
            return
        if to_read:
            with phase("Compared"), processes.agreed():
                for _ in logging.tqdm(batches, desc="Comparing images", unit="batch"):
                    pass
            batches.settle()
        calibration.check(fingerprint, batches.fingerprint)

    def _decompose(
        self,
        metric: Metric,
        groups: Sequence[Sequence[Target]],
        layout: str,
        calibration: Calibration | None,
        run: CalibrationRun | None,
        keep_gradients: bool,
        journal: Journal,
    ) -> tuple[dict[str, Decomposition], Calibration | None, float]:
        """Decompositions, the statistics that later steps need, and the seconds that decomposing took."""
        if run is not None:
            return decompose_by_groups(metric, groups, layout, run, keep_gradients, journal)
        calibration = calibration if metric.uses_data else None
        targets = [target for group in groups for target in group]
        with phase("Decomposed") as decomposing:
            found = decompose_layers(metric, targets, calibration, layout, self.processes, journal)
            decomposing.tell(f"{len(targets)} layers")
        return found, calibration, decomposing.seconds

    def _fingerprint(self, processes: Processes) -> str:
        """Of the model.

        Raises:
            ValueError: if the processes hold different models.
        """
        fingerprint = fingerprint_model(self.model)
        if len(set(processes.gather(fingerprint))) > 1:
            raise ValueError(
                "The processes hold models with different weights. Load the same checkpoint in all, and call "
                "`accelerate.utils.set_seed` before weights are drawn at random, those of a new head say."
            )
        return fingerprint

    def _batches(
        self, dataset: Any, batch_size: int, max_broken_share: float, num_workers: int, keep: bool = False
    ) -> ImageBatches:
        """Batches to learn from; those that are kept are not to fill the memory that a GPU copies from."""
        return ImageBatches(
            dataset,
            image_processor=self.image_processor,
            batch_size=batch_size,
            max_broken_share=max_broken_share,
            num_channels=getattr(self.model.config, "num_channels", 3),
            num_workers=num_workers,
            pin_memory=not keep and self.model.device.type == "cuda",
            processes=self.processes,
            fingerprint=True,
        )

    def _labelled_batches(
        self,
        dataset: Any,
        batch_size: int,
        split: str | None,
        image_column: str | None,
        label_column: str | None,
        num_samples: int | None,
        seed: int,
        num_workers: int,
    ) -> ImageBatches:
        if isinstance(dataset, str | Path | datasets.DatasetDict):
            dataset = load_image_dataset(
                dataset,
                split=split,
                default_splits=("validation", "test"),
                image_column=image_column,
                num_samples=num_samples,
                seed=seed,
            )
        label_map = None
        if isinstance(dataset, datasets.Dataset):
            label_column = label_column or find_label_column(dataset)
            if label_column is not None:
                label_map = map_labels(dataset, label_column, self.model.config.id2label)
        return ImageBatches(
            dataset,
            image_processor=self.image_processor,
            batch_size=batch_size,
            image_column=image_column,
            label_column=label_column,
            label_map=label_map,
            num_channels=getattr(self.model.config, "num_channels", 3),
            num_workers=num_workers,
            pin_memory=self.model.device.type == "cuda",
            processes=self.processes,
        )


def _rank_range(ranks: Mapping[str, int | None]) -> str:
    """`ranks 3 to 60`; dense layers have none."""
    given = [rank for rank in ranks.values() if rank is not None]
    return f"ranks {min(given)} to {max(given)}" if given else "all layers stay dense"


def _around(plan: RankPlan) -> list[RankPlan]:
    """The plan among others of ratios that can be reached, for the report: what would more or less have cost?"""
    ratios = sorted({plan.compression_ratio, *(tenths / 10 for tenths in range(1, 10))})
    plans = [dataclasses.replace(plan, compression_ratio=ratio) for ratio in ratios]
    return [each for each in plans if each.is_reachable]


def _restore(model: PreTrainedModel, targets: Sequence[Target], original: PreTrainedModel) -> None:
    """Give a model that was to be compressed in place its own layers and values back."""
    for target in targets:
        replace_module(model, target.name, target.module)
    if original is not model:
        model.load_state_dict(original.state_dict())
