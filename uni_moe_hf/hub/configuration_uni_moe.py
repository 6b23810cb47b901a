"""Configuration of Uni-MoE: one text decoder, three optional towers, and how they are joined."""

import copy
import math
from typing import Any, ClassVar, Literal


from .compat_uni_moe import register_multimodal_type  # isort: skip  a library that is too old is refused there

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


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
        "impl": "generation_uni_moe.AnyToTextPipeline",
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


def width_of(config: PreTrainedConfig) -> int:
    """How wide a tower's features are; of one that grows wider from stage to stage, the last."""
    if config.model_type == "clap_audio_model":  # its `hidden_size` is not read by the library
        return config.patch_embeds_hidden_size * 2 ** (len(config.depths) - 1)
    return getattr(config, "hidden_size", None) or config.hidden_sizes[-1]


def check_sizes(config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: a size of a model is no whole number within bounds.
    """
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}={value}` of a '{config.model_type}' is no number.")
    limits = dict.fromkeys(DEPTHS, MAX_DEPTH) | dict.fromkeys(WIDTHS, MAX_WIDTH)
    for name, limit in limits.items():
        value = vars(config).get(name)
        several = isinstance(value, list | tuple) and name not in ("hidden_size", "vocab_size", *DEPTHS)
        for each in value if several else () if value is None else (value,):  # some have one for each layer or side
            if not isinstance(each, int) or isinstance(each, bool) or not 1 <= each <= limit:
                raise ValueError(
                    f"`{name}={value!r}` of a '{config.model_type}' must be a whole number up to {limit}."
                )


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
        if self.max_bucket_distance <= self.num_buckets // 4:
            raise ValueError(
                f"`max_bucket_distance={self.max_bucket_distance}` must be above `num_buckets // 4`, "
                f"{self.num_buckets // 4}: up to there each distance has a bucket of its own."
            )
        for whole, part in (("hidden_size", "num_attention_heads"), ("num_mel_bins", "patch_size")):
            if getattr(self, whole) % getattr(self, part) != 0:
                raise ValueError(
                    f"`{whole}` ({getattr(self, whole)}) must be a multiple of `{part}` ({getattr(self, part)})."
                )


@strict
class YamnetConfig(PreTrainedConfig):
    r"""
    Configuration of the YAMNet audio encoder, a MobileNet over patches of a mel spectrogram; there is one size.

    Args:
        hidden_size (`int`, *optional*, defaults to 1024): Width of what it gives.
        num_mel_bins (`int`, *optional*, defaults to 64): Mel bins of the input.
        patch_frames (`int`, *optional*, defaults to 96): Frames of a patch, which is seen alone.
        patch_hop (`int`, *optional*, defaults to 48): Frames from one patch to the next.

    Source: MobileNets (https://huggingface.co/papers/1704.04861), table 1, with 64 mel bins in place of a picture, as
    in `models/research/audioset/yamnet` of TensorFlow.
    """

    model_type = "yamnet"
    base_config_key = "audio_config"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # frozen, like every tower

    hidden_size: int = 1024
    num_mel_bins: int = 64
    patch_frames: int = 96
    patch_hop: int = 48


# Kinds of configs that the library lacks.
OWN_CONFIGS = {"beats": BeatsConfig, "yamnet": YamnetConfig}

# What a part is where its dict names no `model_type`.
DEFAULT_TYPES = {
    "text_config": "llama",
    "vision_config": "clip_vision_model",
    "speech_config": "whisper",
    "audio_config": "beats",
    "audio_connector_config": "blip_2_qformer",
    "speech_connector_config": "blip_2_qformer",
}

# The mixture's fields of a `text_config`, whatever the decoder's kind, and their defaults.
MIXTURE = {
    "mlp_layer_types": None,  # all sparse
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_names": None,
    "shared_expert_base": False,
    "expert_lora_rank": 8,
    "expert_lora_alpha": 16,
    "expert_lora_dropout": 0.0,
    "expert_activations": "save",
    "router_dtype": "float32",
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
}
# What a number may be; `None` is without bound.
NUMBERS = {
    "num_experts": (int, 1, MAX_EXPERTS),
    "num_experts_per_tok": (int, None, None),
    "expert_lora_rank": (int, 0, MAX_WIDTH),
    "expert_lora_alpha": (int | float, None, None),
    "expert_lora_dropout": (int | float, 0, 1),
    "router_aux_loss_coef": (int | float, None, None),
}
WORDS = {
    "shared_expert_base": (True, False),
    "output_router_logits": (True, False),
    "expert_activations": ("save", "recompute"),
    "router_dtype": ("float32", "float64", "bfloat16", "float16"),
}


def is_sparse(text_config: PreTrainedConfig) -> bool:
    """Whether any layer of a decoder is a mixture of experts."""
    return "sparse" in text_config.mlp_layer_types


def is_in_vllm(config: PreTrainedConfig) -> bool:
    """Whether a `text_config` is that of a model which vLLM's Transformers back end builds."""
    return getattr(config, "_attn_implementation", None) == "vllm"


def check_mixture(text_config: PreTrainedConfig, **changes: Any) -> None:
    """
    Args:
        text_config ([`PreTrainedConfig`]): Of any decoder, with the fields of `MIXTURE`.
        changes: Fields as they shall be.

    Raises:
        ValueError: they contradict each other or the decoder.
    """
    fields = {name: changes.get(name, getattr(text_config, name)) for name in MIXTURE}
    for name, (kind, least, most) in NUMBERS.items():
        value = fields[name]
        inside = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        if not (inside and (least is None or least <= value <= most)):
            meaning = ", 0 for experts without LoRA" if name == "expert_lora_rank" else ""
            bounds = "" if least is None else f" between {least} and {most}{meaning}"
            kind = "a whole number" if kind is int else "a number"
            raise ValueError(f"`{name}={value!r}` must be {kind}{bounds}.")
    for name, words in WORDS.items():
        if not any(fields[name] is word or (fields[name] == word and isinstance(word, str)) for word in words):
            raise ValueError(f"`{name}={fields[name]!r}` must be one of {list(words)}.")

    kinds, layers, names = fields["mlp_layer_types"], text_config.num_hidden_layers, fields["expert_names"]
    num_experts, per_token = fields["num_experts"], fields["num_experts_per_tok"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        found = f"{len(kinds)} entries" if isinstance(kinds, list) else f"the value {kinds!r}"
        raise ValueError(
            f"`mlp_layer_types` has {found} but the decoder has `num_hidden_layers={layers}`; give one per layer."
        )
    if unknown := [kind for kind in kinds if kind not in ("sparse", "dense")]:
        raise ValueError(f"`mlp_layer_types` holds {unknown[0]!r}; only 'sparse' and 'dense' are known.")
    if not 1 <= per_token <= num_experts:
        raise ValueError(f"`num_experts_per_tok={per_token}` must lie between 1 and `num_experts={num_experts}`.")
    if names is not None and (not isinstance(names, list) or len(names) != num_experts):
        raise ValueError(
            f"`expert_names={names!r}` must be a list with one name for each of `num_experts={num_experts}`."
        )
    if "sparse" in kinds and fields["shared_expert_base"] and num_experts > 1 and fields["expert_lora_rank"] == 0:
        raise ValueError(
            f"`shared_expert_base=True` with `expert_lora_rank=0` makes {num_experts} equal experts; "
            "set a rank above 0 or `shared_expert_base=False`."
        )


def make_config(settings: dict[str, Any], model_type: str) -> PreTrainedConfig:
    """
    Args:
        settings (`dict`): A config's fields, as in a `config.json`.
        model_type (`str`): Where they name none.

    Returns:
        [`PreTrainedConfig`] of that type.

    Raises:
        ValueError: the installed library knows no such type.
    """
    # Releases before 5.18 write parallel plans, which follow from the rest, into dicts.
    settings = {key: value for key, value in settings.items() if not key.endswith("_plan")}
    model_type = settings.pop("model_type", None) or model_type
    if model_type in OWN_CONFIGS:
        return OWN_CONFIGS[model_type](**settings)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        raise ValueError(
            f"transformers {transformers.__version__} knows no model of type {model_type!r}; use a release that does."
        ) from error


@strict
class UniMoEConfig(PreTrainedConfig):
    r"""
    Configuration of Uni-MoE. Every tower is optional: a config without `audio_config` makes a model without sound.

    Args:
        text_config ([`PreTrainedConfig`] or `dict`, *optional*): The decoder: any LLM's own config, and the mixture's
            fields, which are listed below. A dict without `model_type` is a `llama`.
        vision_config ([`PreTrainedConfig`] or `dict`, *optional*): Any vision backbone with patch tokens; a dict
            without `model_type` is a `clip_vision_model`, an empty one CLIP ViT-L/14-336.
        speech_config ([`WhisperConfig`] or `dict`, *optional*): The Whisper encoder. Its decoder half shapes the
            speech connector; its window is `2 * max_source_positions` mel frames of 10 ms.
        audio_config ([`PreTrainedConfig`] or `dict`, *optional*): The encoder of sound, of a kind that
            `towers_uni_moe.py` knows; a dict without `model_type` is a `beats`.
        audio_connector_config ([`Blip2QFormerConfig`] or `dict`, *optional*): The Q-Former between the encoder of
            sound and the decoder; present exactly when `audio_config` is. `encoder_hidden_size` follows the encoder.
        speech_connector_config ([`Blip2QFormerConfig`] or `dict`, *optional*): A Q-Former in place of Whisper's
            decoder, for an encoder that came without one.
        image_token_id, video_token_id, audio_token_id, speech_token_id (`int`, *optional*): Placeholder ids. By
            default the four ids behind the vocabulary, in the order image, video, audio, speech.
        base_vocab_size (`int`, *optional*): Where placeholder ids may begin; `text_config.vocab_size` by default,
            which may grow past them later when the embedding table is resized for new words.
        vision_feature_layer (`int`, *optional*, defaults to -2): Hidden state of the vision tower that is read.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): `"default"` drops what stands
            before the patches, `"full"` keeps all.
        vision_prefix_length (`int`, *optional*, defaults to 1): How many tokens stand before the patches: a CLS token
            and registers.
        image_seq_length (`int`, *optional*): Tokens of an image; `(image_size // patch_size) ** 2` by default, and
            `vision_prefix_length` more with `"full"`.
        video_pooling (`str`, *optional*, defaults to `"mean"`): `"mean"` averages the projected frames as in the
            original, `"none"` keeps the tokens of every frame.
        num_speech_query_tokens, num_audio_query_tokens (`int`, *optional*, defaults to 50): Tokens of each window of
            speech or sound.
        cut_speech_windows (`bool`, *optional*, defaults to `False`): Whether the speech tower hears a short window as
            long as it is, rounded up to a whole second, in place of the full window with silence behind it. Much
            less to compute; other numbers, so a model is used as it was trained.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the vision connector.
        stage (`str`, *optional*): The last training stage: `"connectors"`, `"experts"` or `"moe"`.

    Fields of the mixture, in `text_config`, where the library, TRL and vLLM look for those of mixtures:
        mlp_layer_types (`list[str]`, *optional*): `"sparse"` or `"dense"` for each layer; all sparse by default,
            while `from_pretrained_parts` makes all dense and `grow_experts` sparse. The original code hard-codes it
            per folder: all layers (speech), every second (audio, v1.5).
        num_experts (`int`, *optional*, defaults to 4): Experts of each sparse layer.
        num_experts_per_tok (`int`, *optional*, defaults to 2): Experts that each token is sent to.
        expert_names (`list[str]`, *optional*): A name or modality for each expert, in order.
        shared_expert_base (`bool`, *optional*, defaults to `False`): `False` gives every expert its own frozen
            network as in the published checkpoints; `True` stores one, and an expert is that plus its LoRA.
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
        StrictDataclassError: (caused by a `ValueError`) a placeholder id is used twice or lies inside the vocabulary,
            connector and tower disagree, or the mixture's fields contradict each other or the decoder.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), sections 3.1 and 3.2; `*/model/moe/` of the original
    code.

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
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "speech_config": AutoConfig,
        "audio_config": AutoConfig,
        "audio_connector_config": AutoConfig,
        "speech_connector_config": AutoConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    audio_connector_config: dict | PreTrainedConfig | None = None
    speech_connector_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    speech_token_id: int | None = None
    base_vocab_size: int | None = None
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    vision_prefix_length: int = 1
    image_seq_length: int | None = None
    video_pooling: Literal["mean", "none"] = "mean"
    num_speech_query_tokens: int = 50
    num_audio_query_tokens: int = 50
    cut_speech_windows: bool = False
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
        if self.vision_config == {}:
            self.vision_config = DEFAULT_VISION
        if self.audio_config is not None and self.audio_connector_config is None:
            self.audio_connector_config = {}
        for name, model_type in DEFAULT_TYPES.items():
            if isinstance(given := getattr(self, name), dict):
                setattr(self, name, make_config(given, model_type))
        if any(not hasattr(self.text_config, name) for name in MIXTURE):
            # A copy: it may be the config of a plain LLM that goes on being one.
            self.text_config = copy.deepcopy(self.text_config)
        for name, value in MIXTURE.items():
            if getattr(self.text_config, name, None) is None:
                setattr(self.text_config, name, value)
        if self.text_config.mlp_layer_types is None:
            self.text_config.mlp_layer_types = ["sparse"] * self.text_config.num_hidden_layers
        super().__post_init__(**kwargs)

        for ear in ("audio", "speech"):
            if None not in (getattr(self, f"{ear}_config"), connector := getattr(self, f"{ear}_connector_config")):
                connector.encoder_hidden_size = width_of(getattr(self, f"{ear}_config"))
        if self.base_vocab_size is None:
            self.base_vocab_size = self.text_config.vocab_size
        for offset, modality in enumerate(MODALITIES):
            if getattr(self, f"{modality}_token_id") is None:
                setattr(self, f"{modality}_token_id", self.base_vocab_size + offset)
        if self.image_seq_length is None and self.vision_config is not None:
            patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
            is_full = self.vision_feature_select_strategy == "full"
            self.image_seq_length = patches + self.vision_prefix_length * is_full
        # The library reads it from the outermost config, checkpoints of LLMs carry it on the inner one.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        if self.audio_config is not None and not hasattr(self.audio_config, "max_source_positions"):
            # Where vLLM looks how many tokens a clip may become; sound has no limit but the decoder's.
            self.audio_config.max_source_positions = getattr(self.text_config, "max_position_embeddings", None)
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        self.custom_pipelines = {**(self.custom_pipelines or {}), **copy.deepcopy(CUSTOM_PIPELINES)}

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
        # They follow from the rest.
        if isinstance(output.get("audio_config"), dict) and output["audio_config"]["model_type"] != "whisper":
            output["audio_config"].pop("max_source_positions", None)
        for key in [key for key in output.get("text_config") or () if key.endswith("_plan")]:
            del output["text_config"][key]
        return output

    def validate_architecture(self) -> None:
        """Checked by `@strict` when a config is made."""
        check_mixture(self.text_config)
        for part in (self, *(getattr(self, name) for name in self.sub_configs)):
            if part is not None:
                check_sizes(part)
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if isinstance(depth, int) and not 1 <= abs(self.vision_feature_layer) <= depth:
            raise ValueError(
                f"`vision_feature_layer={self.vision_feature_layer}` is none of the vision tower's {depth} layers; "
                "count from 1, or from -1 backwards."
            )
        if self.vision_prefix_length < 0:
            raise ValueError(f"`vision_prefix_length={self.vision_prefix_length}` must not be negative.")
        ids = {m: getattr(self, f"{m}_token_id") for m in MODALITIES}
        vocab_size = self.base_vocab_size
        if len(set(ids.values())) < len(ids):
            raise ValueError(f"Placeholder ids must differ, got {ids}.")
        if inside := {modality: token_id for modality, token_id in ids.items() if token_id < vocab_size}:
            raise ValueError(
                f"Placeholder ids {inside} lie inside the vocabulary (`base_vocab_size={vocab_size}`); "
                f"use ids of {vocab_size} or above, the embedding table is never resized for them."
            )
        for ear in ("audio", "speech"):
            if getattr(self, f"{ear}_config") is None and getattr(self, f"{ear}_connector_config") is not None:
                raise ValueError(f"`{ear}_connector_config` is given without `{ear}_config`; give both or none.")
        has_decoder = self.speech_config is not None and self.speech_connector_config is None
        if has_decoder and self.num_speech_query_tokens > self.speech_config.max_target_positions:
            raise ValueError(
                f"`num_speech_query_tokens={self.num_speech_query_tokens}` exceeds the query decoder's "
                f"`max_target_positions={self.speech_config.max_target_positions}`; pass as many or fewer."
            )


__all__ = ["BeatsConfig", "UniMoEConfig", "YamnetConfig"]
