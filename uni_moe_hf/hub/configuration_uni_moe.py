"""Configuration of Uni-MoE: one text decoder, three optional towers, and how they are joined."""

import math
from typing import Any, ClassVar, Literal


from .compat_uni_moe import register_multimodal_type  # isort: skip  a library that is too old is refused there

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, Blip2QFormerConfig, LlamaConfig, PreTrainedConfig, WhisperConfig


# In the order of `mm_token_type_ids`, counted from 1.
MODALITIES = ("image", "video", "audio", "speech")

# Written into every config.json, so that a checkpoint folder works without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_uni_moe.UniMoEConfig",
    "AutoModel": "modeling_uni_moe.UniMoEForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_uni_moe.UniMoEForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_uni_moe.UniMoEForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_uni_moe.UniMoEForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "any-to-text": {
        "impl": "pipeline_uni_moe.AnyToTextPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}

register_multimodal_type("uni_moe", "UniMoEForConditionalGeneration")

# CLIP ViT-L/14-336.
DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}


# What no model has more of, and a damaged config.json may say; a model of such numbers would fill any memory.
MAX_DEPTH, MAX_EXPERTS, MAX_WIDTH = 1024, 4096, 1 << 24
DEPTHS = ("num_hidden_layers", "encoder_layers", "decoder_layers")
WIDTHS = (
    "hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads head_dim d_model "
    "encoder_ffn_dim decoder_ffn_dim encoder_attention_heads decoder_attention_heads num_mel_bins patch_size "
    "max_source_positions max_target_positions encoder_hidden_size patch_embedding_size num_conv_pos_embeddings "
    "num_conv_pos_embedding_groups num_buckets num_channels image_seq_length num_speech_query_tokens "
    "num_audio_query_tokens max_position_embeddings"
).split()


