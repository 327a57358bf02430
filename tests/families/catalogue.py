"""The families that are tried, by name: vision encoders, parts of larger models, and models that are refused."""

from __future__ import annotations

from typing import Any

import transformers

from .zoo import (
    Family,
    at_two_resolutions,
    by_aspect,
    clips,
    flattened,
    images,
    merged,
    naflex,
    packed,
    placed,
    prompted,
    side_by_side,
    sized,
    small_clips,
    small_config,
    sounds,
    spectrograms,
    square_patches,
    tiled,
    tiles,
    with_sizes,
    with_task,
    with_text,
)


_STAGES: dict[str, Any] = {"depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]}
_SWIN: dict[str, Any] = {**_STAGES, "embed_dim": 8, "patch_size": 2, "window_size": 2, "mlp_ratio": 2.0}
_FOUR = ["stage1", "stage2", "stage3", "stage4"]
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": _FOUR,
}
_CONVNEXT: dict[str, Any] = {"patch_size": 2, "num_stages": 4, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_HIERA: dict[str, Any] = {
    "embed_dim": 8,
    "image_size": [64, 64],
    "patch_stride": [4, 4],
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
_NECK: dict[str, Any] = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
_DEEP = {"num_hidden_layers": 4}
_VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _dinov2(**changes: Any) -> Any:
    sizes = {name: value for name, value in _VIT.items() if name != "intermediate_size"}
    return transformers.Dinov2Config(**sizes, mlp_ratio=2, out_features=_FOUR, **changes)


def _depth_anything(name: str) -> Any:
    return lambda: getattr(transformers, name)(
        backbone_config=_dinov2(apply_layernorm=True, reshape_hidden_states=False),
        patch_size=8,
        reassemble_hidden_size=32,
        head_hidden_size=8,
        **_NECK,
    )


def _depth_pro() -> Any:
    part = {"image_size": 16, "patch_size": 8, "mlp_ratio": 2}
    return small_config(
        transformers.DepthProConfig,
        patch_size=16,
        **{f"{each}_model_config": part for each in ("image", "patch", "fov")},
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[16, 8],
        intermediate_hook_ids=[1, 0],
        intermediate_feature_dims=[8, 8],
        fusion_hidden_size=8,
        num_fov_head_layers=0,
    )


def _vitmatte() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    return transformers.VitMatteConfig(
        backbone_config=transformers.VitDetConfig(**sizes, num_channels=4, out_features=["stage2"]),
        hidden_size=32,
        fusion_hidden_sizes=[16, 8, 8, 4],
        convstream_hidden_sizes=[8, 8, 8],
    )


def _dual_encoder() -> Any:
    parts = (small_config(transformers.ViTConfig), small_config(transformers.BertConfig))
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(*parts, projection_dim=16)


def _zoedepth() -> Any:
    backbone = transformers.BeitConfig(**_VIT, out_features=_FOUR, reshape_hidden_states=False)
    return transformers.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=32,
        bottleneck_features=8,
        num_relative_features=8,
        bin_embedding_dim=8,
        num_patch_transformer_layers=1,
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=16,
        patch_transformer_num_attention_heads=2,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.1, "max_depth": 10.0, "name": "nyu"}],
        num_attractors=[4, 2, 2, 2],
        **_NECK,
    )


def _vitpose() -> Any:
    sizes = {**_VIT, "image_size": [32, 32], "patch_size": [8, 8]}
    return transformers.VitPoseConfig(
        backbone_config=transformers.VitPoseBackboneConfig(**sizes, out_indices=[2]), num_labels=3
    )


def _upernet() -> Any:
    backbone = transformers.SwinConfig(**_SWIN, image_size=32, out_features=_FOUR)
    heads = {"hidden_size": 8, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "pool_scales": [1]}
    return transformers.UperNetConfig(backbone_config=backbone, num_labels=3, **heads)


def _sam(config: str = "SamConfig", vision: str = "SamVisionConfig") -> Any:
    def make() -> Any:
        sizes = {**_VIT, "num_hidden_layers": 2, "output_channels": 16, "mlp_dim": 64, "num_pos_feats": 8}
        extra = {} if config == "SamConfig" else {"vit_dim": 32}
        return getattr(transformers, config)(
            vision_config=getattr(transformers, vision)(
                **{name: value for name, value in sizes.items() if name != "intermediate_size"},
                window_size=2,
                global_attn_indexes=[1],
            ).to_dict(),
            prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            mask_decoder_config={
                "hidden_size": 16,
                "mlp_dim": 32,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "iou_head_hidden_dim": 16,
                **extra,
            },
        )

    return make


def _sam2_vision() -> Any:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 2, 4],
        global_attention_blocks=[3],
        window_size_per_stage=[4, 4, 2, 2],
        window_positional_embedding_background_size=[4, 4],
    )
    return transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )


def _sam2() -> Any:
    return transformers.Sam2Config(
        vision_config=_sam2_vision(),
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )


