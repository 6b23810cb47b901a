"""Tiny random parts for tests and benchmarks: milliseconds, offline."""

import os
import string
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from transformers import LlamaTokenizer

from uni_moe_hf import UniMoEConfig, UniMoEForConditionalGeneration, UniMoEProcessor
from uni_moe_hf.hub.compat_uni_moe import RELEASE
from uni_moe_hf.mixtures.processors import build_processor


TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "uni_moe_hf"

WORDS = "A USER: ASSISTANT: what is this it a bird bell red blue yes no hello".split()
# Pieces as SentencePiece has them: "▁word", single characters, and bytes for everything else.
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    *string.ascii_letters,
    *string.digits,
    *"<>:.,'?!",
]

MODALITIES = ("image", "video", "audio", "speech")
TOWERS = ("vision", "audio", "speech")
FEATURES = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_values",
    "speech": "input_features",
}
# What the same sums in float32 may differ by between kernels, numbers of threads and processors: values are of order
# 1, sums have some dozens of terms, and 1e-6 was seen.
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}
EXACT = {"atol": 0, "rtol": 0}

# A decoder without a mixture.
DENSE = {"mlp_layer_types": ["dense", "dense"]}
# One of each, a repeated one, and text between, before and behind them.
MIXED = ("image", 3, "audio", "speech", 2, "video", "image", 4)


