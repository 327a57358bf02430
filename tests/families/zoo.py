"""Tiny random models of many families of Transformers, and batches of inputs as their processors make them.

A family is a class, changes of its configuration and a kind of inputs. Configurations are those of the class with every
size that they have made small, so that a family needs a line here only for what is particular to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor


SIDE = 32

_SMALL: dict[str, Any] = {
    "attention_heads": 4,
    "channels": 3,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 64,
    "decoder_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 1,
    "depth": 2,
    "dim_feedforward": 64,
    "embed_dim": 32,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "encoder_layers": 2,
    "feature_size": 32,
    "head_dim": 8,
    "hidden_dim": 32,
    "hidden_size": 32,
    "image_size": SIDE,
    "intermediate_size": 64,
    "mask_feature_size": 32,
    "max_position_embeddings": 64,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "mlp_dim": 64,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_hidden_groups": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_layers": 2,
    "num_mel_bins": 8,
    "num_queries": 5,
    "out_hidden_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
    "text_embed_dim": 32,
    "vision_embed_dim": 32,
    "vocab_size": 99,
}


def small_config(config_class: type, /, **changes: Any) -> Any:
    """Return a configuration with small sizes; a mapping among the changes is for the configuration in that place."""
    found = config_class()
    values: dict[str, Any] = {}
    for name, value in vars(found).items():
        if isinstance(value, transformers.PretrainedConfig):
            values[name] = small_config(type(value))
        elif name in _SMALL and isinstance(value, int) and not isinstance(value, bool):
            values[name] = _SMALL[name]
    for name in getattr(config_class, "attribute_map", {}):
        if (
            name in _SMALL
            and isinstance(getattr(found, name, None), int)
            and config_class.attribute_map[name] not in changes
        ):
            values.setdefault(config_class.attribute_map[name], _SMALL[name])
    for name, value in changes.items():
        inner = getattr(found, name, None)
        if isinstance(value, dict) and isinstance(inner, transformers.PretrainedConfig):
            value = small_config(type(inner), **value)
        values[name] = value
    try:
        made = config_class(**values)
        if all(hasattr(made, name) for name, value in values.items() if name.endswith("_config")):
            return made
    except (TypeError, AttributeError):
        pass
    # Transformers 4.57 takes the configurations of parts as mappings.
    inner = transformers.PretrainedConfig
    return config_class(**{k: v.to_dict() if isinstance(v, inner) else v for k, v in values.items()})


def images(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images as most image processors give them."""
    return {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=generator)}


def sized(channels: int = 3, side: int = SIDE, name: str = "pixel_values") -> Callable[..., dict[str, Tensor]]:
    """Images of another size."""
    return lambda count, generator: {name: torch.randn(count, channels, side, side, generator=generator)}


def clips(frames: int = 2, side: int = SIDE, name: str = "pixel_values") -> Callable[..., dict[str, Tensor]]:
    """Videos, and images that are divided into tiles."""
    return lambda count, generator: {name: torch.randn(count, frames, 3, side, side, generator=generator)}


