"""Parts that a model is made from, tiny and random."""

import json
from pathlib import Path

import soundfile
import torch
from PIL import Image
from tiny import DENSE, picture, tiny_config, tiny_processor, tiny_tokenizer, tone, user
from transformers import (
    BitImageProcessorPil,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperModel,
)

from uni_moe_hf import BeatsModel


def parts():
    config = tiny_config(DENSE)
    torch.manual_seed(1)
    text = {
        k: v for k, v in config.text_config.to_dict().items() if k in LlamaConfig().to_dict() and k != "model_type"
    }
    return {
        "language_model": LlamaForCausalLM(LlamaConfig(**text)).eval(),
        "vision_tower": CLIPVisionModel(config.vision_config).eval(),
        "speech_tower": WhisperModel(config.speech_config).eval(),
        "audio_tower": BeatsModel(config.audio_config).eval(),
        "audio_connector_config": config.audio_connector_config.to_dict(),
    }


def write_parts(root: Path) -> Path:
    """The parts as folders, `qformer.json` for the audio connector, and a file of six rows with media, returned."""
    given = parts()
    for name, part in given.items():
        if name != "audio_connector_config":
            part.save_pretrained(root / name)
    tiny_tokenizer().save_pretrained(root / "language_model")
    tiny_processor().image_processor.save_pretrained(root / "vision_tower")
    (root / "qformer.json").write_text(json.dumps(given["audio_connector_config"]))
    (root / "media").mkdir()
    Image.fromarray(picture()).save(root / "media/a.png")
    soundfile.write(root / "media/a.wav", tone(), 16000)
    rows = []
    for part in (
        {"type": "image", "path": "media/a.png"},
        {"type": "speech", "path": "media/a.wav"},
        {"type": "audio", "path": "media/a.wav"},
    ):
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a bird"}]}
        rows += [{"messages": [*user(part, "what"), answer]}] * 2
    (root / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root / "rows.jsonl"


def save_dino(folder) -> str:
    """A DINOv2 with its own image processor: 40 pixels from 48 of a tower that was trained on 56."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    crop = {"height": 40, "width": 40}
    processor = BitImageProcessorPil(size={"shortest_edge": 48}, crop_size=crop, image_mean=[0.4] * 3)
    processor.save_pretrained(folder)
    return str(folder)
