"""
The decoder: any LLM of the library, with sparse mixtures of experts in place of its feed-forward networks.

The class of a kind of LLM is made from the library's own when it is first needed: `forward`, caches, attention and
masks are the library's. Added are the blocks, their initialisation, recorded router logits and the parallel plans.
"""

import copy
from functools import cache
from itertools import product
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import init
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from .compat_uni_moe import OutputRecorder
from .configuration_uni_moe import is_in_vllm, is_sparse
from .expert_kernels_uni_moe import ExpertsRouteMixin
from .experts_uni_moe import (
    UniMoEExpertLora,
    UniMoELoraExperts,
    UniMoESparseMoeBlock,
    UniMoETopKRouter,
    activation_name,
    read_feed_forward,
)


# Kinds of layers that look back by attention alone.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

# Full names, as quantisers match them, in the model with its head and in the one without.
UNQUANTISED = [
    *("".join(parts) for parts in product(("", "model."), ("vision", "speech", "audio"), ("_tower", "_connector"))),
    "lm_head",
]


class QuantizationMixin:
    """Acts where a quantisation is asked for, and where a model is built whose config holds one."""

    @classmethod
    def from_pretrained(cls, *args, quantization_config: Any = None, **kwargs) -> Any:
        """As in the library; a quantisation that names no exceptions leaves alone what [`UNQUANTISED`] names."""
        config = kwargs.get("config")
        if quantization_config is None:
            quantization_config = getattr(config, "quantization_config", None)
        if quantization_config is not None:
            kwargs["quantization_config"] = _with_exceptions(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """
        The library's, then the quantisation is looked at.

        Raises:
            ValueError: the method would leave the experts as they are, or put others in their place.
        """
        super().post_init()
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None or isinstance(quantization, dict):
            return
        text_config, method = self.config.get_text_config(), getattr(quantization.quant_method, "value", "")
        if is_sparse(text_config) and not getattr(quantization, "dequantize", False):
            if method in ("fp8", "mxfp8"):
                if text_config.expert_lora_rank > 0:
                    raise ValueError(
                        f"Quantisation '{method}' puts experts of its own, without LoRA, in place of these; merge the "
                        "experts' LoRA first (`merge_expert_lora`), or quantise with torchao or bitsandbytes."
                    )
            elif not text_config.shared_expert_base and not _names_tensors(quantization):
                raise ValueError(
                    f"Quantisation '{method}' reaches linear layers only and would leave these experts' own bases, "
                    "most of the model, as they are; use a model with `shared_expert_base=True`, or name the stacks "
                    "in torchao's `FqnToConfig`."
                )


def _names_tensors(quantization: Any) -> bool:
    """torchao's `FqnToConfig` names tensors, stacks of experts among them; everything else looks for linear layers."""
    return hasattr(getattr(quantization, "quant_type", None), "fqn_to_config")


def _with_exceptions(quantization: Any) -> Any:
    """A copy that leaves alone towers and connectors, whose projectors the stages train, and the head."""
    quantization = copy.deepcopy(quantization)
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    fields = [name for name in ("modules_to_not_convert", "llm_int8_skip_modules") if hasattr(quantization, name)]
    if fields and all(getattr(quantization, name) is None for name in fields) and not _names_tensors(quantization):
        setattr(quantization, fields[0], list(UNQUANTISED))
    return quantization


class SparseDecoderMixin(ExpertsRouteMixin, QuantizationMixin):
    """What is added to the library's decoder of any kind; see [`sparse_decoder`]."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        check_decoder(config, self)
        is_fused = read_feed_forward(self.layers[0].mlp).is_fused
        if is_in_vllm(config):
            fit_into_vllm(config, self)
        for layer, kind in zip(self.layers, config.mlp_layer_types, strict=True):
            if kind == "sparse":
                layer.mlp = UniMoESparseMoeBlock(config, layer.mlp)
        config.base_model_tp_plan = tensor_plan(config, is_fused or is_in_vllm(config))
        config.base_model_ep_plan = expert_plan(config)
        self.post_init()  # once more: for the blocks, and with their plans

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, UniMoETopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, UniMoELoraExperts) and not module.shared_base:
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, UniMoEExpertLora):
            # As PEFT does: the first factor uniform within 1 / sqrt(fan in), the second zero.
            for factor in (module.gate_up_a, module.down_a):
                bound = factor.shape[-1] ** -0.5
                init.uniform_(factor, -bound, bound)
            init.zeros_(module.gate_up_b)
            init.zeros_(module.down_b)


@cache
def sparse_decoder(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    Args:
        base (`type`): A decoder class of the library without its head, such as `Qwen3Model`.

    Returns:
        `type`: its subclass whose layers are mixtures where `config.mlp_layer_types` says "sparse".
    """
    recorded = dict(getattr(base, "_can_record_outputs", None) or {})
    if OutputRecorder is not None:
        recorded["router_logits"] = OutputRecorder(UniMoETopKRouter, index=0)
    members = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with sparse layers.",
        "_can_record_outputs": recorded,
    }
    return type(f"UniMoE{base.__name__}", (SparseDecoderMixin, base), members)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Pickles name the classes that are made here."""
    base = getattr(transformers, name.removeprefix("UniMoE"), None) if name.startswith("UniMoE") else None
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return sparse_decoder(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """
    Args:
        config ([`PreTrainedConfig`]): A `text_config` of any kind, with the mixture's fields.

    Returns:
        [`PreTrainedModel`]: its decoder, with the weights of a fresh one.

    Raises:
        ValueError: it is none that experts fit into.
    """
    base = MODEL_MAPPING.get(type(config), None)
    base = base[0] if isinstance(base, tuple | list) else base
    if base is None:
        raise ValueError(f"The library has no decoder for a `text_config` of type '{config.model_type}'.")
    return sparse_decoder(base)(config)


def check_decoder(config: PreTrainedConfig, decoder: PreTrainedModel | None = None) -> None:
    """
    Args:
        config ([`PreTrainedConfig`]): Of an LLM.
        decoder ([`PreTrainedModel`], *optional*): It without its head, with weights or without; what its layers are
            made of is not looked at without it.

    Raises:
        ValueError: experts do not fit into it; the message says what is missing.
    """
    try:
        if others := sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION):
            raise ValueError(f"it has layers of type '{others[0]}', which do more than attend to what came before")
        if getattr(config, "hidden_size_per_layer_input", None):
            raise ValueError("its layers take inputs of their own for every token, which media do not have")
        layers = getattr(decoder, "layers", ())
        if decoder is not None and not (isinstance(layers, nn.ModuleList) and len(layers)):
            raise ValueError("it has no list of layers called `layers`")
        for layer in layers:
            if not hasattr(layer, "self_attn"):
                raise ValueError(f"its layers ({type(layer).__name__}) have no attention called `self_attn`")
            read_feed_forward(getattr(layer, "mlp", None))
    except ValueError as error:
        raise ValueError(
            f"A '{config.model_type}' LLM cannot be the decoder: {error}; use one with attention and a gated `mlp` in "
            "every layer, such as a Llama, Qwen3 or Gemma 3."
        ) from None


def adjust_logits(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """
    What LLMs do to the logits of their heads, by the fields of their configs that say it.

    Args:
        logits (`torch.Tensor` of shape `(..., vocab_size)`): As they come from the head.
        config ([`PreTrainedConfig`]): Of the decoder.

    Returns:
        `torch.Tensor` of the same shape: scaled (Cohere, Granite) and soft-capped (Gemma) where it says so.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (factor := getattr(config, name, None)) is not None:
            logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


