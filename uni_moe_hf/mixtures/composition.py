"""
Building a dense Uni-MoE from pretrained parts, and the processor that fits it.

What a part is, and whether it can be one, is asked of its config and of an empty model, before weights are read.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
    WhisperModel,
)
from transformers.utils import logging

from ..hub.configuration_uni_moe import MODALITIES, UniMoEConfig, width_of
from ..hub.decoder_uni_moe import check_decoder
from ..hub.feature_extraction_uni_moe import FRONT_ENDS, UniMoEFeatureExtractor
from ..hub.files_uni_moe import reason
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from ..hub.processing_uni_moe import UniMoEProcessor
from ..hub.towers_uni_moe import tower_class
from .beats_file import is_beats_file, read_beats, read_beats_config
from .loading import UNREAD, load_part_config, load_whole, loaded


logger = logging.get_logger(__name__)

# Kinds of LLMs with which `benchmarks/bench_families.py` was run in full.
TESTED = frozenset(
    "llama mistral ministral ministral3 qwen2 qwen3 smollm3 gemma gemma2 gemma3_text phi3 olmo olmo2 olmo3 granite "
    "glm glm4 exaone4 cohere cohere2 seed_oss helium stablelm ernie4_5 hunyuan_v1_dense".split()
)
# Of values of order 1, by how much logits may differ that were computed in another order.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 5e-3}
PLACEHOLDERS = {modality: f"<{modality}>" for modality in MODALITIES}
# Towers whose image processor is CLIP's.
CLIP = ("clip_vision_model", "chinese_clip_vision_model")
# By what configs of LLMs that are mixtures already count their experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Of weights in files of larger models; halves that are saved alone have none of it.
PREFIXES = {"whisper": r"^(model\.)?encoder\.", "clap_audio_model": r"^audio_model\."}


def from_pretrained_parts(
    language_model: str | PreTrainedModel,
    vision_tower: str | PreTrainedModel | None = None,
    speech_tower: str | PreTrainedModel | None = None,
    audio_tower: str | PreTrainedModel | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    **config,
) -> UniMoEForConditionalGeneration:
    r"""
    Joins pretrained parts into a dense Uni-MoE with fresh connectors: where the three stages begin.

    Text alone gives the same logits as before: the model is compared with the LLM on a few tokens.

    Args:
        language_model (`str` or [`PreTrainedModel`]): An LLM with a gated feed-forward network in every layer, such as
            Llama, Qwen3 or Gemma 3: a Hub id, a folder, or a loaded model with its head.
        vision_tower (`str` or [`PreTrainedModel`], *optional*): A vision backbone: CLIP, SigLIP, DINOv2, DINOv3,
            AIMv2, ViT, Swin, ConvNeXt, ... How many tokens it makes of a picture, and how many CLS tokens and registers
            stand before them, is found by asking it.
        speech_tower (`str` or [`PreTrainedModel`], *optional*): A Whisper model. Its encoder becomes the tower; its
            decoder, where there is one, the start of the speech connector, as in the original; without it that is a
            Q-Former.
        audio_tower (`str` or [`PreTrainedModel`], *optional*): An encoder of sound: BEATs, as a folder or as published
            (`BEATs_iter3*.pt`), AST, CLAP (its audio half), a Whisper (its encoder), or YAMNet.
        dtype (`str` or `torch.dtype`, *optional*): Of parts that are given as folders or Hub ids; as saved by default.
            Parts that have been loaded must have it already.
        attn_implementation (`str`, *optional*): Of the model, as in the library.
        config: Further fields of [`UniMoEConfig`], for example `video_pooling`, or `audio_connector_config` for a
            smaller Q-Former than the paper's, which has 102 M parameters.

    Returns:
        [`UniMoEForConditionalGeneration`] with dense layers only, in evaluation mode; dtype and device are those of
        `language_model`.

    Raises:
        ValueError: a part is not of a kind that can be one, its weights are not all there, an argument is not known,
            or something of the LLM would be lost.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), figure 3.
    """
    _check_arguments(config)
    parts = {
        "language_model": language_model,
        "vision_tower": vision_tower,
        "speech_tower": speech_tower,
        "audio_tower": audio_tower,
    }
    kinds = {name: _kind_of_part(part, name) for name, part in parts.items() if part is not None}
    _check_llm(kinds["language_model"], language_model)
    if is_named(language_model):
        _check_tokenizer_of(language_model, kinds["language_model"].get_text_config().vocab_size)
    if vision_tower is not None:
        config = _patch_settings(kinds["vision_tower"], config) | config
    for ear in ("audio", "speech"):
        if f"{ear}_tower" in kinds:
            tower_class(kinds[f"{ear}_tower"], ear)

    loading = {} if dtype is None else {"dtype": dtype}
    _check_dtypes(parts, dtype)
    llm = load_whole(AutoModelForCausalLM, language_model, **loading) if is_named(language_model) else language_model
    towers: dict[str, PreTrainedModel] = {}
    if vision_tower is not None:
        vision = load_whole(AutoModel, vision_tower, UNREAD, **loading) if is_named(vision_tower) else vision_tower
        towers["vision"] = getattr(vision, "vision_model", vision)
    if speech_tower is not None:
        towers["speech"], speech_decoder = _speech_parts(speech_tower, kinds["speech_tower"], loading)
        if speech_decoder is None and config.get("speech_connector_config") is None:
            config["speech_connector_config"] = {}
    if audio_tower is not None:
        towers["audio"] = _audio_part(audio_tower, kinds["audio_tower"], loading)

    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    text = {k: v for k, v in decoder.config.to_dict().items() if k not in ("architectures", "dtype")}
    text |= {"mlp_layer_types": ["dense"] * decoder.config.num_hidden_layers}
    text["tie_word_embeddings"] = head.weight is llm.get_input_embeddings().weight
    config |= {f"{name}_config": tower.config.to_dict() for name, tower in towers.items()}
    # Built in the LLM's dtype, not cast to it: that would round the rotary embedding's frequencies as well.
    settings = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = UniMoEForConditionalGeneration._from_config(
        UniMoEConfig(text_config=text, **config), dtype=llm.dtype, **settings
    )

    model.model.language_model.load_state_dict(decoder.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    for name, tower in towers.items():
        getattr(model.model, f"{name}_tower").load_state_dict(tower.state_dict())
    if speech_tower is not None and speech_decoder is not None and model.config.speech_connector_config is None:
        weights = {k: v for k, v in speech_decoder.state_dict().items() if not k.startswith("embed_tokens.")}
        model.model.speech_connector.decoder.load_state_dict(weights)
    model.generation_config = copy.deepcopy(llm.generation_config)
    _check_nothing_is_lost(model, llm)
    return model


def _check_arguments(config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a field is none of [`UniMoEConfig`]'s.
    """
    known = [field.name for field in fields(UniMoEConfig)]
    for name in config:
        if name not in known:
            near = get_close_matches(name, [*known, *inspect.signature(from_pretrained_parts).parameters], 1, 0.8)
            remedy = f"did you mean `{near[0]}`?" if near else "it is no field of `UniMoEConfig`."
            if name == "torch_dtype":
                remedy = "it is called `dtype`."
            raise ValueError(f"`from_pretrained_parts` knows no `{name}`; {remedy}")


