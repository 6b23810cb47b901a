"""
Building Uni-MoE models: from pretrained parts to a dense model, from PEFT adapters to a mixture of experts.

Growing moves the decoder's own feed-forward modules into the mixture: nothing is copied that can be shared.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperModel,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from ..hub.beats_uni_moe import BeatsModel
from ..hub.configuration_uni_moe import MODALITIES, UniMoEConfig, UniMoETextConfig
from ..hub.experts_uni_moe import UniMoESparseMoeBlock
from ..hub.feature_extraction_uni_moe import UniMoEFeatureExtractor
from ..hub.files_uni_moe import reason
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..hub.processing_uni_moe import UniMoEProcessor
from .expert_adapters import ExpertAdapter, check_is_ours, choose_projectors, read_expert
from .loading import load_part_config, load_whole


def from_pretrained_parts(
    language_model: str | PreTrainedModel,
    vision_tower: str | PreTrainedModel | None = None,
    speech_tower: str | PreTrainedModel | None = None,
    audio_tower: str | BeatsModel | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    **config,
) -> UniMoEForConditionalGeneration:
    r"""
    Joins pretrained parts into a dense Uni-MoE with fresh connectors: where the three stages begin.

    Args:
        language_model (`str` or [`PreTrainedModel`]): A Llama, as a Hub id, a folder or a loaded `LlamaForCausalLM`.
        vision_tower (`str` or [`PreTrainedModel`], *optional*): A vision backbone with patch tokens, CLIP or other;
            how many it makes of a picture, and whether a CLS token is among them, is found by asking it.
        speech_tower (`str` or [`PreTrainedModel`], *optional*): A Whisper model. Its encoder becomes the tower; its
            decoder, where there is one, the start of the speech connector, as in the original.
        audio_tower (`str` or [`BeatsModel`], *optional*): A BEATs saved by this package.
        dtype (`str` or `torch.dtype`, *optional*): Of the parts that are loaded here; as saved by default.
        attn_implementation (`str`, *optional*): Of the model, as in the library.
        config: Further fields of [`UniMoEConfig`], for example `video_pooling`.

    Returns:
        [`UniMoEForConditionalGeneration`] with dense layers only, in the dtype of `language_model`.

    Raises:
        ValueError: `language_model` is not a Llama, a part is not of the expected kind, which is looked at before its
            weights are read, or its weights are not all there.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), figure 3.
    """
    loading = {} if dtype is None else {"dtype": dtype}
    kinds = {
        name: _kind_of_part(part, name)
        for name, part in (
            ("language_model", language_model),
            ("vision_tower", vision_tower),
            ("speech_tower", speech_tower),
            ("audio_tower", audio_tower),
        )
    }
    for name, wanted in (("language_model", "llama"), ("speech_tower", "whisper"), ("audio_tower", "beats")):
        if kinds[name] is not None and kinds[name].model_type != wanted:
            raise ValueError(f"`{name}` is a '{kinds[name].model_type}' model, but a '{wanted}' is needed.")
    if kinds["vision_tower"] is not None:
        config = _patch_settings(kinds["vision_tower"], config) | config
    llm = language_model
    if isinstance(llm, str | Path):
        llm = load_whole(AutoModelForCausalLM, llm, **loading)
    if not isinstance(llm, LlamaForCausalLM):
        kind = getattr(getattr(llm, "config", None), "model_type", "nothing known")
        raise ValueError(
            f"`language_model` is a {type(llm).__name__} ('{kind}'), but Uni-MoE takes a LlamaForCausalLM."
        )
    if getattr(llm, "is_quantized", False):
        raise ValueError("`language_model` is quantised; build from unquantised parts and quantise what was saved.")
    vision = load_whole(AutoModel, vision_tower, True, **loading) if is_named(vision_tower) else vision_tower
    vision = getattr(vision, "vision_model", vision)
    speech_encoder, speech_decoder = _speech_parts(speech_tower, loading)
    audio = load_whole(BeatsModel, audio_tower, **loading) if is_named(audio_tower) else audio_tower

    text = {k: v for k, v in llm.config.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    text["mlp_layer_types"] = ["dense"] * llm.config.num_hidden_layers
    for name, part in (("vision_config", vision), ("speech_config", speech_encoder), ("audio_config", audio)):
        if part is not None:
            config[name] = part.config.to_dict()
    # Built in the LLM's dtype, not cast to it: that would round the rotary embedding's frequencies as well.
    settings = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = UniMoEForConditionalGeneration._from_config(
        UniMoEConfig(text_config=text, **config), dtype=llm.dtype, **settings
    )

    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    if vision is not None:
        model.model.vision_tower.load_state_dict(vision.state_dict())
    if speech_encoder is not None:
        model.model.speech_tower.load_state_dict(speech_encoder.state_dict())
    if speech_decoder is not None:
        weights = {k: v for k, v in speech_decoder.state_dict().items() if not k.startswith("embed_tokens.")}
        model.model.speech_connector.decoder.load_state_dict(weights)
    if audio is not None:
        model.model.audio_tower.load_state_dict(audio.state_dict())
    model.generation_config = llm.generation_config
    return model


def is_named(part: Any) -> bool:
    """Whether a part is given as a Hub id or folder."""
    return isinstance(part, str | Path)


def _kind_of_part(part: Any, argument: str) -> PreTrainedConfig | None:
    """What a part is, by its config: of a vision tower that of the half with the pictures."""
    if part is None:
        return None
    kind = load_part_config(part, f"`{argument}`") if is_named(part) else getattr(part, "config", None)
    if kind is None:
        raise ValueError(f"`{argument}` is a {type(part).__name__}; give a model, a folder or a Hub id.")
    return getattr(kind, "vision_config", kind) if argument == "vision_tower" else kind


@torch.no_grad()
def _patch_settings(kind: PreTrainedConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """
    How many tokens a vision tower makes of a picture, and whether the first of them stands for all of it. Asked of an
    empty one, before weights are read.
    """
    side, patch = (getattr(kind, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(side, int) or not isinstance(patch, int):
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model, but a backbone for square pictures is needed."
        )
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(kind)
            picture = torch.zeros(1, getattr(kind, "num_channels", 3), side, side)
        hidden = tower(pixel_values=picture, output_hidden_states=True).hidden_states
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model, which gives no tokens of a picture ({reason(error)})."
        ) from error
    count, patches = hidden[config.get("vision_feature_layer", -2)].shape[1], (side // patch) ** 2
    registers = getattr(kind, "num_register_tokens", 0)
    if count not in (patches, patches + 1 + registers) and "vision_feature_select_strategy" not in config:
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model that makes {count} tokens of {patches} patches, so which "
            "are patches is unknown; say it with `vision_feature_select_strategy` ('full' keeps all, 'default' "
            "drops the first)."
        )
    strategy = config.get("vision_feature_select_strategy", "full" if count == patches else "default")
    return {"vision_feature_select_strategy": strategy, "image_seq_length": count - (strategy == "default")}


def _speech_parts(
    tower: str | PreTrainedModel | None, loading: Mapping[str, Any]
) -> tuple[PreTrainedModel | None, nn.Module | None]:
    """Encoder and, where there is one, decoder of a Whisper model."""
    if tower is None:
        return None, None
    tower = load_whole(WhisperModel, tower, True, **loading) if is_named(tower) else tower
    if type(tower).__name__ == "WhisperEncoder":
        return tower, None
    return tower.get_encoder(), tower.get_decoder()


def build_processor(
    config: UniMoEConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_processor=None,
    image_size: int | None = None,
    chunk_length: int = 30,
    **settings,
) -> UniMoEProcessor:
    r"""
    Makes the processor that fits a model, and tells the config the placeholders' ids and the tokens of a picture.

    Args:
        config ([`UniMoEConfig`]): Of the model; its four placeholder ids are set to the tokenizer's, its
            `image_seq_length` follows the pictures' size.
        tokenizer ([`PreTrainedTokenizerBase`]): Of the LLM. Gets the four placeholder tokens, behind the vocabulary,
            and a padding token where it has none.
        image_processor (`str` or image processor, *optional*): That of the vision tower, or the Hub id or folder it
            lies in. By default CLIP's at the tower's picture size: right for no other tower.
        image_size (`int`, *optional*): Side of pictures in pixels, in place of the image processor's, for towers that
            take any: fewer pixels are fewer tokens.
        chunk_length (`int`, *optional*, defaults to 30): Seconds of a window of sound, in a model without a speech
            tower; with one its `max_source_positions` decides.
        settings: Further arguments of [`UniMoEProcessor`], for example `video_frames`. The `chat_template` is the
            tokenizer's own where it has one, else Vicuna's.

    Returns:
        [`UniMoEProcessor`].

    Raises:
        ValueError: the speech tower's window is not a whole number of seconds, or pictures have no fixed size.
    """
    _add_placeholders(config, tokenizer)
    feature_size = 80
    if config.speech_config is not None:
        chunk_length, rest = divmod(config.speech_config.max_source_positions, 50)
        feature_size = config.speech_config.num_mel_bins
        if rest:
            raise ValueError(
                f"`speech_config.max_source_positions={config.speech_config.max_source_positions}` is no whole number "
                "of seconds at 50 positions per second; use a multiple of 50."
            )
    mel_bins = config.audio_config.num_mel_bins if config.audio_config is not None else 128
    if settings.get("chat_template") is None:
        settings["chat_template"] = getattr(tokenizer, "chat_template", None)
    return UniMoEProcessor(
        _image_processor(config, image_processor, image_size),
        UniMoEFeatureExtractor(feature_size=feature_size, chunk_length=chunk_length, num_audio_mel_bins=mel_bins),
        tokenizer,
        **{
            "modalities": list(config.modalities),
            "image_seq_length": config.image_seq_length or 576,
            "video_pooling": config.video_pooling,
            "num_speech_query_tokens": config.num_speech_query_tokens,
            "num_audio_query_tokens": config.num_audio_query_tokens,
            **settings,
        },
    )


def _load_image_processor(name: str) -> Any:
    """One that needs Pillow alone."""
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    except ImportError:  # older releases ask for torchvision whatever the backend
        settings, _ = CLIPImageProcessorPil.get_image_processor_dict(name)
        kind = settings["image_processor_type"].removesuffix("Fast").removesuffix("Pil") + "Pil"
        return getattr(transformers, kind).from_pretrained(name)


def _image_processor(config: UniMoEConfig, processor: Any, side: int | None) -> Any:
    """The image processor, at another picture size if asked; counts the tokens of its pictures."""
    if isinstance(processor, str):
        processor = _load_image_processor(processor)
    if processor is None:
        tower_side = config.vision_config.image_size if config.vision_config is not None else 336
        square = {"height": tower_side, "width": tower_side}
        processor = CLIPImageProcessorPil(size={"shortest_edge": tower_side}, crop_size=square)
    crops = getattr(processor, "do_center_crop", False)
    if side is not None:
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"`image_size={side!r}` must be a number of pixels.")
        square = {"height": side, "width": side}
        sizes = {"size": {"shortest_edge": side}, "crop_size": square} if crops else {"size": square}
        processor = type(processor).from_dict({**processor.to_dict(), **sizes})
    if config.vision_config is None:
        return processor
    size, patch = processor.crop_size if crops else processor.size, config.vision_config.patch_size
    if not (size.height and size.width):
        raise ValueError(f"{type(processor).__name__} crops pictures to no fixed size ({size}); set `image_size`.")
    # Patches form a square, and a few tokens of other kinds may be among them.
    special = config.image_seq_length - math.isqrt(config.image_seq_length) ** 2
    if special <= 8:  # any other number was given by hand, and stays
        config.image_seq_length = (size.height // patch) * (size.width // patch) + special
    return processor


def _add_placeholders(config: UniMoEConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Four special tokens with ids of `vocab_size` or above, and a padding token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokens = [f"<{modality}>" for modality in MODALITIES]
    if any(token not in tokenizer.get_vocab() for token in tokens):
        # Ids are given out in order, and many vocabularies are smaller than their padded embedding table.
        missing = config.text_config.vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<reserved_{number}>" for number in range(missing)], special_tokens=True)
        tokenizer.add_tokens(tokens, special_tokens=True)
    for modality, token in zip(MODALITIES, tokens, strict=True):
        setattr(config, f"{modality}_token_id", tokenizer.convert_tokens_to_ids(token))
    config.validate_architecture()
    if config.text_config.pad_token_id is None:
        config.text_config.pad_token_id = tokenizer.pad_token_id


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
    config = model.config.text_config
    if getattr(model, "is_quantized", False):
        raise ValueError("Experts are grown from an unquantised model; quantise what has been grown when loading it.")
    if config.is_sparse:
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
    UniMoETextConfig(**{**config.to_dict(), **fields})  # every check, before anything is changed

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
    mlp: LlamaMLP, config: UniMoETextConfig, adapters: list[ExpertAdapter | None], layer: int, init_weights
) -> UniMoESparseMoeBlock:
    """A mixture in place of `mlp`; the router starts fresh."""
    weight = mlp.gate_proj.weight
    with torch.device("meta"):  # the shared base is `mlp` itself, a second one is never allocated
        block = UniMoESparseMoeBlock(config)
    if block.experts.shared_base:
        block.experts.base = mlp
    wide = torch.promote_types(weight.dtype, torch.float32)  # of what will be trained
    for module, dtype in ((block.gate, wide), (block.experts, weight.dtype), (block.experts.lora, wide)):
        if module is not None:
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device=weight.device, dtype=dtype)
                setattr(module, name, nn.Parameter(empty))
    for module in block.modules():
        if module is not mlp and not isinstance(module, nn.Linear):
            init_weights(module)

    for expert, adapter in enumerate(adapters):
        factors = {} if adapter is None else {
            (projection, side): tensor.to(weight.device, torch.float32)
            for (at, projection, side), tensor in adapter.factors.items()
            if at == layer
        }  # fmt: skip
        if block.experts.shared_base:
            _fill_lora(block.experts, expert, adapter, factors)
        else:
            for row, name in enumerate(("gate", "up", "down")):
                merged = getattr(mlp, f"{name}_proj").weight.float()
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


__all__ = ["build_processor", "from_pretrained_parts", "grow_experts"]
