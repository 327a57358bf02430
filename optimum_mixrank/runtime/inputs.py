"""What one call of a model gets: named tensors as the model's own processor makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional


if TYPE_CHECKING:
    from typing_extensions import Self

PIXELS = "pixel_values"

MAIN_NAMES = (PIXELS, "pixel_values_videos", "flattened_patches", "input_features", "input_values")
"""What models call the pixels of images and videos, and the samples of audio; the first that is given is the main input."""

TEXT_NAMES = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "bbox")
"""Inputs that are text; those of a decoder begin with `decoder_`."""

_SIZES = "target_sizes"
"""The grid of models that put the patches of all images side by side in one entry, `[1, channels, height, columns]`."""

_GRIDS = ("image_grid_thw", "video_grid_thw", "grid_thw", "image_grid_hws", _SIZES)
"""Numbers of patches of each image by dimension, `[images, dimensions]`, of models that pack the patches of all images."""


class ModelInputs(Mapping[str, Tensor]):
    """The inputs of a model for a batch of images, by the names of its arguments.

    Each tensor has one entry per image, along its first dimension. Where a processor packs the patches of all images one
    after the other, a grid says how many there are of each; such a tensor has several entries per image, or a single one
    with the columns of all patches side by side.

    A batch behaves like its main input: it has a length, moves `to` a device, and is indexed by masks, numbers and slices
    of images. By the name of an argument it gives a tensor.

    Args:
        tensors: By name; a single tensor is `pixel_values`.

    Raises:
        ValueError: if there is none, or two of them are for different numbers of images.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Tensor) -> None:
        self._tensors = {PIXELS: tensors} if isinstance(tensors, Tensor) else dict(tensors)
        if not self._tensors:
            raise ValueError(
                "There are no inputs; give a tensor `pixel_values`, or what the model's processor returns."
            )
        grid = next((self._tensors[name] for name in _GRIDS if name in self._tensors), None)
        self._counts = None if grid is None else [math.prod(each) for each in grid.tolist()]
        self._length = len(self.main) if self._counts is None else len(self._counts)
        for name, tensor in self._tensors.items():
            if len(tensor) != self._length and not self._is_packed(name):
                raise ValueError(
                    f"`{name}` has {len(tensor)} entries where `{self.main_name}` is for {self._length} images; all inputs "
                    "of a batch must be for the same images."
                )

    @classmethod
    def of(cls, inputs: ModelInputs | Mapping[str, Tensor] | Tensor) -> ModelInputs:
        """Return inputs that may be given as a mapping or as the tensor of the pixels."""
        return inputs if isinstance(inputs, ModelInputs) else cls(inputs)

    @property
    def main_name(self) -> str:
        """Name of the main input."""
        found = next((name for name in MAIN_NAMES if name in self._tensors), None)
        return found or next(iter(self._tensors))

    @property
    def main(self) -> Tensor:
        """The main input: pixels or samples."""
        return self._tensors[self.main_name]

    @property
    def is_images(self) -> bool:
        """Whether this is nothing but pixels of whole images, `[images, channels, height, width]`."""
        return list(self._tensors) == [PIXELS] and self.main.ndim == 4

    @property
    def entry_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what belongs to one image, by name; without the number of its patches where they are packed."""
        return {
            name: tuple(tensor.shape[1:-1] if self.columns(name) else tensor.shape[1:])
            for name, tensor in self._tensors.items()
        }

    def __len__(self) -> int:
        """Return the number of images."""
        return self._length

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def keys(self) -> Any:
        """Return the names."""
        return self._tensors.keys()

    def items(self) -> Any:
        """Return names and tensors."""
        return self._tensors.items()

    def values(self) -> Any:
        """Return the tensors."""
        return self._tensors.values()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __getitem__(self, key: Any) -> Any:
        """Return the tensor of a name, or the images of a mask, of numbers or of a slice."""
        if isinstance(key, str):
            return self._tensors[key]
        chosen = torch.arange(self._length)[key if isinstance(key, slice) else torch.as_tensor(key).cpu()]
        return type(self)({name: self._chosen(name, chosen) for name in self._tensors})

    def columns(self, name: str) -> int:
        """Return the columns of a patch in a tensor that holds all patches side by side; 0 if it does not."""
        tensor, patches = self._tensors[name], sum(self._counts or [])
        if _SIZES not in self._tensors or name in _GRIDS or tensor.ndim < 3 or len(tensor) != 1:
            return 0
        if not patches:
            return int(tensor.shape[-1] == 0)
        return tensor.shape[-1] // patches if tensor.shape[-1] % patches == 0 else 0

    def image_means(self, values: Tensor) -> Tensor:
        """Return the mean of each image's values, of which there are as many per image, or per patch where they are packed.

        Values of which it is unknown which belong to an image are returned as they are.

        Args:
            values: `[rows]`, image by image, such as one per frame or per token.
        """
        counts = self._counts or [1] * self._length
        if len(values) == self._length or any(len(values) * count % sum(counts) for count in counts):
            return values
        return torch.stack(
            [part.mean() for part in values.split([len(values) * each // sum(counts) for each in counts])]
        )

    def split(self, size: int) -> list[Self]:
        """Return parts of so many images, the last of which may have fewer."""
        return [self[start : start + size] for start in range(0, self._length, size)]

    def only(self, names: Any) -> Self:
        """Return the inputs of these names, and the main one."""
        return type(self)({name: each for name, each in self.items() if name in names or name == self.main_name})

    def without_text(self) -> Self:
        """Return the inputs that are not text."""
        return self.only([name for name in self if name not in TEXT_NAMES and not name.startswith("decoder_")])

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Self:
        """Return the inputs on a device; those of floating-point numbers in a dtype."""
        return self._each(
            lambda tensor: tensor.to(
                device, dtype if tensor.is_floating_point() else None, non_blocking=non_blocking and tensor.is_pinned()
            )
        )

    def requiring_gradients(self) -> Self:
        """Return the inputs with gradients by those of floating-point numbers, from which nothing leads back to these."""
        return self._each(lambda each: each.detach().requires_grad_() if each.is_floating_point() else each)

    def ordinary(self) -> Self:
        """Return the inputs with copies of tensors that were made inside `torch.inference_mode()`."""
        return self._each(lambda each: each.clone() if each.is_inference() else each)

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory."""
        return self._each(lambda each: each.pin_memory())

    def is_pinned(self) -> bool:
        """Return whether the main input is in pinned memory."""
        return self.main.is_pinned()

    def flip(self, dimension: int) -> Self:
        """Return mirror images; only of whole images, see `is_images`."""
        assert self.is_images
        return self._each(lambda each: each.flip(dimension))

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(each.numel() * each.element_size() for each in self._tensors.values())

    def _each(self, change: Any) -> Self:
        return type(self)({name: change(tensor) for name, tensor in self._tensors.items()})

    def _is_packed(self, name: str) -> bool:
        if self._counts is None or name in _GRIDS:
            return False
        return len(self._tensors[name]) == sum(self._counts) or self.columns(name) > 0

    def _chosen(self, name: str, images: Tensor) -> Tensor:
        """Return what of a tensor belongs to images."""
        tensor = self._tensors[name]
        if columns := self.columns(name):
            return tensor.index_select(-1, self._patches(images, columns).to(tensor.device))
        return tensor[(self._patches(images) if self._is_packed(name) else images).to(tensor.device)]

    def _patches(self, images: Tensor, size: int = 1) -> Tensor:
        """Return the places of the patches of images, each patch taking so many."""
        counts = [count * size for count in self._counts or []]
        ends = torch.tensor(counts).cumsum(0).tolist()
        parts = [torch.arange(ends[index] - counts[index], ends[index]) for index in images.tolist()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


Inputs = TypeVar("Inputs", ModelInputs, Tensor)


def concatenated(batches: Sequence[Any]) -> ModelInputs:
    """Return the images of several batches as one; entries of different sizes are padded with zeros, as processors do."""
    parts = [ModelInputs.of(batch) for batch in batches]
    side_by_side = {name for name in parts[0] if parts[0].columns(name)}
    found = {name: [part[name] for part in parts] for name in parts[0]}
    return ModelInputs(
        {
            name: torch.cat(tensors, dim=-1) if name in side_by_side else _padded(tensors)
            for name, tensors in found.items()
        }
    )


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    sizes = [max(each) for each in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        # Pairs of what comes before and after, from the last dimension on.
        amounts = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(functional.pad(tensor, amounts) if any(missing) else tensor)
    return torch.cat(padded)