def _detr(config: str, **changes: Any) -> Any:
    def make() -> Any:
        sizes = {
            "d_model": 32,
            "hidden_size": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 5,
            "backbone": None,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone_config": transformers.ResNetConfig(**_RESNET),
            **changes,
        }
        cls = getattr(transformers, config)
        sizes.pop("hidden_size" if "d_model" in vars(cls()) else "d_model", None)
        return cls(**sizes)

    return make


_RT: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [12, 16, 24],
    "feat_strides": [8, 16, 32],
    "encoder_layers": 1,
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "encode_proj_layers": [2],
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_feature_levels": 3,
    "decoder_n_points": 2,
    "num_queries": 5,
    "num_denoising": 0,
    "d_model": 32,
    "anchor_image_size": None,
}


def _rt_detr(config: str, **changes: Any) -> Any:
    def make() -> Any:
        backbone = transformers.RTDetrResNetConfig(**{**_RESNET, "out_features": _FOUR[1:]})
        return getattr(transformers, config)(backbone_config=backbone, **{**_RT, **changes})

    return make


def _hgnet(stages: list[str]) -> Any:
    return transformers.HGNetV2Config(
        stage_in_channels=[8, 8, 12, 16],
        stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 12, 16, 24],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stem_channels=[3, 8, 8],
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 1, 1, 1],
        embedding_size=8,
        out_features=stages,
    )


_FINE: dict[str, Any] = {**_RT, "decoder_n_points": [2, 2, 2], "hidden_expansion": 0.5, "depth_mult": 0.34}


def _d_fine(config: str = "DFineConfig") -> Any:
    return lambda: getattr(transformers, config)(backbone_config=_hgnet(_FOUR[1:]), **_FINE)


def _deimv2_of_dinov3() -> Any:
    backbone = transformers.DINOv3ViTConfig(
        **{**_VIT, "image_size": 64, "patch_size": 16}, out_indices=[2, 3, 4], apply_layernorm=False
    )
    return transformers.Deimv2Config(backbone_config=backbone, **{**_FINE, "encoder_in_channels": [32, 32, 32]})


def _pp_doclayout_v2() -> Any:
    from transformers.models.pp_doclayout_v2 import configuration_pp_doclayout_v2 as configurations

    order = small_config(configurations.PPDocLayoutV2ReadingOrderConfig, coordinate_size=6, shape_size=4)
    classes = {"num_labels": 25, "class_thresholds": [0.0] * 25, "class_order": [each % 20 for each in range(25)]}
    return transformers.PPDocLayoutV2Config(
        backbone_config=_hgnet(_FOUR[1:]), reading_order_config=order, **_RT, **classes
    )


def _pp_doclayout_v3() -> Any:
    masks = {"mask_feature_channels": (16, 16), "x4_feat_dim": 8, "num_prototypes": 8, "global_pointer_head_size": 8}
    return transformers.PPDocLayoutV3Config(backbone_config=_hgnet(_FOUR), **_RT, **masks, num_labels=25)


def _grounding_dino(config: str) -> Any:
    def make() -> Any:
        return getattr(transformers, config)(
            backbone_config=transformers.SwinConfig(**_SWIN, image_size=64, out_features=_FOUR[1:]),
            text_config=small_config(transformers.BertConfig),
            num_queries=5,
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_ffn_dim=64,
            decoder_attention_heads=4,
            d_model=32,
            encoder_n_points=2,
            decoder_n_points=2,
            max_text_len=16,
        )

    return make


def _lw_detr() -> Any:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        window_block_indices=[0, 2],
        out_indices=[1, 3],
        num_windows=4,
    )
    return transformers.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[0.5, 2.0],
        c2f_num_blocks=1,
        decoder_ffn_dim=64,
        decoder_n_points=2,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=4,
        num_queries=5,
        group_detr=2,
        d_model=32,
        projector_out_channels=32,
    )


def _bridgetower() -> Any:
    # A head has 64 features.
    parts = {"hidden_size": 64, "num_hidden_layers": 3}
    return transformers.BridgeTowerConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        text_config=small_config(transformers.BridgeTowerTextConfig, **parts).to_dict(),
        vision_config=small_config(transformers.BridgeTowerVisionConfig, **parts).to_dict(),
    )


def _contrastive_bridgetower() -> Any:
    config = _bridgetower()
    config.contrastive_hidden_size, config.logit_scale_init_value = 16, 2.6
    return config


def _oneformer() -> Any:
    return transformers.OneFormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN, image_size=32, out_features=_FOUR),
        num_queries=5,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        dim_feedforward=32,
        task_seq_len=6,
        text_encoder_width=32,
        text_encoder_context_length=6,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=99,
        text_encoder_n_ctx=2,
        num_labels=3,
    )


def _mask2former() -> Any:
    return transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN, image_size=32, out_features=_FOUR),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )


def _maskformer() -> Any:
    return transformers.MaskFormerConfig(
        backbone_config=transformers.SwinConfig(**_SWIN, image_size=32, out_features=_FOUR),
        decoder_config=_detr("DetrConfig")(),
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )


