"""
Growing a mixture of experts from a dense model and PEFT adapters.

The decoder's own feed-forward modules move into the mixture: nothing is copied that can be shared.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..hub.configuration_uni_moe import check_mixture, is_sparse
from ..hub.experts_uni_moe import UniMoESparseMoeBlock, gated_weights
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from .expert_adapters import ExpertAdapter, check_is_ours, choose_projectors, read_expert


logger = logging.get_logger(__name__)


@torch.no_grad()
def grow_experts(
    model: UniMoEForConditionalGeneration,
    experts: Mapping[str, str | Path | None],
    shared_base: bool = True,
    layers: str | list[int] = "all",
    num_experts_per_tok: int = 2,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    projectors: Mapping[str, str] | None = None,
) -> UniMoEForConditionalGeneration:
    r"""
    Turns a dense model into a mixture of experts, one per stage-2 adapter. Works in place and returns the model.

    With a shared base each adapter *becomes* an expert: routed to that expert alone, the model computes what the dense
    model with the adapter computes, to rounding (with `layers="all"`; a layer that stays dense keeps the plain LLM's
    feed-forward network, as in the original). With own bases each adapter is merged into a copy, and a fresh LoRA is
    added, as in the paper.

    Args:
        model ([`UniMoEForConditionalGeneration`]): Dense, the parent of all adapters.
        experts (`dict[str, str | Path | None]`): Expert name -> adapter folder; `None` is the plain LLM's network.
        shared_base (`bool`, *optional*, defaults to `True`): One frozen network for all experts, or a copy for each.
        layers (`str` or `list[int]`, *optional*, defaults to `"all"`): `"all"`, `"even"`, or the sparse layers.
        num_experts_per_tok (`int`, *optional*, defaults to 2): Experts per token.
        lora_rank (`int`, *optional*, defaults to 8): Rank of the fresh LoRA of own bases. With a shared base the
            adapters' largest rank counts instead, smaller ones are filled up without changing the function.
        lora_alpha (`float`, *optional*, defaults to 16): Its scale.
        lora_dropout (`float`, *optional*, defaults to 0.05): Dropout on the experts' LoRA.
        projectors (`dict[str, str]`, *optional*): Modality ("image", "speech", ...) -> the expert whose trained
            projector to keep; needed where experts bring different ones for the same connector.

    Returns:
        The same model, with sparse layers.

    Raises:
        ValueError: the model is sparse already or quantised, an adapter does not fit, or experts disagree about a
            projector. Nothing has been changed then.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.3.
    """
    check_is_ours(model)
    if not isinstance(experts, Mapping):
        raise ValueError(f"`experts` is a {type(experts).__name__}; map each expert's name to its adapter or `None`.")
    config = model.config.text_config
    if getattr(model, "is_quantized", False):
        raise ValueError("Experts are grown from an unquantised model; quantise what has been grown when loading it.")
    if is_sparse(config):
        raise ValueError(
            f"The model already has {config.num_experts} experts in {config.mlp_layer_types.count('sparse')} layers; "
            "experts are grown from a dense model."
        )
    if model.config.stage == "experts" and not hasattr(model, "_stage_before"):
        raise ValueError(
            "This model has had stage 'experts', so its feed-forward layers already hold an expert; grow from what "
            "stage 1 left, with that expert's adapter."
        )
    if any(parameter.is_meta for parameter in model.model.language_model.parameters()):
        raise ValueError("Layers are offloaded or empty; load the whole model into memory to grow experts.")
    kinds = _layer_types(layers, config.num_hidden_layers)
    sparse = [index for index, kind in enumerate(kinds) if kind == "sparse"]
    adapters = {
        name: None if folder is None else read_expert(name, folder, config, sparse) for name, folder in experts.items()
    }
    given = [adapter for adapter in adapters.values() if adapter is not None]
    chosen = choose_projectors(model, given, projectors or {})
    if shared_base and given:
        largest = max(given, key=lambda adapter: adapter.rank)
        lora_rank, lora_alpha = largest.rank, largest.scaling * largest.rank
    fields = {
        "mlp_layer_types": kinds,
        "num_experts": len(adapters),
        "num_experts_per_tok": num_experts_per_tok,
        "expert_names": list(adapters),
        "shared_expert_base": shared_base,
        "expert_lora_rank": lora_rank,
        "expert_lora_alpha": lora_alpha,
        "expert_lora_dropout": lora_dropout,
    }
    check_mixture(config, **fields)  # before anything is changed

    if len(adapters) == num_experts_per_tok > 1:
        logger.warning(
            f"Every token goes to all {len(adapters)} experts (`num_experts_per_tok={num_experts_per_tok}`), so there "
            "is nothing to route; lower it, or add experts."
        )
    for name, value in fields.items():
        setattr(config, name, value)
    decoder = model.model.language_model
    for index, layer in enumerate(decoder.layers):
        if config.mlp_layer_types[index] == "sparse":
            layer.mlp = _grown_block(layer.mlp, config, list(adapters.values()), index, decoder._init_weights)
    model.load_state_dict({f"model.{key}": tensor for key, tensor in chosen.items()}, strict=False)
    return model


def _layer_types(layers: str | list[int], num_layers: int) -> list[str]:
    indices = (
        {"all": range(num_layers), "even": range(0, num_layers, 2)}.get(layers) if isinstance(layers, str) else layers
    )
    if not indices or not all(isinstance(index, int) and 0 <= index < num_layers for index in indices):
        raise ValueError(f"`layers={layers!r}` must be 'all', 'even' or indices below the {num_layers} layers.")
    return ["sparse" if index in indices else "dense" for index in range(num_layers)]


def _grown_block(
    mlp: nn.Module, config: PreTrainedConfig, adapters: list[ExpertAdapter | None], layer: int, init_weights
) -> UniMoESparseMoeBlock:
    """A mixture in place of `mlp`, which a shared base is; the router starts fresh."""
    weight = mlp.down_proj.weight
    with torch.device("meta"):
        block = UniMoESparseMoeBlock(config, mlp)
    wide = torch.promote_types(weight.dtype, torch.float32)  # of what will be trained
    for module, dtype in ((block.gate, wide), (block.experts, weight.dtype), (block.experts.lora, wide)):
        if module is not None:
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device=weight.device, dtype=dtype)
                setattr(module, name, nn.Parameter(empty))
    for module in block.modules():
        if module is not mlp and not isinstance(module, nn.Linear):
            init_weights(module)

    bases = gated_weights(mlp)
    for expert, adapter in enumerate(adapters):
        factors = {} if adapter is None else {
            (projection, side): tensor.to(weight.device, torch.float32)
            for (at, projection, side), tensor in adapter.factors.items()
            if at == layer
        }  # fmt: skip
        if block.experts.shared_base:
            _fill_lora(block.experts, expert, adapter, factors)
        else:
            for row, (name, base) in enumerate(zip(("gate", "up", "down"), bases, strict=True)):
                merged = base.float()
                if adapter is not None:
                    merged = merged + adapter.scaling * (factors[name, "B"] @ factors[name, "A"])
                target = (
                    block.experts.down_proj[expert]
                    if name == "down"
                    else block.experts.gate_up_proj[expert].chunk(2)[row]
                )
                target.copy_(merged)
    return block


def _fill_lora(experts: nn.Module, expert: int, adapter: ExpertAdapter | None, factors: dict) -> None:
    """An adapter's factors into an expert's slots; slots above its rank keep a zero second factor."""
    if adapter is None:
        return
    lora, rank, ratio = experts.lora, adapter.rank, adapter.scaling / experts.lora_scaling
    slots = {
        "gate": (lora.gate_up_a[expert].chunk(2)[0], lora.gate_up_b[expert].chunk(2)[0]),
        "up": (lora.gate_up_a[expert].chunk(2)[1], lora.gate_up_b[expert].chunk(2)[1]),
        "down": (lora.down_a[expert], lora.down_b[expert]),
    }
    for projection, (a, b) in slots.items():
        a[:rank].copy_(factors[projection, "A"])
        b[:, :rank].copy_(factors[projection, "B"] * ratio)


__all__ = ["grow_experts"]
