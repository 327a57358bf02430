"""A large model compressed to the size of a small one, or the small one trained itself: which is more accurate?

    apt-get install dataset-fashion-mnist
    python benchmarks/large_to_small.py --models MODELS --output benchmarks/results/large_to_small
    python benchmarks/large_to_small.py --render benchmarks/results/large_to_small.json --page docs/results.md

For every seed, a larger and a smaller ViT are trained on Fashion-MNIST with the same recipe and the same images, and the
larger one is compressed, without labels, with `like` naming the smaller. Accuracy is that on the 10,000 images of the
official test split, which takes no part in any choice. The repository ships 1,000 images to calibrate with, too few to
train on; the Debian package has all 60,000. Rows that the record holds already are not measured again, and models in the
folder MODELS are not trained again, so that a run that was cut off goes on where it stopped; other settings need other
folders.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from support import machine, table, write
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from optimum_mixrank import MixRankCompressor, MixRankConfig


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "fashion_mnist"))
from train import augment, load_split, parameter_groups, split_indices, to_pixels, to_rgb


LARGE, SMALL = "large, trained", "small, trained"
RECIPES = {"large, best": "best", "large, distilled": "distilled"}
"""Compressed models by the names of their rows."""

STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t by the number of seeds."""


def main() -> None:
    args = arguments()
    if args.render is not None:
        lines = rendered(json.loads(args.render.read_text()))
        print("\n".join(lines))
        if args.page is not None:
            args.page.write_text(with_lines(args.page.read_text(), lines))
        return
    torch.set_num_threads(args.threads)
    settings = {
        name: getattr(args, name)
        for name in (
            "widths",
            "blocks",
            "heads",
            "patch_size",
            "train_images",
            "epochs",
            "batch_size",
            "learning_rate",
        )
    }
    settings |= {"calibration_images": args.calibration_images, "distillation_images": args.distillation_images}
    record = earlier_record(args.output, settings) or {"settings": settings, "environment": machine(), "rows": []}
    images, labels = load_split(args.data, "t10k")
    test = to_pixels(images)[: args.test_images], torch.from_numpy(labels.astype(np.int64))[: args.test_images]
    for seed in args.seeds:
        for name in (SMALL, LARGE, *args.compressed):
            if any((row["model"], row["seed"]) == (name, seed) for row in record["rows"]):
                continue
            row = measured(name, seed, args, test)
            record["rows"].append(row)
            print(json.dumps({key: value for key, value in row.items() if key != "correct"}), flush=True)
            write(args.output, record, rendered(record))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of the four IDX files")
    add("--models", type=Path, help="folder in which the trained models are kept")
    add("--output", type=Path, help="OUTPUT.json and OUTPUT.md are written")
    add("--render", type=Path, help="print the tables of this record and measure nothing")
    add("--page", type=Path, help="with --render, the page of the documentation to put the tables into")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--widths", type=int, nargs=2, default=[96, 48], help="of the larger and the smaller model")
    add("--blocks", type=int, default=6)
    add("--heads", type=int, default=4)
    add("--patch-size", type=int, default=7)
    add("--train-images", type=int, default=8_000)
    add("--epochs", type=int, default=6)
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=2e-3)
    add("--test-images", type=int, default=10_000)
    add("--calibration-images", type=int, default=1024)
    add("--distillation-images", type=int, default=2048)
    add("--compressed", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    add("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.render is None and (args.output is None or args.models is None):
        parser.error("--output and --models are needed")
    return args


def earlier_record(output: Path, settings: dict) -> dict | None:
    """The record of a run that was cut off; ends the program if it was made with other settings."""
    path = output.with_suffix(".json")
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    if record["settings"] != settings:
        raise SystemExit(f"{path} was measured with {record['settings']}, not {settings}; give another --output.")
    return record


def measured(name: str, seed: int, args: argparse.Namespace, test: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Train or compress a model, and evaluate it on the test images."""
    start = time.perf_counter()
    model = compressed(RECIPES[name], seed, args) if name in RECIPES else trained(name, seed, args)
    seconds = time.perf_counter() - start
    correct = is_correct(model, *test)
    return {
        "model": name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "top1": float(correct.float().mean()),
        "seconds": round(seconds, 1),
        # One character per image, so that models can be compared image by image.
        "correct": "".join(map(str, correct.int().tolist())),
    }


def folder_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    return args.models / f"{name.partition(',')[0]}-{seed}"


def trained(name: str, seed: int, args: argparse.Namespace) -> ViTForImageClassification:
    """Return a model as `examples/fashion_mnist/train.py` trains it, without choosing an epoch, or the one kept earlier."""
    folder = folder_of(name, seed, args)
    if (folder / "model.safetensors").is_file():
        return ViTForImageClassification.from_pretrained(folder).eval()
    pixels, labels = training_images(seed, args)
    # The same order of images and the same augmentation for both sizes.
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ViTForImageClassification(configuration(args.widths[name == SMALL], args)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=args.learning_rate, betas=(0.9, 0.98))
    per_epoch = len(pixels) // args.batch_size
    total = args.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, per_epoch, total))
    for _ in range(args.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        for index in order[: per_epoch * args.batch_size].split(args.batch_size):
            logits = model(pixel_values=to_rgb(augment(pixels[index], generator))).logits
            F.cross_entropy(logits, labels[index], label_smoothing=0.05).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    model.save_pretrained(folder)
    return model.eval()


def factor(step: int, warmup: int, total: int) -> float:
    """Share of the learning rate: a linear warm-up over one epoch, then a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def configuration(width: int, args: argparse.Namespace) -> ViTConfig:
    return ViTConfig(
        image_size=28,
        patch_size=args.patch_size,
        hidden_size=width,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        intermediate_size=4 * width,
        initializer_range=width**-0.5,
        num_labels=10,
    )


def training_images(seed: int, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that both models are trained on, and their labels; another draw for every seed."""
    images, labels = load_split(args.data, "train")
    index = split_indices(len(images), seed)["train"][: args.train_images]
    return to_pixels(images[index]), torch.from_numpy(labels[index].astype(np.int64))


def compressed(recipe: str, seed: int, args: argparse.Namespace) -> torch.nn.Module:
    """Return the larger model of a seed, compressed to the size of the smaller one with images it was trained on."""
    large, small = (folder_of(name, seed, args) for name in (LARGE, SMALL))
    count = args.distillation_images if recipe == "distilled" else args.calibration_images
    pixels, _ = training_images(seed, args)
    images = [to_rgb(batch) for batch in pixels[:count].split(64)]
    config = MixRankConfig(like=str(small), recipe=recipe, seed=seed)
    return MixRankCompressor(ViTForImageClassification.from_pretrained(large).eval()).compress(config, images)


@torch.no_grad()
def is_correct(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    model.eval()
    found = [model(pixel_values=to_rgb(batch)).logits.argmax(-1) for batch in pixels.split(500)]
    return torch.cat(found) == labels


BEGIN, END = "<!-- large_to_small.py: begin -->", "<!-- large_to_small.py: end -->"


def with_lines(page: str, lines: list[str]) -> str:
    """A page with other lines between the two comments that mark the place of the tables."""
    before, _, rest = page.partition(BEGIN)
    return "\n".join([before + BEGIN, "", *lines, "", END + rest.partition(END)[2]])


def rendered(record: dict) -> list[str]:
    """The settings and the tables of a record, as lines of Markdown."""
    rows = {name: rows_of(record, name) for name in (SMALL, LARGE, *RECIPES)}
    lines = []
    for name, found in rows.items():
        if not found:
            continue
        top1 = [row["top1"] for row in found]
        count = f"{min(row['parameters'] for row in found):,}"
        percent = [f"{100 * each:.2f} %" for each in (statistics.mean(top1), *top1)]
        lines.append([name, count, percent[0], ", ".join(percent[1:])])
    head = ["model", "parameters", "top-1, mean", "top-1 by seed"]
    differences = [comparison(rows[name], rows[SMALL], name) for name in RECIPES if rows[name]]
    compared = ["compressed", "minus small, trained", "95 %, over images", "95 %, over seeds"]
    measured = [*table(head, lines), "", *table(compared, [each for each in differences if each])]
    return [*described(record), "", *measured]


def described(record: dict) -> list[str]:
    """A paragraph of settings and machine, in lines of the documentation's width."""
    settings, here = record["settings"], record["environment"]
    widths = " and ".join(str(each) for each in settings["widths"])
    seeds = len({row["seed"] for row in record["rows"]})
    tests = len(record["rows"][0]["correct"]) if record["rows"] else 0
    text = (
        f"ViTs of width {widths} with {settings['blocks']} blocks and patches of {settings['patch_size']} px; "
        f"{settings['train_images']:,} training images, {settings['epochs']} epochs, batch size {settings['batch_size']}, "
        f"learning rate {settings['learning_rate']:g}; {seeds} seeds, each with images, order and initial weights of its "
        "own; "
        f"`best` with {settings['calibration_images']:,} and `distilled` with {settings['distillation_images']:,} of the "
        f"training images, without labels; {tests:,} test images. PyTorch {here['torch']}, Transformers "
        f"{here['transformers']}, {here['threads']} thread of {here['processor']}."
    )
    return textwrap.wrap(text, 119)


def rows_of(record: dict, name: str) -> list[dict]:
    return sorted((row for row in record["rows"] if row["model"] == name), key=lambda row: row["seed"])


def comparison(ours: list[dict], theirs: list[dict], name: str) -> list[str]:
    """Mean difference of the accuracies of the same seeds, in points, with two intervals.

    Over images: of the differences image by image, averaged over the seeds, for these trained models. Over seeds: by
    Student's t for the differences of the seeds, for models that would be trained again.
    """
    seeds = {row["seed"]: row for row in theirs}
    pairs = [(row, seeds[row["seed"]]) for row in ours if row["seed"] in seeds]
    if not pairs:
        return []
    images = np.mean([outcomes(a) - outcomes(b) for a, b in pairs], axis=0)
    by_seed = [100 * (a["top1"] - b["top1"]) for a, b in pairs]
    over_images = 100 * 1.96 * images.std(ddof=1) / math.sqrt(len(images))
    count = len(by_seed)
    over_seeds = "—"
    if count in STUDENT_95:
        over_seeds = f"± {STUDENT_95[count] * statistics.stdev(by_seed) / math.sqrt(count):.2f}"
    return [name, f"{statistics.mean(by_seed):+.2f} points", f"± {over_images:.2f}", over_seeds]


def outcomes(row: dict) -> np.ndarray:
    return np.array([int(each) for each in row["correct"]], dtype=np.float64)


if __name__ == "__main__":
    main()