def tiny_tokenizer() -> LlamaTokenizer:
    """A Llama tokenizer of characters, bytes and a few merged words."""
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    merges = []
    for word in WORDS:
        left = "▁"
        for character in word:
            if (left, character) not in merges:
                merges.append((left, character))
            left += character
            vocab.setdefault(left, len(vocab))
    return LlamaTokenizer(
        vocab=vocab, merges=merges, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def tiny_config(text: dict | None = None, without: tuple[str, ...] = (), **fields) -> UniMoEConfig:
    """All three towers unless named in `without`; every width is a multiple of 8, as grouped products demand."""
    attention = {"num_hidden_layers": 2, "num_attention_heads": 4}
    towers = {
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "image_size": 16, "patch_size": 8, **attention},
        "speech_config": {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 50,
            "max_target_positions": 16,
            "num_mel_bins": 80,
            "vocab_size": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "patch_embedding_size": 16,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "num_buckets": 32,
            "max_bucket_distance": 80,
            **attention,
        },
        "audio_connector_config": {"hidden_size": 32, "intermediate_size": 64, **attention},
    }
    if "audio" in without:
        without = (*without, "audio_connector")
    return UniMoEConfig(
        text_config={
            "vocab_size": len(tiny_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "num_experts": 4,
            **attention,
            **(text or {}),
        },
        **{name: value for name, value in towers.items() if name.removesuffix("_config") not in without},
        **{"num_speech_query_tokens": 3, "num_audio_query_tokens": 5, **fields},
    )


def tiny_model(
    text: dict | None = None, without: tuple[str, ...] = (), seed: int = 0, **fields
) -> UniMoEForConditionalGeneration:
    """A random model in evaluation mode whose LoRA experts differ from each other and from their bases."""
    torch.manual_seed(seed)
    model = UniMoEForConditionalGeneration(tiny_config(text, without, **fields)).eval()
    with torch.no_grad():
        for experts in model._experts():
            if experts.lora is not None:
                experts.lora.gate_up_b.normal_(std=0.1)
                experts.lora.down_b.normal_(std=0.1)
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.mul_(3)  # the default 0.02 makes tiny models nearly blind to their inputs
    return model


def tiny_processor(config: UniMoEConfig | None = None, **settings) -> UniMoEProcessor:
    """The processor that fits [`tiny_config`]; windows last one second."""
    config = config or tiny_config()
    return build_processor(config, tiny_tokenizer(), chunk_length=1, **settings)


def tone(seconds: float = 0.7, pitch: float = 440.0, rate: int = 16000) -> np.ndarray:
    """`(seconds * rate,)` a sine wave, float32."""
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """`(*size, 3)` random colours, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def film(seed: int = 0, frames: int = 5) -> np.ndarray:
    """`(frames, 20, 24, 3)` random colours, uint8."""
    return np.stack([picture(seed * 100 + frame) for frame in range(frames)])


def user(*parts: dict | str) -> list[dict]:
    """A conversation of one user message."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def tokens_per_clip(config: UniMoEConfig, frames: int) -> dict[str, int]:
    video = 4 if config.video_pooling == "mean" else 4 * frames
    return {"image": 4, "video": video, "audio": 5, "speech": 3}


def make_inputs(config: UniMoEConfig, *rows: tuple, padding: str = "left", frames: int = 2, seed: int = 0) -> dict:
    """
    Random model inputs. A row is a tuple of modalities, each one clip, and of numbers, each as many words; every clip
    of sound is one window whose second half is padding.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = dict.fromkeys(MODALITIES, 0)
    ids = []
    for row in rows:
        ids.append([1])
        for part in row:
            if isinstance(part, str):
                counts[part] += 1
                ids[-1] += [getattr(config, f"{part}_token_id")] * tokens_per_clip(config, frames)[part]
            else:
                ids[-1] += torch.randint(3, config.text_config.vocab_size, (part,), generator=generator).tolist()
    length = max(map(len, ids))
    fills = [[0] * (length - len(row)) for row in ids]
    masks = [[1] * len(row) for row in ids]
    pairs = {"input_ids": ids, "attention_mask": masks}
    inputs = {
        name: torch.tensor([f + r if padding == "left" else r + f for f, r in zip(fills, rows_, strict=True)])
        for name, rows_ in pairs.items()
    }
    shapes = {"image": (3, 16, 16), "video": (frames, 3, 16, 16), "audio": (98, 128), "speech": (80, 100)}
    for modality, count in counts.items():
        if count:
            inputs[FEATURES[modality]] = torch.randn(count, *shapes[modality], generator=generator)
    if counts["audio"]:
        inputs["input_values_mask"] = (torch.arange(98) < 49).long().expand(counts["audio"], 98)
    return inputs


def rows_alone(inputs: dict, rows: tuple[tuple, ...]) -> list[dict]:
    """Each row of a batch as an input of its own, without padding."""
    used, alone = dict.fromkeys(MODALITIES, 0), []
    for index, row in enumerate(rows):
        valid = inputs["attention_mask"][index].bool()
        single = {name: inputs[name][index : index + 1, valid] for name in ("input_ids", "attention_mask")}
        for modality in MODALITIES:
            clips = slice(used[modality], used[modality] + row.count(modality))
            used[modality] = clips.stop
            if clips.start < clips.stop:
                single[FEATURES[modality]] = inputs[FEATURES[modality]][clips]
                if modality == "audio":
                    single["input_values_mask"] = inputs["input_values_mask"][clips]
        alone.append(single)
    return alone


def labels_of(config: UniMoEConfig, inputs: dict) -> torch.Tensor:
    """Every word that is neither placeholder nor padding."""
    ids = inputs["input_ids"]
    return ids.masked_fill((ids >= config.text_config.vocab_size) | (inputs["attention_mask"] == 0), -100)


def assert_logits_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Logits of tiny models are of the order of 1."""
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_pixels_equal(actual: np.ndarray, original: np.ndarray) -> None:
    """
    Equal to what the original's front end made of a picture, 1e-5. Pillow 13, with which that was made, resizes tall
    pictures in other steps than 12: there, less than a level of 256 apart on average.
    """
    difference = np.abs(np.asarray(actual) - np.asarray(original))
    if PIL.__version__.startswith("12.") and difference.max() > 1e-5:
        assert difference.mean() < 1 / 256 / 0.26  # what a level is worth once it is normalised
    else:
        assert difference.max() <= 1e-5


def checkpoint_activations(model, **settings) -> None:
    """Switches gradient checkpointing on, by the name that the installed release gives it."""
    new = hasattr(model, "activation_checkpointing_enable")
    getattr(model, "activation_checkpointing_enable" if new else "gradient_checkpointing_enable")(settings or None)


def since(*release: int):
    """A test of what the library itself can do from a release on."""
    return pytest.mark.skipif(release > RELEASE, reason=f"new in transformers {'.'.join(map(str, release))}")


def child_environment(**more: str) -> dict[str, str]:
    """Of a process whose numbers are compared with those of this one: as many threads, so that sums are alike."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}