def _check_dtypes(parts: Mapping[str, Any], dtype: str | torch.dtype | None) -> None:
    """
    Raises:
        ValueError: a part that has been loaded has another dtype than is asked for.
    """
    wanted = str(dtype).removeprefix("torch.")
    for name, part in parts.items():
        if dtype not in (None, "auto") and isinstance(part, PreTrainedModel):
            found = str(part.dtype).removeprefix("torch.")
            if found != wanted:
                raise ValueError(
                    f"`{name}` has been loaded in {found}, but `dtype` asks for {wanted}; load it in {wanted}, or "
                    "leave out `dtype`."
                )


def is_named(part: Any) -> bool:
    """Whether a part is given as a Hub id, folder or file."""
    return isinstance(part, str | Path)


def _kind_of_part(part: Any, argument: str) -> PreTrainedConfig:
    """What a part is, by its config: of larger models that of the half that is meant."""
    if argument == "audio_tower" and is_named(part) and is_beats_file(part):
        return read_beats_config(part)
    kind = load_part_config(part, f"`{argument}`") if is_named(part) else getattr(part, "config", None)
    if kind is None:
        raise ValueError(f"`{argument}` is a {type(part).__name__}; give a model, a folder or a Hub id.")
    half = {"vision_tower": "vision_config", "audio_tower": "audio_config"}.get(argument)
    half = getattr(kind, half, None) if half else None
    return half if isinstance(half, PreTrainedConfig) else kind


