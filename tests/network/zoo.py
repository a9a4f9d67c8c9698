"""Architectures with batch norm of the transformers package, small, with random weights and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as t
from chains import chain_after
from torch import Tensor, nn

import batchnorm
from batchnorm.network.values.find import find_flow
from batchnorm.network.values.modules import is_frozen_lookalike


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


def audio(frames: int = 48, features: int = 16) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, frames, features)}


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


ZOO: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
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
    "Wav2Vec2-Conformer": lambda: (
        t.Wav2Vec2ConformerModel(
            t.Wav2Vec2ConformerConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                conv_dim=(8, 8),
                conv_stride=(5, 4),
                conv_kernel=(10, 4),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                conv_depthwise_kernel_size=3,
                apply_spec_augment=False,
                layerdrop=0.0,
            )
        ),
        {"input_values": torch.randn(2, 2000)},
    ),
    "HuBERT, batch norm": lambda: (
        t.HubertModel(
            t.HubertConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                conv_dim=(8, 8),
                conv_stride=(5, 4),
                conv_kernel=(10, 4),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                conv_pos_batch_norm=True,
                apply_spec_augment=False,
                layerdrop=0.0,
            )
        ),
        {"input_values": torch.randn(2, 2000)},
    ),
    "CLAP, audio": lambda: (
        t.ClapAudioModel(
            t.ClapAudioConfig(
                spec_size=64,
                num_mel_bins=16,
                patch_embeds_hidden_size=8,
                depths=[1, 1],
                num_attention_heads=[2, 2],
                hidden_size=16,
                window_size=4,
                patch_size=4,
                patch_stride=[4, 4],
                num_hidden_layers=2,
                enable_fusion=False,
            )
        ),
        {"input_features": torch.randn(2, 1, 256, 16)},
    ),
    "FastSpeech2-Conformer": lambda: (
        t.FastSpeech2ConformerModel(
            t.FastSpeech2ConformerConfig(
                hidden_size=16,
                vocab_size=20,
                num_mel_bins=8,
                encoder_num_attention_heads=2,
                encoder_layers=1,
                encoder_linear_units=16,
                decoder_layers=1,
                decoder_num_attention_heads=2,
                decoder_linear_units=16,
                speech_decoder_postnet_layers=2,
                speech_decoder_postnet_units=8,
                speech_decoder_postnet_kernel=3,
                speech_decoder_postnet_dropout=0.0,
                duration_predictor_channels=8,
                energy_predictor_channels=8,
                pitch_predictor_channels=8,
            )
        ),
        {
            "input_ids": torch.randint(0, 20, (2, 7)),
            "duration_labels": torch.full((2, 7), 2),
            "pitch_labels": torch.randn(2, 7, 1),
            "energy_labels": torch.randn(2, 7, 1),
            "spectrogram_labels": torch.randn(2, 14, 8),
        },
    ),
    "SpeechT5, to speech": lambda: (
        t.SpeechT5ForTextToSpeech(
            t.SpeechT5Config(
                vocab_size=20,
                hidden_size=16,
                encoder_layers=1,
                encoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=16,
                num_mel_bins=8,
                speech_decoder_prenet_units=8,
                speech_decoder_postnet_layers=3,
                speech_decoder_postnet_units=8,
                speech_decoder_prenet_dropout=0.0,
                speaker_embedding_dim=4,
                encoder_layerdrop=0.0,
                decoder_layerdrop=0.0,
            )
        ),
        {
            "input_ids": torch.randint(3, 20, (2, 7)),
            "decoder_input_values": torch.randn(2, 8, 8),
            "speaker_embeddings": torch.randn(2, 4),
        },
    ),
    "SeamlessM4T, speech encoder": lambda: (
        t.models.seamless_m4t.modeling_seamless_m4t.SeamlessM4TSpeechEncoder(
            t.SeamlessM4TConfig(
                hidden_size=16,
                speech_encoder_layers=1,
                speech_encoder_attention_heads=2,
                speech_encoder_intermediate_size=16,
                feature_projection_input_dim=16,
                speech_encoder_layerdrop=0.0,
                adaptor_layer_norm=True,
            )
        ),
        audio(),
    ),
    "Parakeet": lambda: (
        t.ParakeetEncoder(
            t.ParakeetEncoderConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                conv_kernel_size=3,
                subsampling_conv_channels=4,
                num_mel_bins=16,
                layerdrop=0.0,
            )
        ),
        {"input_features": torch.randn(2, 64, 16), "attention_mask": torch.ones(2, 64, dtype=torch.long)},
    ),
    "Granite Speech, encoder": lambda: (
        t.models.granite_speech.modeling_granite_speech.GraniteSpeechCTCEncoder(
            t.GraniteSpeechEncoderConfig(
                input_dim=16,
                num_layers=2,
                hidden_dim=16,
                num_heads=2,
                dim_head=8,
                output_dim=5,
                context_size=16,
                conv_kernel_size=3,
            )
        ),
        {"hidden_states": torch.randn(2, 32, 16)},
    ),
    "PatchTST": lambda: (
        t.PatchTSTModel(
            t.PatchTSTConfig(
                num_input_channels=3,
                context_length=16,
                patch_length=4,
                patch_stride=4,
                d_model=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=8,
            )
        ),
        {"past_values": torch.randn(2, 16, 3)},
    ),
    "PatchTSMixer": lambda: (
        t.PatchTSMixerModel(
            t.PatchTSMixerConfig(
                num_input_channels=3,
                context_length=16,
                patch_length=4,
                patch_stride=4,
                d_model=8,
                num_layers=2,
                norm_mlp="BatchNorm",
            )
        ),
        {"past_values": torch.randn(2, 16, 3)},
    ),
    "SuperGlue": lambda: (
        t.models.superglue.modeling_superglue.SuperGlueKeypointEncoder(
            t.SuperGlueConfig(
                hidden_size=16,
                keypoint_encoder_sizes=[8, 16],
                gnn_layers_types=["self", "cross"],
                num_attention_heads=2,
            )
        ),
        {"keypoints": torch.randn(2, 6, 2), "scores": torch.rand(2, 6)},
    ),
    "PP-LCNet": lambda: (t.PPLCNetBackbone(t.PPLCNetConfig(scale=0.25)), image()),
    "Informer": lambda: (
        t.InformerModel(
            t.InformerConfig(
                prediction_length=4,
                context_length=8,
                lags_sequence=[1, 2],
                d_model=8,
                encoder_layers=2,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_time_features=1,
            )
        ),
        {
            "past_values": torch.randn(2, 10),
            "past_time_features": torch.randn(2, 10, 1),
            "past_observed_mask": torch.ones(2, 10),
            "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 1),
        },
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network of the zoo, with statistics, gamma and beta that are not those of initialization.

    Parameters
    ----------
    name : str
        A key of ``ZOO``.

    Returns
    -------
    Module
        In eval mode.
    dict
        Arguments of its forward.
    """
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        tensors = {**module._parameters, **module._buffers}
        if "running_var" in tensors and tensors["running_var"] is not None:
            with torch.no_grad():
                tensors["running_mean"].normal_(0, 0.2, generator=generator)
                tensors["running_var"].uniform_(0.5, 1.5, generator=generator)
                if tensors.get("weight") is not None:
                    tensors["weight"].uniform_(0.5, 1.5, generator=generator)
                    tensors["bias"].normal_(0, 0.2, generator=generator)
    return model.eval(), inputs


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif hasattr(tree, "values"):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)


