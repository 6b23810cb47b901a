r"""
The original's checkpoint format as tables and pure functions: which of its tensors each of ours is made of.

A tensor of ours is made of *parts*, each named by the *role* of the file it stands in and by its key there. Converting
reads parts and writes tensors; reverting reads slices of tensors and writes parts.

Source: the formats of Uni-MoE (https://huggingface.co/papers/2405.11273) as `*/train/train.py@f5e82dd` writes and
`*/model/all_builder.py@f5e82dd` reads them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import WhisperConfig

from ..hub.configuration_uni_moe import MAX_DEPTH
from .checkpoints import TensorInfo


Key = tuple[str, str]  # role, key within its file

# Our key -> the role and the key it comes from; the first pattern counts. Experts follow from `Layout`.
SOURCES = (
    (r"lm_head\.(.+)", "base", r"lm_head.\1"),
    (r"model\.language_model\.(layers\.\d+\.mlp\.gate\.weight)", "gates", r"model.\1"),
    (r"model\.language_model\.(.+)", "base", r"model.\1"),
    (r"model\.vision_connector\.projector\.(.+)", "projector", r"model.mm_projector.\1"),
    (r"model\.speech_connector\.query_tokens", "aligner", "model.query_tokens"),
    (r"model\.speech_connector\.decoder\.(.+)", "aligner", r"model.mm_audio_aligner.decoder.audio_decoder.\1"),
    (r"model\.audio_connector\.query_tokens", "aligner", "model.mm_audio_aligner.query_tokens"),
    (r"model\.audio_connector\.qformer\.(.+)", "aligner", r"model.mm_audio_aligner.qformer.qformer.\1"),
    (r"model\.(?:speech|audio)_connector\.projector\.(.+)", "aligner", r"model.mm_audio_aligner.projector.\1"),
    (r"model\.vision_tower\.(.+)", "vision", r"\1"),
    (r"model\.speech_tower\.(.+)", "speech", r"encoder.\1"),
    (r"model\.audio_tower\.encoder\.pos_conv\.weight", "audio", "encoder.pos_conv.0.weight_v"),
    (r"model\.audio_tower\.encoder\.pos_conv\.bias", "audio", "encoder.pos_conv.0.bias"),
    (
        r"model\.audio_tower\.encoder\.(relative_attention_bias\.weight)",
        "audio",
        r"encoder.layers.0.self_attn.\1",
    ),
    (r"model\.audio_tower\.(.+)", "audio", r"\1"),
)

# What the model has no use for, by role.
DROPPED = {
    # Buffers, and the query decoder's word table, which queries go past.
    "base": r"\.rotary_emb\.inv_freq$|\.audio_decoder\.embed_tokens\.weight$",
    "aligner": r"\.audio_decoder\.embed_tokens\.weight$",
    "gates": r"\.mlp\.gate\.lora_[AB]\.weight$",  # the adapter's, once more
    "expert_lora": r"deepspeed_experts\.0\.(gate|up|down)_proj\.weight$",  # frozen, in the experts' own files
    # The text half of a CLIP, buffers; the half of a Whisper that the connector replaces; one table in every layer.
    "vision": r"^text_model\.|^(visual|text)_projection\.|^logit_scale$|\.position_ids$",
    "speech": r"^decoder\.|^proj_out\.",
    "audio": r"^encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
}
# Of a base: towers, which come from their own files (the speech variant's holds a random Whisper besides); and the
# feed-forward layers of the base that the 8-expert set shares with another model.
FOREIGN = r"^model\.(audio|vision)_tower\."
FOREIGN_EIGHT = r"\.mlp\.(experts\.\d+\.(gate|up|down)_proj|gate)\.weight$"
ROUTER_LORA = r"\.mlp\.gate\.lora_[AB]\.weight$"

# Files of a finetuned folder, by role.
FINETUNED = {
    "adapter": "adapter_model.bin",
    "projector": "non_lora_trainables.bin",
    "aligner": "mm_audio_aligner.bin",
    "gates": "mlp_gates.bin",
}
# Files of the 8-expert set, in the order in which its loader deals them out to experts 0, 1, ...
EIGHT_EXPERTS = ("audiocap", "basev", "base", "base1", "base4", "base7", "base", "base7")

# What a contradiction most often means, by role.
HINTS = {
    "base": "does its config.json belong to its weights?",
    "adapter": "is the adapter for another base?",
    "projector": "are vision tower and base those that it was trained with?",
    "aligner": "are tower and base those that it was trained with?",
    "gates": "is it of the same model as the base?",
    "experts": "are the experts for another base?",
    "expert_lora": "is it of the same model as the experts?",
    "vision": "does its config.json belong to its weights?",
    "speech": "does its config.json belong to its weights?",
    "audio": "is it a self-supervised BEATs?",
}

TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling bos_token_id eos_token_id "
    "pad_token_id tie_word_embeddings num_experts_per_tok"
).split()
# No file states the number of heads of the Q-Former; the released one is a BLIP-2 Q-Former with its defaults.
QFORMER_HEADS = 12


class Part(NamedTuple):
    """A tensor of the original; where its LoRA factors A and B stand; the norm to which it is scaled."""

    key: Key
    lora: tuple[Key, Key] | None = None
    norm: Key | None = None


@dataclass(frozen=True)
class Layout:
    """
    How the original names experts and routers.

    Args:
        eight (`bool`): The 8-expert set's way: DeepSpeed's names, and a file for each expert.
        num_experts (`int`): Experts of a layer.
    """

    eight: bool
    num_experts: int

    def expert_names(self) -> list[str] | None:
        """After their files, where experts have files."""
        if not self.eight:
            return None
        files = [self._expert_file(expert) for expert in range(self.num_experts)]
        return [name if name not in files[:index] else f"{name}_{index}" for index, name in enumerate(files)]

    def parts_of(self, target: str) -> list[Part]:
        """
        Args:
            target (`str`): A tensor of ours.

        Returns:
            `list[Part]`: what it is made of, in the order in which the parts fill it.

        Raises:
            ValueError: the original has nothing like it.
        """
        if match := re.fullmatch(r"model\.language_model\.layers\.(\d+)\.mlp\.experts\.(.+)", target):
            return list(self._expert_parts(int(match[1]), match[2]))
        if self.eight and (match := re.fullmatch(r"model\.language_model\.(layers\.\d+\.mlp)\.gate\.weight", target)):
            return [Part(("gates", f"model.{match[1]}.deepspeed_moe.gate.wg.weight"))]
        for pattern, role, template in SOURCES:
            if match := re.fullmatch(pattern, target):
                key = match.expand(template)
                norm = (role, f"{key.removesuffix('_v')}_g") if key.endswith(".weight_v") else None
                return [Part((role, key), _lora_keys(key) if role in ("base", "gates") else None, norm)]
        raise ValueError(f"The original holds nothing that becomes '{target}'.")

    def _expert_parts(self, layer: int, tensor: str) -> Iterator[Part]:
        for expert in range(self.num_experts):
            for projection in ("gate", "up") if "gate_up" in tensor else ("down",):
                part = self._expert_part(layer, expert, projection)
                if tensor.startswith("lora."):
                    part = Part(part.lora["ab".index(tensor[-1])])
                yield part

    def _expert_part(self, layer: int, expert: int, projection: str) -> Part:
        if not self.eight:
            key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
            return Part(("base", key), _lora_keys(key))
        key = f"model.layers.{layer}.mlp.{projection}_proj.weight"
        lora = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.0.{projection}_proj_lora"
        role = f"expert_lora.{expert}"
        return Part(
            (f"experts.{self._expert_file(expert)}", key), ((role, f"{lora}_A.weight"), (role, f"{lora}_B.weight"))
        )

    def _expert_file(self, expert: int) -> str:
        return EIGHT_EXPERTS[expert % len(EIGHT_EXPERTS)]


def _lora_keys(weight: str) -> tuple[Key, Key]:
    stem = weight.removesuffix(".weight")
    return ("adapter", f"{stem}.lora_A.weight"), ("adapter", f"{stem}.lora_B.weight")


def canonical(role: str) -> Callable[[str], str]:
    """
    Args:
        role (`str`): Of a file.

    Returns:
        `Callable`: from the keys found in such files, which differ in their prefixes, to the keys of the tables.
    """
    kind = role.split(".")[0]

    def rename(key: str) -> str:
        if kind == "vision":
            return key.removeprefix("vision_model.")
        if kind == "speech":
            return key.removeprefix("model.")
        if kind in ("base", "audio"):
            return key
        key = re.sub(r"^(base_model\.model\.)?(model\.)+", "model.", key).replace(".default.", ".")
        if kind in ("projector", "aligner") and (found := re.search(r"mm_(projector|audio_aligner)\..+", key)):
            return f"model.{found[0]}"
        if kind == "aligner" and key.endswith("query_tokens"):
            return "model.query_tokens"
        if kind == "experts" and len(fields := key.split(".")) >= 5:  # as the loader parses them
            return f"model.layers.{fields[2]}.mlp.{fields[-2]}.weight"
        return re.sub(r"deepspeed_experts\.\d+\.", "deepspeed_experts.0.", key)

    return rename


def is_dropped(role: str, key: str, layout: Layout) -> bool:
    """
    Args:
        role, key (`str`): A tensor of the original.
        layout ([`Layout`]): Of its model.

    Returns:
        `bool`: whether the model has no use for it.
    """
    pattern = DROPPED.get(role.split(".")[0])
    if pattern and re.search(pattern, key):
        return True
    return is_foreign(role, key, layout)


def is_foreign(role: str, key: str, layout: Layout) -> bool:
    """
    Args:
        role, key (`str`): A tensor of the original.
        layout ([`Layout`]): Of its model.

    Returns:
        `bool`: whether it is no part of the model in the original either: another model's experts, a random tower.
    """
    pattern = rf"{FOREIGN}|{FOREIGN_EIGHT}" if layout.eight else FOREIGN
    return role == "base" and re.search(pattern, key) is not None


def is_stack(target: str) -> bool:
    """Whether a tensor of ours stacks those of all experts: `(experts, rows, columns)`."""
    return target.startswith("model.language_model.") and ".mlp.experts." in target


def part_shape(target: str, shape: tuple[int, ...], num_parts: int) -> tuple[int, ...]:
    """
    Args:
        target (`str`): A tensor of ours.
        shape (`tuple[int]`): Its shape.
        num_parts (`int`): Of how many equal parts it is made; they fill stacks row by row.

    Returns:
        `tuple[int]`: the shape of each part.
    """
    if not is_stack(target):
        return shape
    experts, rows, columns = shape
    return experts * rows // num_parts, columns


# --- From keys and shapes to configuration


def layout_of(base: Mapping[str, TensorInfo], gates: Mapping[str, TensorInfo] | None) -> tuple[Layout, list[int]]:
    """
    Args:
        base, gates (`dict[str, TensorInfo]`): Canonical keys of the base and, if any, of the routers' file.

    Returns:
        `tuple(Layout, list[int])`: the way experts are named, and the indices of the sparse layers.

    Raises:
        ValueError: there are no routers.
    """
    for eight, pattern in (
        (True, r"model\.layers\.(\d+)\.mlp\.deepspeed_moe\.gate\.wg\.weight"),
        (False, r"model\.layers\.(\d+)\.mlp\.gate\.weight"),
    ):
        found = {}
        for info in (gates or {},) if eight else (base, gates or {}):
            found |= {int(match[1]): info[key] for key in info if (match := re.fullmatch(pattern, key))}
        if found:
            shape = found[min(found)].shape
            if len(shape) != 2:
                raise ValueError(f"The router of layer {min(found)} has shape {shape}, not (experts, hidden_size).")
            return Layout(eight, shape[0]), sorted(found)
    raise ValueError(
        "The base holds no router (model.layers.*.mlp.gate.weight): it is no Uni-MoE; a dense LLM becomes one through "
        "`uni_moe_hf.from_pretrained_parts` and the three stages."
    )


def text_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    Args:
        config (`dict`): The original's `config.json`.
        source (`str`): Its name, for messages.

    Returns:
        `dict`: fields of the `text_config`.

    Raises:
        ValueError: it describes something that the model cannot be.
    """
    for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts_per_tok"):
        if config.get(field) is None:
            raise ValueError(f"'{source}' does not state `{field}`; use the config.json that came with the weights.")
    depth = config["num_hidden_layers"]
    if not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"'{source}' states `num_hidden_layers={depth!r}`, which must lie between 1 and {MAX_DEPTH}.")
    for field, known in (("mm_projector_type", "mlp2x_gelu"), ("audio_projector_type", "linear")):
        if config.get(field, known) != known:
            raise ValueError(f"'{source}' has `{field}={config[field]!r}`, but only {known!r} was ever released.")
    if config.get("use_fm_block"):
        raise ValueError(f"'{source}' has `use_fm_block=True`, which no released model uses and this one lacks.")
    return {field: config[field] for field in TEXT_FIELDS if config.get(field) is not None}


