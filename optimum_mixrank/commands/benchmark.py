"""`optimum-cli mixrank benchmark`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .command import MixRankSubcommand, add_hub_arguments, default_device, load_checkpoint


if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, REFERENCE = "compressed", "dense"


class BenchmarkCommand(MixRankSubcommand):
    """Compare time and memory of a compressed model with those of a dense one."""

    description = """Time a compressed model and a dense one in turns on the same machine, and measure their memory.

The images are random, because the time does not depend on what they show.

examples:
  optimum-cli mixrank benchmark --model out
  optimum-cli mixrank benchmark --model out --reference facebook/deit-base-patch16-224 --batch-size 1 8 64 --threads 4
  optimum-cli mixrank benchmark --model out --device cuda --dtype float16 --compile --json
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        add = parser.add_argument
        add("--model", required=True, help="compressed checkpoint: local folder or Hub id")
        add(
            "--reference",
            help="dense checkpoint to compare with; default: the compressed model with its factors multiplied",
        )
        add("--batch-size", type=int, nargs="+", default=[1, 32], help="images per forward pass; default: 1 32")
        add("--image-size", type=int, help="height and width of the images in pixels; default: that of the model")
        interpolate = "interpolate position embeddings; default: where --image-size is given and the model can"
        add("--interpolate-pos-encoding", action=BooleanOptionalAction, default=None, help=interpolate)
        add("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
        add("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")
        add("--threads", type=int, help="number of CPU threads; default: PyTorch's choice")
        add("--repeats", type=int, default=20, help="timed repetitions of each model, at least 6; default: 20")
        add("--warmup", type=int, default=3, help="forward passes before the timed ones; default: 3")
        add("--compile", action="store_true", help="compile both models with torch.compile")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        self._check_options()
        import torch

        from ..checkpoint.files import count_parameters
        from ..evaluation.memory import activation_bytes, kept_bytes, weight_bytes
        from ..reporting.build import environment

        if args.threads is not None:
            torch.set_num_threads(args.threads)
        models = self._models()
        shape, inputs = self._inputs(models[MODEL])
        batches = [
            {**inputs, "pixel_values": inputs["pixel_values"].expand(size, *shape).contiguous()}
            for size in args.batch_size
        ]
        # Before compilation, after which tensors cannot be counted.
        memory = [{name: activation_bytes(model, batch) for name, model in models.items()} for batch in batches]
        values: dict[str, Any] = {
            "environment": environment(inputs["pixel_values"].device),
            "dtype": str(models[MODEL].dtype).removeprefix("torch."),
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
        given = [("--batch-size", size) for size in args.batch_size]
        given += [("--image-size", args.image_size), ("--threads", args.threads), ("--warmup", args.warmup)]
        for option, value in given:
            if value is not None and value < 1:
                raise ValueError(f"{option} {value} is not positive.")
        if args.repeats < MIN_REPEATS:
            raise ValueError(f"--repeats {args.repeats} is too few for an interval; use {MIN_REPEATS} or more.")

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
        ratio = dataclasses.asdict(time_ratio(latencies[MODEL], latencies[REFERENCE]))
        return {"batch_size": len(batch["pixel_values"]), "models": rows, "time_ratio": ratio}

    def _models(self) -> dict[str, PreTrainedModel]:
        """Return both models by name, on the device."""
        from ..checkpoint.dense import to_dense
        from ..checkpoint.entries import compressed_layers
        from ..checkpoint.original import parse_dtype

        args = self.args
        model = load_checkpoint(args, args.model, parse_dtype(args.dtype))
        if args.reference is not None:
            reference = load_checkpoint(args, args.reference, model.dtype)
        elif compressed_layers(model):
            reference = to_dense(copy.deepcopy(model))
        else:
            raise ValueError(
                f"--model {args.model!r} is a dense checkpoint; name what to compare with by --reference."
            )
        device = args.device or default_device()
        return {MODEL: model.to(device).eval(), REFERENCE: reference.to(device).eval()}

    def _inputs(self, model: PreTrainedModel) -> tuple[Sequence[int], dict[str, Any]]:
        """Return the shape of an image, and the arguments of the models for a single random image."""
        import torch

        from ..runtime.forward import configured_shape
        from ..runtime.outputs import ModelCall

        size, interpolate = self.args.image_size, self.args.interpolate_pos_encoding
        shape = configured_shape(model) if size is None else (getattr(model.config, "num_channels", 3), size, size)
        if interpolate:
            ModelCall(interpolate_pos_encoding=True).check(model)
        takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        options = {"interpolate_pos_encoding": True} if interpolate or (interpolate is None and size and takes) else {}
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        return shape, {"pixel_values": image.to(model.device, model.dtype), **options}


def _text(values: Mapping[str, Any]) -> str:
    lines = [
        f"{name:<10}  {model['parameters']:,} parameters, {_megabytes(model['weight_bytes'])}{_kept(model['kept_bytes'])}"
        for name, model in values["models"].items()
    ]
    lines += ["", f"batch  {'model':<10}  {'ms per batch (quartiles)':>30}  {'images/s':>10}  {'activations':>12}"]
    ratios = []
    for run in values["runs"]:
        size, ratio = run["batch_size"], run["time_ratio"]
        for name, row in run["models"].items():
            low, high, median = (f"{1000 * each:.2f}" for each in (*row["seconds_quartiles"], row["seconds"]))
            time, memory = f"{median} ({low} to {high})", _megabytes(row["activation_bytes"])
            lines.append(f"{size:>5}  {name:<10}  {time:>30}  {row['images_per_second']:>10,.1f}  {memory:>12}")
        ratios.append(
            f"batch {size}: {MODEL} takes {ratio['median']:.3f} of the time of {REFERENCE} "
            f"(95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}, {values['repeats']} repetitions)"
        )
    environment = values["environment"]
    about = (
        f"{environment['device']}, {environment['threads']} threads, {values['dtype']}, "
        f"{'compiled' if values['compiled'] else 'eager'}, images {'x'.join(map(str, values['image_shape']))}, "
        f"PyTorch {environment['torch']}, Transformers {environment['transformers']}"
    )
    return "\n".join([*lines, "", *ratios, "", about])


def _kept(size: int) -> str:
    return f" and {_megabytes(size)} kept for inference" if size else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
