"""Clips, conversations and their tokens, for tests of processors."""

from itertools import groupby
from pathlib import Path

import av
import numpy as np
import torch
from tiny import film, picture, tone

from uni_moe_hf import UniMoEProcessor


MODALITIES = ("image", "video", "audio", "speech")


# Tokens of one clip of the tiny model: 2 x 2 patches, the same after pooling frames, queries of one window.
NUM_TOKENS = {"image": 4, "video": 4, "audio": 5, "speech": 3}


FILES = {"image": "picture.png", "video": "film.mp4", "audio": "sound.wav", "speech": "sound.wav"}


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


# Levels of grey of a test video's frames, far enough apart to be told through lossy compression.
GREYS = [30, 70, 110, 150, 190, 230]


def write_video(path: Path, greys: list[int], sound: np.ndarray | None = None) -> None:
    """One flat frame for each level of grey, 5 per second, H.264, with an AAC track of `sound` at 16 kHz."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("libx264", rate=5)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=16000, layout="mono")
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if track is not None:
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(track.encode(frame))
            container.mux(track.encode())


def clip(modality: str, seed: int = 0, seconds: float = 0.3):
    if modality in ("image", "video"):
        return {"image": picture, "video": film}[modality](seed)
    return tone(seconds, pitch=300 + 50 * seed)


def part(modality: str, seed: int = 0, seconds: float = 0.3) -> dict:
    return {"type": modality, modality: clip(modality, seed, seconds)}


def turn(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def encode(processor: UniMoEProcessor, conversation: list, **kwargs) -> dict:
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(conversation, **kwargs)


def tokens(processor: UniMoEProcessor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


def runs(processor: UniMoEProcessor, ids) -> list[tuple[str, int]]:
    """Placeholders in order, equal neighbours counted together."""
    placeholders = {f"<{modality}>" for modality in MODALITIES}
    return [(t[1:-1], len(list(same))) for t, same in groupby(tokens(processor, ids)) if t in placeholders]


def assert_same(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
