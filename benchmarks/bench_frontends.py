"""
Sound and pictures to features: ours against Transformers' own paths, as ratios inside one run.

    OMP_NUM_THREADS=1 python benchmarks/bench_frontends.py [--repeats 15] [--output benchmarks/results/frontends.md]

One thread, the process's CPU time, the two variants in turn; medians of the quotients of one round, with the middle
half of them. Largest differences are between what the model would get from either.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from comparing import alternate, publish, quotient
from PIL import Image
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import spectrogram, window_function
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from uni_moe_hf import UniMoEFeatureExtractor, UniMoEProcessor


RATE = 16000


def sound(seconds: float) -> np.ndarray:
    """Noise that falls off towards high frequencies, as recordings do."""
    steps = np.random.default_rng(0).standard_normal(int(seconds * RATE))
    return (0.02 * np.convolve(steps, [1, 1, 1, 1, 1], mode="same")).astype(np.float32)


def picture() -> Image.Image:
    """1024 x 768 pixels."""
    walk = np.cumsum(np.random.default_rng(0).standard_normal((768, 1024, 3)), axis=1)
    return Image.fromarray(np.clip(6 * walk + 128, 0, 255).astype(np.uint8))


def library_fbank(waveform: np.ndarray, extractor: UniMoEFeatureExtractor, filters: np.ndarray) -> np.ndarray:
    """BEATs' features through the library's `spectrogram`."""
    energies = spectrogram(
        waveform.astype(np.float64) * 2**15,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
    )
    return (energies.T - extractor.fbank_mean) / (2 * extractor.fbank_std)


def pairs() -> list[tuple[str, Callable, Callable]]:
    """What is compared: a name, the library's way and ours, each to one array."""
    ten, thirty = UniMoEFeatureExtractor(chunk_length=10), UniMoEFeatureExtractor()
    whisper, filters = WhisperFeatureExtractor(), ten._fbank_filters.double().numpy()
    clip, speech, image = sound(10), sound(30), picture()
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    clip_processor = CLIPImageProcessorPil(**size)
    processor = UniMoEProcessor.__new__(UniMoEProcessor)  # its pictures need neither tokenizer nor ears
    processor.image_processor = clip_processor
    padded = np.pad(speech[: 10 * RATE], (0, 20 * RATE))
    asked = {"return_tensors": "np"}

    def numpy_log_mel(waveform: np.ndarray) -> np.ndarray:
        return whisper._np_extract_fbank_features(waveform[None], "cpu")[0]

    def torch_log_mel(waveform: np.ndarray) -> np.ndarray:
        return whisper._torch_extract_fbank_features(waveform[None])[0]

    return [
        ("fbank, 10 s, `spectrogram` (NumPy)", lambda: library_fbank(clip, ten, filters), lambda: ten._fbank(clip)),
        ("log-mel, 30 s, NumPy", lambda: numpy_log_mel(speech), lambda: thirty._log_mel(speech)),
        ("log-mel, 30 s, torch", lambda: torch_log_mel(speech), lambda: thirty._log_mel(speech)),
        ("log-mel, 10 s in 30 s, torch", lambda: torch_log_mel(padded), lambda: thirty._log_mel(speech[: 10 * RATE])),
        (
            "picture, 1024 x 768 to 336, Pillow",
            lambda: clip_processor([image], **asked)["pixel_values"][0],
            lambda: processor._pixels([image], asked)[0],
        ),
    ]


def seconds(way: Callable) -> float:
    """CPU time of one call."""
    start = time.process_time()
    way()
    return time.process_time() - start


def main() -> None:
    """Prints a table, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("Set OMP_NUM_THREADS=1: NumPy's threads would spin beside ours, and count.")
    torch.set_num_threads(1)
    lines = [
        f"Front ends, {date.today()}, torch {torch.__version__}, 1 thread, {args.repeats} rounds.",
        "",
        "| input, and the library's path | library, ms | ours, ms | library / ours (middle half) | difference |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, library, ours in pairs():
        difference = np.abs(library() - ours()).max()
        slow, fast = alternate(partial(seconds, library), partial(seconds, ours), args.repeats)
        lines.append(
            f"| {name} | {1000 * statistics.median(slow):.1f} | {1000 * statistics.median(fast):.2f} "
            f"| {quotient(slow, fast, digits=1)} | {difference:.1e} |"
        )
    publish(lines, args.output)


if __name__ == "__main__":
    main()