def check_sizes(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: a size of a model is no whole number within bounds.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}={value}` of a '{config.model_type}' is no number.")
    limits = dict.fromkeys(DEPTHS, MAX_DEPTH) | {"num_experts": MAX_EXPERTS} | dict.fromkeys(WIDTHS, MAX_WIDTH)
    for name, limit in limits.items():
        value = getattr(config, name, None)
        if value is None or (isinstance(value, list | tuple) and name == "patch_size"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ValueError(f"`{name}={value!r}` of a '{config.model_type}' must be a whole number up to {limit}.")


@strict
class BeatsConfig(PreTrainedConfig):
    r"""
    Configuration of the BEATs audio encoder; the defaults are those of `BEATs_iter3_plus`.

    Args:
        hidden_size (`int`, *optional*, defaults to 768): Width of the encoder.
        patch_embedding_size (`int`, *optional*, defaults to 512): Width of a patch before it is projected to
            `hidden_size`.
        patch_size (`int`, *optional*, defaults to 16): Side of the square fbank patches, in frames and mel bins.
        num_mel_bins (`int`, *optional*, defaults to 128): Mel bins of the input, a multiple of `patch_size`.
        num_conv_pos_embeddings (`int`, *optional*, defaults to 128): Kernel of the convolutional position embedding.
        num_conv_pos_embedding_groups (`int`, *optional*, defaults to 16): Groups of that convolution.
        num_buckets (`int`, *optional*, defaults to 320): Buckets of the relative position bias, half of them for
            positive distances.
        max_bucket_distance (`int`, *optional*, defaults to 800): Distance from which all pairs share the last bucket.
        deep_norm (`bool`, *optional*, defaults to `True`): Whether residuals are scaled by
            `(2 * num_hidden_layers) ** 0.25`.
        dropout, attention_dropout, activation_dropout (`float`, *optional*, defaults to 0.0): Used in training only.

    Raises:
        StrictDataclassError: (caused by a `ValueError`) `hidden_size` is not a multiple of `num_attention_heads`, or
            `num_mel_bins` of `patch_size`.

    Source: BEATs (https://huggingface.co/papers/2212.09058), section 2, and the `cfg` of its published checkpoints.
    """

    model_type = "beats"
    base_config_key = "audio_config"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # frozen, like every tower

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    patch_embedding_size: int = 512
    patch_size: int = 16
    num_mel_bins: int = 128
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    num_buckets: int = 320
    max_bucket_distance: int = 800
    deep_norm: bool = True
    hidden_act: str = "gelu"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Checked by `@strict` when a config is made."""
        check_sizes(self)
        for whole, part in (("hidden_size", "num_attention_heads"), ("num_mel_bins", "patch_size")):
            if getattr(self, whole) % getattr(self, part) != 0:
                raise ValueError(
                    f"`{whole}` ({getattr(self, whole)}) must be a multiple of `{part}` ({getattr(self, part)})."
                )


@strict
class UniMoETextConfig(LlamaConfig):
    r"""
    Configuration of the text decoder: a [`LlamaConfig`] whose feed-forward layers are dense or sparse.

    Args:
        mlp_layer_types (`list[str]`, *optional*): `"sparse"` or `"dense"` for each layer; all sparse by default. The
            original code hard-codes it per folder: all layers (speech), every second (audio, v1.5).
        num_experts (`int`, *optional*, defaults to 4): Experts of each sparse layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2): Experts that each token is sent to.
        expert_names (`list[str]`, *optional*): A name or modality for each expert, in order.
        shared_expert_base (`bool`, *optional*, defaults to `False`): `False` gives every expert its own frozen SwiGLU
            as in the published checkpoints; `True` stores one, and an expert is that plus its own LoRA.
        expert_lora_rank (`int`, *optional*, defaults to 8): Rank of each expert's LoRA; 0 for plain experts.
        expert_lora_alpha (`float`, *optional*, defaults to 16): LoRA products are scaled by `alpha / rank`.
        expert_lora_dropout (`float`, *optional*, defaults to 0.0): Dropout before each LoRA's first factor.
        expert_activations (`str`, *optional*, defaults to `"save"`): What experts keep for backward: `"save"` keeps
            gate, up and low-rank rows, `"recompute"` the layer's input alone, for up to a third more time.
        router_dtype (`str`, *optional*, defaults to `"float32"`): Precision in which router logits are computed.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.0): Weight of the load-balancing loss; the paper's
            ablation (Table 8) finds that it does not help specialised experts.
        output_router_logits (`bool`, *optional*, defaults to `False`): Whether outputs carry the router logits.

    Raises:
        StrictDataclassError: (caused by a `ValueError`) `mlp_layer_types`, `expert_names` or `num_experts_per_tok`
            contradicts the other fields.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.2; `*/model/moe/` of the original code.
    """

    model_type = "uni_moe_text"
    base_config_key = "text_config"
    # The library's own MoE configs use both names; TRL reads `num_experts`.
    attribute_map = {"num_local_experts": "num_experts"}

    mlp_layer_types: list[str] | None = None
    num_experts: int = 4
    num_experts_per_tok: int = 2
    expert_names: list[str] | None = None
    shared_expert_base: bool = False
    expert_lora_rank: int = 8
    expert_lora_alpha: float | int = 16
    expert_lora_dropout: float | int = 0.0
    expert_activations: Literal["save", "recompute"] = "save"
    router_dtype: str = "float32"
    router_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        check_sizes(self)
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """
        `dict[str, str]`: how tensor parallelism splits the layers that this model has.

        Experts are split along their intermediate width, their LoRA with them; the block's output is summed once, so
        the layers of a shared base run on their local part and do not sum. LoRA's unsplit factors get the gradient of
        the local part only: this plan is for inference.
        """
        plan = {name: how for name, how in LlamaConfig.base_model_tp_plan.items() if ".mlp." not in name}
        if "dense" in self.mlp_layer_types:
            plan |= {name: how for name, how in LlamaConfig.base_model_tp_plan.items() if ".mlp." in name}
        if self.tie_word_embeddings:
            plan["embed_tokens"] = "embedding_rowwise"
        if not self.is_sparse:
            return plan
        experts = "layers.*.mlp.experts"
        plan[experts] = "moe_tp_experts"
        if self.shared_expert_base:
            for name, how in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
                plan |= {f"{experts}.base.{name}.weight": how, f"{experts}.base.{name}": "local_params"}
        else:
            plan |= {f"{experts}.gate_up_proj": "packed_colwise", f"{experts}.down_proj": "rowwise"}
        if self.expert_lora_rank:
            plan |= {f"{experts}.lora.gate_up_b": "packed_colwise", f"{experts}.lora.down_a": "rowwise"}
            plan[f"{experts}.lora"] = "local_params"
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Before 5.22 the library adds the rule of tied embeddings in this way; it is there already."""

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """`dict[str, str]`: how expert parallelism spreads experts with bases of their own, LoRA with them."""
        if not self.is_sparse or self.shared_expert_base:
            return {}
        experts = "layers.*.mlp.experts"
        names = ["gate_up_proj", "down_proj"]
        if self.expert_lora_rank:
            names += ["lora.gate_up_a", "lora.gate_up_b", "lora.down_a", "lora.down_b"]
        plan = {f"{experts}.{name}": "grouped_gemm" for name in names}
        if self.expert_lora_rank:
            plan[f"{experts}.lora"] = "local_params"  # the experts' own are made local by the next style alone
        return plan | {experts: "ep_dispatch_experts"}

    @property
    def is_sparse(self) -> bool:
        """`bool`: whether any layer is a mixture of experts."""
        return "sparse" in self.mlp_layer_types

    def validate_architecture(self) -> None:
        """Checked by `@strict` when a config is made."""
        super().validate_architecture()
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`mlp_layer_types` has {len(self.mlp_layer_types)} entries but the decoder has "
                f"`num_hidden_layers={self.num_hidden_layers}`; give one entry per layer."
            )
        if unknown := set(self.mlp_layer_types) - {"sparse", "dense"}:
            raise ValueError(f"`mlp_layer_types` holds {sorted(unknown)}; only 'sparse' and 'dense' are known.")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok={self.num_experts_per_tok}` must lie between 1 and "
                f"`num_experts={self.num_experts}`."
            )
        if self.expert_names is not None and len(self.expert_names) != self.num_experts:
            raise ValueError(
                f"`expert_names` has {len(self.expert_names)} names for `num_experts={self.num_experts}`; "
                "give one name per expert."
            )
        if self.router_dtype not in ("float32", "float64", "bfloat16", "float16"):
            raise ValueError(f"`router_dtype={self.router_dtype!r}` is no floating point type; use 'float32'.")
        if not 0 <= self.expert_lora_rank <= MAX_WIDTH:
            raise ValueError(
                f"`expert_lora_rank={self.expert_lora_rank}` must lie between 0, which means experts without LoRA, "
                f"and {MAX_WIDTH}."
            )
        if not 0 <= self.expert_lora_dropout <= 1:
            raise ValueError(f"`expert_lora_dropout={self.expert_lora_dropout}` must lie between 0 and 1.")
        if self.is_sparse and self.shared_expert_base and self.num_experts > 1 and self.expert_lora_rank == 0:
            raise ValueError(
                f"`shared_expert_base=True` with `expert_lora_rank=0` makes {self.num_experts} equal experts; "
                "set a rank above 0 or `shared_expert_base=False`."
            )
        if self.is_sparse and self.mlp_bias:
            raise ValueError(
                "`mlp_bias=True` and sparse layers do not go together: experts have no biases; "
                "set every entry of `mlp_layer_types` to 'dense'."
            )