# The LLM


@torch.no_grad()
def _check_llm(kind: PreTrainedConfig, llm: Any) -> None:
    """
    Whether an LLM can be the decoder, by an empty one of its kind.

    Raises:
        ValueError: it cannot; the message says what is missing.
    """
    named = is_named(llm)
    if kind.model_type == "uni_moe":
        raise ValueError("`language_model` is a Uni-MoE already; load it with `from_pretrained`, or give its LLM.")
    if getattr(kind, "quantization_config", None) is not None or getattr(llm, "is_quantized", False):
        raise ValueError("`language_model` is quantised; build from unquantised parts and quantise what was saved.")
    if getattr(kind, "is_encoder_decoder", False):
        raise ValueError(f"`language_model` is a '{kind.model_type}' model, an encoder with a decoder; give an LLM.")
    made = type(llm).__name__ if not named else next(iter(kind.architectures or ()), "")
    with_head = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(kind), None)
    other_head = made.partition("For")[2] not in ("", "CausalLM", "ConditionalGeneration")
    if with_head is None or other_head or not (named or llm.get_output_embeddings() is not None):
        what = f"a '{kind.model_type}' model" if with_head is None or not made else f"a {made}"
        raise ValueError(f"`language_model` is {what}, which has no head that predicts words; give an LLM.")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(copy.deepcopy(kind)) if named else llm
        decoder, head = empty.get_decoder(), empty.get_output_embeddings()
    except (AttributeError, ImportError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`language_model` is a '{kind.model_type}' model that cannot be built ({reason(error)})."
        ) from error
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"`language_model` is a '{kind.model_type}' model, whose decoder cannot be told from its head."
        )
    if name := next((name for name in EXPERT_COUNTS if getattr(decoder.config, name, None)), None):
        dense = kind.model_type.partition("_moe")[0]
        offer = f", such as a '{dense}'" if dense != kind.model_type and dense in CONFIG_MAPPING else ""
        raise ValueError(
            f"`language_model` is a '{kind.model_type}' model, a mixture of experts already "
            f"(`{name}={getattr(decoder.config, name)}`); give a dense LLM{offer}."
        )
    check_decoder(decoder)
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(
            f"`language_model` is a '{kind.model_type}' model whose head is no plain linear layer without a bias."
        )
    if decoder.config.model_type not in TESTED:
        logger.warning(
            f"LLMs of kind '{decoder.config.model_type}' were not tested here; it is taken because its parts are of "
            "the known form, and if words alone give the same logits."
        )


