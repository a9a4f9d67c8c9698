"""Networks of the zoo that see images, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn


def image(size: int = 64, batch: int = 2, channels: int = 3) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, channels, size, size)}


def small_resnet(**more: Any) -> Any:
    # reduced depth; out_features makes it a backbone
    return t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], **more)


def detr(cls: Any, config: Any, **more: Any) -> nn.Module:
    return cls(
        config(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=small_resnet(out_features=more.pop("out_features", ["stage4"])),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_queries=4,
            **more,
        )
    )


def rt_detr_backbone(**more: Any) -> Any:
    return t.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 12, 16, 24],
        depths=[1, 2, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
        **more,
    )


def rt_detr(cls: Any, config: Any, **more: Any) -> nn.Module:
    return cls(
        config(
            backbone_config=more.pop("backbone_config", None) or rt_detr_backbone(),
            freeze_backbone_batch_norms=more.pop("freeze", False),
            encoder_hidden_dim=16,
            encoder_in_channels=[12, 16, 24],
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            d_model=16,
            num_queries=4,
            decoder_in_channels=[16, 16, 16],
            decoder_ffn_dim=16,
            decoder_n_points=2,
            decoder_layers=1,
            num_denoising=0,
            anchor_image_size=None,
            **more,
        )
    )


def hgnet() -> Any:
    return t.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
        embedding_size=8,
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )


IMAGES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "ResNet": lambda: (t.ResNetForImageClassification(small_resnet(num_labels=5)), image()),
    "ResNet, basic": lambda: (t.ResNetModel(small_resnet(layer_type="basic")), image()),
    "RegNet": lambda: (
        t.RegNetModel(
            t.RegNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 2, 1, 1], groups_width=4
            )
        ),
        image(),
    ),
    "RegNet, x": lambda: (
        t.RegNetModel(
            t.RegNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16, 16, 24],
                depths=[1, 2, 1, 1],
                groups_width=4,
                layer_type="x",
            )
        ),
        image(),
    ),
    "MobileNetV1": lambda: (t.MobileNetV1Model(t.MobileNetV1Config(depth_multiplier=0.25)), image()),
    "MobileNetV2": lambda: (
        t.MobileNetV2ForSemanticSegmentation(t.MobileNetV2Config(depth_multiplier=0.35, num_labels=4)),
        image(),
    ),
    "EfficientNet": lambda: (
        t.EfficientNetModel(
            t.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320)
        ),
        image(),
    ),
    "ALIGN, vision": lambda: (
        t.AlignVisionModel(t.AlignVisionConfig(width_coefficient=0.25, depth_coefficient=0.3)),
        image(),
    ),
    "LeViT": lambda: (
        t.LevitForImageClassificationWithTeacher(
            t.LevitConfig(
                image_size=64,
                hidden_sizes=[16, 24, 32],
                num_attention_heads=[2, 2, 2],
                depths=[1, 1, 1],
                key_dim=[8, 8, 8],
                num_labels=3,
                down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2], [""]],
            )
        ),
        image(),
    ),
    "SegFormer": lambda: (
        t.SegformerForSemanticSegmentation(
            t.SegformerConfig(
                depths=[1] * 4,
                hidden_sizes=[8, 8, 16, 16],
                num_attention_heads=[1, 1, 2, 2],
                decoder_hidden_size=16,
            )
        ),
        image(),
    ),
    "CvT": lambda: (
        t.CvtModel(t.CvtConfig(embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3])),
        image(),
    ),
    "MobileViT": lambda: (
        t.MobileViTForSemanticSegmentation(
            t.MobileViTConfig(
                image_size=64,
                hidden_sizes=[16, 24, 24],
                neck_hidden_sizes=[8, 8, 16, 16, 16, 24, 32],
                num_attention_heads=2,
            )
        ),
        image(),
    ),
    "MobileViTV2": lambda: (
        t.MobileViTV2ForSemanticSegmentation(
            t.MobileViTV2Config(image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1])
        ),
        image(),
    ),
    "SwiftFormer": lambda: (
        t.SwiftFormerModel(t.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16])),
        image(),
    ),
    "TextNet": lambda: (
        t.TextNetModel(
            t.TextNetConfig(
                stem_out_channels=8,
                hidden_sizes=[8, 8, 16, 16, 16],
                conv_layer_kernel_sizes=[[[3, 3], [3, 1]], [[3, 3]], [[1, 3]], [[3, 3]]],
                conv_layer_strides=[[1, 2], [2], [2], [2]],
            )
        ),
        image(),
    ),
    "HGNet-V2": lambda: (t.HGNetV2Backbone(hgnet()), image()),
    "DETR": lambda: (detr(t.DetrModel, t.DetrConfig), image()),
    "Conditional DETR": lambda: (detr(t.ConditionalDetrModel, t.ConditionalDetrConfig), image()),
    "DAB-DETR": lambda: (
        t.DabDetrModel(
            t.DabDetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=small_resnet(out_features=["stage4"]),
                hidden_size=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                num_queries=4,
            )
        ),
        image(),
    ),
    "Deformable DETR": lambda: (
        detr(
            t.DeformableDetrModel,
            t.DeformableDetrConfig,
            out_features=["stage2", "stage3", "stage4"],
            num_feature_levels=4,
        ),
        image(),
    ),
    "Table Transformer": lambda: (detr(t.TableTransformerModel, t.TableTransformerConfig), image()),
    "RT-DETR": lambda: (rt_detr(t.RTDetrModel, t.RTDetrConfig), image()),
    "RT-DETR, frozen backbone": lambda: (rt_detr(t.RTDetrModel, t.RTDetrConfig, freeze=True), image()),
    "RT-DETRv2": lambda: (rt_detr(t.RTDetrV2Model, t.RTDetrV2Config), image()),
    "D-FINE": lambda: (
        rt_detr(
            t.DFineModel,
            t.DFineConfig,
            backbone_config=hgnet(),
        ),
        image(),
    ),
    "UPerNet": lambda: (
        t.UperNetForSemanticSegmentation(
            t.UperNetConfig(
                backbone_config=small_resnet(out_features=["stage1", "stage2", "stage3", "stage4"]),
                hidden_size=16,
                auxiliary_in_channels=16,
                auxiliary_channels=8,
                num_labels=4,
                pool_scales=[1, 2, 3, 6],
            )
        ),
        image(),
    ),
    "BEiT, segmentation": lambda: (
        t.BeitForSemanticSegmentation(
            t.BeitConfig(
                image_size=64,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=16,
                out_indices=[0, 1, 2, 3],
                num_labels=4,
                pool_scales=[1, 2, 3, 6],
            )
        ),
        image(),
    ),
    "DPT": lambda: (
        t.DPTForDepthEstimation(
            t.DPTConfig(
                image_size=64,
                hidden_size=16,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=16,
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 16, 16],
                fusion_hidden_size=8,
                use_batch_norm_in_fusion_residual=True,
                is_hybrid=False,
            )
        ),
        image(),
    ),
    "ViTMatte": lambda: (
        t.VitMatteForImageMatting(
            t.VitMatteConfig(
                backbone_config=t.VitDetConfig(
                    image_size=64,
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_channels=4,
                    out_features=["stage2"],
                ),
                hidden_size=16,
                convstream_hidden_sizes=[8, 8, 16],
                fusion_hidden_sizes=[16, 16, 8, 8],
            )
        ),
        image(channels=4),
    ),
    "ViTPose": lambda: (
        t.VitPoseForPoseEstimation(
            t.VitPoseConfig(
                backbone_config=t.VitPoseBackboneConfig(
                    image_size=[64, 64],
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    out_indices=[2],
                ),
                use_simple_decoder=False,
                num_labels=3,
            )
        ),
        image(),
    ),
    "PP-LCNet": lambda: (t.PPLCNetBackbone(t.PPLCNetConfig(scale=0.25)), image()),
}
