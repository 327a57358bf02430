"""Quantize a compressed model to 8 bits with torchao and ONNX Runtime; compare accuracy, size and time with float32.

    pip install 'optimum-mixrank[int8]'
    python examples/int8.py

By default the small model of this repository is compressed by 60 %. The same script measures another checkpoint that
optimum-mixrank has compressed:

    python examples/int8.py --model vit-base-60 --original google/vit-base-patch16-224 --data path/to/labelled/images
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForImageClassification, PreTrainedModel

from optimum_mixrank import FactoredLinear, MixRankCompressor, MixRankConfig, export_model, open_exported
from optimum_mixrank.evaluation.latency import measure_latency
from optimum_mixrank.runtime.forward import configured_shape


SHIPPED = Path(__file__).parent / "fashion_mnist"


def torchao_int8(checkpoint: Path, file: Path) -> PreTrainedModel:
    """Quantize the factors, save them, and load the saved file."""
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    # The factors are ordinary linear layers; all linear layers of the model are quantized, including the head.
    quantize_(model, Int8WeightOnlyConfig())
    assert any(type(layer.factor_a.weight).__name__ == "Int8Tensor" for layer in factored_layers(model))
    # Transformers' `save_pretrained` cannot save it, since it allows only one quantizer per model.
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, file, metadata)

    # A new model gets its structure from the compressed checkpoint and its weights from the file.
    reloaded = AutoModelForImageClassification.from_pretrained(checkpoint)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    state, _ = unflatten_tensor_state_dict(load_file(file), metadata)
    reloaded.load_state_dict(state, assign=True)
    return reloaded


def factored_layers(model: nn.Module) -> list[FactoredLinear]:
    return [module for module in model.modules() if isinstance(module, FactoredLinear)]


def export_onnx(checkpoint: Path, folder: Path, int8: bool = False) -> nn.Module:
    """Export with a dynamic batch size, and open the file; `optimum-cli mixrank export` does the same."""
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    return open_exported(export_model(model, folder, "onnx", int8=int8, overwrite=True).file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", default=str(SHIPPED / "model"), help="local folder or Hub id")
    parser.add_argument("--model", type=Path, help="compressed checkpoint; default: the original is compressed first")
    parser.add_argument("--ratio", type=float, default=0.6, help="fraction of parameters to remove in that case")
    parser.add_argument("--calibration-data", default=str(SHIPPED / "data"), help="images to compress it with")
    parser.add_argument("--calibration-split", help="default: train, or the only one")
    parser.add_argument("--data", default=str(SHIPPED / "data"), help="labelled images: local folder or Hub id")
    parser.add_argument("--split", help="default: validation, test, or the only one")
    parser.add_argument("--num-samples", type=int, help="labelled images to draw; default: all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("int8-output"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--record", type=Path, help="JSON file to write the table to")
    args = parser.parse_args()
    if args.calibration_data == str(SHIPPED / "data"):
        args.calibration_split = args.calibration_split or "calibration"

    args.output.mkdir(parents=True, exist_ok=True)
    compressor = MixRankCompressor.from_pretrained(args.original)
    if args.model is None:
        args.model = args.output / "compressed"
        config = MixRankConfig(compression_ratio=args.ratio, seed=args.seed)
        images = compressor.get_calibration_dataset(
            args.calibration_data, split=args.calibration_split, seed=args.seed
        )
        compressor.compress(config, images, args.model, overwrite=True)

    original = args.output / "original"
    compressor.model.save_pretrained(original)
    files = {
        "original": original / "model.safetensors",
        "compressed": args.model / "model.safetensors",
        "torchao int8": args.output / "torchao-int8.safetensors",
        "onnx": args.output / "onnx" / "model.onnx",
        "onnx int8": args.output / "onnx-int8" / "model.onnx",
    }
    loaders: dict[str, Callable[[], nn.Module]] = {
        "original": lambda: compressor.model,
        "compressed": lambda: AutoModelForImageClassification.from_pretrained(args.model),
        "torchao int8": lambda: torchao_int8(args.model, files["torchao int8"]),
        "onnx": lambda: export_onnx(args.model, args.output / "onnx"),
        "onnx int8": lambda: export_onnx(args.model, args.output / "onnx-int8", int8=True),
    }
    models = {name: load() for name, load in loaders.items()}
    batch = torch.randn(args.batch_size, *configured_shape(compressor.model))
    latencies = measure_latency(models, {"pixel_values": batch})
    print(f"{'':14}{'bytes':>12}{'top-1':>9}{'agreement':>11}{'KL in nats':>12}{'ms per image':>14}")
    rows = {}
    for name, model in models.items():
        result = compressor.evaluate(
            model,
            args.data,
            split=args.split,
            num_samples=args.num_samples,
            seed=args.seed,
            batch_size=args.batch_size,
        )
        milliseconds = 1000 * latencies[name].median / args.batch_size
        # Weights of more than 2 GB are in a file beside the model, `model.onnx.data`.
        size = sum(part.stat().st_size for part in files[name].parent.glob(f"{files[name].name}*"))
        print(
            f"{name:14}{size:>12,}{result.top1:>9.2%}{result.agreement:>11.2%}{result.kl:>12.4f}{milliseconds:>14.3f}"
        )
        rows[name] = {"bytes": size, "top1": result.top1, "agreement": result.agreement, "kl": result.kl}
    if args.record is not None:
        packages = {name: version(name) for name in ("torch", "transformers", "torchao", "onnxruntime")}
        args.record.write_text(
            json.dumps({"environment": packages, "seed": args.seed, "models": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