def ear_of(keys: Mapping[str, TensorInfo]) -> str:
    """
    Args:
        keys (`dict[str, TensorInfo]`): Canonical keys of the connector.

    Returns:
        `str`: `"audio"` for a Q-Former, `"speech"` for a query decoder.

    Raises:
        ValueError: there is neither.
    """
    for ear, name in (("audio", "qformer"), ("speech", "decoder")):
        if any(key.startswith(f"model.mm_audio_aligner.{name}.") for key in keys):
            return ear
    raise ValueError("There is no connector (model.mm_audio_aligner.*), neither a Q-Former nor a query decoder.")


def qformer_fields(keys: Mapping[str, TensorInfo]) -> tuple[int, dict[str, Any]]:
    """
    Args:
        keys (`dict[str, TensorInfo]`): Canonical keys of the connector.

    Returns:
        `tuple(int, dict)`: number of queries, and fields of `Blip2QFormerConfig`.

    Raises:
        ValueError: a key is missing, or cross-attention does not stand in every n-th layer.
    """
    prefix = "model.mm_audio_aligner.qformer.qformer.encoder.layer."
    depth, crossed = _layers(keys, prefix), _layers(keys, prefix, r"\.crossattention\.")
    period = crossed[1] - crossed[0] if len(crossed) > 1 else len(depth)
    if not crossed or crossed != depth[::period]:
        raise ValueError(f"The Q-Former has cross-attention in layers {crossed} of {len(depth)}, not in every n-th.")
    _, queries, hidden = _shape(keys, "model.mm_audio_aligner.query_tokens")
    if hidden % QFORMER_HEADS:
        raise ValueError(f"The Q-Former is {hidden} wide, which its {QFORMER_HEADS} heads do not divide.")
    return queries, {
        "hidden_size": hidden,
        "num_hidden_layers": len(depth),
        "num_attention_heads": QFORMER_HEADS,
        "intermediate_size": _shape(keys, f"{prefix}0.intermediate_query.dense.weight")[0],
        "cross_attention_frequency": period,
    }


