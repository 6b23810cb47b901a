"""Building a dense Uni-MoE from pretrained parts."""

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.utils import logging

from ..hub.configuration_uni_moe import MIXTURE, UniMoEConfig
from ..hub.files_uni_moe import cause_of, reason
from ..hub.modeling_uni_moe import UniMoEForConditionalGeneration
from .loading import UNREAD
from .parts import (
    Part,
    check_ear,
    check_llm,
    has_speech_decoder,
    load_llm,
    load_speech,
    load_tower,
    patch_settings,
    read_part,
)


logger = logging.get_logger(__name__)

# Of values of order 1, by how much logits may differ that were computed in another order.
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 5e-3}
# Follow from the parts.
OF_PARTS = ("text_config", "vision_config", "speech_config", "audio_config")


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
            AIMv2, ViT, Swin, ConvNeXt, ... How many tokens it makes of a picture, and how many CLS tokens and
            registers stand before them, is found by asking it.
        speech_tower (`str` or [`PreTrainedModel`], *optional*): A Whisper model. Its encoder becomes the tower; its
            decoder, where there is one, the start of the speech connector, as in the original; without it that is a
            Q-Former.
        audio_tower (`str` or [`PreTrainedModel`], *optional*): An encoder of sound: BEATs, as a folder or as published
            (`BEATs_iter3*.pt`), AST, CLAP (its audio half), a Whisper (its encoder), or YAMNet.
        dtype (`str` or `torch.dtype`, *optional*): Of parts that are given as folders or Hub ids; as saved by default.
            Parts that have been loaded must have it already.
        attn_implementation (`str`, *optional*): Of the model, as in the library.
        config: Further fields of [`UniMoEConfig`], for example `video_pooling`, or `audio_connector_config` for a
            smaller Q-Former than the paper's, which has 102 M parameters. Those of the parts follow from them, and so
            does `num_speech_query_tokens`: 50, or as many as the speech decoder has positions.

    Returns:
        [`UniMoEForConditionalGeneration`] with dense layers only, in evaluation mode; dtype and device are those of
        `language_model`.

    Raises:
        ValueError: a part is not of a kind that can be one, its weights are not all there, an argument is not known,
            or something of the LLM would be lost.

    Source: Uni-MoE (https://huggingface.co/papers/2405.11273), figure 3.
    """
    given = {
        "language_model": language_model,
        "vision_tower": vision_tower,
        "speech_tower": speech_tower,
        "audio_tower": audio_tower,
    }
    _check_dtypes(given, dtype)
    parts, wanted = _read_parts(given, config)

    loading = {} if dtype is None else {"dtype": dtype}
    llm = load_llm(parts["language_model"], loading)
    towers = {name: load_tower(parts[name], loading) for name in ("vision_tower", "audio_tower") if name in parts}
    speech_decoder = None
    if "speech_tower" in parts:
        towers["speech_tower"], speech_decoder = load_speech(parts["speech_tower"], loading)

    decoder, head = llm.get_decoder(), llm.get_output_embeddings()
    wanted.tie_word_embeddings = head.weight is llm.get_input_embeddings().weight
    wanted.text_config.tie_word_embeddings = wanted.tie_word_embeddings
    # Built in the LLM's dtype, not cast to it: that would round the rotary embedding's frequencies as well.
    settings = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = UniMoEForConditionalGeneration._from_config(wanted, dtype=llm.dtype, **settings).eval()

    model.model.language_model.load_state_dict(decoder.state_dict())
    model.lm_head.load_state_dict(head.state_dict())
    for name, tower in towers.items():
        lacking, _ = getattr(model.model, name).load_state_dict(tower.state_dict(), strict=False)
        if unread := [key for key in lacking if name != "vision_tower" or not re.search(UNREAD, key)]:
            raise parts[name].refuse(f"whose weights lack {len(unread)} tensors, such as '{unread[0]}'.")
    if speech_decoder is not None and model.config.speech_connector_config is None:
        weights = {k: v for k, v in speech_decoder.state_dict().items() if not k.startswith("embed_tokens.")}
        model.model.speech_connector.decoder.load_state_dict(weights)
    model.generation_config = copy.deepcopy(llm.generation_config)
    _check_nothing_is_lost(model, llm)
    return model


def config_from_parts(
    language_model: str | PreTrainedModel,
    vision_tower: str | PreTrainedModel | None = None,
    speech_tower: str | PreTrainedModel | None = None,
    audio_tower: str | PreTrainedModel | None = None,
    **config,
) -> UniMoEConfig:
    """
    Args:
        language_model, vision_tower, speech_tower, audio_tower, config: As in [`from_pretrained_parts`].

    Returns:
        [`UniMoEConfig`] of the model that they make; no weights are read.

    Raises:
        ValueError: a part is not of a kind that can be one, or an argument is not known.
    """
    given = {
        "language_model": language_model,
        "vision_tower": vision_tower,
        "speech_tower": speech_tower,
        "audio_tower": audio_tower,
    }
    return _read_parts(given, config)[1]


def _read_parts(given: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[dict[str, Part], UniMoEConfig]:
    """The parts that are given, and the config of the whole."""
    _check_arguments(config)
    if given["language_model"] is None:
        raise ValueError("`language_model` is missing; give an LLM.")
    parts = {name: read_part(name, part) for name, part in given.items() if part is not None}
    for name in parts.keys() & {"speech_tower", "audio_tower"}:
        check_ear(parts[name])
    return parts, _config_of(parts, config)


def _config_of(parts: Mapping[str, Part], config: Mapping[str, Any]) -> UniMoEConfig:
    """
    The config of the whole, from those of its parts.

    Raises:
        ValueError: a part cannot be one, or they do not go together.
    """
    text = check_llm(parts["language_model"]).to_dict()
    # Whatever it may say of experts: it has none.
    text |= {**MIXTURE, "mlp_layer_types": ["dense"] * text["num_hidden_layers"]}
    text = {key: value for key, value in text.items() if key not in ("architectures", "dtype")}
    config = dict(config)
    if "vision_tower" in parts:
        config = config | patch_settings(parts["vision_tower"], config)
    if "speech_tower" in parts and not has_speech_decoder(parts["speech_tower"]):
        config["speech_connector_config"] = config.get("speech_connector_config") or {}
    elif "speech_tower" in parts and config.get("num_speech_query_tokens") is None:
        # Each query has a position in the decoder, and small ones have few.
        positions = parts["speech_tower"].kind.max_target_positions
        config["num_speech_query_tokens"] = min(UniMoEConfig.num_speech_query_tokens, positions)
    for name in parts.keys() - {"language_model"}:
        config[name.replace("_tower", "_config")] = parts[name].kind.to_dict()
    try:
        return UniMoEConfig(text_config=text, **config)
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(reason(cause_of(error))) from error


def _check_arguments(config: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a field is none of [`UniMoEConfig`]'s.
    """
    known = [field.name for field in fields(UniMoEConfig) if field.name not in OF_PARTS]
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


__all__ = ["config_from_parts", "from_pretrained_parts"]
