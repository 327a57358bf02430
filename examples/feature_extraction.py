"""Use a compressed model for features and in a pipeline: the encoder without its head, in plain Transformers.

    python examples/feature_extraction.py

By default the small model of this repository is compressed by 60 %. Test images are then classified by their nearest
neighbour among the calibration images, using the features of the original and of the compressed encoder, and by the head,
in a pipeline. The same script works with another compressed checkpoint:

    python examples/feature_extraction.py --model vit-base-60 --original google/vit-base-patch16-224 \
        --data path/to/labelled/images --split train --test-split validation
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import torch
from image_data import model_inputs
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, pipeline

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset
from optimum_mixrank.calibration.images.sources import find_image_column
from optimum_mixrank.evaluation.labels import find_label_column


SHIPPED = Path(__file__).parent / "fashion_mnist"


@torch.no_grad()
def features(model: torch.nn.Module, images: datasets.Dataset, batch_size: int = 64) -> torch.Tensor:
    """Return the mean of the last hidden states over the tokens, normalised to length 1: `[images, width]`."""
    batches = images.iter(batch_size=batch_size)
    hidden = [model(pixel_values=batch["pixel_values"]).last_hidden_state.mean(dim=1) for batch in batches]
    return F.normalize(torch.cat(hidden), dim=-1)


def nearest_label(queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the label of the most similar image of the gallery for each query, `[queries]`."""
    return labels[(queries @ gallery.T).argmax(dim=-1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", default=str(SHIPPED / "model"), help="local folder or Hub id")
    parser.add_argument("--model", help="compressed checkpoint; default: the original is compressed first")
    parser.add_argument("--ratio", type=float, default=0.6, help="fraction of parameters to remove in that case")
    parser.add_argument("--data", default=str(SHIPPED / "data"), help="labelled images: local folder or Hub id")
    parser.add_argument("--split", help="split of the images to search in; default: train")
    parser.add_argument("--test-split", help="split of the images to classify; default: validation, or test")
    parser.add_argument("--num-samples", type=int, default=1000, help="images to draw from each split")
    parser.add_argument("--output", type=Path, default=Path("features-output"))
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.data == str(SHIPPED / "data"):
        args.split = args.split or "calibration"
    gallery, test = (
        load_image_dataset(args.data, split=split, default_splits=names, num_samples=args.num_samples, seed=args.seed)
        for split, names in ((args.split, ("train",)), (args.test_split, ("validation", "test")))
    )
    label_column = find_label_column(gallery)
    if label_column is None:
        parser.error(f"--data {args.data!r} has no labels to compare neighbours by.")
    if args.model is None:
        compressor = MixRankCompressor.from_pretrained(args.original)
        images = compressor.get_calibration_dataset(gallery, num_samples=min(512, len(gallery)), seed=args.seed)
        config = MixRankConfig(compression_ratio=args.ratio, seed=args.seed)
        compressor.compress(config, images, args.output, overwrite=True)
        args.model = str(args.output)

    processor = AutoImageProcessor.from_pretrained(args.model)
    labels, test_labels = (torch.tensor(each[label_column]) for each in (gallery, test))
    seen = {}
    for name, checkpoint in (("original", args.original), ("compressed", args.model)):
        # The checkpoints contain no pooler; adding one would initialise it at random.
        encoder = AutoModel.from_pretrained(checkpoint, add_pooling_layer=False).eval()
        found, queries = (features(encoder, model_inputs(each, processor)) for each in (gallery, test))
        seen[name] = queries
        correct = (nearest_label(queries, found, labels) == test_labels).double().mean()
        parameters = sum(each.numel() for each in encoder.parameters())
        print(f"{name:12}{parameters:>12,} parameters   nearest neighbour {correct:.2%}")
    similarity = (seen["original"] * seen["compressed"]).sum(dim=-1)
    print(
        f"cosine similarity of original and compressed features: mean {similarity.mean():.4f}, least {similarity.min():.4f}"
    )

    classifier = pipeline("image-classification", model=args.model, image_processor=processor)
    image_column = find_image_column(test.features)
    image = test.cast_column(image_column, datasets.Image())[0][image_column].convert("RGB")
    for answer in classifier(image, top_k=3):
        print(f"{answer['label']:16}{answer['score']:.1%}")


if __name__ == "__main__":
    main()
