"""Tiny random towers of every kind, with what they see or hear through."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import tiny_config
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ASTModel,
    AutoConfig,
    AutoModel,
    ClapAudioModelWithProjection,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from uni_moe_hf import YamnetConfig, YamnetFeatureExtractor, YamnetModel


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
FLAT = {**SMALL, "image_size": 32, "patch_size": 8}
WINDOWED = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 4]}
WINDOWED |= {"window_size": 4}
STAGED = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

# `model_type` -> its settings, tokens of a picture, and how many stand before the patches.
VISION: dict[str, tuple[dict[str, Any], int, int]] = {
    "clip_vision_model": (FLAT, 16, 1),
    "siglip_vision_model": (FLAT, 16, 0),
    "dinov2": (FLAT, 16, 1),
    "dinov2_with_registers": ({**FLAT, "num_register_tokens": 3}, 16, 4),
    "dinov3_vit": ({**FLAT, "num_register_tokens": 2}, 16, 3),
    "aimv2_vision_model": (FLAT, 16, 0),
    "vit": (FLAT, 16, 1),
    "deit": (FLAT, 16, 2),
    "beit": (FLAT, 16, 1),
    "ijepa": (FLAT, 16, 0),
    "internvl_vision": ({**FLAT, "image_size": [32, 32], "patch_size": [8, 8]}, 16, 1),
    "swin": (WINDOWED, 16, 0),
    "swinv2": (WINDOWED, 16, 0),
    "convnext": (STAGED, 4, 0),
    "convnextv2": (STAGED, 4, 0),
    "dinov3_convnext": (STAGED, 4, 0),
}


def vision_tower(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **VISION[kind][0])).eval()


AST = ASTConfig(**SMALL, max_length=104, num_mel_bins=32)
WHISPER = tiny_config().speech_config
WHISPER_V3 = WhisperConfig(**{**WHISPER.to_dict(), "num_mel_bins": 128})


def clap(fusion: bool) -> ClapConfig:
    audio = {"spec_size": 64, "num_mel_bins": 16, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4}
    audio |= {"depths": [1, 1], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16, "hidden_size": 99}
    text = {**SMALL, "vocab_size": 99, "max_position_embeddings": 20}
    return ClapConfig(
        audio_config={**audio, "enable_fusion": fusion, "num_hidden_layers": 2}, text_config=text, projection_dim=16
    )


def clap_extractor(truncation: str) -> ClapFeatureExtractor:
    rate = {"sampling_rate": 8000, "hop_length": 40, "fft_window_size": 256, "frequency_max": 4000, "max_length_s": 1}
    return ClapFeatureExtractor(feature_size=16, truncation=truncation, **rate)


# Name -> the model of which the ear is a part, and its feature extractor.
EARS: dict[str, tuple[Callable[[], torch.nn.Module], Any]] = {
    "YAMNet": (lambda: YamnetModel(YamnetConfig()), YamnetFeatureExtractor(chunk_length=1)),
    "AST": (lambda: ASTModel(AST), ASTFeatureExtractor(num_mel_bins=32, max_length=104)),
    "AST with its classifier": (
        lambda: ASTForAudioClassification(AST),
        ASTFeatureExtractor(num_mel_bins=32, max_length=104),
    ),
    "CLAP": (lambda: ClapModel(clap(False)), clap_extractor("rand_trunc")),
    "CLAP, fused": (lambda: ClapModel(clap(True)), clap_extractor("fusion")),
    "CLAP, audio alone": (
        lambda: ClapAudioModelWithProjection(clap(False).audio_config),
        clap_extractor("rand_trunc"),
    ),
    "Whisper": (lambda: WhisperModel(WHISPER), WhisperFeatureExtractor(feature_size=80, chunk_length=1)),
    "Whisper v3": (
        lambda: WhisperForConditionalGeneration(WHISPER_V3),
        WhisperFeatureExtractor(feature_size=128, chunk_length=1),
    ),
    "Whisper with a classifier": (
        lambda: WhisperForAudioClassification(WHISPER),
        WhisperFeatureExtractor(feature_size=80, chunk_length=1),
    ),
    "Whisper's encoder": (
        lambda: WhisperModel(WHISPER).encoder,
        WhisperFeatureExtractor(feature_size=80, chunk_length=1),
    ),
}


def ear(name: str) -> tuple[torch.nn.Module, Any]:
    """A random model and its feature extractor."""
    make, extractor = EARS[name]
    torch.manual_seed(0)
    return make().eval(), extractor
