"""Architectures of timm, each as small as its arguments allow, without pretrained weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TimmFamily:
    """An architecture of timm: its name, arguments of its constructor, and the side of its images.

    Attributes:
        architecture: The name.
        arguments: What a checkpoint of that architecture may change.
        side: Of the images.
        with_head: Whether it classifies.
        sizes: What the architecture itself sets and lets nobody change, as a function since it may need timm.
        refused: Why it is refused: `"convolution"`.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    side: int = 32
    with_head: bool = True
    sizes: Callable[[], dict[str, Any]] | None = None
    refused: str | None = None

    @property
    def exists(self) -> bool:
        """Whether the installed release of timm has it."""
        try:
            import timm
        except (ImportError, RuntimeError):
            return False
        return timm.is_model(self.architecture)

    def config(self, **changes: Any) -> Any:
        """Return the configuration, with what a checkpoint of timm says of its images."""
        from transformers import TimmWrapperConfig

        statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        images = {"input_size": [3, self.side, self.side], "crop_pct": 1.0, "interpolation": "bicubic", **statistics}
        values = {"num_labels": 5, "model_args": self.arguments, "pretrained_cfg": images, **changes}
        return TimmWrapperConfig(architecture=self.architecture, **values)

    def make(self, seed: int = 0) -> Any:
        """Return the model, in evaluation mode."""
        from transformers import TimmWrapperForImageClassification, TimmWrapperModel

        if self.sizes is not None:
            _make_small(self.architecture, self.sizes())
        torch.manual_seed(seed)
        return (TimmWrapperForImageClassification if self.with_head else TimmWrapperModel)(self.config()).eval()

    def batches(self, count: int = 2, size: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
        """Return batches of random images."""
        generator = torch.Generator().manual_seed(seed)
        return [
            {"pixel_values": torch.randn(size, 3, self.side, self.side, generator=generator)} for _ in range(count)
        ]


_SMALL: dict[str, dict[str, Any]] = {}


def _make_small(architecture: str, sizes: dict[str, Any]) -> None:
    """Let an architecture be made with other sizes than its own from now on, as often as it is made or loaded."""
    import timm

    module = sys.modules[timm.models.model_entrypoint(architecture).__module__]
    if architecture not in _SMALL:
        build = module.build_model_with_cfg

        def build_small(cls: type, variant: str, pretrained: bool = False, **given: Any) -> Any:
            return build(cls, variant, pretrained, **{**given, **_SMALL.get(variant, {})})

        module.build_model_with_cfg = build_small
    _SMALL[architecture] = sizes


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_ROPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "window_size": 4,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 2],
}
_STAGES = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
_NEST = {"embed_dims": [8, 16, 32], "num_heads": [1, 2, 4], "depths": [1, 1, 2], "patch_size": 2}
_MIXER = {"patch_size": 8, "num_blocks": 2, "embed_dim": 32}
_FORMER = {"dims": [32, 32, 32, 64], "depths": [1, 1, 2, 1]}