def _check_tokenizer_of(checkpoint: str | Path, vocab_size: int) -> None:
    """Of the tokenizer that lies beside an LLM, if one does; see [`_check_words`]."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except Exception:  # any other tokenizer may be given to the processor
        return
    _check_words(tokenizer, vocab_size)


@torch.no_grad()
def _check_nothing_is_lost(model: UniMoEForConditionalGeneration, llm: PreTrainedModel) -> None:
    """
    Compares the logits of a few tokens, by the LLM's own attention and on its device.

    Raises:
        ValueError: they differ by more than rounding.
    """
    vocab_size = model.config.text_config.vocab_size
    ids = torch.linspace(0, vocab_size - 1, 12).long().unique()[None]  # of the whole vocabulary
    decoder, was_training = model.model.language_model, llm.training
    asked, own = decoder.config._attn_implementation, llm.get_decoder().config._attn_implementation
    llm.eval()
    model.eval()
    model.to(llm.device)
    if asked != own:
        decoder.set_attn_implementation(own)
    try:
        wanted = llm(input_ids=ids.to(llm.device)).logits
        found = model(input_ids=ids.to(llm.device)).logits
    finally:
        llm.train(was_training)
        if asked != own:
            decoder.set_attn_implementation(asked)
    if torch.equal(found, wanted):
        return
    gap = (found.float() - wanted.float()).abs().max().item()
    scale = max(1.0, wanted.float().abs().max().item())
    kind = model.config.text_config.model_type
    if not gap <= CLOSE.get(wanted.dtype, 0.0) * scale:
        raise ValueError(
            f"Words alone give other logits than the '{kind}' LLM's (up to {gap:.3g} apart, of at most {scale:.3g}), "
            "so something that it does would be lost; this kind of LLM cannot be the decoder yet."
        )
    logger.warning(f"Words alone give the '{kind}' LLM's logits but for rounding: they are up to {gap:.1e} apart.")


# The towers


@torch.no_grad()
def _patch_settings(kind: PreTrainedConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Which hidden state of a vision tower is read, how many tokens it makes of a picture, and how many stand before the
    patches. Asked of empty ones for pictures of two sizes: the patches become four times as many, the others do not.
    """
    side = _side_of(kind)
    states, larger = (_states_of_picture(kind, each, as_made_for=True) for each in (side, 2 * side))
    is_pyramid = len({_count(state) for state in states}) > 1
    # The last by its number: of towers that grow narrower, not all say how many there are.
    layer = config.get("vision_feature_layer", len(states) - 1 if is_pyramid else -2)
    try:
        count, four_times = _count(states[layer]), _count(larger[layer])
    except IndexError:
        raise ValueError(
            f"`vision_feature_layer={layer}` is none of the {len(states)} states of a '{kind.model_type}' model."
        ) from None
    prefix, rest = divmod(4 * count - four_times, 3)
    patch = getattr(kind, "patch_size", None)
    leaves_out = not is_pyramid and isinstance(patch, int) and count - prefix < (side // patch) ** 2
    if rest or leaves_out or not 0 <= prefix < count:
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model that makes {count} tokens of a picture of {side} pixels "
            f"and {four_times} of one of {2 * side}, so which are patches is unknown; use one with square patches."
        )
    width = states[layer].shape[1 if states[layer].dim() == 4 else -1]
    if width != width_of(kind):
        raise ValueError(
            f"`vision_feature_layer={layer}` of a '{kind.model_type}' model is {width} wide, the last "
            f"{width_of(kind)}; use the last."
        )
    keeps_all = config.get("vision_feature_select_strategy") == "full"
    return {
        "vision_feature_layer": layer,
        "vision_prefix_length": prefix,
        "image_seq_length": count if keeps_all else count - prefix,
    }


def _side_of(kind: PreTrainedConfig) -> int:
    """Side of the pictures that a vision tower was made for, in pixels."""
    side = getattr(kind, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
    if not isinstance(side, int):
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model, but a backbone for square pictures is needed."
        )
    return side


def _count(state: torch.Tensor) -> int:
    """Tokens in a hidden state `(1, tokens, width)` or `(1, width, height, width)`."""
    return state.shape[1] if state.dim() == 3 else state.shape[-2] * state.shape[-1]