def _encoder_decoder(encoder: str) -> Any:
    def make() -> Any:
        changes = {**_SWIN, "hidden_size": 64} if "Swin" in encoder else {}
        decoder = small_config(
            transformers.TrOCRConfig, cross_attention_hidden_size=64 if changes else 32, is_decoder=True
        )
        decoder.add_cross_attention = True
        return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            small_config(getattr(transformers, encoder), **changes), decoder
        )

    return make


_PATCHES = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _language(sections: list[int]) -> dict[str, Any]:
    """Return what rotates by three dimensions takes, by the name that the installed release has for it."""
    rope = {"rope_type": "default", "mrope_section": sections}
    is_older = transformers.__version__.startswith("4.")
    return {**_TEXT, **({"rope_scaling": rope} if is_older else {"rope_parameters": {**rope, "rope_theta": 1e4}})}


_LANGUAGE = _language([1, 1, 2])


def _pp_doclayout_v4() -> Any:
    backbone = _hgnet(_FOUR[1:])
    return transformers.PPDocLayoutV4Config(backbone_config=backbone, **_RT, global_pointer_head_size=8, num_labels=25)


def _chmv2() -> Any:
    backbone = transformers.DINOv3ViTConfig(
        **_VIT, out_features=_FOUR, apply_layernorm=True, reshape_hidden_states=True, return_class_token=True
    )
    sizes = {"fusion_hidden_size": 8, "head_hidden_size": 8, "number_output_channels": 8, "patch_size": 8}
    return transformers.CHMv2Config(backbone_config=backbone, post_process_channels=[8] * 4, **sizes)


