"""`optimum-cli mixrank benchmark`."""

from __future__ import annotations

import dataclasses
import inspect
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .command import MixRankSubcommand, add_hub_arguments, default_device, load_checkpoint


if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL, REFERENCE = "compressed", "dense"


class BenchmarkCommand(MixRankSubcommand):
    """Time and memory, dense against compressed."""

    description = """Time a compressed model against a dense one, in turns on the same machine, and measure their memory.

Images are random: what they show does not change the time.

examples:
  optimum-cli mixrank benchmark --model out
  optimum-cli mixrank benchmark --model out --reference facebook/deit-base-patch16-224 --batch-size 1 8 64 --threads 4
  optimum-cli mixrank benchmark --model out --device cuda --dtype float16 --compile --json
"""

    @classmethod
    def add_arguments(cls, parser: ArgumentParser) -> None:
        """See `MixRankSubcommand`."""
        parser.add_argument("--model", required=True, help="compressed checkpoint: local folder or Hub id")
        parser.add_argument(
            "--reference",
            help="what to compare with: local folder or Hub id; default: the compressed model with its factors "
            "multiplied out, which has the original's layers",
        )
        parser.add_argument(
            "--batch-size", type=int, nargs="+", default=[1, 32], help="images per forward pass; default 1 32"
        )
        parser.add_argument("--image-size", type=int, help="pixels of a side; default: that of the model")
        parser.add_argument("--device", help="cpu, cuda, mps, …; default: a GPU if there is one")
        parser.add_argument("--dtype", default="float32", help="float32 (default), float16, bfloat16 or auto")
        parser.add_argument("--threads", type=int, help="threads on the CPU; default: PyTorch's choice")
        parser.add_argument("--repeats", type=int, default=20, help="timings of each model, at least 6; default 20")
        parser.add_argument("--warmup", type=int, default=3, help="forward passes that are not timed; default 3")
        parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of both models")
        add_hub_arguments(parser)

    def execute(self) -> tuple[str, dict[str, Any]]:
        """See `MixRankSubcommand`."""
        args = self.args
        _check_positive("--batch-size", args.batch_size)
        for option in ("image_size", "threads", "warmup"):
            if getattr(args, option) is not None:
                _check_positive(f"--{option.replace('_', '-')}", [getattr(args, option)])
        import torch

        from ..checkpoint.files import count_parameters
        from ..evaluation.latency import MIN_REPEATS, measure_latency, time_ratio
        from ..evaluation.memory import activation_bytes, weight_bytes
        from ..reporting.build import environment

        if args.repeats < MIN_REPEATS:
            raise ValueError(f"--repeats {args.repeats} is too few for an interval; use {MIN_REPEATS} or more.")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        models = self._models()
        shape, inputs = self._inputs(models[MODEL])
        values: dict[str, Any] = {
            "environment": environment(inputs["pixel_values"].device),
            "dtype": str(models[MODEL].dtype).removeprefix("torch."),
            "image_shape": list(shape),
            "compiled": args.compile,
            "repeats": args.repeats,
            "models": {
                name: {"parameters": count_parameters(model), "weight_bytes": weight_bytes(model)}
                for name, model in models.items()
            },
            "runs": [],
        }
        batches = [
            {**inputs, "pixel_values": inputs["pixel_values"].expand(size, *shape).contiguous()}
            for size in args.batch_size
        ]
        # Before compilation, which keeps tensors in places of its own.
        memory = [{name: activation_bytes(model, batch) for name, model in models.items()} for batch in batches]
        for batch, activations in zip(batches, memory, strict=True):
            if args.compile:
                for model in models.values():
                    model.compile(dynamic=False)
            latencies = measure_latency(models, batch, repeats=args.repeats, warmup=args.warmup)
            rows = {
                name: {
                    "seconds": latency.median,
                    "seconds_quartiles": list(latency.quartiles),
                    "images_per_second": latency.images_per_second,
                    "activation_bytes": activations[name],
                }
                for name, latency in latencies.items()
            }
            ratio = time_ratio(latencies[MODEL], latencies[REFERENCE])
            values["runs"].append(
                {"batch_size": len(batch["pixel_values"]), "models": rows, "time_ratio": dataclasses.asdict(ratio)}
            )
        return _text(values), values

    def _models(self) -> dict[str, PreTrainedModel]:
        """Both models on the device, by name."""
        args = self.args
        import copy

        from ..checkpoint.dense import to_dense
        from ..checkpoint.modeling import FactoredLinear
        from ..checkpoint.original import parse_dtype

        dtype = parse_dtype(args.dtype)
        model = load_checkpoint(args, args.model, dtype)
        if args.reference is not None:
            reference = load_checkpoint(args, args.reference, model.dtype)
        elif any(isinstance(module, FactoredLinear) for module in model.modules()):
            reference = to_dense(copy.deepcopy(model))
        else:
            raise ValueError(
                f"--model {args.model!r} is a dense checkpoint; name what to compare with by --reference."
            )
        device = args.device or default_device()
        return {MODEL: model.to(device).eval(), REFERENCE: reference.to(device).eval()}

    def _inputs(self, model: PreTrainedModel) -> tuple[Sequence[int], dict[str, Any]]:
        """Shape of an image, and the models' arguments with one random image."""
        import torch

        from ..runtime.forward import configured_shape

        if self.args.image_size is None:
            shape, options = configured_shape(model), {}
        else:
            size = self.args.image_size
            shape = (getattr(model.config, "num_channels", 3), size, size)
            takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
            options = {"interpolate_pos_encoding": True} if takes else {}
        image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        return shape, {"pixel_values": image.to(model.device, model.dtype), **options}


def _check_positive(option: str, values: Sequence[int]) -> None:
    for value in values:
        if value < 1:
            raise ValueError(f"{option} {value} is not positive.")


def _text(values: Mapping[str, Any]) -> str:
    header = f"{'batch':>5}  {'model':<10}  {'ms per batch (quartiles)':>30}  {'images/s':>10}  {'activations':>12}"
    lines = [
        f"{name:<10}  {model['parameters']:,} parameters, {_megabytes(model['weight_bytes'])}"
        for name, model in values["models"].items()
    ]
    lines += ["", header]
    ratios = []
    for run in values["runs"]:
        for name, row in run["models"].items():
            low, high = (f"{1000 * each:.2f}" for each in row["seconds_quartiles"])
            time = f"{1000 * row['seconds']:.2f} ({low} to {high})"
            memory = _megabytes(row["activation_bytes"])
            lines.append(
                f"{run['batch_size']:>5}  {name:<10}  {time:>30}  {row['images_per_second']:>10,.1f}  {memory:>12}"
            )
        ratio = run["time_ratio"]
        ratios.append(
            f"batch {run['batch_size']}: {MODEL} takes {ratio['median']:.3f} of the time of {REFERENCE} "
            f"(95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}, {values['repeats']} repetitions)"
        )
    environment = values["environment"]
    about = (
        f"{environment['device']}, {environment['threads']} threads, {values['dtype']}, "
        f"{'compiled' if values['compiled'] else 'eager'}, images {'x'.join(map(str, values['image_shape']))}, "
        f"PyTorch {environment['torch']}, Transformers {environment['transformers']}"
    )
    return "\n".join([*lines, "", *ratios, "", about])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
