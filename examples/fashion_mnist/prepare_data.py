"""Write the calibration and test images of this repository.

* `calibration`: the 1,000 images of the official training split that `train.py` never sees (same seed, same split);
* `test`: 2,000 images drawn, seeded, from the official test split of 10,000.

    python examples/fashion_mnist/prepare_data.py --output examples/fashion_mnist/data
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from train import LABELS, load_split, split_indices


NUM_TEST = 2_000

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: calibration
    path: calibration.parquet
  - split: test
    path: test.parquet
---

# Fashion-MNIST, a small part

Images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Zalando SE, MIT licence), 28 x 28, grey.

* `calibration`: 1,000 images of the training split that the model beside them was not trained on;
* `test`: 2,000 images of the test split.

Made by `prepare_data.py`, seed 0.
"""


def write(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write images `[N, 28, 28]` with their labels as one parquet file of PNGs."""
    features = Features({"image": Image(), "label": ClassLabel(names=list(LABELS))})
    pictures = [PILImage.fromarray(image) for image in images]
    Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features).to_parquet(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    images, labels = load_split(args.data, "train")
    index = split_indices(len(images), args.seed)["calibration"]
    write(images[index], labels[index], args.output / "calibration.parquet")
    images, labels = load_split(args.data, "t10k")
    index = np.sort(np.random.default_rng(args.seed).permutation(len(images))[:NUM_TEST])
    write(images[index], labels[index], args.output / "test.parquet")
    (args.output / "README.md").write_text(CARD)


if __name__ == "__main__":
    main()