_TIPSV2_DPT: dict[str, Any] = {
    "backbone_config": {
        "num_hidden_layers": 4,
        "mlp_ratio": 2,
        "out_features": _FOUR,
        "reshape_hidden_states": False,
        "return_class_token": True,
    },
    "neck_hidden_sizes": [8] * 4,
    "fusion_hidden_size": 8,
    "num_depth_bins": 4,
}
_SAM3: dict[str, Any] = {
    "backbone_config": {"image_size": 32, "pretrain_image_size": 32, "window_size": 2, "global_attn_indexes": [1]},
    "fpn_hidden_size": 16,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
_LLAMA_4_TOWER: dict[str, Any] = {
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "pixel_shuffle_ratio": 0.5,
    "intermediate_size": 128,
}
_NARROW_SAM: dict[str, Any] = {"output_channels": 8, "window_size": 2, "global_attn_indexes": [1]}
_SOUNDS: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def _some(names: str) -> dict[str, Any]:
    return {name: _EXPERTS[name] for name in names.split()}


FAMILIES: dict[str, Family] = {
    # Columns of equal blocks.
    "ViT": Family("ViTForImageClassification"),
    "ViT, masked": Family("ViTForMaskedImageModeling", {"encoder_stride": 8}),
    "DeiT": Family("DeiTForImageClassification"),
    "DeiT, distilled": Family("DeiTForImageClassificationWithTeacher"),
    "DINOv2": Family("Dinov2Model", {"mlp_ratio": 2}),
    "DINOv2, classifier": Family("Dinov2ForImageClassification", {"mlp_ratio": 2}),
    "DINOv2, SwiGLU": Family("Dinov2Model", {"use_swiglu_ffn": True}),
    "DINOv2 with registers": Family("Dinov2WithRegistersForImageClassification", {"mlp_ratio": 2}),
    "DINOv3 ViT": Family("DINOv3ViTModel"),
    "DINOv3 ViT, gated": Family("DINOv3ViTModel", {"use_gated_mlp": True}),
    "BEiT": Family("BeitForImageClassification"),
    "Data2Vec": Family("Data2VecVisionForImageClassification"),
    "CLIP, classifier": Family("CLIPForImageClassification"),
    "CLIP, tower": Family("CLIPVisionModel"),
    "CLIP, tower with projection": Family("CLIPVisionModelWithProjection"),
    "SigLIP, classifier": Family("SiglipForImageClassification"),
    "SigLIP, tower": Family("SiglipVisionModel"),
    "MetaCLIP 2": Family("MetaClip2ForImageClassification"),
    "ViTMAE": Family("ViTMAEModel"),
    "ViTMAE, pretraining": Family("ViTMAEForPreTraining"),
    "ViTMSN": Family("ViTMSNForImageClassification"),
    "I-JEPA": Family("IJepaModel"),
    "BLIP, tower": Family("BlipVisionModel"),
    "AIMv2, tower": Family("Aimv2VisionModel"),
    "MLCD": Family("MLCDVisionModel"),
    "Pixio": Family("PixioModel"),
    "RADIO": Family("RadioModel"),
    "TIPSv2, tower": Family("Tipsv2VisionModel"),
    "Sapiens 2": Family("Sapiens2Model"),
    "Phi-4, tower": Family("Phi4MultimodalVisionModel"),
    "InternVL, tower": Family("InternVLVisionModel", {"image_size": [32, 32], "patch_size": [8, 8]}),
    "Pixtral, tower": Family("PixtralVisionModel"),
    "SmolVLM, tower": Family("SmolVLMVisionTransformer"),
    "ViTDet": Family("VitDetModel"),
    "YOLOS": Family("YolosForObjectDetection", {"image_size": [32, 32], "num_detection_tokens": 5}),
    "OWL-ViT, tower": Family("OwlViTVisionModel"),
    "SAM, encoder": Family("SamVisionModel", {"window_size": 2, "global_attn_indexes": [1]}),
    "SAM 3, encoder": Family("Sam3ViTModel", {"image_size": 32, "pretrain_image_size": 32, "window_size": 2}),
    # Stages of different sizes.
    "Swin": Family("SwinForImageClassification", _SWIN),
    "SwinV2": Family("Swinv2ForImageClassification", _SWIN),
    "Swin2SR": Family(
        "Swin2SRForImageSuperResolution",
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 1, "image_size": 16},
        sized(side=16),
    ),
    "Donut, encoder": Family("DonutSwinModel", _SWIN),
    "MaskFormer, Swin": Family("MaskFormerSwinModel", _SWIN),
    "Hiera": Family("HieraForImageClassification", _HIERA, sized(side=64)),
    "Hiera, pretraining": Family("HieraForPreTraining", _HIERA, sized(side=64)),
    "SAM 2, encoder": Family("Sam2VisionModel", inputs=sized(side=64), config=_sam2_vision),
    "LeViT": Family(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "patch_size": 16,
        },
        sized(side=64),
    ),
    "ConvNeXt": Family("ConvNextForImageClassification", _CONVNEXT),
    "ConvNeXt V2": Family("ConvNextV2ForImageClassification", _CONVNEXT),
    "DINOv3 ConvNeXt": Family("DINOv3ConvNextModel", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "MobileViT": Family(
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [4, 4, 8, 8, 12, 12, 24],
            "patch_size": 2,
        },
        sized(side=64),
    ),
    "SwiftFormer": Family(
        "SwiftFormerForImageClassification",
        {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "down_patch_size": 3},
    ),
    "PVT": Family(
        "PvtForImageClassification",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 2, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
        },
    ),
    "PVTv2": Family(
        "PvtV2ForImageClassification",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 2, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "mlp_ratios": [2, 2, 2, 2],
        },
    ),
    "CvT": Family("CvtForImageClassification", {"embed_dim": [8, 16, 32], "depth": [1, 2, 3], "num_heads": [1, 2, 4]}),
    "FocalNet": Family(
        "FocalNetForImageClassification",
        {"embed_dim": 8, "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 32, 64], "patch_size": 2},
    ),
    "Segformer": Family(
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 2, 1]},
    ),
    "Segformer, segmentation": Family(
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
            "depths": [1, 1, 2, 1],
            "decoder_hidden_size": 16,
        },
    ),
    "MGP-STR": Family(
        "MgpstrForSceneTextRecognition",
        {
            "image_size": [32, 32],
            "patch_size": 8,
            "max_token_length": 5,
            "num_character_labels": 9,
            "num_bpe_labels": 9,
            "num_wordpiece_labels": 9,
        },
    ),
    "Perceiver": Family(
        "PerceiverForImageClassificationLearned",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "image_size": 16,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        sized(side=16),
    ),
    # Dense and structured outputs.
    "UperNet": Family("UperNetForSemanticSegmentation", config=_upernet),
    "BEiT, segmentation": Family(
        "BeitForSemanticSegmentation", {**_DEEP, "patch_size": 8, "out_indices": [1, 2, 3, 4], "pool_scales": [1]}
    ),
    "DPT": Family("DPTForDepthEstimation", {**_VIT, "backbone_out_indices": [0, 1, 2, 3], **_NECK}),
    "DPT, segmentation": Family("DPTForSemanticSegmentation", {**_VIT, "backbone_out_indices": [0, 1, 2, 3], **_NECK}),
    "Depth Anything": Family("DepthAnythingForDepthEstimation", config=_depth_anything("DepthAnythingConfig")),
    "Prompt Depth Anything": Family(
        "PromptDepthAnythingForDepthEstimation", config=_depth_anything("PromptDepthAnythingConfig")
    ),
    "ZoeDepth": Family("ZoeDepthForDepthEstimation", config=_zoedepth),
    "GLPN": Family(
        "GLPNForDepthEstimation",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "num_attention_heads": [1, 2, 3, 4],
            "depths": [1, 1, 2, 1],
            "decoder_hidden_size": 16,
        },
    ),
    "ViTPose": Family("VitPoseForPoseEstimation", config=_vitpose),
    "CHMv2": Family("CHMv2ForDepthEstimation", config=_chmv2),
    "TIPSv2 DPT": Family("Tipsv2DptForDepthEstimation", _TIPSV2_DPT),
    "TIPSv2 DPT, segmentation": Family("Tipsv2DptForSemanticSegmentation", _TIPSV2_DPT),
    "Depth Pro": Family("DepthProForDepthEstimation", config=_depth_pro),
    "ViTMatte": Family("VitMatteForImageMatting", inputs=sized(channels=4), config=_vitmatte),
    "SAM": Family("SamModel", config=_sam()),
    "SAM-HQ": Family("SamHQModel", config=_sam("SamHQConfig", "SamHQVisionConfig")),
    "SAM 3, tower": Family("Sam3VisionModel", _SAM3),
    "SAM 3, tracker": Family(
        "Sam3TrackerModel",
        {
            "vision_config": _SAM3,
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 16,
                "iou_head_hidden_dim": 16,
                "mlp_dim": 32,
                "num_attention_heads": 2,
            },
        },
    ),
    "SLANeXt": Family(
        "SLANeXtForTableRecognition",
        {"vision_config": _NARROW_SAM, "post_conv_in_channels": 8, "post_conv_out_channels": 16, "max_text_length": 4},
    ),
    "SAM 2": Family("Sam2Model", inputs=sized(side=64), config=_sam2),
    "Mask2Former": Family("Mask2FormerForUniversalSegmentation", config=_mask2former),
    "MaskFormer": Family("MaskFormerForInstanceSegmentation", config=_maskformer),
    "EoMT": Family(
        "EomtForUniversalSegmentation", {**_DEEP, "num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1}
    ),
    "EoMT, DINOv3": Family(
        "EomtDinov3ForUniversalSegmentation", {**_DEEP, "num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1}
    ),
    "VidEoMT": Family(
        "VideomtForUniversalSegmentation",
        {**_DEEP, "num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1, "mlp_ratio": 2},
        clips(2, name="pixel_values_videos"),
    ),
    "OneFormer": Family("OneFormerForUniversalSegmentation", inputs=with_task, config=_oneformer),
    "SegGPT": Family(
        "SegGptForImageSegmentation",
        {
            **_DEEP,
            "image_size": (64, 32),
            "pretrain_image_size": 32,
            "merge_index": 0,
            "intermediate_hidden_state_indices": (0, 1, 2, 3),
            "decoder_hidden_size": 8,
        },
        prompted,
    ),
    "DETR": Family("DetrForObjectDetection", inputs=sized(side=64), config=_detr("DetrConfig")),
    "Conditional DETR": Family(
        "ConditionalDetrForObjectDetection", inputs=sized(side=64), config=_detr("ConditionalDetrConfig")
    ),
    "Deformable DETR": Family(
        "DeformableDetrForObjectDetection", inputs=sized(side=64), config=_detr("DeformableDetrConfig")
    ),
    "DAB-DETR": Family("DabDetrForObjectDetection", inputs=sized(side=64), config=_detr("DabDetrConfig")),
    "Table Transformer": Family(
        "TableTransformerForObjectDetection", inputs=sized(side=64), config=_detr("TableTransformerConfig")
    ),
    "RT-DETR": Family("RTDetrForObjectDetection", inputs=sized(side=64), config=_rt_detr("RTDetrConfig")),
    "RT-DETRv2": Family("RTDetrV2ForObjectDetection", inputs=sized(side=64), config=_rt_detr("RTDetrV2Config")),
    "D-FINE": Family("DFineForObjectDetection", inputs=sized(side=64), config=_d_fine()),
    "DEIMv2": Family("Deimv2ForObjectDetection", inputs=sized(side=64), config=_d_fine("Deimv2Config")),
    "DEIMv2, DINOv3": Family("Deimv2ForObjectDetection", inputs=sized(side=64), config=_deimv2_of_dinov3),
    "LW-DETR": Family("LwDetrForObjectDetection", inputs=sized(side=64), config=_lw_detr),
    "PP-DocLayout V2": Family("PPDocLayoutV2ForObjectDetection", inputs=sized(side=64), config=_pp_doclayout_v2),
    "PP-DocLayout V3": Family("PPDocLayoutV3ForObjectDetection", inputs=sized(side=64), config=_pp_doclayout_v3),
    "Grounding DINO": Family(
        "GroundingDinoForObjectDetection",
        inputs=with_text(sized(side=64)),
        config=_grounding_dino("GroundingDinoConfig"),
    ),
    "MM Grounding DINO": Family(
        "MMGroundingDinoForObjectDetection",
        inputs=with_text(sized(side=64)),
        config=_grounding_dino("MMGroundingDinoConfig"),
    ),
    "PP-DocLayout V4": Family("PPDocLayoutV4ForObjectDetection", inputs=sized(side=64), config=_pp_doclayout_v4),
    "RF-DETR": Family("RfDetrForObjectDetection", {"num_queries": 5}),
    "SuperPoint": Family("SuperPointForKeypointDetection", refused="convolution"),
    # Two towers.
    "CLIP": Family("CLIPModel"),
    "MetaCLIP 2, two towers": Family("MetaClip2Model"),
    "SigLIP": Family("SiglipModel"),
    "SigLIP2": Family("Siglip2Model", {"vision_config": {"num_patches": 16}}, naflex),
    "SigLIP2, classifier": Family("Siglip2ForImageClassification", {"vision_config": {"num_patches": 16}}, naflex),
    "SigLIP2, tower": Family("Siglip2VisionModel", {"num_patches": 16}, naflex),
    "AltCLIP": Family("AltCLIPModel"),
    "Chinese-CLIP": Family("ChineseCLIPModel"),
    "AIMv2": Family("Aimv2Model"),
    "GroupViT": Family(
        "GroupViTModel",
        {"vision_config": {"depths": [2, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]}},
    ),
    "CLIPSeg": Family("CLIPSegModel"),
    "OWL-ViT": Family("OwlViTModel"),
    "OWLv2": Family("Owlv2Model"),
    "OWL-ViT, detector": Family("OwlViTForObjectDetection"),
    "OWLv2, detector": Family("Owlv2ForObjectDetection"),
    "FLAVA": Family("FlavaModel"),
    "X-CLIP": Family(
        "XCLIPModel",
        {
            "vision_config": {
                "num_frames": 2,
                "mit_hidden_size": 16,
                "mit_intermediate_size": 64,
                "mit_num_hidden_layers": 1,
                "mit_num_attention_heads": 4,
            }
        },
        # `get_video_features` of 4.57 reads its own tuple as an output with names; the whole, with text, runs.
        with_text(clips(2)),
    ),
    "TIPSv2": Family("Tipsv2Model"),
    "Vision-text dual encoder": Family("VisionTextDualEncoderModel", config=_dual_encoder),
    "BLIP": Family("BlipModel"),
    "BridgeTower": Family("BridgeTowerModel", inputs=with_text(images), config=_bridgetower),
    "BridgeTower, retrieval": Family(
        "BridgeTowerForImageAndTextRetrieval", inputs=with_text(images), config=_bridgetower
    ),
    "InstructBLIP, video": Family("InstructBlipVideoForConditionalGeneration"),
    "BLIP, retrieval": Family("BlipForImageTextRetrieval"),
    # Captions and answers.
    "BLIP, captions": Family("BlipForConditionalGeneration"),
    "BLIP, answers": Family("BlipForQuestionAnswering"),
    "BLIP-2": Family(
        "Blip2ForConditionalGeneration", {"qformer_config": {"encoder_hidden_size": 32}, "num_query_tokens": 4}
    ),
    "InstructBLIP": Family(
        "InstructBlipForConditionalGeneration", {"qformer_config": {"encoder_hidden_size": 32}, "num_query_tokens": 4}
    ),
    "GIT": Family("GitForCausalLM"),
    "Kosmos-2": Family(
        "Kosmos2ForConditionalGeneration",
        {"text_config": {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4}, "latent_query_num": 4},
    ),
    "TrOCR": Family("VisionEncoderDecoderModel", config=_encoder_decoder("ViTConfig")),
    "Donut": Family("VisionEncoderDecoderModel", config=_encoder_decoder("DonutSwinConfig")),
    "Pix2Struct": Family(
        "Pix2StructForConditionalGeneration",
        {
            "vision_config": {"patch_embed_hidden_size": 48, "seq_len": 16, "d_ff": 64, "d_kv": 8},
            "text_config": {"d_kv": 8, "d_ff": 64, "num_layers": 1},
        },
        flattened,
    ),
    "Florence-2": Family(
        "Florence2ForConditionalGeneration",
        {
            "vision_config": {
                "embed_dim": [8, 16, 32],
                "num_heads": [1, 2, 4],
                "num_groups": [1, 2, 4],
                "depths": [1, 1, 1],
                "patch_size": [7, 3, 3],
                "patch_stride": [4, 2, 2],
                "patch_padding": [3, 1, 1],
                "patch_prenorm": [False, True, True],
                "window_size": 4,
                "projection_dim": 32,
            },
            "text_config": {"d_model": 32},
        },
        sized(side=64),
    ),
    # Language models that see.
    "LLaVA": Family("LlavaForConditionalGeneration"),
    "LLaVA-NeXT": Family(
        "LlavaNextForConditionalGeneration", {"image_grid_pinpoints": [[32, 64], [64, 32]]}, with_sizes(clips(3))
    ),
    "LLaVA-OneVision": Family(
        "LlavaOnevisionForConditionalGeneration", {"image_grid_pinpoints": [[32, 64], [64, 32]]}, with_sizes(clips(3))
    ),
    "VipLLaVA": Family("VipLlavaForConditionalGeneration", {"vision_feature_layers": [-1, -2]}),
    "SmolVLM": Family("SmolVLMForConditionalGeneration", {"scale_factor": 2}, tiled),
    "Idefics2": Family(
        "Idefics2ForConditionalGeneration",
        {
            "perceiver_config": {
                "resampler_depth": 1,
                "resampler_n_latents": 4,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
            }
        },
        tiled,
    ),
    "Idefics3": Family("Idefics3ForConditionalGeneration", {"scale_factor": 2}, tiled),
    "PaliGemma": Family("PaliGemmaForConditionalGeneration"),
    "Gemma 3": Family("Gemma3ForConditionalGeneration", {"mm_tokens_per_image": 4}),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        {"vision_config": {**_PATCHES, "hidden_size": 32}, "text_config": _LANGUAGE},
        packed,
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        {"vision_config": {**_PATCHES, "fullatt_block_indexes": [1], "window_size": 32}, "text_config": _LANGUAGE},
        packed,
    ),
    "Qwen3-VL": Family(
        "Qwen3VLForConditionalGeneration",
        {
            "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "text_config": _language([2, 1, 1]),
        },
        packed,
    ),
    "Qwen2.5-Omni, thinker": Family("Qwen2_5OmniThinkerForConditionalGeneration", {}, packed),
    "Qwen3-Omni, thinker": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration", {"text_config": _language([2, 1, 1])}, packed
    ),
    "Qwen3.5": Family("Qwen3_5ForConditionalGeneration", {}, packed),
    "VideoLLaMA 3": Family("VideoLlama3ForConditionalGeneration", {}, merged),
    "EXAONE 4.5": Family("Exaone4_5_ForConditionalGeneration", {}, packed),
    "GLM-4.6V": Family("Glm46VForConditionalGeneration", {}, packed),
    "GLM-OCR": Family("GlmOcrForConditionalGeneration", {}, packed),
    "HyperCLOVA X, vision": Family("HyperCLOVAXVisionV2ForConditionalGeneration", {}, packed),
    "LightOnOCR": Family("LightOnOcrForConditionalGeneration", {}, with_sizes(sized())),
    "Qianfan-OCR": Family("QianfanOCRForConditionalGeneration"),
    "Step 3.7": Family("Step3p7ForConditionalGeneration"),
    "Video-LLaVA": Family("VideoLlavaForConditionalGeneration"),
    "LLaVA-NeXT-Video": Family(
        "LlavaNextVideoForConditionalGeneration", {"image_grid_pinpoints": [[32, 64], [64, 32]]}, with_sizes(clips(3))
    ),
    "ShieldGemma 2": Family("ShieldGemma2ForImageClassification", {"mm_tokens_per_image": 4}),
    "T5Gemma 2": Family("T5Gemma2ForConditionalGeneration"),
    "Idefics": Family("IdeficsForVisionText2Text"),
    "GLM-4V": Family("Glm4vForConditionalGeneration", {"vision_config": _PATCHES}, packed),
    "InternVL": Family(
        "InternVLForConditionalGeneration", {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}}
    ),
    "Mistral 3": Family("Mistral3ForConditionalGeneration", {}, with_sizes(sized())),
    "GOT-OCR2": Family(
        "GotOcr2ForConditionalGeneration",
        {"vision_config": {"window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 64}},
    ),
    "Ovis2": Family("Ovis2ForConditionalGeneration"),
    "Aya Vision": Family("AyaVisionForConditionalGeneration"),
    "Cohere 2 Vision": Family("Cohere2VisionForConditionalGeneration"),
    "Janus": Family(
        "JanusForConditionalGeneration",
        {
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_hidden_layers": 1,
            }
        },
    ),
    "DeepSeek-VL": Family("DeepseekVLForConditionalGeneration"),
    "LFM2-VL": Family("Lfm2VlForConditionalGeneration", {"vision_config": {"num_patches": 16}}, naflex),
    "ColPali": Family("ColPaliForRetrieval"),
    "ColQwen2": Family(
        "ColQwen2ForRetrieval",
        {"vlm_config": {"vision_config": {**_PATCHES, "hidden_size": 32}, "text_config": _LANGUAGE}},
        packed,
    ),
    "Llama 4": Family(
        "Llama4ForConditionalGeneration",
        {
            "vision_config": _LLAMA_4_TOWER,
            "text_config": {
                "intermediate_size_mlp": 64,
                "num_local_experts": 2,
                "layer_types": ["chunked_attention", "full_attention"],
            },
        },
    ),
    "Llama 4, tower": Family("Llama4VisionModel", _LLAMA_4_TOWER),
    "Llama 3.2, tower": Family(
        "MllamaVisionModel",
        {
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
        by_aspect,
    ),
    "MiniCPM-V 4.6": Family(
        "MiniCPMV4_6ForConditionalGeneration",
        {
            "vision_config": {"insert_layer_id": 0},
            "insert_layer_id": 0,
            "text_config": {
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "layer_types": ["linear_attention", "full_attention"],
            },
        },
        side_by_side,
    ),
    "Kimi K2.5": Family(
        "Kimi_K25ForConditionalGeneration",
        {
            "vision_config": {"pos_emb_height": 4, "pos_emb_width": 4},
            "projection_hidden_size": 32,
            "text_config": {
                **_some("moe_intermediate_size n_routed_experts num_experts_per_tok"),
                "n_group": 2,
                "topk_group": 1,
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "qk_nope_head_dim": 8,
            },
        },
        square_patches,
    ),
    "PaddleOCR-VL": Family("PaddleOCRVLForConditionalGeneration", {}, square_patches),
    "Gemma 4, tower": Family("Gemma4VisionModel", {"pooling_kernel_size": 2, "position_embedding_size": 16}, placed),
    "LFM3-VL": Family(
        "Lfm3VlForConditionalGeneration",
        {
            "vision_config": {"layer_types": ["conv", "full_attention"]},
            "text_config": {**_TEXT, "layer_types": ["conv", "full_attention"]},
            "projector_hidden_size": 32,
        },
        packed,
    ),
    "Qwen3-VL, experts": Family(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "vision_config": {**_PATCHES, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "text_config": {
                **_language([2, 1, 1]),
                **_some("moe_intermediate_size num_experts num_local_experts num_experts_per_tok"),
            },
        },
        packed,
    ),
    "GLM-4V, experts": Family(
        "Glm4vMoeForConditionalGeneration",
        {
            "vision_config": _PATCHES,
            "text_config": {**_LANGUAGE, **_some("moe_intermediate_size n_routed_experts num_experts_per_tok")},
        },
        packed,
    ),
    "Aria": Family("AriaForConditionalGeneration"),
    "Kosmos-2.5": Family(
        "Kosmos2_5ForConditionalGeneration",
        {
            "text_config": {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4},
            "vision_config": {"patch_embed_hidden_size": 48, "max_num_patches": 16},
            "latent_query_num": 4,
        },
        flattened,
    ),
    "Granite Docling": Family(
        "GraniteDoclingForConditionalGeneration",
        {
            "text_config": _TEXT,
            "pad_token_id": 0,
            "vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0]},
        },
        tiles,
    ),
    "DeepSeek-VL, hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration", {"high_res_vision_config": _NARROW_SAM}, at_two_resolutions
    ),
    "ColModernVBERT": Family(
        "ColModernVBertForRetrieval",
        {
            "vlm_config": {
                "pixel_shuffle_factor": 2,
                "text_config": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
            }
        },
        tiled,
    ),
    "PI0": Family("PI0ForConditionalGeneration"),
    # Images and text together.
    "ViLT": Family("ViltForQuestionAnswering", refused="whole"),
    "ViLT, with text": Family("ViltForQuestionAnswering", inputs=with_text(images)),
    "BridgeTower, contrastive": Family(
        "BridgeTowerForContrastiveLearning", inputs=with_text(images), config=_contrastive_bridgetower
    ),
    "LayoutLMv3": Family("LayoutLMv3ForSequenceClassification", {"input_size": 32}),
    # Videos and audio.
    "VideoMAE": Family("VideoMAEForVideoClassification", {"num_frames": 4}, clips(4)),
    "ViViT": Family("VivitForVideoClassification", {"num_frames": 4, "tubelet_size": [2, 8, 8]}, clips(4)),
    "TimeSformer": Family("TimesformerForVideoClassification", {"num_frames": 2}, clips(2)),
    "V-JEPA 2": Family(
        "VJEPA2Model",
        {
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 16,
            "num_attention_heads": 2,
            "pred_num_attention_heads": 1,
            "pred_num_hidden_layers": 1,
            "mlp_ratio": 2,
        },
        clips(4, name="pixel_values_videos"),
    ),
    "VideoPrism": Family("VideoPrismVisionModel", {"num_frames": 2}, clips(2, name="pixel_values_videos")),
    "VideoPrism, classifier": Family(
        "VideoPrismForVideoClassification", {"num_frames": 2}, clips(2, name="pixel_values_videos")
    ),
    "AST": Family(
        "ASTForAudioClassification", {"max_length": 24, "num_mel_bins": 16}, spectrograms(16, 24, True, "input_values")
    ),
    "Inkling, tower": Family("InklingVisionModel", {"text_hidden_size": 32, "n_layers": 2}, small_clips),
    "Wav2Vec 2.0": Family("Wav2Vec2ForSequenceClassification", _SOUNDS, sounds()),
    "HuBERT": Family("HubertForCTC", _SOUNDS, sounds()),
    "WavLM": Family("WavLMForSequenceClassification", _SOUNDS, sounds()),
    "SpeechT5": Family("SpeechT5ForSpeechToText", {**_SOUNDS, **_TEXT, "positional_dropout": 0.0}, sounds()),
    "Voxtral": Family(
        "VoxtralForConditionalGeneration", {"audio_config": {"intermediate_size": 128}}, spectrograms(8, 32)
    ),
    "Qwen2-Audio": Family("Qwen2AudioForConditionalGeneration", {}, spectrograms(8, 32)),
    "Parakeet": Family("ParakeetForCTC", {}, spectrograms(8, 32, True)),
    "Moonshine": Family(
        "MoonshineForConditionalGeneration",
        {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
        sounds(3000),
    ),
    "Whisper": Family("WhisperForConditionalGeneration", _TEXT, spectrograms(8, 32)),
    # What is refused as what it is.
    "BERT": Family("BertModel", refused="text"),
    "GPT-2": Family("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 4}, refused="text"),
    "ResNet": Family(
        "ResNetForImageClassification",
        {name: value for name, value in _RESNET.items() if name != "out_features"},
        refused="convolution",
    ),
    "MobileNetV2": Family("MobileNetV2ForImageClassification", refused="convolution"),
    "PoolFormer": Family(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        refused="convolution",
    ),
    "TextNet": Family("TextNetForImageClassification", refused="convolution"),
}
