"""BEATs as published: `BEATs_iter3*.pt`, a pickle of its settings (`cfg`) and its tensors (`model`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..hub.configuration_uni_moe import BeatsConfig
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
    return BeatsConfig(**{ours: cfg[theirs] for theirs, ours in BEATS_FIELDS.items() if theirs in cfg})


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
    tensors, read = content["model"], set()
    model = BeatsModel(beats_config(content["cfg"], str(file))).eval()

    def tensor(name: str) -> torch.Tensor:
        read.add(name)
        found = tensors.get(name)
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            raise ValueError(f"'{file}' holds no '{name}', which a BEATs of its `cfg` has; download it again.")
        return found.float()

    state = {}
    for name, own in model.state_dict().items():
        if name == "encoder.pos_conv.weight":  # stored as weight norm's two factors
            direction, length = tensor(f"{KERNEL}.weight_v"), tensor(f"{KERNEL}.weight_g")
            value = direction * (length / direction.norm(dim=(0, 1), keepdim=True))
        else:
            value = tensor(RENAMED.get(name, name))
        if value.shape != own.shape:
            raise ValueError(
                f"'{file}' holds '{name}' of shape {tuple(value.shape)}; its `cfg` says {tuple(own.shape)}."
            )
        state[name] = value
    for name in sorted(tensors.keys() - read):
        if not DROPPED.search(name):
            raise ValueError(f"'{file}' holds '{name}', for which a BEATs of its `cfg` has no place.")
        if "relative_attention_bias" in name and not torch.equal(tensors[name], tensors[FIRST_TABLE]):
            raise ValueError(f"'{name}' in '{file}' differs from the first layer's, but BEATs has one for all layers.")
    model.load_state_dict(state)
    return model


def _content(file: str | Path) -> dict[str, Any]:
    content = load_pickle(file)
    for entry in ("cfg", "model"):
        if not isinstance(content.get(entry), Mapping):
            raise ValueError(f"'{file}' has no entry '{entry}'; give a BEATs checkpoint as published.")
    return content


__all__ = ["beats_config", "is_beats_file", "read_beats", "read_beats_config"]