def _states_of_picture(kind: PreTrainedConfig, side: int, as_made_for: bool = False) -> tuple[torch.Tensor, ...]:
    """Hidden states of a picture of so many pixels, without values; of a tower that was made for it, if asked."""
    kind = copy.deepcopy(kind)
    if as_made_for:
        kind.image_size = [side, side] if isinstance(kind.image_size, list | tuple) else side
    try:
        with torch.device("meta"):
            tower = AutoModel.from_config(kind)
            picture = torch.zeros(1, getattr(kind, "num_channels", 3), side, side)
            states = tower(pixel_values=picture, output_hidden_states=True).hidden_states
        if not states or any(state.dim() not in (3, 4) for state in states):
            raise ValueError("it returns no hidden states")
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"`vision_tower` is a '{kind.model_type}' model, which gives no tokens of a picture of {side} pixels "
            f"({reason(error)})."
        ) from error
    return states


def _speech_parts(
    tower: str | PreTrainedModel, kind: PreTrainedConfig, loading: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.Module | None]:
    """Encoder and, where there is one, decoder of a Whisper model."""
    if is_named(tower):
        with_decoder = next(iter(kind.architectures or ()), "") in ("WhisperModel", "WhisperForConditionalGeneration")
        if not with_decoder:
            return _load_half(tower_class(kind, "speech"), tower, kind, loading), None
        tower = load_whole(WhisperModel, tower, "", **loading)
    if type(tower).__name__ == "WhisperEncoder":
        return tower, None
    decoder = getattr(tower.base_model, "decoder", None)
    return tower.base_model.encoder if hasattr(tower.base_model, "encoder") else tower.encoder, decoder


def _audio_part(tower: str | PreTrainedModel, kind: PreTrainedConfig, loading: Mapping[str, Any]) -> PreTrainedModel:
    """An encoder of sound, from a file, a folder, or a larger model."""
    if is_named(tower) and is_beats_file(tower):
        return read_beats(tower).to(getattr(torch, str(loading.get("dtype", "float32")).removeprefix("torch.")))
    if is_named(tower):
        return _load_half(tower_class(kind, "audio"), tower, kind, loading)
    for half in ("audio_model", "audio_spectrogram_transformer", "encoder"):
        found = getattr(tower, half, None) or getattr(tower.base_model, half, None)
        if isinstance(found, PreTrainedModel) and found.config.model_type == kind.model_type:
            return found
    return tower


def _load_half(
    tower: type[PreTrainedModel], checkpoint: str | Path, kind: PreTrainedConfig, loading: Mapping[str, Any]
) -> PreTrainedModel:
    """An encoder from the folder of a larger model, or from its own."""
    if kind.model_type not in PREFIXES:
        return load_whole(AutoModel, checkpoint, "", **loading)
    mapping = {PREFIXES[kind.model_type]: ""}
    return load_whole(tower, checkpoint, "", config=kind, key_mapping=mapping, **loading)


# The processor


