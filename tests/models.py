"""Tiny models of the three families, with the same weights under every release of Transformers.

Random weights are drawn by the name that a tensor has on disk, and are larger than a fresh initialization, so that every
layer matters to the output.
"""

import copy
import functools
import json
import tempfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


IMAGE_SIZE = 32
AWKWARD = {"hidden_size": 36, "intermediate_size": 60, "num_attention_heads": 3}
"""Sizes that no power of two divides well; for ViT and DeiT."""


def tiny_vit(cls=ViTForImageClassification, **changes) -> PreTrainedModel:
    """Two blocks of width 32 with an MLP of 64, 16 patches; 5 classes."""
    return _model(cls, ViTConfig, _columnar(changes))


def tiny_deit(cls=DeiTForImageClassification, **changes) -> PreTrainedModel:
    """As `tiny_vit`, with a distillation token."""
    return _model(cls, DeiTConfig, _columnar(changes))


def tiny_swin(cls=SwinForImageClassification, **changes) -> PreTrainedModel:
    """Two stages of width 16 and 32 with two blocks each, windows of 4 by 4 patches, one patch merging."""
    sizes = {
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "mlp_ratio": 2.0,
        "num_labels": 5,
    }
    return _model(cls, SwinConfig, {**sizes, **changes})


def tiny_swinv2(**changes) -> PreTrainedModel:
    """As `tiny_swin`, with an MLP of its own for the position biases of every block."""
    sizes = {"image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return _model(
        Swinv2ForImageClassification,
        Swinv2Config,
        {**sizes, "window_size": 4, "mlp_ratio": 2.0, "num_labels": 5, **changes},
    )


def segformer() -> PreTrainedModel:
    """Four stages of one block, whose configuration names no size of images; 5 classes."""
    sizes = {"depths": [1] * 4, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2]}
    torch.manual_seed(0)
    config = SegformerConfig(**sizes, decoder_hidden_size=16, mlp_ratios=[2] * 4, num_labels=5)
    return SegformerForSemanticSegmentation(config).eval()


def compressed(model, layout, **changes) -> PreTrainedModel:
    """A tiny model with factored layers of this layout and, in its second block, a dense one."""
    from optimum_mixrank import MixRankCompressor, MixRankConfig

    settings = {
        "compression_ratio": 0.3,
        "compression_scope": "targets",
        "recipe": "fast",
        "layout": layout,
        "ratio_pattern": {r"1.*attention\.output\.dense": 0},
        **changes,
    }
    return MixRankCompressor(model).compress(MixRankConfig(**settings), [pixels(16)], inplace=True)


def mixed(model, layout="factors") -> PreTrainedModel:
    """A tiny model of mixed structure, made in place and without images.

    In each block query, key and value share their first factor; the MLPs have lost every third hidden unit, and in every
    second block what is left of them is factored. All other layers are dense.
    """
    from optimum_mixrank import MixRankConfig
    from optimum_mixrank.calibration.sites import SharedInput, find_sites
    from optimum_mixrank.calibration.targets import find_targets
    from optimum_mixrank.checkpoint.factorize import insert_layer, rank_map_of
    from optimum_mixrank.checkpoint.narrowing import selected_columns, selected_rows
    from optimum_mixrank.checkpoint.quantizer import MixRankHfQuantizer, attach
    from optimum_mixrank.checkpoint.rank_map import layout_version

    targets = find_targets(model)
    sites = find_sites(model, targets, ["shared", "width"])
    for position, site in enumerate(sites):
        if isinstance(site, SharedInput):
            insert_layer(model, site.joint, _truncated(site.joint.module, layout))
            continue
        units = torch.tensor([unit for unit in range(site.num_units) if unit % 3])
        narrow = selected_rows(site.first.module, units), selected_columns(site.second.module, units)
        for target, layer in zip((site.first, site.second), narrow, strict=True):
            insert_layer(model, target, _truncated(layer, layout) if position % 4 == 3 else layer)
    rank_map = rank_map_of(model, targets)
    entries = {name: entry.to_dict() for name, entry in rank_map.items()}
    config = MixRankConfig(layout=layout, rank_map=entries, layout_version=layout_version(rank_map.values()))
    attach(model, MixRankHfQuantizer(config, pre_quantized=True))
    return model


def _truncated(dense, layout):
    from optimum_mixrank.checkpoint.factorize import factored_linear

    U, S, V = torch.linalg.svd(dense.weight.detach().double(), full_matrices=False)
    rank = len(S) // 2
    return factored_linear(dense, S[:rank, None] * V[:rank], U[:, :rank], layout)


def pixels(count=4, seed=0) -> torch.Tensor:
    """Random images, `[count, 3, 32, 32]`."""
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def _columnar(changes):
    sizes = {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_labels": 5,
    }
    return {**sizes, **changes}


def _model(cls, config_cls, arguments):
    return copy.deepcopy(_template(cls, config_cls, json.dumps(arguments, sort_keys=True)))


@functools.cache
def _template(cls, config_cls, arguments):
    with tempfile.TemporaryDirectory() as folder:
        cls(config_cls(**json.loads(arguments))).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        tensors = {name: _random(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return cls.from_pretrained(folder, dtype=torch.float32).eval()


def _random(name, tensor):
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if tensor.ndim < 2:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if name.endswith("weight"):
        return noise * (2 / tensor[0].numel() ** 0.5)
    return 0.5 * noise