@strict
class UniMoEConfig(PreTrainedConfig):
    r"""
    Configuration of Uni-MoE. Every tower is optional: a config without `audio_config` makes a model without BEATs.

    Args:
        text_config ([`UniMoETextConfig`] or `dict`, *optional*): The decoder.
        vision_config ([`PreTrainedConfig`] or `dict`, *optional*): Any vision backbone with patch tokens; a dict
            without `model_type` is a `clip_vision_model`, an empty one CLIP ViT-L/14-336.
        speech_config ([`WhisperConfig`] or `dict`, *optional*): The Whisper encoder. Its decoder half shapes the
            speech connector; its window is `2 * max_source_positions` mel frames of 10 ms.
        audio_config ([`BeatsConfig`] or `dict`, *optional*): The BEATs encoder.
        audio_connector_config ([`Blip2QFormerConfig`] or `dict`, *optional*): The Q-Former between BEATs and the
            decoder; present exactly when `audio_config` is. `encoder_hidden_size` follows `audio_config.hidden_size`.
        image_token_id, video_token_id, audio_token_id, speech_token_id (`int`, *optional*): Placeholder ids. By
            default the four ids behind the vocabulary, in the order image, video, audio, speech.
        base_vocab_size (`int`, *optional*): Where placeholder ids may begin; `text_config.vocab_size` by default,
            which may grow past them later when the embedding table is resized for new words.
        vision_feature_layer (`int`, *optional*, defaults to -2): Hidden state of the vision tower that is read.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): `"default"` drops the first (CLS)
            token, `"full"` keeps all.
        image_seq_length (`int`, *optional*): Tokens of an image; `(image_size // patch_size) ** 2` by default, one
            more with `"full"` (a backbone without a CLS token needs the number given).
        video_pooling (`str`, *optional*, defaults to `"mean"`): `"mean"` averages the projected frames as in the
            original, `"none"` keeps the tokens of every frame.
        num_speech_query_tokens, num_audio_query_tokens (`int`, *optional*, defaults to 50): Tokens of each window of
            speech or sound.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the vision connector.
        stage (`str`, *optional*): The last training stage: `"connectors"`, `"experts"` or `"moe"`.

    Raises:
        StrictDataclassError: (caused by a `ValueError`) a placeholder id is used twice or lies inside the vocabulary,
            or connector and tower disagree.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), section 3.1.

    Example:

    ```python
    >>> from uni_moe_hf import UniMoEConfig

    >>> config = UniMoEConfig(vision_config={}, speech_config={}, audio_config={})
    >>> config.image_seq_length, config.audio_connector_config.encoder_hidden_size
    (576, 768)
    ```
    """

    model_type = "uni_moe"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # the decoder's is enough
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "text_config": UniMoETextConfig,
        "vision_config": AutoConfig,
        "speech_config": WhisperConfig,
        "audio_config": BeatsConfig,
        "audio_connector_config": Blip2QFormerConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    audio_connector_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    speech_token_id: int | None = None
    base_vocab_size: int | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    image_seq_length: int | None = None
    video_pooling: Literal["mean", "none"] = "mean"
    num_speech_query_tokens: int = 50
    num_audio_query_tokens: int = 50
    projector_hidden_act: str = "gelu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    stage: Literal["connectors", "experts", "moe"] | None = None
    auto_map: dict | None = None
    custom_pipelines: dict | None = None

    def __post_init__(self, **kwargs):
        # Built here: since 5.20 the library does it, by rules that older releases do not know.
        if self.text_config is None:
            self.text_config = {}
        if isinstance(self.vision_config, dict):
            named = {"model_type": DEFAULT_VISION["model_type"], **self.vision_config}
            self.vision_config = AutoConfig.for_model(**(named if self.vision_config else DEFAULT_VISION))
        if self.audio_config is not None and self.audio_connector_config is None:
            self.audio_connector_config = {}
        for name, kind in self.sub_configs.items():
            if isinstance(given := getattr(self, name), dict):
                # Releases before 5.18 write parallel plans, which follow from the rest, into dicts.
                settings = {key: value for key, value in given.items() if not key.endswith("_plan")}
                settings.pop("model_type", None)
                setattr(self, name, kind(**settings))
        super().__post_init__(**kwargs)

        if self.audio_config is not None:
            self.audio_connector_config.encoder_hidden_size = self.audio_config.hidden_size
        if self.base_vocab_size is None:
            self.base_vocab_size = self.text_config.vocab_size
        for offset, modality in enumerate(MODALITIES):
            if getattr(self, f"{modality}_token_id") is None:
                setattr(self, f"{modality}_token_id", self.base_vocab_size + offset)
        if self.image_seq_length is None and self.vision_config is not None:
            patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
            self.image_seq_length = patches + (self.vision_feature_select_strategy == "full")
        # The library reads it from the outermost config, plain Llama checkpoints carry it on the inner one.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.custom_pipelines = self.custom_pipelines or CUSTOM_PIPELINES

    @property
    def _experts_implementation(self) -> str | None:
        return self.__dict__.get("_experts_implementation_internal")

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None) -> None:
        # The library hands it to every sub-config, but towers have no experts and refuse it.
        name = value.get("text_config", value.get("")) if isinstance(value, dict) else value
        self._experts_implementation_internal = name
        if isinstance(self.text_config, PreTrainedConfig):
            self.text_config._experts_implementation = name

    @property
    def modalities(self) -> tuple[str, ...]:
        """`tuple[str]`: what this model can take besides text, in the order of `mm_token_type_ids`."""
        vision = ("image", "video") if self.vision_config is not None else ()
        audio = ("audio",) if self.audio_config is not None else ()
        speech = ("speech",) if self.speech_config is not None else ()
        return vision + audio + speech

    def to_dict(self) -> dict[str, Any]:
        """As in the library; of its parts, without where they came from and what only classifiers need."""
        output = super().to_dict()
        for name in self.sub_configs:
            for key in ("_name_or_path", "architectures", "id2label", "label2id"):
                if isinstance(output.get(name), dict):
                    output[name].pop(key, None)
        return output

    def validate_architecture(self) -> None:
        """Checked by `@strict` when a config is made."""
        # By the field, not the class: a checkpoint's own code has its own copy of every class.
        if not hasattr(self.text_config, "mlp_layer_types"):
            raise ValueError(
                f"`text_config` is a {type(self.text_config).__name__}, but the decoder needs a UniMoETextConfig; "
                "pass `text_config.to_dict()` without its 'model_type', or use `uni_moe_hf.from_pretrained_parts`."
            )
        for part in (self, *(getattr(self, name) for name in self.sub_configs)):
            if part is not None:
                check_sizes(part)
        ids = {m: getattr(self, f"{m}_token_id") for m in MODALITIES}
        vocab_size = self.base_vocab_size
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"Placeholder ids must differ, got {ids}.")
        if inside := {modality: token_id for modality, token_id in ids.items() if token_id < vocab_size}:
            raise ValueError(
                f"Placeholder ids {inside} lie inside the vocabulary (`base_vocab_size={vocab_size}`); "
                f"use ids of {vocab_size} or above, the embedding table is never resized for them."
            )
        if self.audio_config is None and self.audio_connector_config is not None:
            raise ValueError("`audio_connector_config` is given without `audio_config`; give both or none.")
        if self.speech_config is not None and self.num_speech_query_tokens > self.speech_config.max_target_positions:
            raise ValueError(
                f"`num_speech_query_tokens={self.num_speech_query_tokens}` exceeds the query decoder's "
                f"`max_target_positions={self.speech_config.max_target_positions}`."
            )


__all__ = ["BeatsConfig", "UniMoEConfig", "UniMoETextConfig"]
