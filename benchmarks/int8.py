"""int8 on top of compression: bytes, time, top-1 and KL of a dense model and compressed ones, in float32 and in int8.

    pip install 'optimum-mixrank[int8,openvino]' optimum-quanto
    python benchmarks/int8.py --dense path/to/vit --models "40 % kept=path/to/compressed" --data path/to/images \
        --output benchmarks/results/int8
    python benchmarks/int8.py --render benchmarks/results/int8.json

All variants are timed in one process, in turns, with one thread; times are ratios to the dense model in float32 under
PyTorch. Images for the ranges of static int8 are drawn from the training split. A variant whose packages are missing is
left out, and so is one that --only does not name.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support import machine, table, write
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_mixrank import MixRankCompressor, export_model, load_image_dataset, open_exported, to_plain_factors
from optimum_mixrank.calibration.images.batches import Batch, ImageBatches
from optimum_mixrank.checkpoint.architecture import load_named, read_config
from optimum_mixrank.evaluation.flops import flops_per_image
from optimum_mixrank.evaluation.latency import Latency, measure_latency, time_ratio
from optimum_mixrank.pipeline.images import ImageReader
from optimum_mixrank.runtime.distributed import SINGLE_PROCESS
from optimum_mixrank.runtime.fidelity import kl_divergence
from optimum_mixrank.runtime.forward import configured_shape, evaluation_mode


Variant = tuple[nn.Module, int]
"""A model, and its bytes on disk."""


def torch_float32(model: PreTrainedModel, folder: Path, images: list[Tensor]) -> Variant:
    model.save_pretrained(folder)
    return model, (folder / "model.safetensors").stat().st_size


def torchao(config: str) -> Callable[[PreTrainedModel, Path, list[Tensor]], Variant]:
    def quantized(model: PreTrainedModel, folder: Path, images: list[Tensor]) -> Variant:
        import torchao.quantization
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        if "DynamicActivation" in config:
            # As `export_model` does it for runtimes that round what passes between two factors.
            to_plain_factors(model, rotated=True)
        torchao.quantization.quantize_(model, getattr(torchao.quantization, config)())
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        save_file(tensors, folder / "int8.safetensors", metadata)
        return model, (folder / "int8.safetensors").stat().st_size

    return quantized


def quanto(model: PreTrainedModel, folder: Path, images: list[Tensor]) -> Variant:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model, weights=qint8)
    freeze(model)
    save_file(model.state_dict(), folder / "int8.safetensors")
    return model, (folder / "int8.safetensors").stat().st_size


def exported(runtime: str, int8: bool = False, static: bool = False) -> Callable[..., Variant]:
    def written(model: PreTrainedModel, folder: Path, images: list[Tensor]) -> Variant:
        calibration: Iterator[Tensor] | None = iter(images) if static else None
        result = export_model(model, folder / "exported", runtime, int8=int8, calibration=calibration)
        return open_exported(result.file), result.num_bytes

    return written


METHODS: dict[str, Callable[[PreTrainedModel, Path, list[Tensor]], Variant]] = {
    "PyTorch, float32": torch_float32,
    "torchao, int8 weights": torchao("Int8WeightOnlyConfig"),
    "torchao, dynamic int8": torchao("Int8DynamicActivationInt8WeightConfig"),
    "optimum-quanto, int8 weights": quanto,
    "ONNX Runtime, float32": exported("onnx"),
    "ONNX Runtime, dynamic int8": exported("onnx", int8=True),
    "ONNX Runtime, static int8": exported("onnx", int8=True, static=True),
    "OpenVINO, float32": exported("openvino"),
    "OpenVINO, int8 weights": exported("openvino", int8=True),
    "OpenVINO, static int8": exported("openvino", int8=True, static=True),
}
DENSE = "dense"
BASE = f"{DENSE}; PyTorch, float32"


def open_model(path: str) -> PreTrainedModel:
    return load_named(path, read_config(path, {}), None, dtype=torch.float32).eval()


def models_of(args: argparse.Namespace) -> dict[str, str]:
    """Checkpoints by label, the dense one first."""
    entries = [entry.rpartition("=") for entry in args.models]
    return {DENSE: args.dense, **{label or Path(path).name: path for label, _, path in entries}}


def make_variants(args: argparse.Namespace, images: list[Tensor], folder: Path) -> dict[str, Variant]:
    """Every method on all models, by name; one that does not run is reported and left out."""
    variants: dict[str, Variant] = {}
    for index, (method, make) in enumerate(METHODS.items()):
        for number, (label, path) in enumerate(models_of(args).items()):
            name = f"{label}; {method}"
            if name != BASE and not fnmatch.fnmatch(name, args.only):
                continue
            place = folder / f"{index}-{number}"
            place.mkdir()
            try:
                variants[name] = make(open_model(path), place, images)
            except ImportError as error:
                print(f"{name} is left out: {error}", flush=True)
    return variants


def logits_of(model: nn.Module, batches: list[Batch]) -> Tensor:
    """`[images, classes]`."""
    with evaluation_mode(model):
        return torch.cat([model(pixel_values=batch.pixel_values)["logits"] for batch in batches])


def measure(args: argparse.Namespace, variants: dict[str, Variant], images: ImageBatches) -> list[dict[str, Any]]:
    """A row for each variant: size, accuracy and fidelity, and times of all of them in turns."""
    models = {name: model for name, (model, _) in variants.items()}
    original = models[BASE]
    latencies: dict[int, dict[str, Latency]] = {}
    for size in args.batch_sizes:
        batch = torch.randn(size, *configured_shape(original), generator=torch.Generator().manual_seed(0))
        latencies[size] = measure_latency(models, {"pixel_values": batch}, repeats=args.repeats)
    # Decoded once, and seen once by each model.
    batches = list(images)
    labels = torch.cat([batch.labels for batch in batches])
    expected = logits_of(original, batches)
    flops = {label: flops_per_image(open_model(path)) for label, path in models_of(args).items()}
    rows = []
    for name, (model, num_bytes) in variants.items():
        logits = logits_of(model, batches)
        ratios = {size: time_ratio(found[name], found[BASE]) for size, found in latencies.items()}
        rows.append(
            {
                "model": name.partition("; ")[0],
                "flops": flops[name.partition("; ")[0]],
                "method": name.partition("; ")[2],
                "bytes": num_bytes,
                "bytes_ratio": variants[BASE][1] / num_bytes,
                "top1": (logits.argmax(dim=1) == labels).double().mean().item(),
                "kl": kl_divergence(expected, logits).mean().item(),
                "milliseconds": {size: found[name].median * 1000 for size, found in latencies.items()},
                "time_ratio": {size: [ratio.median, ratio.low, ratio.high] for size, ratio in ratios.items()},
            }
        )
        print(rows[-1], flush=True)
    return rows


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    times = [f"time, batch {size}" for size in rows[0]["time_ratio"]]
    cells = [
        [
            row["method"],
            row["model"],
            f"{row['bytes']:,}",
            f"{row['bytes_ratio']:.2f}",
            f"{row['top1']:.1%}",
            f"{row['kl']:.4f}",
            *(f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in row["time_ratio"].values()),
        ]
        for row in rows
    ]
    return table(["runtime and precision", "model", "bytes", "times smaller", "top-1", "KL in nats", *times], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", help="checkpoint that --models are compared to")
    parser.add_argument("--models", nargs="+", default=[], help="LABEL=CHECKPOINT, compressed from it")
    parser.add_argument("--data", help="labelled images with a training and a validation split")
    parser.add_argument("--num-samples", type=int, default=1000, help="validation images; default: 1000")
    parser.add_argument("--num-calibration", type=int, default=128, help="images for ranges; default: 128")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="*", help="pattern of variants such as 'compressed; ONNX*'")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="OUTPUT.md and OUTPUT.json are written")
    parser.add_argument("--render", type=Path, help="print the table of this record and measure nothing")
    args = parser.parse_args()
    if args.render is not None:
        print("\n".join(rendered(json.loads(args.render.read_text()))))
        return
    if None in (args.dense, args.data, args.output):
        parser.error("--dense, --data and --output are needed")
    torch.set_num_threads(1)

    compressor = MixRankCompressor.from_pretrained(args.dense, device="cpu")
    reader = ImageReader(compressor.model, compressor.image_processor, SINGLE_PROCESS)
    images = reader.read_labelled(args.data, num_samples=args.num_samples, seed=args.seed)
    drawn = load_image_dataset(args.data, split="train", num_samples=args.num_calibration, seed=args.seed)
    calibration = [batch.pixel_values for batch in reader.read(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, make_variants(args, calibration, Path(folder)), images)
    settings = {
        "models": {label: Path(path).name for label, path in models_of(args).items()},
        "validation images": args.num_samples,
        "images for ranges": args.num_calibration,
        "repetitions": args.repeats,
        "seed": args.seed,
    }
    packages = ("onnxruntime", "openvino", "nncf", "torchao", "optimum-quanto", "optimum-mixrank")
    versions = {name: importlib.metadata.version(name) for name in packages if _is_installed(name)}
    record = {"settings": settings, "machine": {**machine(), **versions}, "rows": rows}
    write(args.output, record, rendered(record))


def rendered(record: dict[str, Any]) -> list[str]:
    """The table of a record with its settings, as Markdown."""
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if name != "models")
    where = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    return [*as_table(record["rows"]), "", f"Times are ratios to {BASE}, with 95 % intervals; {settings}; {where}."]


def _is_installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


if __name__ == "__main__":
    main()
