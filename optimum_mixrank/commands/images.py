"""Options of commands that may read images, and the images."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.images.batches import ImageBatches


def add_image_arguments(parser: ArgumentParser, purpose: str, num_samples: int, splits: str) -> None:
    """Declare the options of `read_images`; the texts say what the images are for and which splits are the default."""
    add = parser.add_argument
    add("--dataset", help=f"local folder or Hub id of images {purpose}")
    add("--split", help=f"split of the dataset; default: {splits}, or the only one")
    add("--image-column", help="column of the dataset; default: the only image column")
    add("--num-samples", type=int, default=num_samples, help=f"number of images to draw; default: {num_samples}")
    add("--seed", type=int, default=42, help="seed of that draw; default: 42")
    add("--batch-size", type=int, default=8, help="images per forward pass; default: 8")


def add_image_size_argument(parser: ArgumentParser) -> None:
    """Declare the option of `named_shape`."""
    size = "height and width of the images, or one number for both; default: as the model or its image processor says"
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help=size)


def check_image_size(args: Any) -> None:
    """Check `--image-size`, before any work.

    Raises:
        ValueError: if it is not a size.
    """
    size = args.image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ValueError(
            f"--image-size {' '.join(map(str, size))} is not a height and a width, or one number for both."
        )


def named_shape(args: Any, model: PreTrainedModel) -> tuple[int, int, int] | None:
    """Return the shape of images that `--image-size` asks for, `(channels, height, width)`, or None."""
    from ..runtime.forward import configured_channels

    size = args.image_size
    return None if size is None else (configured_channels(model), size[0], size[-1])


def read_images(
    args: Any, model: PreTrainedModel, image_processor: Any, default_splits: tuple[str, ...], labelled: bool = True
) -> ImageBatches:
    """Return the images that the options name.

    Args:
        args: The options.
        model: The model that the images are for.
        image_processor: Its image processor.
        default_splits: Splits to choose where none is named, best first.
        labelled: Whether labels are read too if there are any; otherwise the names of classes do not matter.

    Raises:
        ValueError: if the options name no such images.
    """
    from ..calibration.images.rows import draw_images
    from ..calibration.images.sources import find_image_column, load_image_dataset
    from ..pipeline.images import ImageReader
    from ..runtime.distributed import SINGLE_PROCESS

    if args.num_samples < 1:
        raise ValueError(f"--num-samples {args.num_samples} is not positive.")
    reader = ImageReader(model, image_processor, SINGLE_PROCESS, batch_size=args.batch_size)
    images = load_image_dataset(
        args.dataset, split=args.split, default_splits=default_splits, image_column=args.image_column
    )
    if not labelled:
        images = images.select_columns([find_image_column(images.features, args.image_column)])
        return reader.read(draw_images(images, args.num_samples, args.seed))
    return reader.read_labelled(images, args.image_column, num_samples=args.num_samples, seed=args.seed)