def answers(model: nn.Module, inputs: dict[str, Any], training: bool) -> dict[str, Tensor]:
    """Outputs, gradients and state after one pass with its backward, dropout drawn alike every time."""
    model.train(training)
    model.zero_grad()
    torch.manual_seed(2)
    outputs = [o for o in tensors(model(**inputs)) if o.is_floating_point()]
    sum(
        (o * torch.linspace(-1, 2, o.numel()).view_as(o).to(o)).sum() for o in outputs if o.requires_grad
    ).backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    found |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {f"state {n}": v.clone() for n, v in model.state_dict().items()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two answers, each tensor on the scale of its largest value.

    A gradient that is zero but for rounding (a bias in front of a norm) is seen on the scale of the others.
    """
    assert ours.keys() == theirs.keys()
    gradients = [
        float(v.double().abs().max()) for k, v in theirs.items() if k.startswith("gradient") and v.numel()
    ]
    floor, worst = 1e-3 * max(gradients, default=0.0), 0.0
    for name, expected in theirs.items():
        got = ours[name]
        assert got.shape == expected.shape, name
        if expected.numel():
            scale = max(float(expected.double().abs().max()), floor if name.startswith("gradient") else 1e-6)
            worst = max(worst, float((got.double() - expected.double()).abs().max()) / scale)
    return worst


def activations_after_norms(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How many activations stand behind a norm, or behind a sum with a norm's output, in a real run."""
    flow = find_flow(model, inputs)
    ours = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    chains = [chain_after(flow, norm) for norm in ours]
    return len(
        {(act.view, act.order) for chain in chains for *_, act in chain.calls[-1:] if chain.activation}
    )


def look(name: str) -> dict[str, Any]:
    """Put one network through accelerate and fold; figures for the table, and what the tests judge by."""
    model, inputs = build(name)
    reference = copy.deepcopy(model)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    wide = True
    try:
        copy.deepcopy(model).double()(**double)
    except RuntimeError:
        # some make float32 tensors in their forward
        wide, double = False, inputs
    exact, fast = (copy.deepcopy(model).double() if wide else copy.deepcopy(model) for _ in range(2))
    found = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = [m for m in model.modules() if is_frozen_lookalike(m)]
    batchnorm.accelerate(fast)
    result: dict[str, Any] = {
        "wide": wide,
        "found": len(found),
        "frozen": len(frozen),
        "pairs": activations_after_norms(reference, inputs),
        "training": difference(answers(fast, double, True), answers(exact, double, True)),
        "eval": difference(answers(fast, double, False), answers(exact, double, False)),
    }
    # of the last mode, as the pairs are
    rows = batchnorm.record(fast)
    result["called"] = len(rows.of("called"))
    result["fused"] = sum(row.detail.rpartition(" -> ")[2] not in ("", "add") for row in rows.of("called"))
    result["sums"] = sum("add" in row.detail for row in rows.of("called"))
    result["unseen"] = [(row.path, row.reason) for row in rows.left_alone]
    folded = batchnorm.fold(reference.eval(), inputs)
    with torch.no_grad():
        outputs = [{str(i): o for i, o in enumerate(tensors(m.eval()(**inputs)))} for m in (folded, model)]
    result["fold"] = difference(*outputs)
    counts = batchnorm.record(folded).counts()
    result["folded"] = counts.get("folded", 0)
    result["left"] = [(row.path, row.reason) for row in batchnorm.record(folded).left_alone]
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page of the zoo."""
    lines = [
        "# The zoo",
        "",
        f"{len(results)} architectures with batch norm of the `transformers` package "
        f"({t.__version__}), made small, with random weights, running statistics, gamma and beta. "
        "Each went through `accelerate` and through `fold`, and was compared with itself as given.",
        "",
        "- **norms**: batch norms of `torch.nn` found; **+ n frozen**: lookalikes with four buffers, which `fold` "
        "folds and `accelerate` leaves, for Dynamo shows their arithmetic and no batch norm.",
        "- **pairs**: activations that, in a real run, stand behind a norm, or behind a sum with a norm's output; "
        "**in one call**: of these, called together with their norm after `accelerate`; **sums**: residual sums that "
        "are part of such a call.",
        "- **training**: largest difference of outputs, gradients and statistics between accelerated and given "
        "network in training mode, float64 (float32 where marked), each tensor on the scale of "
        "its largest value (a gradient not under a thousandth of the largest gradient). It is rounding: "
        "in a small network in training mode a few values per channel amplify it.",
        "- **folded**: norms folded; **eval**: largest difference of the folded network's outputs, float32, on "
        "the scale of the largest output.",
        "",
        "Made by `python tests/network/zoo.py docs/zoo.md`; `tests/network/test_zoo.py` holds every row.",
        "",
        "| architecture | norms | pairs | in one call | sums | training | folded | eval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = dict.fromkeys(("found", "frozen", "pairs", "fused", "sums", "folded"), 0)
    left = []
    for name, r in results.items():
        for key in total:
            total[key] += r[key]
        frozen = f" + {r['frozen']} frozen" if r["frozen"] else ""
        lines.append(
            f"| {name} | {r['found']}{frozen} | {r['pairs']} | {r['fused']} | {r['sums']} | {r['training']:.0e}"
            f"{'' if r['wide'] else ' (float32)'} "
            f"| {r['folded']} of {r['found'] + r['frozen']} | {r['fold']:.0e} |"
        )
        left += [(name, path, reason) for path, reason in r["left"]]
    lines += [
        f"| **all** | {total['found']} + {total['frozen']} frozen | {total['pairs']} | {total['fused']} "
        f"({total['fused'] / total['pairs']:.1%}) | {total['sums']} | | {total['folded']} of "
        f"{total['found'] + total['frozen']} ({total['folded'] / (total['found'] + total['frozen']):.1%}) | |",
        "",
        "Deformable DETR samples its features at places that it computes, which magnifies the rounding of float32; "
        "in float64 its folded network differs by 5e-13.",
        "",
        "## Run as they were written",
        "",
        "| architecture | norms | first reason |",
        "|---|---|---|",
        *(
            f"| {name} | {len(r['unseen'])} | {r['unseen'][0][1].replace('|', '/')} |"
            for name, r in results.items()
            if r["unseen"]
        ),
        "",
        "## Not folded, and why",
        "",
        "| architecture | norm | reason |",
        "|---|---|---|",
        *(f"| {name} | `{path}` | {reason} |" for name, path, reason in left),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys
    import warnings
    from pathlib import Path

    warnings.simplefilter("ignore")
    seen = {}
    for name in ZOO:
        seen[name] = look(name)
        print(name, {k: v for k, v in seen[name].items() if k not in ("left", "unseen")}, flush=True)
    Path(sys.argv[1]).write_text(table(seen))
