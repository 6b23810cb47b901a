"""Experts as vLLM's fused kernel takes them: LoRA is folded into weights of their own while a checkpoint loads."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedConfig

from ..hub.experts_uni_moe import ExpertLoraTensors, merged_weights


def merged_experts(weights: Iterable[tuple[str, torch.Tensor]], scaling: float) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors of a checkpoint whose experts have LoRA.
        scaling (`float`): What LoRA's products are multiplied by.

    Yields:
        `tuple[str, torch.Tensor]`: the same with plain experts, layer by layer, as `merge_expert_lora` makes them.

    Raises:
        ValueError: a tensor of some experts is missing.
    """
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in weights:
        layer, is_expert, rest = name.partition(".experts.")
        if not is_expert:
            yield name, tensor
            continue
        layers[layer][rest] = tensor
        if (made := _merged_layer(layers[layer], scaling)) is not None:
            del layers[layer]
            for projection, merged in zip(("gate_up_proj", "down_proj"), made, strict=True):
                yield f"{layer}.experts.{projection}", merged
    if layers:
        layer, held = next(iter(layers.items()))
        raise ValueError(f"The experts of '{layer}' are incomplete in this checkpoint: there is only {sorted(held)}.")


def whole_experts(
    weights: Iterable[tuple[str, torch.Tensor]], text_config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors of a checkpoint with plain experts.
        text_config ([`PreTrainedConfig`]): Says which layers are sparse.

    Yields:
        `tuple[str, torch.Tensor]`: the same.

    Raises:
        ValueError: a sparse layer lacks one of its two stacks.
    """
    sparse = [layer for layer, kind in enumerate(text_config.mlp_layer_types) if kind == "sparse"]
    missing = {f"layers.{layer}.mlp.experts.{stack}" for layer in sparse for stack in ("gate_up_proj", "down_proj")}
    for name, tensor in weights:
        missing.discard(name.partition("language_model.")[2])
        yield name, tensor
    if missing:
        raise ValueError(f"The checkpoint lacks the experts' weights {sorted(missing)}; save it again.")


def _merged_layer(held: dict[str, torch.Tensor], scaling: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Merged weights of a layer's experts, once all their tensors are there."""
    held = {name.removeprefix("base.").removesuffix(".weight"): tensor for name, tensor in held.items()}
    if {"gate_proj", "up_proj"} <= held.keys():
        held["gate_up_proj"] = torch.cat([held["gate_proj"], held["up_proj"]])
    lora = [held.get(f"lora.{field}") for field in ExpertLoraTensors._fields]
    frozen = [held.get(name) for name in ("gate_up_proj", "down_proj")]
    if any(tensor is None for tensor in (*lora, *frozen)):
        return None
    return merged_weights(*frozen, ExpertLoraTensors(*lora), scaling)
