"""Compress a Vision Transformer with ImageNet, on one GPU or many, and evaluate it on the validation images.

    python examples/imagenet/compress.py --dataset path/to/imagenet                      # one process
    accelerate launch --config_file examples/imagenet/one_node.yaml \
        examples/imagenet/compress.py --dataset path/to/imagenet                         # 8 GPUs of one machine

`path/to/imagenet` holds the folders `train` and `val`, each with one folder of images per class. `several_nodes.yaml`
explains how to use several machines. Without `--dataset` the images come from the Hub: calibration images are drawn from a
stream, and the validation images, 7 GB, are downloaded. The dataset there is gated: accept its conditions once, and log in
with `hf auth login`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import datasets
from accelerate import Accelerator
from huggingface_hub.errors import GatedRepoError

from optimum_mixrank import MixRankCompressor, MixRankConfig, load_image_dataset
from optimum_mixrank.reporting import format_table


HUB_ID = "ILSVRC/imagenet-1k"
GATED = (
    f"{HUB_ID} cannot be read: {{}}\nAccept its conditions at https://huggingface.co/datasets/{HUB_ID} and log in with "
    "`hf auth login`, or name a local copy: --dataset path/to/imagenet."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="facebook/deit-base-patch16-224", help="local folder or Hub id")
    parser.add_argument("--dataset", default=HUB_ID, help=f"local folder; default: {HUB_ID} on the Hub")
    parser.add_argument("--ratio", type=float, default=0.5, help="fraction of parameters to remove; default 0.5")
    parser.add_argument("--recipe", default="best", help="best (default), fast, paper or paper_second_moment")
    parser.add_argument("--num-samples", type=int, default=1024, help="calibration images; default 1024")
    parser.add_argument("--test-samples", type=int, help="validation images; default: all 50,000")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass of a process; default 64")
    parser.add_argument("--num-workers", type=int, default=4, help="per process, to decode images; default 4")
    parser.add_argument("--output", type=Path, default=Path("imagenet-output"))
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of the output folder")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    logging.getLogger("optimum_mixrank").setLevel(logging.INFO)  # a line per phase

    accelerator = Accelerator()
    compressor = MixRankCompressor.from_pretrained(args.model, accelerator=accelerator)
    # One process of each machine lists and downloads the files; the others find them in the cache.
    with accelerator.local_main_process_first():
        images, test_images = load_images(args)
    config = MixRankConfig(compression_ratio=args.ratio, recipe=args.recipe, seed=args.seed)
    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    model = compressor.compress(config, images, save_directory=args.output, overwrite=args.overwrite, **loading)
    compressor.evaluate(model, test_images, **loading)
    # Save again, to include the accuracy in the report and the model card.
    compressor.save_pretrained(model, args.output, overwrite=True)
    if accelerator.is_main_process:
        print(format_table(compressor.report))
        print(f"Checkpoint and report: {args.output}/")
    accelerator.end_training()


def load_images(args: argparse.Namespace) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return calibration and validation images, undecoded."""
    draw = {"seed": args.seed, "num_samples": args.num_samples}
    test = {"seed": args.seed, "num_samples": args.test_samples, "split": "validation"}
    if Path(args.dataset).is_dir():
        return load_image_dataset(args.dataset, split="train", **draw), load_image_dataset(args.dataset, **test)
    try:
        return (
            load_image_dataset(args.dataset, split="train", streaming=True, **draw),
            # Without `data_files`, all 150 GB would be downloaded.
            load_image_dataset(args.dataset, data_files={"validation": "data/validation-*.parquet"}, **test),
        )
    except (datasets.exceptions.DatasetNotFoundError, GatedRepoError, ConnectionError) as error:
        raise SystemExit(GATED.format(error)) from error


if __name__ == "__main__":
    main()