def naflex(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of images of any shape, padded, as SigLIP2 takes them."""
    mask = torch.ones(count, 16, dtype=torch.int32)
    mask[::2, 12:] = 0
    shapes = torch.tensor([[4, 4], [3, 4]], dtype=torch.int64)
    return {
        "pixel_values": torch.randn(count, 16, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes[(mask.sum(1) == 12).long()],
    }


def packed(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of images of any shape, one after the other, as the models of Qwen take them."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])[torch.arange(count) % 2]
    return {
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": grids,
    }


def merged(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed patches of single images, with the number of them that become one token, as VideoLLaMA 3 takes them."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])[torch.arange(count) % 2]
    return {
        "pixel_values": torch.randn(int(grids.prod(1).sum()), 3 * 8 * 8, generator=generator),
        "image_grid_thw": grids,
        "image_merge_sizes": torch.ones(count, dtype=torch.int64),
    }


def side_by_side(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of images of several sizes side by side in one entry, as MiniCPM-V takes them."""
    sizes = torch.tensor([[4, 4], [4, 8]], dtype=torch.int32)[torch.arange(count) % 2]
    columns = 8 * int(sizes.prod(1).sum())
    return {"pixel_values": torch.randn(1, 3, 8, columns, generator=generator), "target_sizes": sizes}


def square_patches(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Packed patches as small images, as Kimi and PaddleOCR take them."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])[torch.arange(count) % 2]
    patches = torch.randn(int(grids.prod(1).sum()), 3, 8, 8, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": grids}


def placed(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches with the numbers of their columns and rows, as Gemma 4 takes them."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(count, -1, -1)
    return {"pixel_values": torch.rand(count, 16, 3 * 8 * 8, generator=generator), "pixel_position_ids": places}


def by_aspect(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Tiles of images with the number of their aspect ratio, as Llama 3.2 takes them."""
    return {
        "pixel_values": torch.randn(count, 1, 2, 3, SIDE, SIDE, generator=generator),
        "aspect_ratio_ids": torch.full((count, 1), 2),
        "aspect_ratio_mask": torch.ones(count, 1, 2, dtype=torch.int64),
    }


def tiles(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images that are divided into tiles, with the mask of tiles, as Granite Docling takes them."""
    return {**clips(2)(count, generator), "pixel_attention_mask": torch.ones(count, 2, dtype=torch.bool)}


def at_two_resolutions(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images twice, as hybrid models of DeepSeek-VL take them."""
    names = ("pixel_values", "high_res_pixel_values")
    return {name: images(count, generator)["pixel_values"] for name in names}


def small_clips(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches of several frames with the channels last, as Inkling takes them."""
    return {"pixel_values": torch.randn(count, 2, 8, 8, 3, generator=generator)}


def sounds(samples: int = 800) -> Callable[..., dict[str, Tensor]]:
    """Audio as it is."""
    return lambda count, generator: {"input_values": torch.randn(count, samples, generator=generator)}


def flattened(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Patches behind the numbers of their rows and columns, which begin at one, as Pix2Struct takes them."""
    places = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)).expand(count, -1, -1)
    return {"flattened_patches": torch.cat([places, torch.randn(count, 16, 48, generator=generator)], dim=-1)}


def tiled(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images that are divided into tiles, with the mask of their pixels, as Idefics and SmolVLM take them."""
    return {
        **clips(2)(count, generator),
        "pixel_attention_mask": torch.ones(count, 2, SIDE, SIDE, dtype=torch.int64),
    }


def with_sizes(inputs: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Inputs with the sizes of the images before they were divided or padded."""
    return lambda count, generator: {
        **inputs(count, generator),
        "image_sizes": torch.full((count, 2), SIDE, dtype=torch.int64),
    }


def with_task(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images with the name of a task as tokens, as OneFormer takes them."""
    return {**images(count, generator), "task_inputs": torch.randint(3, 90, (count, 6), generator=generator)}


def prompted(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Images with another image and its mask as an example, as SegGPT takes them."""
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: images(count, generator)["pixel_values"] for name in names}


def with_text(inputs: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Inputs with a text for every image, as processors of models for both give them."""

    def make(count: int, generator: torch.Generator) -> dict[str, Tensor]:
        tokens = torch.randint(3, 90, (count, 6), generator=generator)
        return {**inputs(count, generator), "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return make


def spectrograms(bins: int, frames: int, transposed: bool = False, name: str = "input_features") -> Callable[..., Any]:
    """Audio as spectrograms."""
    shape = (frames, bins) if transposed else (bins, frames)
    return lambda count, generator: {name: torch.randn(count, *shape, generator=generator)}


@dataclass(frozen=True)
class Family:
    """A family: the class of the model, changes of its configuration and what it takes."""

    model: str
    changes: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[..., dict[str, Tensor]] = images
    config: Callable[[], Any] | None = None
    refused: str | None = None

    @property
    def exists(self) -> bool:
        """Whether the installed release of Transformers has it."""
        return hasattr(transformers, self.model)

    def make(self, seed: int = 0) -> Any:
        """Return the model, in evaluation mode."""
        torch.manual_seed(seed)
        cls = getattr(transformers, self.model)
        config = self.config() if self.config is not None else small_config(cls.config_class, **self.changes)
        # OneFormer of 4.57 is made with a parameter in float64, which loading rounds.
        model = cls(config).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                # Nothing would pass through a projection that starts at zero, as that of Gemma 3, and nothing of a block
                # whose weights start at 1e-10, as those of SAM and BLIP-2.
                if parameter.ndim > 1 and not (parameter.abs() > 1e-6).any():
                    parameter.normal_(std=0.02)
        return model

    def batches(self, count: int = 2, size: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
        """Return batches of random inputs."""
        generator = torch.Generator().manual_seed(seed)
        return [self.inputs(size, generator) for _ in range(count)]
