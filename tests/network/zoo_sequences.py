"""Networks of the zoo that hear, speak, forecast or match keypoints, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn


def audio(frames: int = 48, features: int = 16) -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, frames, features)}


SEQUENCES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
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