# vLLM


def fit_into_vllm(config: PreTrainedConfig, decoder: PreTrainedModel) -> None:
    """
    vLLM puts layers of its own in place of those it recognises. What it would get wrong is hidden from it or refused;
    our plug-in (`uni_moe_hf.serving`), which does more, has changed the config by then.

    Args:
        config ([`PreTrainedConfig`]): Of the decoder.
        decoder ([`PreTrainedModel`]): The library's, before its layers get experts.

    Raises:
        ValueError: the engine would give other answers than the model.
    """
    if not getattr(config, "served_by_plugin", False):
        remedy = "install uni-moe-hf beside vLLM, whose plug-in serves it"
        unread = ("output_multiplier", "lm_head_multiplier", "logits_scaling")
        if scaled := [name for name in unread if getattr(config, name, None) not in (None, 1)]:
            raise ValueError(f"vLLM alone would not scale the logits by `{scaled[0]}` of this LLM; {remedy}.")
        if is_sparse(config) and config.expert_lora_rank and not config.shared_expert_base:
            raise ValueError(
                f"vLLM alone would leave out the LoRA of these experts with bases of their own; {remedy}, or save the "
                "model after `merge_expert_lora`."
            )
        name = activation_name(read_feed_forward(decoder.layers[0].mlp).act_fn)
        if is_sparse(config) and not config.expert_lora_rank and name != "silu":
            raise ValueError(f"vLLM alone would compute experts with SiLU, these have '{name}'; {remedy}.")
    decoder.embed_tokens.__class__ = _bounded(type(decoder.embed_tokens))
    for layer, kind in zip(decoder.layers, config.mlp_layer_types, strict=True):
        if kind == "sparse" and config.shared_expert_base:
            layer.mlp.__class__ = _called_by_layer(type(layer.mlp))


