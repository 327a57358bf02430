"""Does compression need images of the classes that the model will see? Learn from others only, and compare.

    python benchmarks/other_classes.py --model MODEL --data LABELLED_IMAGES --split train --test-split validation \
        --ratio 0.6 --num-samples 1280 --epochs 5 --output other_classes

Half of the classes, drawn by the seed, are "unseen". The model is compressed and distilled once with images of the other
classes alone, and once with as many images of all classes; both are tested on images of the unseen classes. Labels choose
the images, and measure accuracy; compression does not see them. `other_classes.json` holds what was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from methods import accuracy, logits_of
from transformers import PreTrainedModel

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset
from optimum_mixrank.calibration.images.batches import ImageBatches
from optimum_mixrank.evaluation.labels import find_label_column
from optimum_mixrank.reporting.build import environment
from optimum_mixrank.runtime.fidelity import kl_divergence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--test-split", default="validation")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--num-samples", type=int, default=1280, help="images to learn from")
    parser.add_argument("--closed-form-images", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    compressor = MixRankCompressor.from_pretrained(args.model)
    train = load_image_dataset(args.data, split=args.split)
    test = load_image_dataset(args.data, split=args.test_split)
    column = find_label_column(train)
    classes = len(set(train[column]))
    generator = torch.Generator().manual_seed(args.seed)
    unseen = set(torch.randperm(classes, generator=generator)[: classes // 2].tolist())
    others = [index for index, label in enumerate(train[column]) if label not in unseen]
    tests = test.select([index for index, label in enumerate(test[column]) if label in unseen])
    sources = {"other classes": train.select(others), "all classes": train}

    batches = [
        each.pixel_values
        for each in ImageBatches(tests, image_processor=compressor.image_processor, batch_size=args.batch_size)
    ]
    labels = torch.tensor(tests[column])
    original = logits_of(compressor.model, batches)
    record = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        | {"model": Path(args.model).name, "data": Path(args.data).name, "output": args.output.name},
        "unseen_classes": sorted(unseen),
        "test_images": len(tests),
        "original_top1": accuracy(original, labels),
        "environment": environment(),
        "rows": [],
    }
    for name, source in sources.items():
        images = drawn(source, args.num_samples, args.seed)
        model, row = measured(compressor, images, args)
        logits = logits_of(model, batches)
        row |= {"top1": accuracy(logits, labels), "kl": float(kl_divergence(original, logits).mean())}
        record["rows"].append({"learned_from": name, "images": len(images), **row})
        print(json.dumps(record["rows"][-1]), flush=True)
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def drawn(source: Dataset, count: int, seed: int) -> Dataset:
    """Return images drawn at random."""
    if len(source) < count:
        raise SystemExit(f"--num-samples {count}: there are only {len(source)} images to draw from.")
    return source.shuffle(seed=seed).select(range(count))


def measured(
    compressor: MixRankCompressor, images: Dataset, args: argparse.Namespace
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the compressed model, and what it took; `held_out` is the KL before each step and after the last one."""
    config = MixRankConfig(
        recipe="distilled",
        compression_ratio=args.ratio,
        compression_scope="targets",
        closed_form_images=args.closed_form_images,
        epochs=args.epochs,
        seed=args.seed,
    )
    start = time.perf_counter()
    model = compressor.compress(config, images, batch_size=args.batch_size, max_broken_share=0)
    report = compressor.report
    steps = report.compensation
    return model, {
        "kept": report.kept_of_encoder,
        "held_out": [*(step["error_before"] for step in steps), steps[-1]["error_after"]],
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    main()
