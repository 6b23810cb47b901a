"""
What the features of a clip follow from: the tower's weights and settings, the front end's, and the clip's content. A
cache compares the first two with its own, and finds a clip by the third.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..hub.files_uni_moe import resolved


# Of configs and front ends: says where they come from, not what they do.
UNTOLD = {"transformers_version", "architectures", "dtype", "torch_dtype", "processor_class", "auto_map"}
UNTOLD |= {"id2label", "label2id"}


def encoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that has towers, whatever has wrapped it."""
    return next(module for module in model.modules() if hasattr(type(module), "run_towers"))


def tower_identities(model: nn.Module, processor: Any) -> dict[str, dict[str, Any]]:
    """
    Args:
        model ([`UniMoEForConditionalGeneration`]): With its towers in memory.
        processor ([`UniMoEProcessor`]): Of the model.

    Returns:
        `dict`: tower -> all that its features follow from besides the clip: "weights" (a digest), "dtype", "config",
        "reads" and "front_end".

    Raises:
        ValueError: a tower is not in memory.
    """
    encoder, found = encoder_of(model), {}
    config, extractor = encoder.config, processor.feature_extractor
    ear = {"sampling_rate": extractor.sampling_rate, "chunk_length": extractor.chunk_length}
    pictures = _told(processor.image_processor.to_dict()) | {"image_mode": processor.image_mode}
    kind = type(processor.image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    front_ends = {"vision": pictures | {"image_processor_type": kind}}
    own = {**ear, "num_mel_bins": extractor.num_audio_mel_bins, "feature_extractor_type": "of BEATs"}
    front_ends["audio"] = _told(extractor.audio_front_end or own)
    speech = ("feature_size", "hop_length", "n_fft", "dither", "cut_speech_windows")
    front_ends["speech"] = ear | {name: getattr(extractor, name) for name in speech}
    for name, front_end in front_ends.items():
        if getattr(config, f"{name}_config") is None:
            continue
        if (tower := getattr(encoder, f"{name}_tower")) is None:
            raise ValueError(f"The {name} tower is not in memory; open the feature cache before it is unloaded.")
        about = {"weights": _digest_of(tower), "dtype": str(tower.dtype).removeprefix("torch.")}
        about |= {"config": _told(tower.config.to_dict()), "front_end": front_end}
        if name == "vision":
            fields = ("vision_feature_layer", "vision_feature_select_strategy", "vision_prefix_length")
            about["reads"] = {field: getattr(config, field) for field in fields}
        found[name] = json.loads(json.dumps(about, default=str))
    return found


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in UNTOLD and not name.startswith("_")}


def _digest_of(tower: nn.Module) -> str:
    """Of the weights, by name and value."""
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(tower.state_dict().items()):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def difference(stored: Any, wanted: Any, name: str = "") -> str:
    """
    The first setting that differs; empty where none does. A setting that one side does not know is not compared: of
    another release of the library.
    """
    if isinstance(stored, dict) and isinstance(wanted, dict) and name.count(".") == 0:
        for key in stored.keys() & wanted.keys():
            if found := difference(stored[key], wanted[key], f"{name}.{key}" if name else key):
                return found
        return ""
    if stored == wanted:
        return ""
    return "its weights differ" if name == "weights" else f"`{name}` is {stored!r} there and {wanted!r} here"


def content_digest(source: Any, kind: str, uploads_only: bool) -> str:
    """A digest of a clip's content."""
    if isinstance(source, Mapping) and (array := source.get("array", source.get("raw"))) is not None:
        return content_digest((array, source.get("sampling_rate")), kind, uploads_only)
    if (
        source is None
        or isinstance(source, list | tuple)
        or hasattr(source, "__array__")
        or hasattr(source, "getexif")
    ):
        return _content_of_values(source, kind, uploads_only)
    source = resolved(source, kind, uploads_only)
    if isinstance(source, str):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    if isinstance(source, bytes):
        return hashlib.blake2b(source).hexdigest()
    raise ValueError(
        f"{kind} is a {type(source).__name__}, which a feature cache cannot tell from another; give a path, bytes or "
        "an array."
    )


def _content_of_values(source: Any, kind: str, uploads_only: bool) -> str:
    """A digest of an array, a PIL picture, or of several."""
    digest = hashlib.blake2b()
    if isinstance(source, list | tuple) and not all(isinstance(value, int | float) for value in source):
        parts = [
            str(each) if each is None or isinstance(each, int | float) else content_digest(each, kind, uploads_only)
            for each in source
        ]
        digest.update(json.dumps(parts).encode())
        return digest.hexdigest()
    if hasattr(source, "getexif"):  # its pixels, and how they are read
        digest.update(f"{source.mode} {source.getexif().get(0x0112)} {source.info.get('transparency')}".encode())
        if (palette := source.getpalette("RGBA")) is not None:
            digest.update(bytes(palette))
    if isinstance(source, torch.Tensor):
        told = f"{source.dtype} {tuple(source.shape)}".encode()
        values = source.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.blake2b(told + values.tobytes()).hexdigest()
    array = np.ascontiguousarray(np.asarray(source))
    if array.dtype == object:
        raise ValueError(f"{kind} has no source: neither a path, nor bytes, nor an array.")
    digest.update(f"{array.dtype.str} {array.shape}".encode())
    digest.update(array.tobytes())
    return digest.hexdigest()


__all__ = ["content_digest", "difference", "encoder_of", "tower_identities"]