def build_processor(
    config: UniMoEConfig,
    tokenizer: str | PreTrainedTokenizerBase,
    image_processor=None,
    image_size: int | None = None,
    chunk_length: int = 30,
    audio_feature_extractor=None,
    **settings,
) -> UniMoEProcessor:
    r"""
    Makes the processor that fits a model, and tells the config the placeholders' ids and the tokens of a picture.

    Args:
        config ([`UniMoEConfig`]): Of the model; its four placeholder ids are set to the tokenizer's, its
            `image_seq_length` follows the pictures' size.
        tokenizer (`str` or [`PreTrainedTokenizerBase`]): Of the LLM, or the Hub id or folder it lies in. Gets the four
            placeholder tokens, behind the vocabulary, and a padding token where it has none.
        image_processor (`str` or image processor, *optional*): That of the vision tower, or the Hub id or folder it
            lies in: needed for every tower but CLIP, whose own at the tower's picture size is the default.
        image_size (`int`, *optional*): Side of pictures in pixels, in place of the image processor's, for towers that
            take any: fewer pixels are fewer tokens.
        chunk_length (`int`, *optional*, defaults to 30): Seconds of a window of sound for BEATs, in a model without a
            speech tower; with one its `max_source_positions` decides.
        audio_feature_extractor (`str` or feature extractor, *optional*): That of the encoder of sound, or the Hub id
            or folder it lies in; BEATs has none.
        settings: Further arguments of [`UniMoEProcessor`], for example `video_frames`. The `chat_template` is the
            tokenizer's own where it has one, else Vicuna's.

    Returns:
        [`UniMoEProcessor`].

    Raises:
        ValueError: a placeholder is a word of the LLM's, the speech tower's window is not a whole number of seconds,
            pictures have no fixed size or do not fit the tower, or the encoder of sound needs its feature extractor.
    """
    if is_named(tokenizer):
        tokenizer = loaded(AutoTokenizer.from_pretrained, tokenizer)
    front_end = _front_end(config, audio_feature_extractor)
    pictures = _image_processor(config, image_processor, image_size)
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
    mel_bins = config.audio_config.num_mel_bins if config.audio_config is not None and front_end is None else 128
    if settings.get("chat_template") is None:
        settings["chat_template"] = getattr(tokenizer, "chat_template", None)
    return UniMoEProcessor(
        pictures,
        UniMoEFeatureExtractor(
            feature_size=feature_size,
            chunk_length=chunk_length,
            num_audio_mel_bins=mel_bins,
            audio_front_end=front_end,
        ),
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


@torch.no_grad()
def _front_end(config: UniMoEConfig, extractor: Any) -> dict[str, Any] | None:
    """Settings of the feature extractor of sound, which the encoder must understand; `None` for BEATs."""
    if config.audio_config is None or config.audio_config.model_type == "beats":
        return None
    kind = config.audio_config.model_type
    if extractor is None:
        raise ValueError(
            f"The encoder of sound is a '{kind}' model, which hears through its own feature extractor; pass "
            "`audio_feature_extractor`, such as the folder that the encoder came from."
        )
    if is_named(extractor):
        try:
            extractor = AutoFeatureExtractor.from_pretrained(extractor)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"`audio_feature_extractor` '{extractor}' could not be loaded ({reason(error)})."
            ) from error
    if type(extractor).__name__ not in FRONT_ENDS:
        raise ValueError(f"`audio_feature_extractor` is a {type(extractor).__name__}; known are {list(FRONT_ENDS)}.")
    settings = {k: v for k, v in extractor.to_dict().items() if k not in ("processor_class", "auto_map")}
    ears = UniMoEFeatureExtractor(audio_front_end=settings)
    features = ears(audio=np.zeros(ears.samples_of("audio"), np.float32), return_tensors="pt")
    with torch.device("meta"):
        tower = tower_class(config.audio_config, "audio")(copy.deepcopy(config.audio_config))
    try:
        tower(**{name: tensor.to("meta") for name, tensor in features.items()})
    except NotImplementedError:
        pass  # what depends on values is not known without them
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"`audio_feature_extractor` makes features of shape {tuple(features['input_values'].shape)}, which this "
            f"'{kind}' model does not take ({reason(error)}); use the one that it came with."
        ) from error
    return settings


def _load_image_processor(name: str) -> Any:
    """One that needs Pillow alone: the class that is named, in its Pillow form, or the same steps by another."""
    try:
        settings, _ = CLIPImageProcessorPil.get_image_processor_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{name}' holds no image processor ({reason(error)}); pass `image_processor`.") from error
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or ""
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind and hasattr(transformers, f"{kind}Pil"):
        return getattr(transformers, f"{kind}Pil").from_dict(settings)
    if not kind:
        try:
            return AutoImageProcessor.from_pretrained(name, backend="pil")
        except (ImportError, OSError, ValueError):
            pass
    if not {"image_mean", "image_std", "size"} <= settings.keys():
        raise ValueError(
            f"The image processor of '{name}' ({kind or 'of no stated kind'}) needs torchvision here; pass one that "
            "needs Pillow alone as `image_processor`."
        )
    settings = {
        key: value
        for key, value in settings.items()
        if value is not None and not key.endswith("_type") and key not in ("processor_class", "auto_map")
    }
    crops = bool(settings.get("do_center_crop"))
    generic = CLIPImageProcessorPil if crops else ViTImageProcessorPil
    return generic.from_dict(settings | {"do_center_crop": crops, "do_convert_rgb": True})