def query_decoder_fields(keys: Mapping[str, TensorInfo], whisper: WhisperConfig) -> tuple[int, dict[str, Any]]:
    """
    Args:
        keys (`dict[str, TensorInfo]`): Canonical keys of the connector.
        whisper (`WhisperConfig`): Of the tower.

    Returns:
        `tuple(int, dict)`: number of queries, and the fields of the decoder half of a `WhisperConfig`.

    Raises:
        ValueError: a key is missing, or tower and connector differ in width.
    """
    prefix = "model.mm_audio_aligner.decoder.audio_decoder."
    _, queries, width = _shape(keys, "model.query_tokens")
    if width != whisper.d_model:
        raise ValueError(
            f"The query decoder is {width} wide but the speech tower {whisper.d_model}; give the Whisper that the "
            "model was trained with."
        )
    return queries, {
        "decoder_layers": len(_layers(keys, f"{prefix}layers.")),
        "decoder_ffn_dim": _shape(keys, f"{prefix}layers.0.fc1.weight")[0],
        "max_target_positions": _shape(keys, f"{prefix}embed_positions.weight")[0],
    }


def _layers(keys: Mapping[str, TensorInfo], prefix: str, suffix: str = r"\.") -> list[int]:
    return sorted({int(match[1]) for key in keys if (match := re.match(rf"{re.escape(prefix)}(\d+){suffix}", key))})


def _shape(keys: Mapping[str, TensorInfo], key: str) -> tuple[int, ...]:
    if key not in keys:
        raise ValueError(f"The connector lacks '{key}'; the file is of another kind, or incomplete.")
    return keys[key].shape


__all__ = [
    "FINETUNED",
    "HINTS",
    "ROUTER_LORA",
    "Key",
    "Layout",
    "Part",
    "canonical",
    "ear_of",
    "is_dropped",
    "is_foreign",
    "is_stack",
    "layout_of",
    "part_shape",
    "qformer_fields",
    "query_decoder_fields",
    "text_fields",
]