@cache
def _bounded(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    """A table in which placeholders, whose ids lie behind it, are padding; vLLM overwrites those of clips."""

    class Bounded(kind):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids.masked_fill(input_ids >= self.num_embeddings, 0))

    return Bounded


@cache
def _called_by_layer(kind: type[nn.Module]) -> type[nn.Module]:
    """A feed-forward network in which vLLM finds no gate and up to fuse: experts call each, with LoRA between."""

    class CalledByLayer(kind):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("Experts call the layers of their base one by one.")

    return CalledByLayer


# Parallel plans


def tensor_plan(config: PreTrainedConfig, is_fused: bool) -> dict[str, str]:
    """
    How tensor parallelism splits the layers that a decoder has: as the library says, and experts along their
    intermediate width, their LoRA with them. The block's output is summed once, so the layers of a shared base run on
    their local part and do not sum. LoRA's unsplit factors get the gradient of the local part only: this plan is for
    inference.

    Args:
        config ([`PreTrainedConfig`]): Of the decoder.
        is_fused (`bool`): Whether gate and up are one linear layer; such a shared base is not split but copied.

    Returns:
        `dict[str, str]`: module or parameter -> how; empty where the library has no plan for this kind.
    """
    own = type(config).base_model_tp_plan
    if not isinstance(own, dict):
        return {}
    plan = {name: how for name, how in own.items() if ".mlp." not in name or "dense" in config.mlp_layer_types}
    if config.tie_word_embeddings:
        plan["embed_tokens"] = "embedding_rowwise"
    if not is_sparse(config) or (config.shared_expert_base and is_fused):
        return plan
    experts = "layers.*.mlp.experts"
    plan[experts] = "moe_tp_experts"
    if config.shared_expert_base:
        for name, how in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
            plan |= {f"{experts}.base.{name}.weight": how, f"{experts}.base.{name}": "local_params"}
    else:
        plan |= {f"{experts}.gate_up_proj": "packed_colwise", f"{experts}.down_proj": "rowwise"}
    if config.expert_lora_rank:
        plan |= {f"{experts}.lora.gate_up_b": "packed_colwise", f"{experts}.lora.down_a": "rowwise"}
        plan[f"{experts}.lora"] = "local_params"
    return plan


def expert_plan(config: PreTrainedConfig) -> dict[str, str]:
    """How expert parallelism spreads experts with bases of their own, LoRA with them: module or parameter -> how."""
    if not is_sparse(config) or config.shared_expert_base:
        return {}
    experts = "layers.*.mlp.experts"
    names = ["gate_up_proj", "down_proj"]
    if config.expert_lora_rank:
        names += ["lora.gate_up_a", "lora.gate_up_b", "lora.down_a", "lora.down_b"]
    plan = {f"{experts}.{name}": "grouped_gemm" for name in names}
    if config.expert_lora_rank:
        plan[f"{experts}.lora"] = "local_params"  # the experts' own are made local by the next style alone
    return plan | {experts: "ep_dispatch_experts"}


__all__ = [
    "QuantizationMixin",
    "SparseDecoderMixin",
    "adjust_logits",
    "build_decoder",
    "check_decoder",
    "expert_plan",
    "fit_into_vllm",
    "sparse_decoder",
    "tensor_plan",
]