def _image_processor(config: UniMoEConfig, processor: Any, side: int | None) -> Any:
    """The image processor, at another picture size if asked; counts the tokens of its pictures."""
    if is_named(processor):
        processor = _load_image_processor(str(processor))
    if processor is None and config.vision_config is not None and config.vision_config.model_type not in CLIP:
        raise ValueError(
            f"The vision tower is a '{config.vision_config.model_type}' model, which sees through its own image "
            "processor; pass `image_processor`, such as the folder that the tower came from."
        )
    if not (processor is None or (callable(processor) and hasattr(processor, "to_dict"))):
        raise ValueError(f"`image_processor` is a {type(processor).__name__}; give an image processor or its folder.")
    if processor is None:
        tower_side = _side_of(config.vision_config) if config.vision_config is not None else 336
        square = {"height": tower_side, "width": tower_side}
        processor = CLIPImageProcessorPil(size={"shortest_edge": tower_side}, crop_size=square)
    if side is not None:
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"`image_size={side!r}` must be a number of pixels.")
        square = {"height": side, "width": side}
        crops = getattr(processor, "do_center_crop", False)
        sizes = {"size": {"shortest_edge": side}, "crop_size": square} if crops else {"size": square}
        processor = type(processor).from_dict({**processor.to_dict(), **sizes})
    if config.vision_config is None:
        return processor
    wide, high = (
        np.asarray(processor(Image.new("RGB", size), return_tensors="np")["pixel_values"]).shape[1:]
        for size in ((96, 64), (64, 96))
    )
    if wide != high or len(wide) != 3 or wide[1] != wide[2]:
        raise ValueError(
            f"{type(processor).__name__} makes pictures of {wide} and {high} of wide and high ones, but they must be "
            "squares of one size; set `image_size`."
        )
    if (found := wide[1]) != _side_of(config.vision_config):
        states = _states_of_picture(config.vision_config, found)
        count = _count(states[config.vision_feature_layer])
        prefix = 0 if config.vision_feature_select_strategy == "full" else config.vision_prefix_length
        config.image_seq_length = count - prefix
    return processor


def _check_words(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """
    Raises:
        ValueError: a placeholder is one of the words that an LLM has an embedding of.
    """
    known = tokenizer.get_vocab()
    inside = {token: known[token] for token in PLACEHOLDERS.values() if known.get(token, vocab_size) < vocab_size}
    if inside:
        raise ValueError(
            f"The tokenizer has {inside} among the LLM's own {vocab_size} words, where placeholders cannot lie; use "
            "an LLM that knows no such words, or rename them in its tokenizer."
        )


def _add_placeholders(config: UniMoEConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Four special tokens with ids of `vocab_size` or above, and a padding token."""
    vocab_size = config.text_config.vocab_size
    _check_words(tokenizer, vocab_size)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if any(token not in tokenizer.get_vocab() for token in PLACEHOLDERS.values()):
        # Ids are given out in order, and many vocabularies are smaller than their padded embedding table.
        missing = vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<reserved_{number}>" for number in range(missing)], special_tokens=True)
        tokenizer.add_tokens(list(PLACEHOLDERS.values()), special_tokens=True)
    for modality, token in PLACEHOLDERS.items():
        setattr(config, f"{modality}_token_id", tokenizer.convert_tokens_to_ids(token))
    config.validate_architecture()
    if config.text_config.pad_token_id is None:
        config.text_config.pad_token_id = tokenizer.pad_token_id


__all__ = ["build_processor", "from_pretrained_parts"]