def _mvitv2(**changes: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        from timm.models.mvitv2 import MultiScaleVitCfg

        return {"model_cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=8, **changes)}

    return make


TIMM_FAMILIES: dict[str, TimmFamily] = {
    "ViT": TimmFamily("vit_tiny_patch16_224", _VIT),
    "ViT, encoder": TimmFamily("vit_tiny_patch16_224", _VIT, with_head=False),
    "ViT, normalised queries": TimmFamily("vit_tiny_patch16_224", {**_VIT, "qk_norm": True}),
    "ViT, test model": TimmFamily("test_vit3", {"img_size": 32, "depth": 2}),
    "ViT, SigLIP": TimmFamily("vit_base_patch16_siglip_224", _VIT),
    "ViT, CLIP": TimmFamily("vit_base_patch16_clip_224", _VIT),
    "ViT, parallel": TimmFamily("vit_small_patch16_36x1_224", _VIT),
    "ViT, two in parallel": TimmFamily("vit_small_patch16_18x2_224", _VIT),
    "ViT, relative positions": TimmFamily("vit_relpos_small_patch16_224", _VIT),
    "ViT, SAM": TimmFamily(
        "samvit_base_patch16_224", {**_VIT, "window_size": 2, "global_attn_indexes": [1], "neck_chans": 16}
    ),
    "FlexiViT": TimmFamily("flexivit_small", _VIT),
    "NaFlexViT": TimmFamily(
        "naflexvit_base_patch16_gap", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    ),
    "AIMv2": TimmFamily("aimv2_large_patch14_224", _VIT),
    "DINOv2 with registers": TimmFamily("vit_small_patch14_reg4_dinov2", _VIT),
    "DINOv2, SwiGLU": TimmFamily("vit_giant_patch14_reg4_dinov2", _VIT),
    "DINOv3": TimmFamily("vit_small_patch16_dinov3", _ROPE),
    "DINOv3, SwiGLU": TimmFamily("vit_small_plus_patch16_dinov3", _ROPE),
    "DeiT": TimmFamily("deit_tiny_patch16_224", _VIT),
    "DeiT, distilled": TimmFamily("deit_tiny_distilled_patch16_224", _VIT),
    "DeiT III": TimmFamily("deit3_small_patch16_224", _VIT),
    "BEiT": TimmFamily("beit_base_patch16_224", _VIT),
    "BEiT v2": TimmFamily("beitv2_base_patch16_224", _VIT),
    "EVA": TimmFamily("eva_large_patch14_196", _VIT),
    "EVA-02": TimmFamily("eva02_tiny_patch14_224", _EVA),
    "EVA-02, base": TimmFamily("eva02_base_patch14_224", _EVA),
    "EVA-02, separate q, k, v": TimmFamily("eva02_tiny_patch14_224", {**_EVA, "qkv_fused": False}),
    "EVA-02, CLIP": TimmFamily("eva02_base_patch16_clip_224", _EVA),
    "Swin": TimmFamily("swin_tiny_patch4_window7_224", _SWIN),
    "Swin S3": TimmFamily("swin_s3_tiny_224", {**_SWIN, "window_size": [4, 4, 4]}),
    "Swin V2": TimmFamily("swinv2_tiny_window8_256", _SWIN),
    "Swin V2, CR": TimmFamily("swinv2_cr_tiny_224", _SWIN),
    "ConvNeXt": TimmFamily("convnext_tiny", _STAGES),
    "ConvNeXt V2": TimmFamily("convnextv2_tiny", _STAGES),
    "MobileViT": TimmFamily("mobilevit_xxs", side=64),
    "LeViT": TimmFamily(
        "levit_128s",
        {"img_size": 64, "embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 2, 2], "depth": [1, 1, 1]},
        side=64,
    ),
    "CaiT": TimmFamily("cait_xxs24_224", {**_VIT, "depth_token_only": 1}),
    "XCiT": TimmFamily("xcit_nano_12_p8_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}),
    "MaxViT": TimmFamily("test_maxvit", {"img_size": 64}, side=64),
    "Hiera": TimmFamily(
        "hiera_tiny_224", {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": [1, 1, 2, 1]}, side=64
    ),
    "SAM 2 Hiera": TimmFamily(
        "sam2_hiera_tiny",
        {
            "embed_dim": 16,
            "num_heads": 1,
            "stages": [1, 1, 2, 1],
            "global_att_blocks": [3],
            "window_spec": [4, 4, 2, 2],
        },
        side=64,
    ),
    "PVT v2": TimmFamily(
        "pvt_v2_b0", {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
    ),
    "Twins, PCPVT": TimmFamily(
        "twins_pcpvt_small",
        {"img_size": 64, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
        side=64,
    ),
    "Twins, SVT": TimmFamily(
        "twins_svt_small",
        {"img_size": 64, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]},
        side=64,
    ),
    "TinyViT": TimmFamily(
        "tiny_vit_5m_224",
        {"embed_dims": [16, 16, 32, 32], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_sizes": [2] * 4},
        side=64,
    ),
    "PiT": TimmFamily(
        "pit_ti_224", {"img_size": 64, "base_dims": [8, 8, 8], "depth": [1, 1, 1], "heads": [1, 2, 2]}, side=64
    ),
    "DaViT": TimmFamily(
        "davit_tiny",
        {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 2},
        side=64,
    ),
    "TNT": TimmFamily("tnt_s_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 2}),
    "ConViT": TimmFamily(
        "convit_tiny", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    ),
    "EdgeNeXt": TimmFamily("edgenext_xx_small", {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, side=64),
    "ViTamin": TimmFamily("vitamin_small_224", {"img_size": 64, "depth": 2}, side=64),
    "MViTv2": TimmFamily("mvitv2_tiny", {"img_size": 64}, side=64, sizes=_mvitv2()),
    "MViTv2, class token": TimmFamily("mvitv2_base_cls", {"img_size": 64}, side=64, sizes=_mvitv2(use_cls_token=True)),
    "GCViT": TimmFamily(
        "gcvit_xxtiny",
        {"img_size": 64},
        side=64,
        sizes=lambda: {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]},
    ),
    "NesT": TimmFamily("nest_tiny", {"img_size": 32}, sizes=lambda: _NEST),
    "NesT, JAX": TimmFamily("nest_tiny_jx", {"img_size": 32}, sizes=lambda: _NEST),
    "CAFormer": TimmFamily("caformer_s18", side=64, sizes=lambda: _FORMER),
    "ConvFormer": TimmFamily("convformer_s18", side=64, sizes=lambda: _FORMER),
    "VOLO": TimmFamily(
        "volo_d1_224",
        {"img_size": 64},
        side=64,
        sizes=lambda: {
            "layers": [1, 1, 1, 1],
            "embed_dims": [16, 32, 32, 32],
            "num_heads": [2, 4, 4, 4],
            "stem_hidden_dim": 8,
        },
    ),
    "CoaT": TimmFamily(
        "coat_tiny",
        {"img_size": 64, "embed_dims": [16] * 4, "serial_depths": [1] * 4, "parallel_depth": 1, "patch_size": 4},
        side=64,
    ),
    "CoaT, lite": TimmFamily(
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": [16, 16, 32, 32], "serial_depths": [1] * 4, "patch_size": 4},
        side=64,
    ),
    "EfficientFormer": TimmFamily(
        "efficientformer_l1", {"depths": [1, 1, 1, 2], "embed_dims": [8, 16, 24, 32], "num_vit": 1}, side=224
    ),
    "FastViT, attention": TimmFamily("fastvit_sa12", {"embed_dims": [32] * 4, "layers": [1] * 4}, side=64),
    "FastViT, MobileCLIP": TimmFamily("fastvit_mci0", {"embed_dims": [32] * 4, "layers": [1] * 4}, side=64),
    "CrossViT": TimmFamily(
        "crossvit_tiny_240",
        {
            "img_size": 64,
            "embed_dim": [16, 32],
            "num_heads": [2, 2],
            "patch_size": [8, 16],
            "img_scale": [1.0, 1.0],
            "depth": [[1, 2, 0]],
        },
        side=64,
    ),
    "Sequencer2D": TimmFamily(
        "sequencer2d_s",
        {"img_size": 56, "layers": [1] * 4, "embed_dims": [16] * 4, "hidden_sizes": [4] * 4},
        side=56,
    ),
    "MLP-Mixer": TimmFamily("mixer_s32_224", {"img_size": 32}, sizes=lambda: _MIXER),
    "gMLP": TimmFamily("gmlp_s16_224", {"img_size": 32}, sizes=lambda: _MIXER),
    "ResMLP": TimmFamily("resmlp_12_224", {"img_size": 32}, sizes=lambda: _MIXER),
    "SwiftFormer": TimmFamily("swiftformer_xs", {"layers": [1] * 4, "embed_dims": [8, 16, 24, 32]}, side=64),
    "MambaOut": TimmFamily("mambaout_femto", {"dims": [8, 16, 24, 32], "depths": [1] * 4}, side=64),
    "ViT, hybrid": TimmFamily(
        "vit_tiny_r_s16_p8_224", {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}, side=64
    ),
    "Perception Encoder": TimmFamily("vit_pe_core_tiny_patch16_384", _VIT),
    "BEiT-3": TimmFamily("beit3_base_patch16_224", _VIT),
    # What is refused as what it is: attention of some consists of convolutions of single pixels.
    "CoAtNet": TimmFamily("coatnet_pico_rw_224", {"img_size": 64}, side=64, refused="convolution"),
    "EfficientFormer V2": TimmFamily(
        "efficientformerv2_s0",
        {"img_size": 64, "depths": [1, 1, 2, 2], "embed_dims": [16, 16, 32, 32], "num_vit": 1, "mlp_ratios": 4},
        side=64,
        refused="convolution",
    ),
    "EfficientViT, MIT": TimmFamily("efficientvit_b0", side=64, refused="convolution"),
    "EfficientViT, MSRA": TimmFamily("efficientvit_m0", {"img_size": 64}, side=64, refused="convolution"),
    "FastViT": TimmFamily(
        "fastvit_t8", {"embed_dims": [16, 16, 32, 32], "layers": [1] * 4}, side=64, refused="convolution"
    ),
    "FocalNet": TimmFamily(
        "focalnet_tiny_srf",
        side=64,
        sizes=lambda: {"embed_dim": 8, "depths": [1, 1, 2, 1]},
        refused="convolution",
    ),
    "InceptionNeXt": TimmFamily(
        "inception_next_atto", {"dims": [16, 16, 24, 32], "depths": [1] * 4}, side=64, refused="convolution"
    ),
    "MobileViT V2": TimmFamily("mobilevitv2_050", side=64, refused="convolution"),
    "PoolFormer": TimmFamily("poolformer_s12", side=64, sizes=lambda: _STAGES, refused="convolution"),
    "PoolFormer V2": TimmFamily("poolformerv2_s12", side=64, sizes=lambda: _STAGES, refused="convolution"),
    "RDNet": TimmFamily("rdnet_tiny", side=64, refused="convolution"),
    "RepViT": TimmFamily("repvit_m0_9", side=64, refused="convolution"),
    "SHViT": TimmFamily("shvit_s1", side=64, refused="convolution"),
    "Visformer": TimmFamily(
        "visformer_tiny",
        {"img_size": 64, "embed_dim": 32, "depth": [1, 1, 1], "num_heads": 2, "init_channels": 8},
        side=64,
        refused="convolution",
    ),
}
