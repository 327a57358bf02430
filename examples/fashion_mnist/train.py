"""Train the small Vision Transformer of this repository.

The model is a `ViTForImageClassification` for the 28 x 28 grey-scale images of Fashion-MNIST
(Zalando SE, MIT licence). The 60,000 images of the official training split are divided once, by
a seeded permutation, into

* 56,000 images to train on,
* 3,000 images on which the epoch is chosen (the best one is kept),
* 1,000 images that training never sees; they become the calibration set.

The official test split is evaluated once, at the end, and takes no part in any choice.

The four IDX files come from the Debian package ``dataset-fashion-mnist``::

    apt-get install dataset-fashion-mnist
    python examples/fashion_mnist/train.py --output fashion-mnist-vit
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification


LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
NUM_VALIDATION = 3_000
NUM_CALIBRATION = 1_000
# Mean and standard deviation over the pixels of the training split, in [0, 1].
MEAN, STD = 0.2860, 0.3530


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes, see http://yann.lecun.com/exdb/mnist/."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes.")
    ndim = data[3]
    shape = np.frombuffer(data, dtype=">i4", count=ndim, offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load_split(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images `[N, 28, 28]` and labels `[N]` of the split with this file prefix (train, t10k)."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return images, labels


def split_indices(num_images: int, seed: int) -> dict[str, np.ndarray]:
    """Divide the official training split into train, validation and calibration indices."""
    order = np.random.default_rng(seed).permutation(num_images)
    first, second = NUM_CALIBRATION, NUM_CALIBRATION + NUM_VALIDATION
    return {"calibration": order[:first], "validation": order[first:second], "train": order[second:]}


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Images `[N, 28, 28]` in bytes -> normalised grey pixel values `[N, 1, 28, 28]`."""
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD).unsqueeze(1)


def to_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """Grey `[N, 1, H, W]` -> RGB `[N, 3, H, W]`, the format that image pipelines deliver."""
    return pixels.expand(-1, 3, -1, -1)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images and shift each by up to one pixel in both directions."""
    n, _, height, width = pixels.shape
    flip = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
    padded = F.pad(pixels, (1, 1, 1, 1), value=-MEAN / STD)
    dy, dx = torch.randint(0, 3, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in [0, 1]."""
    model.eval()
    hits = 0
    for x, y in zip(pixels.split(500), labels.split(500), strict=True):
        hits += int((model(pixel_values=to_rgb(x)).logits.argmax(-1) == y).sum())
    return hits / len(labels)


def write_preprocessor(folder: Path) -> None:
    """Write the image processor's configuration under the class name that all releases of Transformers know."""
    config = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [MEAN] * 3,
        "image_processor_type": "ViTImageProcessor",
        "image_std": [STD] * 3,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 28, "width": 28},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Apply weight decay only to matrices, not to biases, norms, the CLS token or position embeddings."""
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "embeddings.cls" not in name and "position" not in name else rest).append(
            parameter
        )
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_split(args.data, "train")
    parts = split_indices(len(images), args.seed)
    pixels = {name: to_pixels(images[index]) for name, index in parts.items()}
    targets = {name: torch.from_numpy(labels[index].astype(np.int64)) for name, index in parts.items()}

    config = ViTConfig(
        image_size=28,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        # The default of 0.02 suits a width of 768; the standard deviation scales with 1 / sqrt(fan_in).
        initializer_range=0.1,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=(0.9, 0.98))
    steps_per_epoch = len(pixels["train"]) // args.batch_size
    total, warmup = args.epochs * steps_per_epoch, steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    args.output.mkdir(parents=True, exist_ok=True)
    log = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": {name: len(index) for name, index in parts.items()},
        "epochs": [],
    }
    best, best_state = -1.0, None
    for epoch in range(1, args.epochs + 1):
        model.train()
        start, running = time.perf_counter(), 0.0
        order = torch.randperm(len(pixels["train"]), generator=generator)
        for step in range(steps_per_epoch):
            index = order[step * args.batch_size : (step + 1) * args.batch_size]
            logits = model(pixel_values=to_rgb(augment(pixels["train"][index], generator))).logits
            loss = F.cross_entropy(logits, targets["train"][index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            running += loss.item()
        held_out = accuracy(model, pixels["validation"], targets["validation"])
        entry = {
            "epoch": epoch,
            "train_loss": round(running / steps_per_epoch, 4),
            "validation_accuracy": round(held_out, 4),
            "seconds": round(time.perf_counter() - start, 1),
        }
        log["epochs"].append(entry)
        print(json.dumps(entry), flush=True)
        if held_out > best:
            best = held_out
            log["chosen_epoch"] = epoch
            best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.save_pretrained(args.output)

    model.load_state_dict(best_state)
    test_images, test_labels = load_split(args.data, "t10k")
    log["test_accuracy"] = accuracy(model, to_pixels(test_images), torch.from_numpy(test_labels.astype(np.int64)))
    model.save_pretrained(args.output)
    write_preprocessor(args.output)
    (args.output / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"epoch {log['chosen_epoch']} chosen, test accuracy {log['test_accuracy']:.4f}")


if __name__ == "__main__":
    main()
