"""`optimum-cli mixrank benchmark`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.formatting import counted, format_milliseconds
from .command import (
    MixRankSubcommand,
    add_hub_arguments,
    checked_device,
    default_device,
    hub_arguments,
    load_checkpoint,
)
from .images import add_image_size_argument, check_image_size, named_shape


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..allocation.latency import LatencyTable

MODEL, REFERENCE = "compressed", "dense"


class BenchmarkCommand(MixRankSubcommand):
    """Compare time and memory of a compressed model with those of a dense one."""

    description = """Time a compressed model and a dense one in turns on the same machine, and measure their memory.

The images are random, since the time does not depend on their content.

examples:
  optimum-cli mixrank benchmark --model out
  optimum-cli mixrank benchmark --model out --reference facebook/deit-base-patch16-224 --batch-size 1 8 64 --threads 4
  optimum-cli mixrank benchmark --model out --device cuda --dtype float16 --compile --json

With --table, time the layers of a dense model instead, at several ranks and widths, for --cost latency:

  optimum-cli mixrank benchmark --model facebook/deit-base-patch16-224 --table latencies.json --batch-size 8 --threads 4
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add(
            "--model", required=True, help="compressed checkpoint, or with --table a dense one: local folder or Hub id"
        )
        add(
            "--table",
            type=Path,
            metavar="FILE",
            help="write a table of latencies to this JSON file instead of comparing two models",
        )
        runtime = "with --table, what runs the layers: eager (default), compile (the same as --compile) or onnxruntime"
        add("--runtime", help=runtime)
        add(
            "--reference",
            help="dense checkpoint to compare with; default: the compressed model with its factors multiplied",
        )
        batches = "images per forward pass; default: 1 32, or 1 with --table, which takes a single value"
        add("--batch-size", type=int, nargs="+", help=batches)
        add_image_size_argument(parser)
        interpolate = "interpolate position embeddings; default: if --image-size is given and the model can"
        add("--interpolate-pos-encoding", action=BooleanOptionalAction, default=None, help=interpolate)
        add("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
        add("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")
        add("--threads", type=int, help="number of CPU threads; default: PyTorch's choice")
        repeats = "timed repetitions of each model, at least 6; default: 20, or 9 with --table"
        add("--repeats", type=int, help=repeats)
        add("--warmup", type=int, default=3, help="forward passes before the timed ones; default: 3")
        add("--compile", action="store_true", help="compile both models with torch.compile")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        args.repeats = args.repeats if args.repeats is not None else 9 if args.table else 20
        args.batch_size = args.batch_size if args.batch_size is not None else [1] if args.table else [1, 32]
        self._check_options()
        if args.table is not None:
            return self._measure_table()
        import torch

        from ..checkpoint.files import count_parameters
        from ..evaluation.memory import activation_bytes, kept_bytes, weight_bytes
        from ..reporting.build import environment

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        models = self._models()
        first = next(iter(models.values()))
        shape, inputs = self._inputs(first)
        batches = [
            {**inputs, "pixel_values": inputs["pixel_values"].expand(size, *shape).contiguous()}
            for size in args.batch_size
        ]
        # Before compilation, after which tensors cannot be counted.
        memory = [{name: activation_bytes(model, batch) for name, model in models.items()} for batch in batches]
        values: dict[str, Any] = {
            "environment": environment(inputs["pixel_values"].device),
            "dtype": str(first.dtype).removeprefix("torch."),
            "image_shape": list(shape),
            "compiled": args.compile,
            "repeats": args.repeats,
            "models": {
                name: {
                    "parameters": count_parameters(model),
                    "weight_bytes": weight_bytes(model),
                    "kept_bytes": kept_bytes(model),
                }
                for name, model in models.items()
            },
            "runs": [self._timings(models, *each) for each in zip(batches, memory, strict=True)],
        }
        return _text(values), values

    def _check_options(self) -> None:
        from ..evaluation.latency import MIN_REPEATS

        args = self.args
        check_image_size(args)
        given = [("--batch-size", size) for size in args.batch_size]
        given += [("--threads", args.threads), ("--warmup", args.warmup)]
        for option, value in given:
            if value is not None and value < 1:
                raise ValueError(f"{option} {value} is not positive.")
        if args.repeats < MIN_REPEATS:
            raise ValueError(f"--repeats {args.repeats} is too few for an interval; use {MIN_REPEATS} or more.")
        if args.table is None:
            if args.runtime is not None:
                raise ValueError(f"--runtime {args.runtime} has no effect without --table; leave it out.")
            return
        for option in ("reference", "interpolate_pos_encoding"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} has no effect with --table; leave it out.")
        if len(args.batch_size) > 1:
            raise ValueError(
                f"--batch-size {' '.join(map(str, args.batch_size))} names several sizes, but a table is for one; measure "
                "one table for each."
            )
        if args.compile and args.runtime not in (None, "compile"):
            raise ValueError(f"--compile contradicts --runtime {args.runtime}; leave one of them out.")

    def _measure_table(self) -> tuple[str, dict[str, Any]]:
        """Measure a table of latencies and write it; return a summary and the table as JSON values."""
        import torch

        from ..checkpoint.original import parse_dtype
        from ..evaluation.latency_table import measure_latency_table, save_latency_table
        from ..evaluation.runtimes import check_runtime
        from ..runtime.files import check_writable_file

        args = self.args
        check_writable_file(args.table)
        device = torch.device(checked_device(args.device or default_device()))
        runtime = args.runtime or ("compile" if args.compile else "eager")
        check_runtime(runtime, device)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        model = load_checkpoint(args, args.model, parse_dtype(args.dtype)).to(device).eval()
        table = measure_latency_table(
            model,
            args.batch_size[0],
            runtime=runtime,
            pixel_values_shape=self._shape(model),
            repeats=args.repeats,
        )
        save_latency_table(table, args.table)
        return _table_text(table, args.table), table.to_dict()

    def _timings(
        self, models: dict[str, PreTrainedModel], batch: dict[str, Any], activations: dict[str, int]
    ) -> dict[str, Any]:
        """Return the times of all models for one batch size, as JSON values."""
        from ..evaluation.latency import measure_latency, time_ratio

        if self.args.compile:
            for model in models.values():
                model.compile(dynamic=False)
        latencies = measure_latency(models, batch, repeats=self.args.repeats, warmup=self.args.warmup)
        rows = {
            name: {
                "seconds": latency.median,
                "seconds_quartiles": list(latency.quartiles),
                "images_per_second": latency.images_per_second,
                "activation_bytes": activations[name],
            }
            for name, latency in latencies.items()
        }
        ratio = dataclasses.asdict(time_ratio(*latencies.values()))
        return {"batch_size": len(batch["pixel_values"]), "models": rows, "time_ratio": ratio}

    def _models(self) -> dict[str, PreTrainedModel]:
        """Return both models by name, on the device: first the one that is timed, then what it is compared with."""
        from ..checkpoint.dense import to_dense
        from ..checkpoint.entries import compressed_layers
        from ..checkpoint.original import parse_dtype

        args = self.args
        device = checked_device(args.device or default_device())
        model = load_checkpoint(args, args.model, parse_dtype(args.dtype))
        if args.reference is not None:
            reference = load_checkpoint(args, args.reference, model.dtype)
            if compressed_layers(reference) and not compressed_layers(model):
                raise ValueError(
                    f"--reference {args.reference!r} is compressed and --model {args.model!r} is not: swap the two."
                )
        elif compressed_layers(model):
            reference = to_dense(copy.deepcopy(model))
        else:
            raise ValueError(
                f"--model {args.model!r} is a dense checkpoint; name what to compare with by --reference."
            )
        names = (MODEL, REFERENCE)
        if bool(compressed_layers(model)) == bool(compressed_layers(reference)):
            names = ("model", "reference")
        return {name: each.to(device).eval() for name, each in zip(names, (model, reference), strict=True)}

    def _shape(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Return the shape of an image, `(channels, height, width)`."""
        from ..checkpoint.original import load_image_processor
        from ..deployment.image_part import image_shape

        processor = load_image_processor(self.args.model, hub_arguments(self.args), needed=False)
        return image_shape(model, processor, named_shape(self.args, model))

    def _inputs(self, model: PreTrainedModel) -> tuple[Sequence[int], dict[str, Any]]:
        """Return the shape of an image, and the arguments of the models for a single random image."""
        import torch

        from ..runtime.outputs import ModelCall

        size, interpolate = self.args.image_size, self.args.interpolate_pos_encoding
        shape = self._shape(model)
        if interpolate:
            ModelCall(interpolate_pos_encoding=True).check(model)
        takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        options = {"interpolate_pos_encoding": True} if interpolate or (interpolate is None and size and takes) else {}
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        return shape, {"pixel_values": image.to(model.device, model.dtype), **options}


def _table_text(table: LatencyTable, file: Path) -> str:
    conditions, rest = table.conditions, table.rest_seconds / table.model_seconds
    about = ", ".join(
        f"{name.replace('_', ' ')} {conditions[name]}"
        for name in ("device", "threads", "dtype", "runtime", "batch_size")
    )
    multiple = table.rank_multiple
    ranks = f"multiples of {multiple} cost no more" if multiple > 1 else "no multiple is better than another"
    return "\n".join(
        [
            f"{'Dense model':<28}{format_milliseconds(table.model_seconds)} per batch",
            f"{'  without its linear layers':<28}{format_milliseconds(table.rest_seconds)} ({rest:.1%})",
            f"{'Shapes':<28}{len(table.layers)}",
            f"{'Ranks and widths':<28}{ranks}",
            f"{'Conditions':<28}{about}",
            f"{'Table':<28}{file}",
        ]
    )


def _text(values: Mapping[str, Any]) -> str:
    lines = [
        f"{name:<10}  {model['parameters']:,} parameters, {_megabytes(model['weight_bytes'])}{_kept(model['kept_bytes'])}"
        for name, model in values["models"].items()
    ]
    lines += ["", f"batch  {'model':<10}  {'ms per batch (quartiles)':>30}  {'images/s':>10}  {'activations':>12}"]
    ratios, (compared, reference) = [], values["models"]
    for run in values["runs"]:
        size, ratio = run["batch_size"], run["time_ratio"]
        for name, row in run["models"].items():
            low, high, median = (f"{1000 * each:.2f}" for each in (*row["seconds_quartiles"], row["seconds"]))
            time, memory = f"{median} ({low} to {high})", _megabytes(row["activation_bytes"])
            lines.append(f"{size:>5}  {name:<10}  {time:>30}  {row['images_per_second']:>10,.1f}  {memory:>12}")
        ratios.append(
            f"batch {size}: {compared} takes {ratio['median']:.3f} of the time of {reference} "
            f"(95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}, {values['repeats']} repetitions)"
        )
    environment = values["environment"]
    about = (
        f"{environment['device']}, {counted(environment['threads'], 'thread')}, {values['dtype']}, "
        f"{'compiled' if values['compiled'] else 'eager'}, images {'x'.join(map(str, values['image_shape']))}, "
        f"PyTorch {environment['torch']}, Transformers {environment['transformers']}"
    )
    return "\n".join([*lines, "", *ratios, "", about])


def _kept(size: int) -> str:
    return f" and {_megabytes(size)} kept for inference" if size else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
