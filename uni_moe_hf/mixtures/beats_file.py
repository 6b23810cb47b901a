"""BEATs as published: `BEATs_iter3*.pt`, a pickle of its settings (`cfg`) and its tensors (`model`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN

from ..hub.configuration_uni_moe import BeatsConfig
from ..hub.files_uni_moe import cause_of, reason
from ..hub.towers_uni_moe import BeatsModel
from .loading import load_pickle


BEATS_FIELDS = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "embed_dim": "patch_embedding_size",
    "input_patch_size": "patch_size",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_bucket_distance",
    "deep_norm": "deep_norm",
    "activation_fn": "hidden_act",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
}
BEATS_OPTIONAL = ("activation_fn", "dropout", "attention_dropout", "activation_dropout")
# What a BEATs can be and our encoder is not.
BEATS_FIXED = {
    "conv_bias": False,
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
# Our names -> theirs, where they differ.
KERNEL, FIRST_TABLE = "encoder.pos_conv.0", "encoder.layers.0.self_attn.relative_attention_bias.weight"
RENAMED = {"encoder.pos_conv.bias": f"{KERNEL}.bias", "encoder.relative_attention_bias.weight": FIRST_TABLE}
# The head of a finetuned one, and copies of the first layer's table.
DROPPED = re.compile(r"^predictor\.|^encoder\.layers\.\d+\.self_attn\.relative_attention_bias\.weight$")


def beats_config(cfg: Mapping[str, Any], source: str = "BEATs") -> BeatsConfig:
    """
    Args:
        cfg (`dict`): The entry of that name in a BEATs file.
        source (`str`, *optional*): Its name, for messages.

    Returns:
        [`BeatsConfig`].

    Raises:
        ValueError: a field is missing, or of a kind of BEATs that was never released.
    """
    if missing := [name for name in BEATS_FIELDS if name not in cfg and name not in BEATS_OPTIONAL]:
        raise ValueError(f"The `cfg` in '{source}' lacks {missing}; use a published BEATs checkpoint.")
    for name, known in BEATS_FIXED.items():
        if cfg.get(name, known) != known:
            raise ValueError(f"The `cfg` in '{source}' has `{name}={cfg[name]}`, but only {known} is supported.")
    try:
        config = BeatsConfig(**{ours: cfg[theirs] for theirs, ours in BEATS_FIELDS.items() if theirs in cfg})
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"The `cfg` in '{source}' describes no BEATs: {reason(cause_of(error))}") from error
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"The `cfg` in '{source}' has `activation_fn='{config.hidden_act}'`, which is not known.")
    return config


def is_beats_file(part: str | Path) -> bool:
    """Whether a part is named by a file, not by a folder or a Hub id."""
    return Path(part).is_file() or str(part).endswith((".pt", ".pth", ".bin"))


def read_beats_config(file: str | Path) -> BeatsConfig:
    """
    Args:
        file (`str` or `Path`): A BEATs checkpoint as published; its tensors are not read.

    Returns:
        [`BeatsConfig`].

    Raises:
        ValueError: it is none.
    """
    return beats_config(_content(file)["cfg"], str(file))


def read_beats(file: str | Path) -> BeatsModel:
    """
    Args:
        file (`str` or `Path`): A BEATs checkpoint as published, self-supervised or finetuned; of the latter the
            classifier is left out.

    Returns:
        [`BeatsModel`] in evaluation mode, with every weight from the file.

    Raises:
        ValueError: the file is damaged or no BEATs, or holds other tensors than its `cfg` describes.
    """
    content = _content(file)
    tensors, read, config = content["model"], set(), beats_config(content["cfg"], str(file))
    with torch.device("meta"):
        shapes = {name: tuple(own.shape) for name, own in BeatsModel(config).state_dict().items()}

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        read.add(name)
        found = tensors.get(name)
        is_plain = isinstance(found, torch.Tensor) and found.layout == torch.strided and not found.is_meta
        if not is_plain or not found.is_floating_point():
            raise ValueError(f"'{file}' holds no '{name}', which a BEATs of its `cfg` has; download it again.")
        if tuple(found.shape) != shape:
            raise ValueError(f"'{file}' holds '{name}' of shape {tuple(found.shape)}, but its `cfg` says {shape}.")
        return found.float()

    state = {}
    for name, shape in shapes.items():
        if name == "encoder.pos_conv.weight":  # stored as weight norm's two factors
            direction, length = tensor(f"{KERNEL}.weight_v", shape), tensor(f"{KERNEL}.weight_g", (1, 1, shape[-1]))
            value = direction * (length / direction.norm(dim=(0, 1), keepdim=True))
        else:
            value = tensor(RENAMED.get(name, name), shape)
        if not value.isfinite().all():
            raise ValueError(f"'{file}' makes NaN or infinite values of '{name}'; download it again.")
        state[name] = value
    for name in sorted(map(str, tensors.keys() - read)):
        if not DROPPED.search(name):
            raise ValueError(f"'{file}' holds '{name}', for which a BEATs of its `cfg` has no place.")
        table = tensors[FIRST_TABLE]
        if "relative_attention_bias" in name and not (
            isinstance(tensors[name], torch.Tensor) and torch.equal(tensors[name], table)
        ):
            raise ValueError(f"'{name}' in '{file}' differs from the first layer's, but BEATs has one for all layers.")
    model = BeatsModel(config).eval()
    model.load_state_dict(state)
    return model


def _content(file: str | Path) -> dict[str, Any]:
    content = load_pickle(file)
    for entry in ("cfg", "model"):
        if not isinstance(content.get(entry), Mapping):
            raise ValueError(f"'{file}' has no entry '{entry}'; give a BEATs checkpoint as published.")
    return content


__all__ = ["beats_config", "is_beats_file", "read_beats", "read_beats_config"]
